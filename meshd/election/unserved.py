"""How deployments look while no node works on them: what they wait for, or why they failed. Pure.

1. One that sleeps is absent until it is asked for.
2. It waits for the node whose turn it is, or whose claim has been told and whose work has not.
3. If nobody is to come, and somebody tried, it has failed, with the words of all that tried.
4. Else it waits, with the reason of every node that could not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
    claimants: dict[ModelId, list[Standing]] = {}
    for node in nodes:
        for model in node.claims:
            claimants.setdefault(model, []).append(node)
    return {
        d.model: _unserved(d, nodes, claimants.get(d.model, ()), demand, failed.get(d.model))
        for d in deployments
        if not d.removed
    }


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
