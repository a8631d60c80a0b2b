"""A model that is settled is looked at again as soon as an event can have touched it: what an
election does is never less than what one does that looks at all models again after every event."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from meshd.election.election import Election
from meshd.election.words import (
    CapacityMeasured,
    DemandMoved,
    DeploymentsSeen,
    DrainAsked,
    Effect,
    EpochSaved,
    Event,
    HostReported,
    LeasesChanged,
    NodesSeen,
    Offer,
    OffersMade,
    SaveEpoch,
    Standing,
    StartHost,
    StopHost,
)
from meshd.ids import ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.view import Bid, Claim, ClaimState, Deployment, ModelState, Suits
from tests.election.words import GB, OWN, record

MODELS = [ModelId(f"m{i}") for i in range(4)]
OTHERS = ["a", "b", "x"]


class Surroundings:
    """What may be said to a node, at random, and how its own orders end."""

    def __init__(self, seed: int) -> None:
        self.chance = Random(seed)
        self.draining = False
        self.others = {name: Standing(NodeId(name), name) for name in OTHERS}
        self.records = {model: record(1, model) for model in MODELS}
        self.to_come: list[Event] = []

    def event(self) -> Event:
        chance = self.chance
        if self.to_come and chance.random() < 0.5:
            return self.to_come.pop(chance.randrange(len(self.to_come)))
        match chance.randrange(7):
            case 0 | 1:
                name = chance.choice(OTHERS)
                self.others[name] = self._standing(name)
                here = [other for other in self.others.values() if chance.random() < 0.9]
                return NodesSeen(tuple(here))
            case 2:
                model = chance.choice(MODELS)
                self.records[model] = self._record(self.records[model])
                return DeploymentsSeen(tuple(self.records.values()))
            case 3 | 4:
                return OffersMade(tuple(Offer(self._bid(m), {"CUDA0": GB}) for m in MODELS))
            case 5:
                return DemandMoved({model: chance.randint(1, 3) for model in MODELS})
            case _:
                self.draining = self.draining is (chance.random() < 0.5)
                return chance.choice((DrainAsked(self.draining), Tick(), Tick()))

    def obey(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SaveEpoch():
                    self.to_come.append(EpochSaved(effect.model, effect.epoch))
                case StartHost():
                    state = self.chance.choice((ModelState.READY, ModelState.FAILED))
                    self.to_come.append(HostReported(effect.deployment.model, state))
                case StopHost():
                    self.to_come.append(HostReported(effect.model, ModelState.ABSENT))
                case LeasesChanged():
                    offers = tuple(Offer(self._bid(m), {"CUDA0": GB}) for m in MODELS)
                    self.to_come.append(OffersMade(offers))
                case _:
                    pass

    def _standing(self, name: str) -> Standing:
        chance = self.chance
        claims = {
            model: Claim(model, chance.randint(1, 9), chance.choice(list(ClaimState)), 0, "")
            for model in MODELS
            if chance.random() < 0.3
        }
        bids = {model: self._bid(model) for model in MODELS if chance.random() < 0.5}
        return Standing(NodeId(name), name, bids, claims, draining=chance.random() < 0.2)

    def _bid(self, model: ModelId) -> Bid:
        suits = self.chance.choice((Suits.YES, Suits.YES, Suits.NO, Suits.SPLIT))
        return Bid(model, 99, suits, headroom=self.chance.randint(0, 15))

    def _record(self, before: Deployment) -> Deployment:
        chance = self.chance
        return replace(
            before,
            version=before.version + 1,
            replicas=chance.choice((None, 1, 2)),
            host=chance.choice((None, None, None, OWN, NodeId("a"))),
            asleep=chance.random() < 0.2,
            removed=chance.random() < 0.1,
        )


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_missed(seed: int) -> None:
    world, now, claimed = Surroundings(seed), 0.0, 0
    one, all_over_again = (Election(OWN, OWN, {}) for _ in range(2))
    draining = False
    for election in (one, all_over_again):
        election.handle(CapacityMeasured({"CUDA0": 3 * GB}), now)
    for _ in range(150):
        now += world.chance.choice((0.0, 0.3, 3.0, 20.0))
        event = world.event()
        draining = event.on if isinstance(event, DrainAsked) else draining
        effects = one.handle(event, now)
        assert all_over_again.handle(event, now) == effects
        assert all_over_again.handle(DrainAsked(draining), now) == [], event
        claimed += sum(isinstance(effect, SaveEpoch) for effect in effects)
        world.obey(effects)
    assert claimed
