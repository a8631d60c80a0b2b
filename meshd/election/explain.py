"""Why a model is where it is: the decision, its figures, and why not each other node. Pure.

The sentences are those that stand in the events of a node that begins or ends to host (rule 12 of
election.py), so that `meshd plan` says before what the log says after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from meshd.election.claims import Contender, contenders, wanted_replicas
from meshd.election.ranking import (
    Ranked,
    behind,
    current_bid,
    may_not_host,
    merit,
    not_ranked,
    order,
    rank,
    suits_less,
)
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import ClaimState, Deployment, WorkerShare

_NAMED = 3
"""Other nodes named in one line; of the rest only the number is said."""


class Verdict(StrEnum):
    HOSTS = "hosts"
    NEXT = "next"
    """It is its turn to claim."""
    STANDS_BY = "stands by"
    LEAVES = "leaves"
    """It has a claim that does not stand."""
    CANNOT = "cannot"


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What becomes of one node for a deployment."""

    node: NodeId
    name: str
    verdict: Verdict
    why: str
    """What it counts with, or why not, in words and figures."""
    score: int | None = None
    epoch: int | None = None
    needs_bytes: int | None = None
    free_bytes: int | None = None
    workers: tuple[WorkerShare, ...] = ()
    """Who lends memory for what it hosts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one deployment, as one node sees it."""

    model: ModelId
    wanted: int
    """Hosts."""
    decision: str
    nodes: tuple[NodePlan, ...]
    """All of them: hosts in their order, then the ranking, then the rest by name."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "nodes": [asdict(node) for node in self.nodes]}


def explain(
    deployment: Deployment, nodes: Iterable[Standing], demand: Mapping[ModelId, int]
) -> Plan:
    """`nodes`: all that are alive or suspected, the own one too; `demand`: hosts asked for by it,
    of a deployment that leaves that to demand."""
    everyone = tuple(nodes)
    wanted = wanted_replicas(deployment, demand)
    found = contenders(deployment, everyone)
    ranking = rank(deployment, everyone)
    standing, gap = found[:wanted], max(0, wanted - len(found))
    plans = [
        *(_host(c) for c in standing),
        *(_outranked(c, standing) for c in found[wanted:]),
        *(_candidate(ranking, place, gap) for place in range(len(ranking))),
    ]
    told = {plan.node for plan in plans}
    rest = (node for node in everyone if node.node not in told)
    plans.extend(_other(node, deployment) for node in sorted(rest, key=lambda n: n.name))
    return Plan(deployment.model, wanted, _decision(deployment, wanted, plans), tuple(plans))


def why_claim(deployment: Deployment, own: Ranked, others: Iterable[Standing], lead: str) -> str:
    """One line: why this node claims, and why not the others. `lead`: why somebody has to."""
    everyone = tuple(others)
    behind_it = [r for r in rank(deployment, everyone) if order(r) < order(own)]
    parts = [f"{r.node.name}: {behind(own.bid, r.bid)}" for r in behind_it[:_NAMED]]
    for node in sorted(everyone, key=lambda n: n.name):
        if len(parts) < _NAMED and (reason := not_ranked(node, deployment)) is not None:
            parts.append(f"{node.name}: {reason}")
    if unsaid := len(everyone) - len(parts):
        parts.append(f"{unsaid} more" if parts else f"{unsaid} others")
    line = f"{lead}; {own.node.name}: {merit(own.bid)}"
    return f"{line}; not {'; '.join(parts)}" if parts else line


def why_outranked(found: Sequence[Contender], own: NodeId, wanted: int) -> str:
    """One line: why the claim of `own` does not stand among those `found`, in their order."""
    mine = next(c for c in found if c.node.node == own)
    best = found[:wanted]
    names = ", ".join(c.node.name for c in best)
    last = best[-1]
    if last.claim.state is not mine.claim.state:
        reason = "which serves already"
    elif last.claim.epoch != mine.claim.epoch:
        reason = f"epoch {last.claim.epoch} against {mine.claim.epoch}"
    else:
        reason = f"both epoch {mine.claim.epoch}, the higher score stands"
    return f"{len(found)} claims, {wanted} wanted: {names} stands, {reason}"


def _host(of: Contender) -> NodePlan:
    claim = of.claim
    why = f"{claim.state}, epoch {claim.epoch}" + (f": {claim.reason}" if claim.reason else "")
    if claim.workers:
        shares = ", ".join(f"{w.name} ({w.share:.0%})" for w in claim.workers)
        why += f"; with memory of {shares}"
    node, verdict = of.node, Verdict.HOSTS
    return NodePlan(
        node.node, node.name, verdict, why, claim.score, claim.epoch, workers=claim.workers
    )


def _outranked(of: Contender, standing: Sequence[Contender]) -> NodePlan:
    node, claim = of.node, of.claim
    why = why_outranked((*standing, of), node.node, len(standing)) if standing else "not wanted"
    return NodePlan(node.node, node.name, Verdict.LEAVES, why, claim.score, claim.epoch)


def _candidate(ranking: Sequence[Ranked], place: int, gap: int) -> NodePlan:
    own = ranking[place]
    node, bid, why = own.node, own.bid, merit(own.bid)
    if place:
        why = f"{behind(ranking[0].bid, bid)} ({why})"
    too_soon = suits_less(bid, ranking[0].bid)
    verdict = Verdict.NEXT if place < gap and not too_soon else Verdict.STANDS_BY
    needs, free = bid.needs_bytes, bid.free_bytes
    return NodePlan(node.node, node.name, verdict, why, own.score, None, needs, free)


def _other(node: Standing, deployment: Deployment) -> NodePlan:
    claim, bid = node.claims.get(deployment.model), current_bid(node, deployment)
    why = not_ranked(node, deployment) or "not wanted"
    verdict = Verdict.CANNOT
    if claim is not None and claim.state is not ClaimState.FAILED:
        verdict = Verdict.LEAVES
        why = may_not_host(node, deployment) or why
    return NodePlan(
        node.node,
        node.name,
        verdict,
        why,
        epoch=None if claim is None else claim.epoch,
        needs_bytes=None if bid is None else bid.needs_bytes,
        free_bytes=None if bid is None else bid.free_bytes,
    )


def _decision(deployment: Deployment, wanted: int, plans: Sequence[NodePlan]) -> str:
    model = deployment.model
    if not wanted:
        return f"{model} is {'unloaded' if deployment.removed else 'asleep'}: nobody hosts it"
    hosts = [f"{p.name} ({p.why})" for p in plans if p.verdict is Verdict.HOSTS]
    to_come = [f"{p.name} ({p.why})" for p in plans if p.verdict is Verdict.NEXT]
    parts = [f"{', '.join(hosts)} hosts {model}"] if hosts else []
    if to_come:
        parts.append(f"{', '.join(to_come)} is to host {model}")
    if missing := wanted - len(hosts) - len(to_come):
        parts.append(f"no node for {missing} of {wanted} hosts of {model}")
    return "; ".join(parts)
