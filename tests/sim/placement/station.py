"""One simulated node: the real election, book of deployments and ledger; all around is modelled.

The disk keeps what was synced before a crash. Bids are made here as the node's shell would make
them; some of them lie. What it cannot know (what others said, who is alive) the mesh tells it.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshd.election.deployments import DeploymentBook, Rejected, Written
from meshd.election.election import Election
from meshd.election.hosted import Phase
from meshd.election.words import (
    CapacityMeasured,
    DemandMoved,
    DeploymentsSeen,
    DrainAsked,
    Effect,
    EpochSaved,
    Event,
    HostChanged,
    HostMeasured,
    HostReported,
    LeasesChanged,
    NodesSeen,
    Offer,
    OffersMade,
    PublishClaims,
    PutToSleep,
    SaveEpoch,
    Standing,
    StartHost,
    StopHost,
)
from meshd.ids import ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.view import Claim, Deployment, ModelState
from tests.sim.placement.agenda import Agenda
from tests.sim.placement.bidding import offer_for
from tests.sim.placement.engines import Engines, Luck
from tests.sim.placement.traces import brief

TOO_MANY = 200
"""Events in a row at one moment that only a machine that chases its own tail makes."""


@dataclass(frozen=True, slots=True)
class Word:
    """What a node says of itself; the later run and the higher number stand."""

    boot: int
    number: int
    standing: Standing

    @property
    def stamp(self) -> tuple[int, int]:
        return self.boot, self.number


class Surroundings(Protocol):
    """What a station needs of the world."""

    agenda: Agenda
    chance: random.Random
    luck: Luck
    look_s: float
    """How long a node gathers news before its machine sees them, at most; and if that is long,
    before it makes its offers anew and tells the others."""
    late: float
    """The chance that whatever it does takes twenty times as long."""

    def needs(self, deployment: Deployment) -> int: ...

    def said(self, station: Station) -> None: ...

    def wrote(self, station: Station) -> None: ...

    def ordered(self, station: Station, event: Event, effects: Sequence[Effect]) -> None: ...

    def handled(self, station: Station, event: Event, effects: Sequence[Effect]) -> None: ...


@dataclass(slots=True)
class Disk:
    """What is synced."""

    epochs: dict[ModelId, int] = field(default_factory=dict)
    records: tuple[Deployment, ...] = ()


class Station:
    def __init__(
        self, index: int, node: NodeId, capacity: Mapping[str, int], world: Surroundings
    ) -> None:
        self.index, self.id, self.name = index, node, f"n{index}"
        self.capacity = dict(capacity)
        self.member = True
        self.up = False
        self.boot = 0
        self.disk = Disk()
        self.weights: set[ModelId] = set()
        self.doomed: set[ModelId] = set()
        """Models it promises to host and never can."""
        self.mute: set[ModelId] = set()
        """Models it promises to host and never claims."""
        self.demand: Mapping[ModelId, int] = {}
        self.busy: set[ModelId] = set()
        self.log: deque[str] = deque(maxlen=40)
        self._world = world

    # -- its life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """A new run: what it knows is on its disk."""
        self.boot += 1
        self.up, self.draining = True, False
        chance = self._world.chance
        self.machine = Election(self.id, self.name, dict(self.disk.epochs))
        self.book = DeploymentBook(self.disk.records)
        self.engines = Engines(
            self.after, self, self._world.luck, chance, lambda model: model in self.doomed
        )
        self.alive: set[int] = set()
        self.known: dict[int, Word] = {}
        self.claims: tuple[Claim, ...] = ()
        self.offers: dict[ModelId, Offer] = {}
        self.leased: Mapping[str, int] = {}
        self.seen: tuple[Standing, ...] = ()
        self.shown: tuple[Deployment, ...] = ()
        self._number = 0
        self._queue: deque[Event] = deque()
        self._wakes_at: float | None = None
        self._looking = self._offering = self._speaking = False
        self.word = Word(self.boot, 0, self._standing())
        first: list[Callable[[], None]] = [
            lambda: self.post(CapacityMeasured(dict(self.capacity))),
            self._show_deployments,
            self._offer,
            self._look,
            lambda: self.post(DemandMoved(self.demand)),
        ]
        chance.shuffle(first)
        for step in first:
            self.after(chance.uniform(0.0, 0.1), step)
        self.speak()

    def crash(self) -> None:
        """What was not synced is lost; its engines die with it."""
        self.up = False

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        """If this run is still the one then."""
        boot = self.boot
        self._world.agenda.after(
            delay_s, lambda: action() if self.up and self.boot == boot else None
        )

    # -- what happens to it -----------------------------------------------------------------------

    def post(self, event: Event) -> None:
        self._queue.append(event)
        if len(self._queue) > 1:
            return
        now = self._world.agenda.now
        count = 0
        while self._queue:
            count += 1
            assert count < TOO_MANY, f"{self.name} never comes to rest: {self._queue[0]}"
            event = self._queue[0]
            effects = tuple(self.machine.handle(event, now))
            if effects or type(event) is not NodesSeen:
                self.log.append(f"{now:.3f} {brief(event)} -> {', '.join(map(brief, effects))}")
            self._world.ordered(self, event, effects)
            for effect in effects:
                self._do(effect)
            self._world.handled(self, event, effects)
            self._queue.popleft()
        self._arm()

    def ignores(self, model: ModelId) -> bool:
        """It never finds that it is its turn, unless it hosts it already."""
        hosted = self.machine.hosted.get(model)
        return model in self.mute and (hosted is None or hosted.phase is Phase.FAILED)

    def heard(self, index: int, word: Word) -> bool:
        """Whether that was news."""
        before = self.known.get(index)
        if before is not None and before.stamp >= word.stamp:
            return False
        self.known[index] = word
        self.look()
        return True

    def meet(self, words: Mapping[int, Word]) -> None:
        """It knows all of these, and that they are alive."""
        self.known = {index: word for index, word in words.items() if index != self.index}
        self.alive = set(self.known)

    def merged(self, records: Iterable[Deployment]) -> None:
        if self.book.merge(records):
            self._recorded()

    def write(self, change: Callable[[DeploymentBook], Written | Rejected]) -> None:
        """An operator's wish, or its own."""
        written = change(self.book)
        if isinstance(written, Written) and written.changed:
            self._recorded()
            self._world.wrote(self)

    def drain(self, on: bool) -> None:
        self.draining = on
        self.post(DrainAsked(on))
        self.reoffer()
        self.speak()

    def demands(self, replicas: Mapping[ModelId, int], busy: set[ModelId]) -> None:
        self.demand, self.busy = replicas, busy
        if self.up:
            self.post(DemandMoved(replicas))
            self.reoffer()

    def recapacitate(self, capacity: Mapping[str, int]) -> None:
        """Devices were lost, or are back."""
        lost = [device for device in self.capacity if device not in capacity]
        self.capacity = dict(capacity)
        if self.up:
            self.post(CapacityMeasured(dict(capacity)))
            for device in lost:
                self.engines.lose(device)
            self.reoffer()

    def reported(self, model: ModelId, state: ModelState, reason: str | None) -> None:
        self.post(HostReported(model, state, reason))
        self.reoffer()

    def measured(self, model: ModelId, memory: Mapping[str, int]) -> None:
        self.post(HostMeasured(model, memory))

    # -- what it does in a while, once for all that happened meanwhile ----------------------------

    def look(self) -> None:
        if not self._looking:
            self._looking = True
            self.after(self._soon(self._world.look_s), self._look)

    def reoffer(self) -> None:
        if not self._offering:
            self._offering = True
            self.after(self._soon(max(0.05, self._world.look_s)), self._offer)

    def speak(self) -> None:
        if not self._speaking:
            self._speaking = True
            self.after(self._soon(max(0.02, self._world.look_s)), self._speak)

    def _look(self) -> None:
        self._looking = False
        standings = (
            self.known[i].standing if i in self.known else Standing(node_id(i), f"n{i}")
            for i in sorted(self.alive)
        )
        self.seen = tuple(standings)
        self.post(NodesSeen(self.seen))

    def _offer(self) -> None:
        self._offering = False
        self.offers = {
            d.model: offer_for(self, d, self._world.needs(d))
            for d in self.book.records
            if not d.removed
        }
        offers = (o for model, o in self.offers.items() if not self.ignores(model))
        self.post(OffersMade(tuple(offers)))
        self.speak()

    def _speak(self) -> None:
        self._speaking = False
        standing = self._standing()
        if standing == self.word.standing and self._number:
            return
        self._number += 1
        self.word = Word(self.boot, self._number, standing)
        self._world.said(self)

    def _recorded(self) -> None:
        records = self.book.records
        self.after(self._soon(0.1), lambda: setattr(self.disk, "records", records))
        self._show_deployments()
        self.reoffer()

    def _show_deployments(self) -> None:
        self.shown = self.book.records
        self.post(DeploymentsSeen(self.shown))

    # -- orders of its machine --------------------------------------------------------------------

    def _do(self, effect: Effect) -> None:
        match effect:
            case SaveEpoch():
                self.after(self._soon(0.05), lambda: self._saved(effect))
            case StartHost():
                lease = self.machine.ledger.leases.get(effect.deployment.model)
                assert lease is not None, f"{self.name} started without a lease: {effect}"
                self.weights.add(effect.deployment.model)
                self.engines.start(effect.deployment, effect.epoch, lease.memory)
            case StopHost():
                self.engines.stop(effect.model, drain=effect.drain)
            case PublishClaims():
                self.claims = effect.claims
                self.speak()
            case LeasesChanged():
                self.leased = effect.leased
                self.reoffer()
            case PutToSleep():
                self.write(lambda book: book.put_to_sleep(effect.model, self.id))
            case HostChanged():
                pass

    def _saved(self, order: SaveEpoch) -> None:
        """Sometimes it is on disk, and a crash comes before anybody is told."""
        before = self.disk.epochs.get(order.model, 0)
        self.disk.epochs[order.model] = max(before, order.epoch)
        saved = EpochSaved(order.model, order.epoch)
        self.after(self._soon(0.02), lambda: self.post(saved))

    def _arm(self) -> None:
        due = self.machine.due()
        if due is None or (self._wakes_at is not None and self._wakes_at <= due):
            return
        now = self._world.agenda.now
        self._wakes_at = max(due, now + 1e-6)
        self.after(self._wakes_at - now, self._wake)

    def _wake(self) -> None:
        now = self._world.agenda.now
        if self._wakes_at is None or now < self._wakes_at - 1e-9:
            return
        self._wakes_at = None
        self.post(Tick())
        due = self.machine.due()
        assert due is None or due > now, f"{self.name} would tick for ever: due {due} at {now}"

    def _standing(self) -> Standing:
        bids = {model: offer.bid for model, offer in self.offers.items()}
        claims = {claim.model: claim for claim in self.claims}
        return Standing(self.id, self.name, bids, claims, self.draining, self.member)

    def _soon(self, most_s: float) -> float:
        """Now and then much later than usual."""
        chance = self._world.chance
        return chance.uniform(0.0, most_s * (20.0 if chance.random() < self._world.late else 1.0))


def node_id(index: int) -> NodeId:
    """Of the form that real ones have."""
    digest = hashlib.sha256(str(index).encode()).digest()
    return NodeId(base64.b32encode(digest).decode().lower().rstrip("="))
