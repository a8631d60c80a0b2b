"""How deployments look while no node works on them: what they wait for, or why they failed. Pure.

1. One that sleeps is absent until it is asked for.
2. It waits for the node whose turn it is, or whose claim has been told and whose work has not.
3. If nobody is to come, and somebody tried, it has failed, with the words of all that tried.
4. Else it waits, with the reason of every node that could not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meshd.election.claims import contenders, wanted_replicas
from meshd.election.ranking import not_ranked, rank
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import ClaimState, Deployment, ModelState, ModelView

ASLEEP = "asleep, for want of requests or of memory; the next request loads it"
NAMED = 8
"""Nodes named in one reason."""


def unserved(
    deployments: Iterable[Deployment],
    nodes: Sequence[Standing],
    demand: Mapping[ModelId, int],
    failed: Mapping[ModelId, ModelView],
) -> Mapping[ModelId, ModelView]:
    """Of all that are not removed. `nodes`: all that are alive or suspected, the own one too;
    `failed`: how this node's own attempts looked when they failed."""
    return Unserved().look(deployments, nodes, demand, failed)


class Unserved:
    """The same for one who looks at every change: only what it is about is looked at again. A
    hundred nodes that bid for fifty models have news all the time, of one model each."""

    def __init__(self) -> None:
        self._nodes: Sequence[Standing] = ()
        self._demand: Mapping[ModelId, int] = {}
        self._looks: dict[ModelId, tuple[Deployment, ModelView | None, ModelView]] = {}
        """By model: of what record and own failure, and how it looks."""

    def look(
        self,
        deployments: Iterable[Deployment],
        nodes: Sequence[Standing],
        demand: Mapping[ModelId, int],
        failed: Mapping[ModelId, ModelView],
    ) -> Mapping[ModelId, ModelView]:
        """As `unserved`."""
        moved = None if demand != self._demand else _moved(self._nodes, nodes)
        before = {} if moved is None else self._looks
        claimants: dict[ModelId, list[Standing]] = {}
        for node in nodes:
            for model in node.claims:
                claimants.setdefault(model, []).append(node)
        looks = {}
        for deployment in deployments:
            if deployment.removed:
                continue
            model = deployment.model
            own = failed.get(model)
            known = before.get(model)
            if known is None or known[:2] != (deployment, own) or model in (moved or ()):
                found = _unserved(deployment, nodes, claimants.get(model, ()), demand, own)
                known = deployment, own, found
            looks[model] = known
        self._nodes, self._demand, self._looks = nodes, demand, looks
        return {model: found for model, (_, _, found) in looks.items()}


def _moved(old: Sequence[Standing], new: Sequence[Standing]) -> Collection[ModelId] | None:
    """The models of which nodes say something else than before; None if it may be all."""
    if len(old) != len(new):
        return None
    moved: set[ModelId] = set()
    for one, other in zip(old, new, strict=True):
        if one is other:
            continue
        if replace(one, bids=other.bids, claims=other.claims) != other:
            return None
        moved.update(_differing(one.bids, other.bids), _differing(one.claims, other.claims))
    return moved


def _differing(old: Mapping[ModelId, Any], new: Mapping[ModelId, Any]) -> Iterator[ModelId]:
    yield from (model for model, word in new.items() if old.get(model) != word)
    yield from (model for model in old if model not in new)


def _unserved(
    deployment: Deployment,
    nodes: Sequence[Standing],
    claimants: Sequence[Standing],
    demand: Mapping[ModelId, int],
    failed: ModelView | None,
) -> ModelView:
    model, ref = deployment.model, deployment.ref
    if not wanted_replicas(deployment, demand):
        return ModelView(model, ref, ModelState.ABSENT, ASLEEP)  # 1
    coming = [c.node.name for c in contenders(deployment, claimants)]
    coming = coming or [r.node.name for r in rank(deployment, nodes)[:1]]
    if coming:
        return ModelView(model, ref, ModelState.WAITING, f"{', '.join(coming)} is to host it")  # 2
    claims = {node.node: node.claims[model] for node in claimants}
    tried = [node for node in claimants if claims[node.node].state is ClaimState.FAILED]
    if not tried:  # 4
        return ModelView(model, ref, ModelState.WAITING, _reasons(deployment, nodes))
    waits = [w for n in tried if (w := claims[n.node].retry_in_s) is not None]
    seen = failed if failed is not None and failed.ref == ref else None
    return ModelView(  # 3
        model,
        ref,
        ModelState.FAILED,
        _words(tried, {n.node: claims[n.node].reason for n in tried}, alone=len(nodes) == 1),
        retry_after_s=min(waits, default=None),
        digest=None if seen is None else seen.digest,
        capabilities=() if seen is None else seen.capabilities,
        created_at=0 if seen is None else seen.created_at,
        evidence=() if seen is None else seen.evidence,
    )


def _reasons(deployment: Deployment, nodes: Sequence[Standing]) -> str:
    said = {n.node: not_ranked(n, deployment) or "it could" for n in nodes if n.hosts}
    if not said:
        return "no node of this mesh hosts models"
    hosts = [n for n in nodes if n.node in said]
    return _words(hosts, said, alone=len(nodes) == 1)


def _words(nodes: Sequence[Standing], said: Mapping[NodeId, str], *, alone: bool) -> str:
    if alone:
        return said[nodes[0].node]
    named = sorted(nodes, key=lambda n: n.name)
    parts = [f"{n.name}: {said[n.node]}" for n in named[:NAMED]]
    if len(named) > NAMED:
        parts.append(f"and {len(named) - NAMED} more")
    return "; ".join(parts)
