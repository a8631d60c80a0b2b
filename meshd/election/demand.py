"""How much each model is asked for, by whose clients, and which models nobody uses. Pure.

A request is counted by the node whose client sent it (`asked`, `answered`), so that none counts
twice. Each node tells the others its own *offered load* of each model: requests a second times
seconds of service a request, which is the number of slots its clients keep busy (Little's law). It
does not depend on how many hosts there are, so adding one does not make the need for it vanish. The
sum over all nodes is what replicas are counted from (scaling.py).

Rules, numbered as in the code:

1. Rates decay: a request counts half after `HALF_LIFE_S`. The decay is exact whenever it is read;
   there is no timer that must come.
2. The service time is the mean over answered requests, which decay alike. Time in a queue does not
   belong to it: who waits needs no slot yet, and counts by having asked. Before the first answer
   there is no load.
3. What is told changes only by more than `TOLD_CHANGE` of it: a rate is never still, and each
   change of an advert goes to every node. Below `FAINT_LOAD` it is told as nothing.
4. What other nodes tell is believed until they tell something else or are gone.
5. A model is idle when this node's engine has worked on nothing of it for a time and no node tells
   of a load: with several hosts, one that got no request says nothing about the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from meshd.ids import ModelId, NodeId

HALF_LIFE_S: Final = 60.0
"""Long enough that ten requests a minute are a figure and not a flicker (the spread is 15 %), short
enough that a crowd that has gone is forgotten in minutes."""
TOLD_CHANGE: Final = 0.25
"""Several times less than a whole replica's worth at the shares scaling.py works with."""
FAINT_LOAD: Final = 0.01
"""Slots; a second of work in a hundred."""
MAX_MODELS: Final = 1024
"""Models counted here, and of each other node. Full-policy: those with the least load go."""
MAX_LOAD: Final = 65_536.0
"""Slots that one node's clients can be said to keep busy of one model."""
_RATE_PER_COUNT: Final = math.log(2) / HALF_LIFE_S


class DecayedSum:
    """A sum in which everything counts half after `HALF_LIFE_S`."""

    __slots__ = ("_at", "_value")

    def __init__(self) -> None:
        self._value, self._at = 0.0, 0.0

    def add(self, amount: float, now: float) -> None:
        self._value, self._at = self.read(now) + amount, now

    def read(self, now: float) -> float:
        return self._value * math.exp2((self._at - now) / HALF_LIFE_S)  # 1


@dataclass(slots=True)
class _Asked:
    """By this node's clients, of one model."""

    requests: DecayedSum = field(default_factory=DecayedSum)
    answered: DecayedSum = field(default_factory=DecayedSum)
    service_s: DecayedSum = field(default_factory=DecayedSum)
    told: float = 0.0


@dataclass(slots=True)
class _Worked:
    """By this node's engine, on one model."""

    in_flight: int = 0
    last_at: float = 0.0


