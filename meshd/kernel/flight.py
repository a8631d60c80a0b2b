"""Flight recorder: the last events and effects of every machine, for the crash report.

Bounded: `capacity` entries over all machines, the oldest falls out. Entries hold the objects
themselves (immutable by the machine protocol); they are rendered only when somebody asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlightEntry:
    at: float
    """Monotonic seconds."""
    machine: str
    event: object
    effects: tuple[object, ...]

    def render(self) -> str:
        orders = ", ".join(map(repr, self.effects)) or "-"
        return f"{self.at:.6f} {self.machine} {self.event!r} -> {orders}"


class FlightRecorder:
    def __init__(self, capacity: int = 4096) -> None:
        self._entries: deque[FlightEntry] = deque(maxlen=capacity)

    def record(self, at: float, machine: str, event: object, effects: Sequence[object]) -> None:
        self._entries.append(FlightEntry(at, machine, event, tuple(effects)))

    def entries(self, machine: str | None = None) -> tuple[FlightEntry, ...]:
        return tuple(e for e in self._entries if machine is None or e.machine == machine)

    def render(self) -> str:
        """One line an entry, oldest first."""
        return "".join(f"{e.render()}\n" for e in self._entries)
