"""How fast it goes, how long it will take, and how long to wait after a failure. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

MEMORY_S: Final = 4.0
"""What lies further back counts for little in the rate."""
FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 30.0
MAX_FAILURES: Final = 6
"""In a row, with the waiting between them some 15 s plus what each took to fail."""


class Rate:
    """Bytes a second, with older ones fading."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._weight = 0.0
        self._sum = 0.0

    def observe(self, count: int, now: float) -> None:
        """`count` bytes came since the last call."""
        passed_s = now - self._at
        if passed_s <= 0:
            return
        keep = math.exp(-passed_s / MEMORY_S)
        self._sum = self._sum * keep + count
        self._weight = self._weight * keep + passed_s
        self._at = now

    @property
    def bytes_per_s(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def eta_s(self, left_bytes: int) -> float | None:
        """None while nothing comes."""
        rate = self.bytes_per_s
        return left_bytes / rate if rate >= 1 else None


class Backoff:
    """When a source that fails for a while may be asked again; several workers share one.

    Failures while it waits anyway count as one.
    """

    def __init__(self, chance: Callable[[], float]) -> None:
        """`chance`: a number in 0..1, for the jitter."""
        self._chance = chance
        self._failures = 0
        self.retry_at = 0.0

    def failed(self, now: float, retry_after_s: float | None = None) -> bool:
        """Whether to ask again, at `retry_at`; otherwise it failed too often, or asks for more
        patience than there is."""
        if now < self.retry_at:
            return True
        self._failures += 1
        delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self._failures - 1))
        delay_s *= 0.75 + self._chance() / 2
        if retry_after_s is not None:
            delay_s = max(delay_s, retry_after_s)
        if self._failures >= MAX_FAILURES or delay_s > 2 * LONGEST_DELAY_S:
            return False
        self.retry_at = now + delay_s
        return True

    def worked(self) -> None:
        """It gave something."""
        self._failures = 0
