"""The union: every model of every node, as one node's clients see it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from meshd.ids import ModelId
from meshd.view.placement import ClaimState
from meshd.view.snapshots import (
    HostView,
    ModelState,
    ModelView,
    PeerModel,
    PeerState,
    PeerView,
    Target,
    View,
)
from meshd.view.split import WorkerShare

T = TypeVar("T")

EXACT_DIGITS = 12
"""Hex digits of a digest in an exact name."""


def with_local(view: View, local: Mapping[ModelId, ModelView]) -> View:
    """`view` with other models of this node."""
    return _in_step(replace(view, local=local))


def with_peers(view: View, peers: tuple[PeerView, ...]) -> View:
    """`view` with another picture of the other nodes."""
    if _same_models(view.peers, peers):  # round trips change all the time, and nothing else
        return replace(view, peers=peers)
    return _in_step(replace(view, peers=peers))


def with_wanted(view: View, wanted: Mapping[ModelId, ModelView]) -> View:
    """`view` with other words about deployments that no node works on."""
    return _in_step(replace(view, wanted=wanted))


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


_NONE_WANTED: Mapping[ModelId, ModelView] = MappingProxyType({})


def union(
    local: Mapping[ModelId, ModelView],
    peers: tuple[PeerView, ...],
    wanted: Mapping[ModelId, ModelView] = _NONE_WANTED,
) -> Mapping[ModelId, ModelView]:
    """Every model by name, with the hosts and targets of all nodes that can be reached.

    The order of `peers` does not matter: they count in the order of their ids.

    1. Of nodes that are dead or left nothing counts. A draining node's engine takes requests for as
       long as it claims to be ready: it hands the model over first.
    2. One name is one digest. If nodes mean different weights by it, the name itself is served by
       nobody and says so, and each digest has a name of its own (`exact_name`): a request must not
       be answered by another model than it named. Only who serves its weights makes a name
       ambiguous for others: not who is still fetching, or failed.
    3. One instance is one node's: this one's, else the first peer's. Whoever names it after that
       offers no target, so that nobody can pass for another node's engine.
    4. Engines of suspects are targets only of models that nobody else serves.
    5. The state is the most hopeful one of all nodes; words and progress are that node's.
    6. What is `wanted` is told of models that no node has, or works on.
    """
    found = _of_nodes(local, peers)
    lacking = {
        name: model if (known := found.get(name)) is None else _with_facts(model, known)
        for name, model in wanted.items()
        if name not in found or found[name].state is ModelState.ABSENT
    }
    if not lacking:
        return found
    return MappingProxyType(dict(sorted({**found, **lacking}.items())))  # 6


def _of_nodes(
    local: Mapping[ModelId, ModelView], peers: tuple[PeerView, ...]
) -> Mapping[ModelId, ModelView]:
    """Rules 1 to 5."""
    reachable = [p for p in peers if p.state in (PeerState.ALIVE, PeerState.SUSPECT)]  # 1
    if not reachable:
        return local
    taken = {t.instance for model in local.values() for t in model.targets}
    found: dict[ModelId, list[_Found]] = {}
    for peer in sorted(reachable, key=lambda p: p.id):
        for theirs in peer.models:
            target = None if theirs.instance in taken else _target(peer, theirs)  # 3
            if target is not None:
                taken.add(target.instance)
            found.setdefault(theirs.id, []).append((peer, theirs, target))
    models = dict(local)
    for name, parts in found.items():
        ours = local.get(name)
        digests = _digests(ours, parts)
        if len(digests) > 1:  # 2
            models.update(_apart(name, ours, parts, digests))
            continue
        digest = next(iter(digests), None)
        same = [part for part in parts if part[1].digest in (None, digest)]
        own = ours if ours is None or ours.digest in (None, digest) else None
        if same or own is not ours:
            models[name] = _joined(own, same, digest)
    return MappingProxyType(dict(sorted(models.items())))


def exact_name(name: ModelId, digest: str) -> ModelId:
    """The name of those weights and no others, for when `name` alone means several."""
    return ModelId(f"{name}@{digest.removeprefix('sha256:')[:EXACT_DIGITS]}")


def _digests(ours: ModelView | None, parts: list[_Found]) -> tuple[str, ...]:
    """What a name means, in a stable order: the weights that are served, or if there are none,
    those of whom we know most."""
    everybody: list[ModelView | PeerModel] = [theirs for _, theirs, _ in parts]
    if ours is not None:
        everybody.append(ours)
    known = [(m.digest, m.state) for m in everybody if m.digest is not None]
    served = {d for d, state in known if state in (ModelState.READY, ModelState.DRAINING)}
    if served:
        return tuple(sorted(served))
    return tuple(digest for digest, _ in known[-1:])  # ours, or the last peer's


def _apart(
    name: ModelId, ours: ModelView | None, parts: list[_Found], digests: tuple[str, ...]
) -> Mapping[ModelId, ModelView]:
    """The models that one name means, each by its exact name, and the name, which serves none."""
    apart: dict[ModelId, ModelView] = {}
    for digest in digests:
        same = [part for part in parts if part[1].digest == digest]
        own = ours if ours is not None and ours.digest == digest else None
        exact = exact_name(name, digest)
        apart[exact] = replace(_joined(own, same, digest) if same or own is None else own, id=exact)
    names = tuple(apart)
    joined = _joined(ours, parts, None)
    apart[name] = replace(
        joined,
        state=ModelState.FAILED,
        reason=f"`{name}` means different weights on different nodes; say which: "
        + " or ".join(f"`{n}` ({', '.join(h.node for h in apart[n].hosts)})" for n in names),
        targets=(),
        ambiguous=names,
    )
    return apart


_Found: TypeAlias = tuple[PeerView, PeerModel, Target | None]
"""A model as one peer has it, and its engine there if that takes requests."""


def _same_models(old: tuple[PeerView, ...], new: tuple[PeerView, ...]) -> bool:
    """Whether two pictures of the other nodes come to the same union."""
    return len(old) == len(new) and all(
        a is b
        or (
            (a.id, a.name, a.state, a.draining) == (b.id, b.name, b.state, b.draining)
            and a.models == b.models
            and (not b.draining or a.claims == b.claims)
            and _split(a) == _split(b)
        )
        for a, b in zip(old, new, strict=True)
    )


def _split(peer: PeerView) -> list[tuple[ModelId, tuple[WorkerShare, ...]]]:
    """Who lends memory for what it hosts."""
    return [(claim.model, claim.workers) for claim in peer.claims if claim.workers]


def _in_step(view: View) -> View:
    models = union(view.local, view.peers, view.wanted)
    return replace(view, models=_renewed(view.models, models))


def _renewed(
    old: Mapping[ModelId, ModelView], new: Mapping[ModelId, ModelView]
) -> Mapping[ModelId, ModelView]:
    """`old` itself if nothing changed, so that readers see at a glance that nothing did."""
    return old if old == new else new


def _joined(ours: ModelView | None, parts: list[_Found], digest: str | None) -> ModelView:
    """One model of several nodes: this one's part, if it has one, and those of others."""
    best: ModelView | PeerModel | None = ours
    state = ModelState.ABSENT if ours is None else ours.state
    for _, theirs, target in parts:  # 5
        theirs_now = _state(theirs, target)
        if best is None or _RANK[theirs_now] < _RANK[state]:
            best, state = theirs, theirs_now
    assert best is not None, "a model is found somewhere"
    targets = [] if ours is None else list(ours.targets)
    targets += [target for _, _, target in parts if target is not None]
    suspects = {peer.id for peer, _, _ in parts if peer.state is PeerState.SUSPECT}
    sure = [t for t in targets if t.node_id not in suspects]
    everybody = [m for m in (ours, *(theirs for _, theirs, _ in parts)) if m is not None]
    return ModelView(
        id=best.id,
        ref=everybody[0].ref,
        state=state,
        reason=best.reason,
        progress=best.progress,
        retry_after_s=best.retry_after_s if isinstance(best, ModelView) else None,
        digest=digest,
        context_length=best.context_length,
        capabilities=best.capabilities or _first(m.capabilities for m in everybody) or (),
        created_at=_first(m.created_at for m in everybody) or 0,
        evidence=best.evidence if isinstance(best, ModelView) else (),
        hosts=(*(() if ours is None else ours.hosts), *_hosts(parts)),
        targets=tuple(sure or targets),  # 4
    )


