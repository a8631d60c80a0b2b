"""Which of several claims of a model stand. Pure functions over what nodes say.

1. A claim contends if it is PREPARING or READY and its node may host the deployment. Who failed is
   passed over, who drains has given up.
2. READY goes before PREPARING: who serves is not displaced by who may come to serve, and never by
   a better score. Then the higher epoch, the higher score, the higher node id.
3. As many as replicas are wanted stand, the first of that order. The others give up, each by its
   own decision; the engine of one that stands is never touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshd.election.ranking import may_not_host
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Claim, ClaimState, Deployment

CONTENDING = frozenset({ClaimState.PREPARING, ClaimState.READY})


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


def outranked_epoch(
    deployment: Deployment, nodes: Iterable[Standing], stand: Iterable[Contender]
) -> int:
    """The highest epoch among claims that do not stand. A host that stands with a lower one must
    take a higher one: workers serve only the newest epoch they know."""
    standing = {c.node.node for c in stand}
    return highest_epoch(deployment.model, (n for n in nodes if n.node not in standing))


def ready_elsewhere(found: Iterable[Contender], own: NodeId) -> int:
    """How many other contenders serve."""
    return sum(c.claim.state is ClaimState.READY and c.node.node != own for c in found)
