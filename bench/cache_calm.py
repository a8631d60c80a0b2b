"""Timing something that uses whole cores, in a moment when nobody else does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.measure import ATTEMPT_PAUSE_S, ATTEMPTS, PEACE
from bench.processes import cpu_s, machine_cpu_s, own_cpu_s


@dataclass(frozen=True, slots=True)
class Timed:
    seconds: float
    cpu_s: float
    """Of this process and its children."""
    foreign: float
    """Cores taken meanwhile by all others."""


def calmest(
    work: Callable[[], object],
    *,
    before: Callable[[], object] = lambda: None,
    helper: int | None = None,
) -> Timed:
    """How long `work` took. It is done again if others disturbed it; which attempt counts does not
    depend on how long it took. `before`: done before every attempt, and not timed. `helper`: a
    process that belongs to the benchmark, but whose time does not count as work's.

    What `work` starts it must wait for: only then its time is in our own account.
    """
    attempts: list[Timed] = []
    while True:
        before()
        began, clocks = time.monotonic(), _clocks(helper)
        work()
        seconds = time.monotonic() - began
        own_s, helper_s, all_s = (b - a for a, b in zip(clocks, _clocks(helper), strict=True))
        foreign_s = all_s - own_s - helper_s
        attempts.append(Timed(seconds, own_s, round(max(0.0, foreign_s) / seconds, 3)))
        if attempts[-1].foreign <= PEACE or len(attempts) == ATTEMPTS:
            return min(attempts, key=lambda attempt: attempt.foreign)
        time.sleep(ATTEMPT_PAUSE_S)


def _clocks(helper: int | None) -> tuple[float, float, float]:
    """CPU seconds of this process and its children, of the helper, of the machine."""
    return own_cpu_s(), cpu_s(helper) if helper is not None else 0.0, machine_cpu_s()
