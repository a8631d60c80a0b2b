"""Circuit breakers: which engines are left alone for a while because they failed.

A pure machine, called as methods like admission's. One circuit per target instance, and only for
those in trouble: CLOSED (counting faults in a row) → OPEN (until `retry_at`) → HALF-OPEN (one
request goes through as probe) → CLOSED, or OPEN again for twice as long, up to 30 s.

What an attempt tells, from the request's side:

1. UNREACHABLE: no connection to another node. Opens at once: dialling takes seconds.
2. BROKE: no connection to an engine here, a connection that ended without an answer, an answer that
   is not HTTP, or none in time. Three in a row open.
3. ERRED: a 5xx answer other than 501 and 503. Three in a row open, but such an engine does answer:
   it is passed over only while another is sound. Requests that make an engine say 500 must not
   take it away from everybody else.
4. Any other answer is health, and closes. 503 and 429 are among them: loading, draining and full
   are states, not faults; the view will say the same in a moment, and the request is tried
   elsewhere anyway.

An answer that breaks off after it began is no fault here: the next attempt will show one. Nothing
here ever reaches membership.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from meshd.ids import InstanceId

FAULTS_TO_OPEN: Final = 3
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_LAST_S: Final = 30.0
PROBE_LIMIT_S: Final = 10.0
"""A probe that has had no outcome for this long no longer keeps the next one from going."""


class Fault(StrEnum):
    UNREACHABLE = "unreachable"
    BROKE = "broke"
    ERRED = "erred"


@dataclass(frozen=True, slots=True)
class Shut:
    """An engine that is left alone."""

    retry_after_s: float
    """Until the next probe may go."""
    answers: bool
    """It does answer, though with errors: better than nothing."""
    reason: str
    """What its last fault was, in words."""


NONE_SHUT: Final[Mapping[InstanceId, Shut]] = MappingProxyType({})


@dataclass(slots=True)
class _Circuit:
    fault: Fault
    reason: str
    faults: int = 0
    """In a row."""
    openings: int = 0
    """In a row; 0 while closed."""
    retry_at: float = 0.0
    probe: int = 0
    """The probe whose outcome counts; 0: none is out."""


class Breakers:
    """See the module's docstring. `now` is monotonic."""

    def __init__(self) -> None:
        self._circuits: dict[InstanceId, _Circuit] = {}
        self.troubled: Collection[InstanceId] = self._circuits
        """Engines that had a fault lately. While there are none, which is nearly always, the hot
        path asks for nothing else."""
        self._last_probe = 0

    def shut(self, now: float) -> Mapping[InstanceId, Shut]:
        """The engines that no request should go to now."""
        return {
            instance: Shut(circuit.retry_at - now, circuit.fault is Fault.ERRED, circuit.reason)
            for instance, circuit in self._circuits.items()
            if circuit.openings and now < circuit.retry_at
        }

    def begin(self, instance: InstanceId, now: float) -> int:
        """A request goes to `instance`. If it is the probe of a half-open circuit, the number by
        which its outcome is known as that, else 0."""
        circuit = self._circuits.get(instance)
        if circuit is None or not circuit.openings or now < circuit.retry_at:
            return 0
        self._last_probe += 1
        circuit.probe = self._last_probe
        circuit.retry_at = now + PROBE_LIMIT_S
        return circuit.probe

    def succeeded(self, instance: InstanceId) -> None:
        self._circuits.pop(instance, None)

    def failed(
        self, instance: InstanceId, fault: Fault, reason: str, now: float, probe: int = 0
    ) -> None:
        circuit = self._circuits.get(instance)
        if circuit is None:
            circuit = self._circuits[instance] = _Circuit(fault, reason)
        if circuit.openings and (not probe or probe != circuit.probe):
            return  # sent before it opened; a burst that breaks together is one failure
        circuit.fault, circuit.reason = fault, reason
        circuit.faults += 1
        if circuit.openings or fault is Fault.UNREACHABLE or circuit.faults >= FAULTS_TO_OPEN:
            circuit.retry_at = now + min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2**circuit.openings)
            circuit.openings += 1
            circuit.probe = 0

    def abandoned(self, instance: InstanceId, probe: int, now: float) -> None:
        """The probe ended without telling anything, its client gone: the next one may go."""
        circuit = self._circuits.get(instance)
        if circuit is not None and circuit.probe == probe:
            circuit.retry_at = now
            circuit.probe = 0

    def keep(self, live: Collection[InstanceId]) -> None:
        """Forget the engines that are no more."""
        for instance in [i for i in self._circuits if i not in live]:
            del self._circuits[instance]
