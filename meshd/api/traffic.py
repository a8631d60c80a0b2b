"""Counts of what was served, as plain integers.

The hot path adds to them; `metrics.py` turns them into Prometheus' text when somebody asks, so
that the library is neither imported at start nor locked for every request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import Final

REQUEST_BOUNDS_S: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TTFT_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

LAG_WINDOW = 10
"""Ticks over which the worst lag of the loop is reported."""


class Histogram:
    """`counts[i]`: observations in (bounds[i-1], bounds[i]]; the last one is above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, count up to it), as Prometheus wants them."""
        rows: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound is None else repr(float(bound)), running))
        return rows


class ModelTraffic:
    """Requests for one model by one route (`local`, `remote`; `none` when none was taken)."""

    __slots__ = ("outcomes", "seconds", "ttft")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        """`ok`, the code of the error answered, or `client_gone`."""
        self.seconds = Histogram(REQUEST_BOUNDS_S)
        self.ttft = Histogram(TTFT_BOUNDS_S)

    def count(self, outcome: str) -> None:
        outcomes = self.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1


class Traffic:
    def __init__(self) -> None:
        self.by_model: dict[tuple[str, str], ModelTraffic] = {}
        """(model, route). Only models of the view get a row: a client's invention does not."""
        self.bytes_in = 0
        """Of request bodies sent to engines."""
        self.bytes_out = 0
        """Of answers, heads included, from engines."""
        self.retries: dict[str, int] = {}
        self.lags: deque[float] = deque([0.0], maxlen=LAG_WINDOW)

    def of(self, model: str, route: str) -> ModelTraffic:
        row = self.by_model.get((model, route))
        if row is None:
            row = self.by_model[model, route] = ModelTraffic()
        return row

    def retried(self, reason: str) -> None:
        self.retries[reason] = self.retries.get(reason, 0) + 1
