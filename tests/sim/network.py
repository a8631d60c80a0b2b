"""The network between simulated nodes: latency, loss, duplication, and who can reach whom."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Conditions:
    """Chances are per message and independent; seconds."""

    latency_s: float = 0.0005
    jitter_s: float = 0.002
    """Mean of the exponential part of the latency, so that messages overtake each other."""
    loss: float = 0.0
    duplication: float = 0.0


@dataclass(slots=True)
class Network:
    conditions: Conditions
    chance: random.Random
    _cut: set[tuple[int, int]] = field(default_factory=set)
    """(from, to) whose messages are dropped."""

    def arrivals(self, sender: int, receiver: int) -> list[float]:
        """Delays after which a message arrives: none, one, or several if it is duplicated."""
        if (sender, receiver) in self._cut:
            return []
        return [self.latency() for _ in range(self._copies())]

    def latency(self) -> float:
        return self.conditions.latency_s + self.chance.expovariate(1 / self.conditions.jitter_s)

    def reaches(self, sender: int, receiver: int) -> bool:
        return (sender, receiver) not in self._cut

    def cut(self, senders: list[int], receivers: list[int]) -> None:
        """Drop all that goes from `senders` to `receivers`; one way."""
        self._cut.update((a, b) for a in senders for b in receivers if a != b)

    def split(self, one: list[int], other: list[int]) -> None:
        self.cut(one, other)
        self.cut(other, one)

    def heal(self) -> None:
        self._cut.clear()

    def _copies(self) -> int:
        conditions = self.conditions
        if conditions.loss and self.chance.random() < conditions.loss:
            return 0
        if conditions.duplication and self.chance.random() < conditions.duplication:
            return 2
        return 1
