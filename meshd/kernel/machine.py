"""The protocol of everything that decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)


@dataclass(frozen=True, slots=True)
class Tick:
    """The clock reached what `due()` asked for. Every machine's event union contains it."""


class Machine(Protocol[In, Out]):
    """Takes events and a clock reading, returns orders.

    `now` is monotonic seconds, never earlier than at the call before. A machine does not await,
    read a clock, draw a random number, log or do I/O; equal sequences of (event, now) give equal
    sequences of effects.
    """

    def handle(self, event: In, now: float) -> Sequence[Out]:
        """What to do about `event`, in this order. Never raises for any event of the union."""

    def due(self) -> float | None:
        """When (monotonic seconds) the machine wants a `Tick`; None if nothing is awaited."""
