"""What an election knows of the mesh: records, other nodes, epochs, who hosted last. Pure.

Other nodes' words are replaced whole, so what is kept of them is bounded by the adverts; last hosts
are kept by models that a deployment was ever seen of. Epochs count as soon as they are heard, also
of models whose record is still on its way: the claim may be gone when it comes.

In a large mesh a view says little that is new. What is the same object as before is taken to say
the same, and is not looked into.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from meshd.election.claims import Contender
from meshd.election.words import (
    DemandMoved,
    DeploymentsSeen,
    DrainAsked,
    NodesSeen,
    Standing,
)
from meshd.ids import ModelId, NodeId
from meshd.view import Bid, Claim, ClaimState, Deployment

MAX_EPOCHS: Final = 4096
"""Models whose epochs are kept as heard. Full-policy as in the store: the lowest one goes, and
becomes the floor of all that are not kept."""
_MOVING = (ClaimState.READY, ClaimState.DRAINING)


class Outlook:
    """`epochs`: the highest epoch this node saved, by model; `floor`: of all models without one."""

    def __init__(
        self, own: NodeId, name: str, epochs: Mapping[ModelId, int], floor: int = 0
    ) -> None:
        self.own = own
        self.name = name
        self.draining = False
        self.demand: Mapping[ModelId, int] = {}
        self.heard = False
        """The other nodes were named at least once, be it that there is none."""
        self.others: dict[NodeId, Standing] = {}
        self.deployments: dict[ModelId, Deployment] = {}
        self.seen_at: dict[ModelId, float] = {}
        """When the record that there is came."""
        self._claimants: dict[ModelId, dict[NodeId, Standing]] = {}
        """The others with a claim, of any state."""
        self._own = dict(epochs)
        """Saved or drawn here."""
        self._heard: dict[ModelId, int] = {}
        """Claimed by others, or by an earlier run of this node."""
        self._floor = floor
        self._last_hosts: dict[ModelId, Mapping[NodeId, str]] = {}
        """Names of those that hosted when there were last enough of them."""

    def take(
        self, event: NodesSeen | DeploymentsSeen | DemandMoved | DrainAsked, now: float
    ) -> Collection[ModelId]:
        """Models of which a record, a claim, whether a claimant may host, or how many hosts are
        wanted may be otherwise now."""
        match event:
            case NodesSeen():
                return self.see_nodes(event.nodes)
            case DeploymentsSeen():
                return self.see_deployments(event.records, now)
            case DemandMoved():
                self.demand = event.replicas
            case DrainAsked():
                self.draining = event.on
        return self.deployments

    def see_nodes(self, nodes: Iterable[Standing]) -> Collection[ModelId]:
        """A word of this node itself is of an earlier run of it: only its epochs count."""
        before, self.others = self.others, {node.node: node for node in nodes}
        if (earlier := self.others.pop(self.own, None)) is not None:
            self._hear_epochs(earlier)
        new = [node for id_, node in self.others.items() if before.get(id_) is not node]
        touched: set[ModelId] = set()
        for id_ in (before.keys() - self.others.keys()).union(node.node for node in new):
            for model in before[id_].claims if id_ in before else ():
                del self._claimants[model][id_]
                touched.add(model)
        for node in new:
            for model in node.claims:
                self._claimants.setdefault(model, {})[node.node] = node
                touched.add(model)
            self._hear_epochs(node)
        for model in touched:
            if not self._claimants[model]:
                del self._claimants[model]
        first, self.heard = not self.heard, True
        return self.deployments if first else touched

    def see_deployments(self, records: Iterable[Deployment], now: float) -> Collection[ModelId]:
        before = self.deployments
        self.deployments = {r.model: r for r in records}
        self.seen_at = {
            model: self.seen_at[model]
            if model in before and before[model].stamp == record.stamp
            else now
            for model, record in self.deployments.items()
        }
        return {
            *(m for m, record in self.deployments.items() if before.get(m) is not record),
            *(m for m in before if m not in self.deployments),
        }

    def myself(
        self, model: ModelId, *, claim: Claim | None = None, bid: Bid | None = None
    ) -> Standing:
        """This node as the others see it, as far as it is about `model`."""
        return Standing(
            self.own,
            self.name,
            MappingProxyType({} if bid is None else {model: bid}),
            MappingProxyType({} if claim is None else {model: claim}),
            self.draining,
        )

    def claimants(self, model: ModelId, own: Claim | None) -> Sequence[Standing]:
        """All nodes with a claim of `model`, this one too if it has one."""
        others = self._claimants.get(model, {}).values()
        return [*others] if own is None else [*others, self.myself(model, claim=own)]

    # -- epochs -----------------------------------------------------------------------------------

    def epoch(self, model: ModelId) -> int:
        """The highest one that was ever heard, saved or drawn here."""
        return max(self._own.get(model, 0), self.heard_epoch(model))

    def heard_epoch(self, model: ModelId) -> int:
        """The highest one that is somebody else's, as far as can be told."""
        return max(self._heard.get(model, 0), self._floor)

    def next_epoch(self, model: ModelId) -> int:
        """Draw a higher one; no two draws are equal."""
        self._own[model] = self.epoch(model) + 1
        return self._own[model]

    def _hear_epochs(self, node: Standing) -> None:
        for model, claim in node.claims.items():
            if claim.epoch > self.heard_epoch(model):
                self._heard[model] = claim.epoch
        while len(self._heard) > MAX_EPOCHS:
            lowest = min(self._heard, key=self._heard.__getitem__)
            self._floor = max(self._floor, self._heard.pop(lowest))

    # -- who hosted -------------------------------------------------------------------------------

    def note_hosts(self, model: ModelId, standing: Sequence[Contender], wanted: int) -> None:
        if wanted == 0:
            self._last_hosts.pop(model, None)
        elif len(standing) == wanted:
            self._last_hosts[model] = {c.node.node: c.node.name for c in standing}

    def cause_of_claim(
        self, deployment: Deployment, standing: Sequence[Contender], wanted: int, failures: int
    ) -> tuple[str, str]:
        """Why there is a gap: the word for the metrics, and words for people."""
        model = deployment.model
        gone = [
            name
            for node, name in self._last_hosts.get(model, {}).items()
            if node not in self.others and node != self.own
        ]
        if gone:
            return "died", f"{', '.join(sorted(gone))} is gone"
        holding = {c.node.node for c in standing}
        for node in sorted(self.claimants(model, None), key=lambda n: n.node):
            claim = node.claims[model]
            if claim.state is ClaimState.FAILED:
                return "failed", f"{node.name} failed: {claim.reason}"
            if claim.state in _MOVING and node.node not in holding:
                return "moved", f"{node.name} is to give it up"
        if failures:
            return "failed", f"trying again after {failures} failures in a row"
        if standing:
            return "scaled", f"host {len(standing) + 1} of {wanted}"
        return "first", "nobody hosts it"
