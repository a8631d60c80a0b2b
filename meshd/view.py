"""What the rooms tell each other: immutable snapshots.

A view is replaced, never edited. Reading one is advice; whoever wants to change something sends an
event to its owner. Sizes are bytes, times are seconds, `*_at` in a view is Unix time for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from meshd.ids import InstanceId, ModelId, NodeId


class NodeState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class ModelState(StrEnum):
    """States of a model, as in `/mesh/status`. A *wait* always has a reason beside it."""

    ABSENT = "absent"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    WAITING = "waiting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Target:
    """One engine that can be sent a request for a model now."""

    model: ModelId
    node: str
    """Name of the node, for `x-meshd-node`."""
    instance: InstanceId
    socket_path: str
    """Unix socket of the engine."""
    slots: int
    """How many requests the engine works on at once."""
    local: bool = True


@dataclass(frozen=True, slots=True)
class HostView:
    """One node's engine for a model."""

    node: str
    node_id: NodeId
    epoch: int
    state: ModelState
    context_length: int | None
    """Tokens per slot, as the engine reported them after loading."""
    slots: int
    slots_free: int
    bytes_on_disk: int = 0


@dataclass(frozen=True, slots=True)
class ModelView:
    id: ModelId
    ref: str
    state: ModelState
    reason: str | None = None
    """Why it is not `ready`, in words that say what to do; None when it is."""
    progress: float | None = None
    """0..1 of what is being waited for; None if nothing can be said."""
    retry_after_s: float | None = None
    digest: str | None = None
    """sha256 over the weights; None while it has not been proved."""
    context_length: int | None = None
    capabilities: tuple[str, ...] = ()
    created_at: int = 0
    evidence: tuple[str, ...] = ()
    """Last lines of the engine, for a model that failed."""
    hosts: tuple[HostView, ...] = ()
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceView:
    name: str
    backend: str
    uuid: str | None
    memory_total_bytes: int
    memory_free_bytes: int
    unified: bool
    """Device memory is the machine's memory (CPU, GB10, Apple)."""
    compute_capability: str | None


@dataclass(frozen=True, slots=True)
class BinaryView:
    name: str
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ProofView:
    level: str
    """`none`, `binary` (it is what it claims to be), `backend` (it lists the device), `runtime`."""
    passed: bool
    checked_at: float
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuntimeView:
    """The engine this node runs."""

    id: str
    backend: str
    build: str
    rpc_protocol: str | None
    directory: str
    binaries: tuple[BinaryView, ...]
    proof: ProofView


@dataclass(frozen=True, slots=True)
class CacheView:
    path: str
    used_bytes: int
    budget_bytes: int | None
    free_bytes: int


@dataclass(frozen=True, slots=True)
class NodeView:
    id: NodeId
    name: str
    version: str
    role: str
    state: NodeState
    started_at: float
    """Monotonic seconds; `uptime_s` is derived from it."""
    listen: str
    peer_listen: str | None


@dataclass(frozen=True, slots=True)
class View:
    """A node's current picture. Today it is of one node; peers join it later."""

    node: NodeView
    runtime: RuntimeView | None = None
    devices: tuple[DeviceView, ...] = ()
    models: Mapping[ModelId, ModelView] = field(default_factory=lambda: MappingProxyType({}))
    cache: CacheView | None = None
