"""What the rooms tell each other: immutable snapshots.

A view is replaced, never edited. Reading one is advice; whoever wants to change something sends an
event to its owner. Sizes are bytes, times are seconds, `*_at` in a view is Unix time for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from meshd.ids import InstanceId, MeshId, ModelId, NodeId
from meshd.view.placement import Bid, Claim, Deployment
from meshd.view.split import Lendable, WorkerShare


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
    memory: tuple[tuple[str, int], ...] = ()
    """Bytes by device, as the engine said after loading; empty where that is not known."""
    offloaded: tuple[int, int] | None = None
    """Layers on accelerators, of all; None as above, and on the CPU."""
    workers: tuple[WorkerShare, ...] = ()
    """Nodes that lend memory for it; empty if it lies on its host alone."""


@dataclass(frozen=True, slots=True)
class FetchView:
    """Weights on their way."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    eta_s: float | None
    """None while nothing can be said."""
    sources: tuple[tuple[str, int], ...] = ()
    """Bytes got so far, by `hub` or name of node."""


@dataclass(frozen=True, slots=True)
class Preparing:
    """How far weights are on their way to being usable."""

    state: ModelState
    """FETCHING, VERIFYING, or WAITING for somebody else who fetches them."""
    reason: str
    progress: float | None = None
    """0..1"""
    fetch: FetchView | None = None


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
    ambiguous: tuple[ModelId, ...] = ()
    """The exact names, if nodes mean different weights by this one; it then has no targets."""
    fetch: FetchView | None = None
    """Set while its weights are fetched or mended."""
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
    engine_name: str | None = None
    """What the engine's own binary calls it (`CUDA0`); None if it does not list it."""
    driver: str | None = None
    """Version of the driver that was asked."""
    problem: str | None = None
    """Why it cannot be used, or what its witnesses disagree on; None if they agree."""
    memory_bytes_per_s: int | None = None
    """How fast the device reads its memory, to two digits; None if that is not known."""


@dataclass(frozen=True, slots=True)
class BinaryView:
    name: str
    path: str
    sha256: str


class Layer(StrEnum):
    """What of an engine is proved, from the ground up; each needs those before it."""

    BINARY = "binary"
    """It is what it claims to be: files, hashes, build flags, version."""
    BACKEND = "backend"
    """It lists the device, and was built for it."""
    RUNTIME = "runtime"
    """A model ran on the device, and the driver saw it there."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of a proof."""

    layer: Layer
    passed: bool
    checked_at: float
    """Unix time."""
    evidence: tuple[str, ...]
    """What was seen, one line each, in the order it was looked at."""
    problem: str | None = None
    """Why it did not pass, in words that say what to do."""


@dataclass(frozen=True, slots=True)
class ProofView:
    level: str
    """The highest layer that passed with all below it: `none`, or a word of `Layer`."""
    passed: bool
    """Every layer that applies did."""
    checked_at: float
    evidence: tuple[str, ...]
    """Of all layers together."""
    layers: tuple[LayerView, ...] = ()
    problem: str | None = None
    """Of the first layer that did not pass."""


@dataclass(frozen=True, slots=True)
class RuntimeView:
    """The engine this node runs."""

    id: str
    backend: str
    """What models run on here as far as that is proved: `cpu` unless a device is."""
    build: str
    rpc_protocol: str | None
    directory: str
    binaries: tuple[BinaryView, ...]
    proof: ProofView
    built_for: str = "cpu"
    """The backend it was built for."""
    tokens_per_s: float | None = None
    """With the probe model on the device, in the run of the proof; None if there was none."""


@dataclass(frozen=True, slots=True)
class CacheView:
    path: str
    used_bytes: int
    budget_bytes: int | None
    free_bytes: int


@dataclass(frozen=True, slots=True)
class WeightsView:
    """A set of weights that lies verified on this machine's disk."""

    model: ModelId
    ref: str
    digest: str
    size_bytes: int


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
    memory: tuple[tuple[str, int], ...] = ()
    offloaded: tuple[int, int] | None = None
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
    weights: frozenset[str] = frozenset()
    """Digests of the sets it says it holds verified."""
    backend: str = "cpu"
    """What its engine runs models on, as far as it proved that."""
    proof: ProofView | None = None
    """The evidence it gives; None of a node that runs no engine."""
    bids: tuple[Bid, ...] = ()
    """At most one a model, as `claims`; both are empty for a client node."""
    claims: tuple[Claim, ...] = ()
    demand: tuple[tuple[ModelId, float], ...] = ()
    """Slots of each model that its clients keep busy, wherever the engines are."""
    lends: tuple[Lendable, ...] = ()
    """Memory that other nodes' models may lie in; none of a client node."""
    rpc_protocol: str | None = None
    """Of its engine; None if it has none, or one that cannot lend."""


@dataclass(frozen=True, slots=True)
class View:
    """A node's current picture of itself and, as far as it knows them, of all others.

    Published whole; `with_local` and `with_peers` (united.py) keep `models` in step.
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
    weights: tuple[WeightsView, ...] = ()
    """What lies verified on this machine's disk, by model."""
    deployments: tuple[Deployment, ...] = ()
    """What the mesh should serve as far as this node knows, tombstones included, by model."""
    bids: tuple[Bid, ...] = ()
    """This node's own, at most one a model; other nodes are told."""
    claims: tuple[Claim, ...] = ()
    """As `bids`."""
    demand: tuple[tuple[ModelId, float], ...] = ()
    """Of this node's own clients, as `PeerView.demand`."""
    lends: tuple[Lendable, ...] = ()
    """Memory of this node that other nodes' models may lie in; other nodes are told."""
    wanted: Mapping[ModelId, ModelView] = field(default_factory=lambda: MappingProxyType({}))
    """Deployments as they look while no node works on them: why they wait, sleep or failed."""
