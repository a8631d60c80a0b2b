"""Adverts: what a node says of itself, and how much of it is believed.

`describe` makes a node's own advert out of its view; `Advert.model_validate` reads another's, with
every field bounded and unknown ones ignored. `AdvertBook` keeps the newest of each node. Who signed
what is the trust side's business (credentials.py): nothing comes in here unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from meshd.ids import InstanceId, ModelId, NodeId
from meshd.peers.advert_size import make_fit
from meshd.peers.placement import (
    MAX_BIDS,
    MAX_CLAIMS,
    MAX_DEMAND,
    MAX_LENDS,
    AdvertBid,
    AdvertClaim,
    AdvertLendable,
    Load,
    Model,
    Placement,
    bids_to_wire,
    claims_to_wire,
    demand_to_wire,
    lends_to_wire,
)
from meshd.view import (
    DeviceView,
    ModelState,
    NodeState,
    PeerModel,
    ProofView,
    Role,
    RuntimeView,
    View,
)

MAX_NODES: Final = 4096
"""Adverts kept. A member could make up nodes only with certificates of the mesh's key, so this
bounds a mistake rather than an attack."""
MAX_MODELS: Final = 256
MAX_DEVICES: Final = 64
MAX_WEIGHTS: Final = 128
MAX_EVIDENCE: Final = 24
MAX_EVIDENCE_CHARS: Final = 200
MAX_PROGRESS_STEPS: Final = 10
"""Progress travels in tenths: an advert a per cent would flood the mesh while a model loads."""

Text = Annotated[str, StringConstraints(max_length=256)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Digest = Annotated[str, StringConstraints(max_length=80)]


class _Peer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class AdvertModel(_Peer):
    id: Text
    ref: Annotated[str, StringConstraints(max_length=1024)] = ""
    state: Annotated[ModelState, Field(strict=False)]
    digest: Text | None = None
    reason: Annotated[str, StringConstraints(max_length=1024)] | None = None
    progress: Annotated[float, Field(ge=0, le=1)] | None = None
    context_length: Count | None = None
    capabilities: Annotated[list[Text], Field(max_length=16)] = []
    created_at: Count = 0
    bytes_on_disk: Count = 0
    memory: Annotated[dict[Text, Count], Field(max_length=MAX_DEVICES)] = {}
    """Bytes by device, as its engine said after loading."""
    offloaded: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """Layers on accelerators, of all."""
    instance: Text | None = None
    epoch: Count = 0
    slots: Annotated[int, Field(ge=0, le=65_536)] = 0

    def to_view(self, slots_free: int | None) -> PeerModel:
        """`slots_free`: as told apart from the advert; None if it was not yet."""
        free = self.slots if slots_free is None else min(self.slots, slots_free)
        return PeerModel(
            id=ModelId(self.id),
            ref=self.ref,
            state=self.state,
            digest=self.digest,
            reason=self.reason,
            progress=self.progress,
            context_length=self.context_length,
            capabilities=tuple(self.capabilities),
            created_at=self.created_at,
            bytes_on_disk=self.bytes_on_disk,
            memory=tuple(self.memory.items()),
            offloaded=None if self.offloaded is None else (self.offloaded[0], self.offloaded[1]),
            instance=InstanceId(self.instance) if self.instance else None,
            epoch=self.epoch,
            slots=self.slots,
            slots_free=free,
        )


class AdvertDevice(_Peer):
    name: Text
    backend: Text
    uuid: Text | None = None
    memory_total_bytes: Count
    memory_free_bytes: Count
    unified: bool
    compute_capability: Text | None = None
    engine_name: Text | None = None
    driver: Text | None = None
    problem: Annotated[str, StringConstraints(max_length=1024)] | None = None

    def to_view(self) -> DeviceView:
        return DeviceView(**self.model_dump())


class AdvertProof(_Peer):
    """What a node gives as evidence that its engine runs on `Advert.backend`."""

    level: Text
    passed: bool
    checked_at: Annotated[float, Field(ge=0, le=1e12)]
    """Unix time by its own clock, for people."""
    evidence: Annotated[
        list[Annotated[str, StringConstraints(max_length=MAX_EVIDENCE_CHARS)]],
        Field(max_length=MAX_EVIDENCE),
    ] = []
    problem: Annotated[str, StringConstraints(max_length=1024)] | None = None

    def to_view(self) -> ProofView:
        return ProofView(
            self.level, self.passed, self.checked_at, tuple(self.evidence), problem=self.problem
        )


class Advert(_Peer):
    """Client nodes advertise neither models, devices and weights, nor bids and claims; what they
    send of them is dropped. Their clients count like everybody's: they tell the demand."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    version: Text
    role: Annotated[Role, Field(strict=False)] = Role.MEMBER
    draining: bool = False
    engine: Text | None = None
    backend: Text = "cpu"
    """What its models run on, as it proved."""
    proof: AdvertProof | None = None
    rpc_protocol: Text | None = None
    devices: Annotated[list[AdvertDevice], Field(max_length=MAX_DEVICES)] = []
    models: Annotated[list[AdvertModel], Field(max_length=MAX_MODELS)] = []
    weights: Annotated[list[Digest], Field(max_length=MAX_WEIGHTS)] = []
    """Digests of the sets it holds verified."""
    bids: Annotated[list[AdvertBid], Field(max_length=MAX_BIDS)] = []
    claims: Annotated[list[AdvertClaim], Field(max_length=MAX_CLAIMS)] = []
    demand: Annotated[dict[Model, Load], Field(max_length=MAX_DEMAND)] = {}
    """Slots of each model that its clients keep busy."""
    lends: Annotated[list[AdvertLendable], Field(max_length=MAX_LENDS)] = []
    """Memory that models of other nodes may lie in."""


