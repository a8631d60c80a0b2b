"""What the rooms tell each other: immutable snapshots.

A view is replaced, never edited. Reading one is advice; whoever wants to change something sends an
event to its owner. Sizes are bytes, times are seconds, `*_at` in a view is Unix time for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from meshd.ids import InstanceId, MeshId, ModelId, NodeId


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


class PeerState(StrEnum):
    """What membership says of another node."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


class MeshState(StrEnum):
    """Where this node stands with its mesh."""

    NONE = "none"
    """It belongs to none: not asked to join yet, or it left."""
    JOINING = "joining"
    MEMBER = "member"
    REFUSED = "refused"
    """The mesh will not have it; `reason` says why. It serves what it has alone."""


class Role(StrEnum):
    MEMBER = "member"
    CLIENT = "client"
    """Uses the mesh, hosts nothing."""


@dataclass(frozen=True, slots=True)
class Target:
    """One engine that can be sent a request for a model now."""

    model: ModelId
    node: str
    """Name of the node, for `x-meshd-node`."""
    instance: InstanceId
    socket_path: str
    """Unix socket of the engine; empty if it is another node's."""
    slots: int
    """How many requests the engine works on at once."""
    local: bool = True
    node_id: NodeId | None = None
    """Of the node whose engine it is; None for this one's."""
    slots_free: int | None = None
    """As that node last reported; None for a local engine, whose requests are all our own."""


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
class MeshView:
    id: MeshId | None = None
    name: str = ""
    state: MeshState = MeshState.NONE
    reason: str | None = None
    """Why it is not `member`, in words that say what to do."""
    issuer: bool = False
    """Whether this node holds the mesh's key and can invite."""


@dataclass(frozen=True, slots=True)
class PeerModel:
    """A model as another node's signed advert tells it; `slots_free` is newer than the advert."""

    id: ModelId
    ref: str
    state: ModelState
    digest: str | None = None
    reason: str | None = None
    progress: float | None = None
    context_length: int | None = None
    capabilities: tuple[str, ...] = ()
    created_at: int = 0
    bytes_on_disk: int = 0
    instance: InstanceId | None = None
    """Set while its engine can be sent requests."""
    epoch: int = 0
    slots: int = 0
    slots_free: int = 0