class Demand:
    """See the module's docstring. Times are monotonic seconds of this node."""

    def __init__(self) -> None:
        self._asked: dict[ModelId, _Asked] = {}
        self._worked: dict[ModelId, _Worked] = {}
        self._heard: dict[NodeId, Mapping[ModelId, float]] = {}

    # -- this node's clients ----------------------------------------------------------------------

    def asked(self, model: ModelId, now: float) -> None:
        """A client of this node asked for a model the mesh serves or can load."""
        if model not in self._asked and len(self._asked) >= MAX_MODELS:
            least = min(self._asked, key=lambda m: self._asked[m].requests.read(now))
            del self._asked[least]
        self._asked.setdefault(model, _Asked()).requests.add(1.0, now)

    def answered(self, model: ModelId, service_s: float, now: float) -> None:
        """An engine, here or elsewhere, was done with such a request after `service_s` (2)."""
        asked = self._asked.get(model)
        if asked is not None:
            asked.answered.add(1.0, now)
            asked.service_s.add(max(0.0, service_s), now)

    def rate(self, model: ModelId, now: float) -> float:
        """Requests a second of this node's clients."""
        asked = self._asked.get(model)
        return 0.0 if asked is None else asked.requests.read(now) * _RATE_PER_COUNT

    def service_s(self, model: ModelId, now: float) -> float | None:
        """Mean seconds of service a request of this node's clients; None before the first."""
        asked = self._asked.get(model)
        count = 0.0 if asked is None else asked.answered.read(now)
        # Both decay alike, so the mean stays until there are no digits left of them.
        return None if asked is None or count < 1e-9 else asked.service_s.read(now) / count

    # -- the mesh ---------------------------------------------------------------------------------

    def tell(self, now: float) -> Mapping[ModelId, float]:
        """This node's load by model, as others are to know it (3)."""
        for model, asked in self._asked.items():
            load = self._own_load(model, now)
            if load < FAINT_LOAD:
                asked.told = 0.0
            elif abs(load - asked.told) > TOLD_CHANGE * asked.told:
                asked.told = _two_digits(load)
        return MappingProxyType({m: a.told for m, a in self._asked.items() if a.told > 0})

    def hear(self, origin: NodeId, loads: Mapping[ModelId, float]) -> None:
        """What another node tells, instead of what it told before (4). What is no load counts as
        none, and more than `MAX_LOAD` as that."""
        told = {model: min(load, MAX_LOAD) for model, load in loads.items() if load > 0}
        heaviest = sorted(told, key=lambda model: (-told[model], model))[:MAX_MODELS]
        self._heard[origin] = {model: told[model] for model in heaviest}

    def keep_only(self, origins: Iterable[NodeId]) -> None:
        """Other nodes that are alive or suspected; the clients of all others are gone (4)."""
        alive = set(origins)
        self._heard = {origin: loads for origin, loads in self._heard.items() if origin in alive}

    def load(self, model: ModelId, now: float) -> float:
        """Slots that all clients of the mesh keep busy."""
        heard = sum(loads.get(model, 0.0) for loads in self._heard.values())
        return self._own_load(model, now) + heard

    # -- this node's engines ----------------------------------------------------------------------

    def began(self, model: ModelId, now: float) -> None:
        """An engine of this node is to work on a request, whoever sent it. Ends in `ended`."""
        worked = self._worked.setdefault(model, _Worked())
        worked.in_flight += 1
        worked.last_at = now

    def ended(self, model: ModelId, now: float) -> None:
        worked = self._worked.get(model)
        if worked is not None:
            worked.in_flight = max(0, worked.in_flight - 1)
            worked.last_at = now

    def became_ready(self, model: ModelId, now: float) -> None:
        """Its engine is loaded: from now on it can be found unused."""
        worked = self._worked.setdefault(model, _Worked())
        worked.last_at = max(worked.last_at, now)

    def stopped(self, model: ModelId) -> None:
        """Its engine is gone, and with it what it worked on."""
        self._worked.pop(model, None)

    def busy(self, model: ModelId) -> bool:
        worked = self._worked.get(model)
        return worked is not None and worked.in_flight > 0

    def last_at(self, model: ModelId) -> float | None:
        """When this node's engine last worked on it, or became ready; None if it has none."""
        worked = self._worked.get(model)
        return None if worked is None else worked.last_at

    def idle(self, now: float, idle_unload_s: float) -> tuple[ModelId, ...]:
        """Models whose engine here has been without work that long, while nobody in the mesh has
        a load of them (5); longest unused first. A load of one slot takes seven half-lives to fade,
        so a shorter `idle_unload_s` may be exceeded by some minutes."""
        idle = [
            (worked.last_at, model)
            for model, worked in self._worked.items()
            if worked.in_flight == 0
            and now - worked.last_at >= idle_unload_s
            and self.load(model, now) < FAINT_LOAD
        ]
        return tuple(model for _, model in sorted(idle))

    def _own_load(self, model: ModelId, now: float) -> float:
        return self.rate(model, now) * (self.service_s(model, now) or 0.0)


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