def describe(view: View, name: str, role: Role) -> dict[str, Any]:
    """The advert of the node whose view this is; JSON-able. `name`: as configured."""
    body: dict[str, Any] = {
        "name": name,
        "version": view.node.version,
        "role": role.value,
        "draining": view.node.state is NodeState.DRAINING,
        "demand": demand_to_wire(view.demand),
    }
    if role is Role.CLIENT:
        make_fit(body)
        return body
    runtime = view.runtime
    if runtime is not None:
        body["engine"] = f"{runtime.id}: {runtime.build}"[:256]
        body["rpc_protocol"] = runtime.rpc_protocol
        body["backend"] = runtime.backend
        body["proof"] = _proof(runtime)
    body["devices"] = [
        {
            "name": device.name[:256],
            "backend": device.backend,
            "uuid": device.uuid,
            "memory_total_bytes": device.memory_total_bytes,
            # In steps of a sixteenth: free memory moves all the time.
            "memory_free_bytes": _coarse(device.memory_free_bytes, device.memory_total_bytes),
            "unified": device.unified,
            "compute_capability": device.compute_capability,
            "engine_name": device.engine_name,
            "driver": device.driver,
            "problem": device.problem[:1024] if device.problem else None,
        }
        for device in view.devices[:MAX_DEVICES]
    ]
    # Models that are served come first: they are the last to be left out.
    models = sorted((_model(view, name) for name in view.local), key=lambda m: not m["instance"])
    body["models"] = models[:MAX_MODELS]
    # Sets that are alike under two names count once. Full-policy: the first ones by model stay.
    digests = dict.fromkeys(weights.digest for weights in view.weights)
    body["weights"] = list(digests)[:MAX_WEIGHTS]
    body["bids"] = bids_to_wire(view.bids)
    body["claims"] = claims_to_wire(view.claims)
    body["lends"] = lends_to_wire(view.lends)
    make_fit(body)
    return body


def told_of(view: View) -> tuple[object, ...]:
    """All that `describe` reads: while these are the same objects, the advert is the same."""
    node = view.node
    return (
        node.version, node.state, view.runtime, view.devices, view.local, view.weights, view.bids,
        view.claims, view.demand, view.lends,
    )  # fmt: skip


