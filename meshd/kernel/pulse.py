"""Whether a process that looked at itself may say that it is alive. Pure.

1. The loop woke us much later than it should have: whoever waits for it waits that long too.
2. A check found a fault.
Otherwise it is alive. `PERIODS` looks fit into the manager's limit, so that one bad look, which any
machine has when it swaps, does not end the process, and a lasting fault does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PERIODS = 4
LAG_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Pulse:
    faults: tuple[str, ...]
    """Why the manager is not told; empty: it is."""
    changed: bool
    """The look before came out otherwise: worth a line in the log."""

    @property
    def alive(self) -> bool:
        return not self.faults


class PulseJudge:
    """Judges one look after the other. `limit_s`: how long the manager waits for a sign of life."""

    def __init__(self, limit_s: float) -> None:
        self.period_s = limit_s / PERIODS
        self.lag_limit_s = min(LAG_LIMIT_S, self.period_s)
        self._was_alive = True

    def judge(self, lag_s: float, found: Mapping[str, str | None]) -> Pulse:
        """`lag_s`: how late the look began. `found`: per check, its fault or None."""
        faults = [f"{name}: {fault}" for name, fault in found.items() if fault is not None]  # 2
        if lag_s > self.lag_limit_s:  # 1
            faults.insert(0, f"event loop: {lag_s:.1f} s late")
        pulse = Pulse(tuple(faults), changed=self._was_alive == bool(faults))
        self._was_alive = pulse.alive
        return pulse