@dataclass(frozen=True, slots=True)
class PeerView:
    id: NodeId
    name: str
    state: PeerState
    role: Role = Role.MEMBER
    address: str | None = None
    """HOST:PORT it is reached at, or would be dialled at first."""
    rtt_s: float | None = None
    """Smoothed round trip of a control message; None before the first."""
    version: str = ""
    draining: bool = False
    devices: tuple[DeviceView, ...] = ()
    models: tuple[PeerModel, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """A node's current picture of itself and, as far as it knows them, of all others.

    Published whole; `with_local` and `with_peers` keep `models`, the union, in step.
    """

    node: NodeView
    runtime: RuntimeView | None = None
    devices: tuple[DeviceView, ...] = ()
    models: Mapping[ModelId, ModelView] = field(default_factory=lambda: MappingProxyType({}))
    """Every model the mesh serves or could, as clients see it."""
    cache: CacheView | None = None
    mesh: MeshView = MeshView()
    local: Mapping[ModelId, ModelView] = field(default_factory=lambda: MappingProxyType({}))
    """The part of `models` that is this node's own."""
    peers: tuple[PeerView, ...] = ()
    """All other nodes, tombstones included, by name."""


def with_local(view: View, local: Mapping[ModelId, ModelView]) -> View:
    """`view` with other models of this node."""
    return replace(view, local=local, models=_renewed(view.models, union(local, view.peers)))


def with_peers(view: View, peers: tuple[PeerView, ...]) -> View:
    """`view` with another picture of the other nodes."""
    return replace(view, peers=peers, models=_renewed(view.models, union(view.local, peers)))


_RANK = {
    state: rank
    for rank, state in enumerate(
        (
            ModelState.READY,
            ModelState.LOADING,
            ModelState.VERIFYING,
            ModelState.FETCHING,
            ModelState.WAITING,
            ModelState.DRAINING,
            ModelState.FAILED,
            ModelState.ABSENT,
        )
    )
}
"""Of two nodes' states of one model, what a client is told: the most hopeful one."""


def union(
    local: Mapping[ModelId, ModelView], peers: tuple[PeerView, ...]
) -> Mapping[ModelId, ModelView]:
    """Every model by name, with the hosts and targets of all nodes that can be reached.

    The order of `peers` does not matter: they count in the order of their ids.

    1. Of nodes that are dead or left nothing counts; a draining node's engines take no requests.
    2. One name is one digest: this node's, else the first peer's that has one. Weights that differ
       are left out of it: a request must not be answered by another model than it named.
    3. One instance is one node's: this one's, else the first peer's. Whoever names it after that
       offers no target, so that nobody can pass for another node's engine.
    4. Engines of suspects are targets only of models that nobody else serves.
    5. The state is the most hopeful one of all nodes; words and progress are that node's.
    """
    reachable = [p for p in peers if p.state in (PeerState.ALIVE, PeerState.SUSPECT)]  # 1
    if not reachable:
        return local
    models = dict(local)
    taken = {t.instance for model in local.values() for t in model.targets}
    for peer in sorted(reachable, key=lambda p: p.id):
        for theirs in peer.models:
            ours = models.get(theirs.id)
            if ours is not None and _differ(ours.digest, theirs.digest):  # 2
                continue
            target = None if theirs.instance in taken else _target(peer, theirs)  # 3
            if target is not None:
                taken.add(target.instance)
            model = _as_model(peer, theirs, target)
            models[theirs.id] = model if ours is None else _joined(ours, model)
    suspects = {p.id for p in reachable if p.state is PeerState.SUSPECT}
    if suspects:
        for name, model in models.items():  # 4
            sure = tuple(t for t in model.targets if t.node_id not in suspects)
            if sure and len(sure) < len(model.targets):
                models[name] = replace(model, targets=sure)
    return MappingProxyType(dict(sorted(models.items())))


def _renewed(
    old: Mapping[ModelId, ModelView], new: Mapping[ModelId, ModelView]
) -> Mapping[ModelId, ModelView]:
    """`old` itself if nothing changed, so that readers see at a glance that nothing did."""
    return old if old == new else new


def _differ(first: str | None, second: str | None) -> bool:
    """Whether two digests are known, and not one."""
    return first is not None and second is not None and first != second


def _joined(first: ModelView, second: ModelView) -> ModelView:
    best = second if _RANK[second.state] < _RANK[first.state] else first  # 5
    return replace(
        best,
        ref=first.ref,
        digest=first.digest or second.digest,
        capabilities=best.capabilities or first.capabilities or second.capabilities,
        created_at=first.created_at or second.created_at,
        hosts=first.hosts + second.hosts,
        targets=first.targets + second.targets,
    )


def _target(peer: PeerView, theirs: PeerModel) -> Target | None:
    """Their engine, if it takes requests; one without slots never would."""
    if theirs.instance is None or theirs.slots <= 0 or peer.draining:
        return None
    return Target(
        model=theirs.id,
        node=peer.name,
        instance=theirs.instance,
        socket_path="",
        slots=theirs.slots,
        local=False,
        node_id=peer.id,
        slots_free=theirs.slots_free,
    )


def _as_model(peer: PeerView, theirs: PeerModel, target: Target | None) -> ModelView:
    """What one peer says of a model, as if it were the only node that has it."""
    state = theirs.state
    if state is ModelState.READY and target is None:
        state = ModelState.DRAINING
    hosts: tuple[HostView, ...] = ()
    if state is not ModelState.ABSENT:
        hosts = (
            HostView(
                node=peer.name,
                node_id=peer.id,
                epoch=theirs.epoch,
                state=state,
                context_length=theirs.context_length,
                slots=theirs.slots,
                slots_free=theirs.slots_free,
                bytes_on_disk=theirs.bytes_on_disk,
            ),
        )
    return ModelView(
        id=theirs.id,
        ref=theirs.ref,
        state=state,
        reason=theirs.reason,
        progress=theirs.progress,
        digest=theirs.digest,
        context_length=theirs.context_length,
        capabilities=theirs.capabilities,
        created_at=theirs.created_at,
        hosts=hosts,
        targets=() if target is None else (target,),
    )