def _with_facts(wanted: ModelView, known: ModelView) -> ModelView:
    """`wanted`, with what nodes know of its weights though none has them at work."""
    return replace(
        wanted,
        digest=wanted.digest or known.digest,
        context_length=wanted.context_length or known.context_length,
        capabilities=wanted.capabilities or known.capabilities,
        created_at=wanted.created_at or known.created_at,
    )


def _first(values: Iterable[T]) -> T | None:
    """The first that is not empty."""
    return next((value for value in values if value), None)


def _hosts(parts: list[_Found]) -> Iterator[HostView]:
    for peer, theirs, target in parts:
        state = _state(theirs, target)
        if state is not ModelState.ABSENT:
            yield HostView(
                node=peer.name,
                node_id=peer.id,
                epoch=theirs.epoch,
                state=state,
                context_length=theirs.context_length,
                slots=theirs.slots,
                slots_free=theirs.slots_free,
                bytes_on_disk=theirs.bytes_on_disk,
                memory=theirs.memory,
                offloaded=theirs.offloaded,
                workers=next((c.workers for c in peer.claims if c.model == theirs.id), ()),
            )


def _state(theirs: PeerModel, target: Target | None) -> ModelState:
    """Theirs, as it looks from here: an engine that takes no requests is on its way out."""
    if theirs.state is ModelState.READY and target is None:
        return ModelState.DRAINING
    return theirs.state


def _target(peer: PeerView, theirs: PeerModel) -> Target | None:
    """Their engine, if it takes requests; one without slots never would."""
    if theirs.instance is None or theirs.slots <= 0:
        return None
    if peer.draining and not any(  # 1
        c.model == theirs.id and c.state is ClaimState.READY for c in peer.claims
    ):
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
