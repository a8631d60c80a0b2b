"""What a child's machine is told, what it orders, and its states; see `meshd.runtime.child`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from meshd.kernel.machine import Tick
from meshd.runtime.faults import Fault
from meshd.runtime.launch import LaunchSpec


class ChildState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """Takes no new requests, finishes those it has."""
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"


_S = ChildState
TRANSITIONS: Mapping[ChildState, frozenset[ChildState]] = MappingProxyType(
    {
        _S.STOPPED: frozenset({_S.STARTING}),
        _S.STARTING: frozenset({_S.READY, _S.STOPPING, _S.BACKOFF, _S.FAILED}),
        _S.READY: frozenset({_S.DRAINING, _S.STOPPING, _S.STARTING, _S.BACKOFF, _S.FAILED}),
        _S.DRAINING: frozenset({_S.STOPPING, _S.STOPPED}),
        _S.STOPPING: frozenset({_S.STOPPED, _S.STARTING, _S.BACKOFF, _S.FAILED}),
        _S.BACKOFF: frozenset({_S.STARTING, _S.STOPPED}),
        _S.FAILED: frozenset({_S.STARTING, _S.STOPPED}),
    }
)
"""Every legal change of state; STARTING to itself (a smaller rung at once) is no change."""


def state_diagram() -> str:
    """`TRANSITIONS` as a Mermaid diagram, for the documentation."""
    lines = ["stateDiagram-v2", "    [*] --> stopped"]
    lines += [
        f"    {source} --> {target}"
        for source, targets in TRANSITIONS.items()
        for target in sorted(targets)
    ]
    return "\n".join(lines) + "\n"


class ProbeKind(StrEnum):
    STARTUP = "startup"
    """Health, identity, slots and context, one generated token."""
    LIVENESS = "liveness"
    """Health and slots."""
    CANARY = "canary"
    """One generated token."""


class Force(StrEnum):
    TERM = "TERM"
    KILL = "KILL"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine said of itself when it was ready."""

    slots: int
    context_length: int
    """Tokens per slot."""
    note: str = ""
    """What was left out of the probe, in words."""


# -- events ---------------------------------------------------------------------------------------
# `generation` counts spawns; an event of an earlier one is of the past and ignored.


@dataclass(frozen=True, slots=True)
class StartAsked:
    pass


@dataclass(frozen=True, slots=True)
class StopAsked:
    drain_s: float
    kill: bool = False
    """At once and by KILL: nothing it could still say is of use to anybody."""


@dataclass(frozen=True, slots=True)
class Spawned:
    generation: int
    pid: int


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """No process came to be: the terminal event of that Spawn, in place of Exited."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Progressed:
    """The process printed, read or computed something."""

    generation: int


@dataclass(frozen=True, slots=True)
class FaultSeen:
    generation: int
    fault: Fault


@dataclass(frozen=True, slots=True)
class ProbePassed:
    generation: int
    kind: ProbeKind
    facts: EngineFacts | None = None
    """Set for STARTUP."""
    idle_s: float = 0.0
    """Seconds since the engine had a request."""


@dataclass(frozen=True, slots=True)
class ProbeNotYet:
    """It loads; nothing is wrong."""

    generation: int
    kind: ProbeKind


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    generation: int
    kind: ProbeKind
    reason: str
    final: bool = False
    """No later probe can pass (a stranger answered)."""


@dataclass(frozen=True, slots=True)
class Drained:
    generation: int


@dataclass(frozen=True, slots=True)
class Exited:
    generation: int
    status: int
    """Exit code; negative: number of the signal."""


Event = (
    StartAsked
    | StopAsked
    | Spawned
    | SpawnFailed
    | Progressed
    | FaultSeen
    | ProbePassed
    | ProbeNotYet
    | ProbeFailed
    | Drained
    | Exited
    | Tick
)


# -- effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Ends in SpawnFailed, or in Spawned and later Exited."""

    generation: int
    spec: LaunchSpec


@dataclass(frozen=True, slots=True)
class SendSignal:
    generation: int
    force: Force


@dataclass(frozen=True, slots=True)
class Probe:
    """Ends in ProbePassed, ProbeNotYet or ProbeFailed of the same kind."""

    generation: int
    kind: ProbeKind


@dataclass(frozen=True, slots=True)
class AwaitDrain:
    """Ends in Drained, unless the process ends first."""

    generation: int


@dataclass(frozen=True, slots=True)
class Announce:
    """The state or its reason changed."""

    state: ChildState
    reason: str | None


Effect = Spawn | SendSignal | Probe | AwaitDrain | Announce
