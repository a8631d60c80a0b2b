"""Arithmetic over interleaved rounds, and the tables.

The speed of a host drifts by half between rounds, so nothing is compared across rounds: what a
front adds, and how it stands to another, is taken within each round, and the median of those is
the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Round = Mapping[str, Mapping[str, Mapping[str, float]]]
"""front → measurement → figure → value."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure beside what was to be reached. `value` is None if it could not be measured."""

    what: str
    value: float | None
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        reached = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "reached" if reached else "not reached"


class Rounds:
    """Rounds of one run."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self.rounds = rounds

    def has(self, *fronts: str) -> bool:
        return bool(self.rounds) and all(f in r for r in self.rounds for f in fronts)

    def value(self, front: str, kind: str, key: str) -> float | None:
        """The median over rounds of a figure as it was measured."""
        return self._median(lambda r: r[front][kind][key], front)

    def total(self, front: str, kind: str, key: str) -> float | None:
        if not self.has(front):
            return None
        return sum(r[front][kind][key] for r in self.rounds)

    def added(self, front: str, kind: str, key: str, base: str = "direct") -> float | None:
        """What `front` adds to `base`, of the same round."""
        return self._median(lambda r: r[front][kind][key] - r[base][kind][key], front, base)

    def beyond(self, front: str, kind: str, key: str, base: str = "direct") -> float | None:
        """A count that `base` has as well, summed: only what exceeds it, round by round."""
        if not self.has(front, base):
            return None
        return sum(max(0.0, r[front][kind][key] - r[base][kind][key]) for r in self.rounds)

    def ratio(self, front: str, other: str, kind: str, key: str) -> float | None:
        return self._median(
            lambda r: _divide(r[front][kind][key], r[other][kind][key]), front, other
        )

    def added_ratio(
        self, front: str, other: str, kind: str, key: str, base: str = "direct"
    ) -> float | None:
        """What `front` adds over what `other` adds."""

        def of(r: Round) -> float:
            zero = r[base][kind][key]
            return _divide(r[front][kind][key] - zero, r[other][kind][key] - zero)

        return self._median(of, front, other, base)

    def _median(self, of: Callable[[Round], float], *fronts: str) -> float | None:
        return median(of(r) for r in self.rounds) if self.has(*fronts) else None


def _divide(a: float, b: float) -> float:
    """Of two measured figures; a divisor that noise made 0 or negative gives no good news."""
    return a / b if b > 0 else float("inf")


# -- text -----------------------------------------------------------------------------------------


def show(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can also be read as it is; the first column is text."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        figures = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([cells[0].ljust(widths[0]), *figures])} |"

    rules = ["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]
    return "\n".join([line(head), f"|{'|'.join(rules)}|", *map(line, rows)])


def goals_table(goals: Sequence[Goal]) -> str:
    rows = [
        [
            goal.what,
            f"{show(goal.value, 2)}{goal.unit if goal.value is not None else ''}",
            f"{'≥' if goal.at_least else '≤'} {goal.limit:.3g}{goal.unit}",
            goal.verdict,
        ]
        for goal in goals
    ]
    return table(["goal", "measured", "to reach", "verdict"], rows)
