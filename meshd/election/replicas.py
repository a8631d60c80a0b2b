"""How many hosts each model has by demand: scaling.py for all of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from meshd.election.claims import contenders
from meshd.election.demand import Demand
from meshd.election.ranking import rank
from meshd.election.scaling import Scale, initial, scaled
from meshd.election.words import Standing
from meshd.ids import ModelId
from meshd.view import Deployment, ModelView


class Replicas:
    def __init__(self) -> None:
        self._scales: dict[ModelId, Scale] = {}
        self.wanted: Mapping[ModelId, int] = {}
        """By model, of those deployments that leave it to demand."""

    def look(
        self,
        deployments: Iterable[Deployment],
        nodes: Sequence[Standing],
        models: Mapping[ModelId, ModelView],
        demand: Demand,
        now: float,
    ) -> bool:
        """Whether `wanted` changed. `nodes`: all that are alive or suspected, the own one too."""
        kept: dict[ModelId, Scale] = {}
        for deployment in deployments:
            model = deployment.model
            if deployment.removed or deployment.asleep or deployment.replicas is not None:
                continue
            hosts = len(contenders(deployment, nodes))
            most = hosts + len(rank(deployment, nodes))
            seen = models.get(model)
            slots = max((h.slots for h in seen.hosts), default=0) if seen is not None else 0
            scale = self._scales.get(model) or initial(hosts)
            kept[model] = scaled(scale, demand.load(model, now), slots, now, most=most)
        self._scales = kept
        wanted = {model: scale.replicas for model, scale in kept.items()}
        changed = wanted != self.wanted
        self.wanted = wanted
        return changed
