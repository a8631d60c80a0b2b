"""How often an engine may be started again, and how long to wait before each time."""

from __future__ import annotations

from collections import deque

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


class RestartBudget:
    """`limit` restarts within any `window_s` seconds; waits double from `FIRST_WAIT_S`."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._taken_at: deque[float] = deque()

    def try_take(self, now: float) -> float | None:
        """Take one restart and return its wait, seconds; None if the budget is spent."""
        while self._taken_at and self._taken_at[0] <= now - self._window_s:
            self._taken_at.popleft()
        count = len(self._taken_at)
        if count >= self._limit:
            return None
        self._taken_at.append(now)
        # min() on the exponent too: 2**2000 is no float.
        return min(FIRST_WAIT_S * 2.0 ** min(count, 16), LONGEST_WAIT_S)

    def refill(self) -> None:
        self._taken_at.clear()
