"""How far we trust our own judgement (Lifeguard, section IV A: local health aware probe)."""

from __future__ import annotations

MOST = 4
STRETCH_PER_POINT = 0.25


class Awareness:
    """A score from 0 (well) to `MOST`. What makes us doubt ourselves raises it, answers lower it.

    A node that is starved of CPU or cut off sees all others fail at once; it should then wait
    longer before it says so. Not much longer: it may be right, and its users wait.
    """

    __slots__ = ("score",)

    def __init__(self) -> None:
        self.score = 0

    def answered(self) -> None:
        """A probe was answered in time."""
        self.score = max(0, self.score - 1)

    def doubt(self, points: int = 1) -> None:
        """A probe failed and relays that should have said Nack were silent too, we were suspected
        ourselves, or we stood still."""
        self.score = min(MOST, self.score + max(0, points))

    @property
    def stretch(self) -> float:
        """Factor for our own timeouts: 1 to 2."""
        return 1.0 + STRETCH_PER_POINT * self.score