class AdvertBook:
    """The newest advert of each node, and the free slots told since."""

    def __init__(self) -> None:
        self._adverts: dict[NodeId, tuple[int, Advert, dict[str, Any]]] = {}
        self._slots_free: dict[NodeId, dict[str, int]] = {}
        self._placement: dict[NodeId, Placement] = {}
        """Made once an advert: there may be hundreds, and pictures are made often."""

    def version(self, node: NodeId) -> int:
        """Of the advert kept; -1 for none."""
        kept = self._adverts.get(node)
        return -1 if kept is None else kept[0]

    def get(self, node: NodeId) -> Advert | None:
        kept = self._adverts.get(node)
        return None if kept is None else kept[1]

    def envelope(self, node: NodeId) -> dict[str, Any] | None:
        """As it was signed, for passing on."""
        kept = self._adverts.get(node)
        return None if kept is None else kept[2]

    def put(self, node: NodeId, version: int, advert: Advert, envelope: Mapping[str, Any]) -> bool:
        """Whether it was newer than what was kept."""
        if version <= self.version(node):
            return False
        if node not in self._adverts and len(self._adverts) >= MAX_NODES:
            return False
        self._adverts[node] = (version, advert, dict(envelope))
        self._placement[node] = _placement(advert)
        return True

    def put_slots(self, node: NodeId, slots_free: dict[str, int]) -> bool:
        """Free slots by instance, told by the node itself. Whether anything changed."""
        if self._slots_free.get(node) == slots_free:
            return False
        self._slots_free[node] = slots_free
        return True

    def models(self, node: NodeId) -> tuple[PeerModel, ...]:
        advert = self.get(node)
        if advert is None or advert.role is Role.CLIENT:
            return ()
        free = self._slots_free.get(node, {})
        return tuple(m.to_view(free.get(m.instance or "")) for m in advert.models)

    def weights(self, node: NodeId) -> frozenset[str]:
        """Digests of the sets it says it holds verified."""
        advert = self.get(node)
        if advert is None or advert.role is Role.CLIENT:
            return frozenset()
        return frozenset(advert.weights)

    def placement(self, node: NodeId) -> Placement:
        return self._placement.get(node, Placement())

    def rpc_protocol(self, node: NodeId) -> str | None:
        """Of its engine; None of a node that runs none."""
        advert = self.get(node)
        return None if advert is None or advert.role is Role.CLIENT else advert.rpc_protocol

    def runs_on(self, node: NodeId) -> tuple[str, ProofView | None]:
        """What its models run on, and the evidence it gives; `cpu` for all that gives none, or
        whose own evidence does not pass."""
        advert = self.get(node)
        if advert is None or advert.role is Role.CLIENT or advert.proof is None:
            return "cpu", None
        proof = advert.proof.to_view()
        return (advert.backend if proof.passed else "cpu"), proof

    def forget(self, node: NodeId) -> None:
        self._adverts.pop(node, None)
        self._slots_free.pop(node, None)
        self._placement.pop(node, None)


def slots_from_wire(value: Any) -> dict[str, int]:
    """Free slots by instance, out of a `load` frame; what is not that is left out."""
    if type(value) is not dict:
        return {}
    rows = list(value.items())[:MAX_MODELS]
    return {k: n for k, n in rows if len(k) <= 256 and type(n) is int and 0 <= n <= 65_536}


def _placement(advert: Advert) -> Placement:
    demand = tuple((ModelId(model), load) for model, load in advert.demand.items())
    if advert.role is Role.CLIENT:
        return Placement(demand=demand)
    bids = {bid.model: bid.to_view() for bid in advert.bids}
    claims = {claim.model: claim.to_view() for claim in advert.claims}
    lends = tuple(lend.to_view() for lend in advert.lends)
    return Placement(tuple(bids.values()), tuple(claims.values()), demand, lends)


def _proof(runtime: RuntimeView) -> dict[str, Any]:
    """Full-policy: the first lines of evidence stay, and the beginning of each."""
    proof = runtime.proof
    return {
        "level": proof.level,
        "passed": proof.passed,
        "checked_at": proof.checked_at,
        "evidence": [line[:MAX_EVIDENCE_CHARS] for line in proof.evidence[:MAX_EVIDENCE]],
        "problem": proof.problem[:1024] if proof.problem else None,
    }


def _model(view: View, name: ModelId) -> dict[str, Any]:
    model = view.local[name]
    host = model.hosts[0] if model.hosts else None
    target = next((t for t in model.targets if t.local), None)
    progress = model.progress
    if progress is not None:
        progress = round(progress * MAX_PROGRESS_STEPS) / MAX_PROGRESS_STEPS
    return {
        "id": model.id[:256],
        "ref": model.ref[:1024],
        "state": model.state.value,
        "digest": model.digest,
        "reason": model.reason[:1024] if model.reason else None,
        "progress": progress,
        "context_length": model.context_length,
        "capabilities": list(model.capabilities)[:16],
        "created_at": model.created_at,
        "bytes_on_disk": host.bytes_on_disk if host else 0,
        "memory": dict(host.memory[:MAX_DEVICES]) if host else {},
        "offloaded": list(host.offloaded) if host and host.offloaded else None,
        "instance": target.instance if target else None,
        "epoch": host.epoch if host else 0,
        "slots": target.slots if target else 0,
    }


def _coarse(free_bytes: int, total_bytes: int) -> int:
    step = max(1, total_bytes // 16)
    return free_bytes // step * step
