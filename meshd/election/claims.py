"""Which of several claims of a model stand. Pure functions over what nodes say.

1. A claim contends if it is PREPARING or READY and its node may host the deployment. Who failed is
   passed over, who drains has given up.
2. READY goes before PREPARING: who serves is not displaced by who may come to serve, and never by
   a better score. Then the higher epoch, the higher score, the higher node id.
3. As many as replicas are wanted stand, the first of that order. The others give up, each by its
   own decision; the engine of one that stands is never touched.
4. Where fewer contend, those READY whose nodes may host no longer stand in, in the same order: they
   serve on until they are replaced.
5. A host that stands, or stands in, needs a higher epoch than every claim that does not. One that
   FAILED is no rival: its node tries again and again, and takes a higher one each time. No claim
   that stands is outbid, so two hosts that see each other do not outbid each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshd.election.ranking import may_not_host
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Claim, ClaimState, Deployment

CONTENDING = frozenset({ClaimState.PREPARING, ClaimState.READY})
RIVALS = CONTENDING | {ClaimState.DRAINING}
"""Served by somebody, or to be served (5)."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A node with the claim by which it contends."""

    node: Standing
    claim: Claim

    @property
    def precedence(self) -> tuple[bool, int, int, NodeId]:
        """Rule 2; higher goes before."""
        claim = self.claim
        return claim.state is ClaimState.READY, claim.epoch, claim.score, self.node.node


def wanted_replicas(deployment: Deployment, demand: Mapping[ModelId, int]) -> int:
    """How many hosts it should have; none while it is asleep or removed, one where it is pinned."""
    if deployment.removed or deployment.asleep:
        return 0
    replicas = deployment.replicas
    wanted = max(1, demand.get(deployment.model, 1) if replicas is None else replicas)
    return wanted if deployment.host is None else 1


def contenders(deployment: Deployment, nodes: Iterable[Standing]) -> tuple[Contender, ...]:
    """Who contends (1), in the order of rule 2; the first ones stand (3)."""
    found = [
        Contender(node, claim)
        for node in nodes
        if (claim := node.claims.get(deployment.model)) is not None
        and claim.state in CONTENDING
        and may_not_host(node, deployment) is None
    ]
    return tuple(sorted(found, key=lambda c: c.precedence, reverse=True))


def highest_epoch(model: ModelId, nodes: Iterable[Standing]) -> int:
    """Of all claims there are, of any state; 0 if there is none."""
    return max((c.epoch for n in nodes if (c := n.claims.get(model)) is not None), default=0)


def standing(
    deployment: Deployment, nodes: Iterable[Standing], found: Sequence[Contender], wanted: int
) -> tuple[Contender, ...]:
    """Whose claims stand, or stand in (3, 4). `found`: those that contend, in their order."""
    contending = {c.node.node for c in found}
    serving_on = [
        Contender(node, claim)
        for node in nodes
        if (claim := node.claims.get(deployment.model)) is not None
        and claim.state is ClaimState.READY
        and node.node not in contending
    ]
    serving_on.sort(key=lambda c: c.precedence, reverse=True)
    return (*found, *serving_on)[:wanted]


def outranked_epoch(
    model: ModelId, nodes: Iterable[Standing], stand: Iterable[Contender]
) -> int | None:
    """The highest epoch among the rivals of those that stand (5); None if they have none."""
    standing = {c.node.node for c in stand}
    return max(
        (
            claim.epoch
            for node in nodes
            if node.node not in standing
            and (claim := node.claims.get(model)) is not None
            and claim.state in RIVALS
        ),
        default=None,
    )


def ready_elsewhere(found: Iterable[Contender], own: NodeId) -> int:
    """How many other contenders serve."""
    return sum(c.claim.state is ClaimState.READY and c.node.node != own for c in found)
