"""What must hold after every event, and what must be true when all has come to rest.

After every event, of the node that handled it:

1. What it leases fits its devices, but for engines that took more than was estimated and devices
   that were lost; nothing is leased while it does not.
2. An engine runs only with a lease and a claim; a claim is READY only if the engine is.
3. A claim's epoch is on disk before the claim is published. Of one model on one node epochs never
   fall, also over crashes; a claim that is made anew has a higher one than any before, and than
   any that its node had seen.
4. An engine that is READY is stopped only because nobody wants it, its options changed, its node
   drains, its pin or its replicas moved, or enough others are READY with higher claims. Never for
   a better score, and never for somebody who only prepares.
5. A node claims only when it is its turn (turns.py), and not if others were first meanwhile. Only
   those that never claim are passed over, and only when they have had the time to.
6. A worker never serves a host of a model at an older epoch than it served that host before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from meshd.election.ledger import Holder, Lease
from meshd.election.turns import TURN_S
from meshd.election.words import (
    CapacityMeasured,
    DeploymentsSeen,
    Effect,
    EpochSaved,
    Event,
    HostMeasured,
    LeasesChanged,
    NodesSeen,
    OffersMade,
    PutToSleep,
    SaveEpoch,
    Standing,
    StartHost,
    StopHost,
)
from meshd.ids import ModelId, NodeId
from meshd.view import Claim, ClaimState, Deployment, ModelState, Suits
from tests.sim.placement.agenda import Agenda
from tests.sim.placement.turns import assert_no_better_way, assert_turn, record_of, standing

if TYPE_CHECKING:
    from tests.sim.placement.station import Station


class Judge:
    def __init__(self, agenda: Agenda) -> None:
        self.agenda = agenda
        self.changed_at = 0.0
        """When a claim last said otherwise."""
        self.doomed: set[ModelId] = set()
        """Models that some node promises to host and never can."""
        self.mute: set[tuple[NodeId, ModelId]] = set()
        """Who promises to host a model and never claims it."""
        self.passed = 0
        """Claims before one of those."""
        self._bidding_since: dict[tuple[int, int, ModelId, NodeId], float] = {}
        """How long a node sees one of those bid and claim nothing."""
        self.starts = self.stops = 0
        self.trace = hashlib.blake2b(digest_size=16)
        """Over every event that was handled, its time and what it led to."""
        self._claims: dict[int, Mapping[ModelId, Claim]] = {}
        """As published last, of the present run."""
        self._highest: dict[tuple[int, ModelId], int] = {}
        self._leases: dict[int, Mapping[Holder, Lease]] = {}
        self._excused: set[int] = set()
        self._outdated: set[int] = set()
        """Nodes whose leases changed after their offers."""
        self._known_since: dict[tuple[int, int, ModelId, tuple[int, NodeId]], float] = {}
        self.known: dict[tuple[int, int, ModelId], int] = {}
        """The highest epoch that a run of a node was shown."""
        self.rivals: dict[tuple[int, int, ModelId], int] = {}
        """The same of claims that had not failed."""
        self._noted: dict[int, Mapping[NodeId, Standing]] = {}
        """Whose claims are in those two, by what was shown last."""
        self._served: dict[tuple[int, ModelId, int], int] = {}

    def started(self, station: Station) -> None:
        self._noted.pop(station.index, None)
        self._claims[station.index] = {}
        self._leases[station.index] = {}
        self._excused.discard(station.index)
        self._outdated.add(station.index)

    def crashed(self, station: Station) -> None:
        self._claims[station.index] = {}
        self.changed_at = self.agenda.now

    def ordered(self, station: Station, event: Event, effects: Sequence[Effect]) -> None:
        """Before the orders are carried out."""
        if isinstance(event, DeploymentsSeen):
            for record in event.records:
                since = (station.index, station.boot, record.model, record.stamp)
                self._known_since.setdefault(since, self.agenda.now)
        if isinstance(event, OffersMade):
            self._outdated.discard(station.index)
        for effect in effects:
            match effect:
                case SaveEpoch():
                    self._check_turn(station, event, effect.model)
                case PutToSleep():
                    model = effect.wanted_for
                    silent = self._silent(station, model)
                    assert_no_better_way(station, record_of(station, model), silent)
                case StartHost():
                    self.starts += 1
                    self._check_start(station, effect.deployment.model)
                case StopHost():
                    self.stops += 1
                    self._check_stop(station, effect)
                case _:
                    pass
        if any(isinstance(effect, LeasesChanged) for effect in effects):
            self._outdated.add(station.index)

    def handled(self, station: Station, event: Event, effects: Sequence[Effect]) -> None:
        """When they have been."""
        what = f"{self.agenda.now:.6f} {station.index} {type(event).__name__} {len(effects)}"
        self.trace.update(what.encode())
        self._check_memory(station, event)
        if isinstance(event, NodesSeen):
            self._note_epochs(station)
            self._note_mute(station)
        if effects:
            self._check_claims(station)
        self._check_engines(station)

    def works(self, host: Station, worker: Station) -> None:
        """`worker` serves all that `host` is ready to have served."""
        for claim in host.claims:
            if claim.state is ClaimState.READY:
                key = (worker.index, claim.model, host.index)
                assert claim.epoch >= self._served.get(key, 0), (  # 6
                    f"{worker.name} served {host.name} for {claim.model} at epoch "
                    f"{self._served[key]}, and now at {claim.epoch}"
                )
                self._served[key] = claim.epoch

    def _check_memory(self, station: Station, event: Event) -> None:  # 1
        ledger = station.machine.ledger
        before, after = self._leases[station.index], dict(ledger.leases)
        self._leases[station.index] = after
        leased = ledger.leased()
        for model, lease in after.items():
            if model not in before:
                over = [d for d in lease.memory if leased[d] > station.capacity.get(d, 0)]
                assert not over, f"{station.name} leased {model} where nothing is free: {over}"
        if ledger.overcommitted() is None:
            self._excused.discard(station.index)
            return
        if isinstance(event, HostMeasured | CapacityMeasured):
            self._excused.add(station.index)
        assert station.index in self._excused, f"{station.name}: {ledger.overcommitted()}"

    def _check_engines(self, station: Station) -> None:  # 2
        claimed = {claim.model: claim for claim in station.claims}
        for model, engine in station.engines.running.items():
            lease = station.machine.ledger.holds(model)
            assert lease, f"{station.name} runs {model} without a lease"
            assert model in claimed, f"{station.name} runs {model} without a claim"
            if engine.state is ModelState.READY:
                leased = station.machine.ledger.leases[model].memory
                assert leased == engine.memory, f"{station.name} took {engine.memory}, not {leased}"
            assert engine.epoch <= claimed[model].epoch, (station.name, engine, claimed[model])

    def _check_claims(self, station: Station) -> None:  # 2, 3
        before = self._claims[station.index]
        after = {claim.model: claim for claim in station.claims}
        if before == after:
            return
        if self._told(station, before) != self._told(station, after):
            self.changed_at = self.agenda.now
        self._claims[station.index] = after
        for model, claim in after.items():
            key = (station.index, model)
            highest = self._highest.get(key, 0)
            where = f"{station.name}: {claim}"
            assert claim.epoch >= highest, f"below {highest}, {where}"
            if claim.state is ClaimState.FAILED and model not in station.engines.running:
                continue  # it may say why it never came to claim it
            assert claim.epoch <= station.disk.epochs.get(model, 0), f"not on disk, {where}"
            if model not in before:
                assert claim.epoch > highest, f"not above {highest}, {where}"
                known = self.known.get((station.index, station.boot, model), 0)
                assert claim.epoch > known, f"not above the others' {known}, {where}"
            if claim.state is ClaimState.READY and before.get(model) != claim:
                engine = station.engines.running.get(model)
                ready = engine is not None and engine.state is ModelState.READY
                assert ready, f"not ready, {where}"
            self._highest[key] = claim.epoch

    def _told(
        self, station: Station, claims: Mapping[ModelId, Claim]
    ) -> set[tuple[ModelId, ClaimState, int]]:
        """What counts as a change. The claims of who can never host do not; and where one tries
        again and again, the others' epochs go along."""
        return {
            (model, claim.state, 0 if model in self.doomed else claim.epoch)
            for model, claim in claims.items()
            if model not in station.doomed
        }

    def _check_turn(self, station: Station, event: Event, model: ModelId) -> None:  # 5
        """A claim that stands takes a higher epoch, or draws another one, without asking anew."""
        if model in self._claims[station.index] or isinstance(event, EpochSaved):
            return
        assert station.index not in self._outdated, f"{station.name} claims {model} by old offers"
        record = record_of(station, model)
        since = (station.index, station.boot, model, record.stamp)
        known_s = self.agenda.now - self._known_since[since]
        silent = self._silent(station, model)
        self.passed += bool(silent)
        assert_turn(station, record, replicas(record, station.demand), known_s, silent)

    def _check_start(self, station: Station, model: ModelId) -> None:  # 5
        if model not in self._claims[station.index]:
            record = record_of(station, model)
            others, wanted = standing(station.seen, record), replicas(record, station.demand)
            assert others < wanted, f"{station.name} starts {model} beside {others}"

    def _note_epochs(self, station: Station) -> None:
        before = self._noted.get(station.index, {})
        seen = self._noted[station.index] = {other.node: other for other in station.seen}
        for other in [other for node, other in seen.items() if before.get(node) is not other]:
            for model, claim in other.claims.items():
                key = (station.index, station.boot, model)
                self.known[key] = max(self.known.get(key, 0), claim.epoch)
                if claim.state is not ClaimState.FAILED:
                    self.rivals[key] = max(self.rivals.get(key, 0), claim.epoch)

    def _note_mute(self, station: Station) -> None:
        seen = self._noted[station.index]
        for node, model in self.mute:
            key, other = (station.index, station.boot, model, node), seen.get(node)
            if other is None or model in other.claims or model not in other.bids:
                self._bidding_since.pop(key, None)
            else:
                self._bidding_since.setdefault(key, self.agenda.now)

    def _silent(self, station: Station, model: ModelId) -> set[NodeId]:
        """Who has had the time to claim, and is known not to (5)."""
        latest = self.agenda.now - TURN_S
        return {
            node
            for node, mute in self.mute
            if mute == model
            and self._bidding_since.get((station.index, station.boot, model, node), math.inf)
            <= latest
        }

    def _check_stop(self, station: Station, order: StopHost) -> None:  # 4
        engine = station.engines.running.get(order.model)
        claim = self._claims[station.index].get(order.model)
        if engine is None or claim is None or claim.state is not ClaimState.READY:
            return
        if engine.state is not ModelState.READY:
            return
        record = next((d for d in station.shown if d.model == order.model), None)
        if (
            record is None
            or record.removed
            or record.asleep
            or options(record) != options(engine.deployment)
        ):
            return
        ready = {
            s.node: s.claims[order.model]
            for s in station.seen
            if order.model in s.claims
            and s.claims[order.model].state is ClaimState.READY
            and s.hosts
        }
        wanted = replicas(record, station.demand)
        if station.draining or record.host not in (None, station.id):
            silent = self._silent(station, order.model)
            coming = [s.name for s in station.seen if s.node not in silent and _may_come(s, record)]
            assert not coming or len(ready) >= wanted, (
                f"{station.name} moved {order.model} away though {coming} may come: {order}"
            )
            return
        own = (claim.epoch, claim.score, station.id)
        above = [node for node, c in ready.items() if (c.epoch, c.score, node) > own]
        assert len(above) >= wanted, (
            f"{station.name} gave up {order.model} at {own} for {above} ({wanted} wanted): {order}"
        )


def _may_come(other: Standing, record: Deployment) -> bool:
    """Whether it may yet be READY with the model, and is not."""
    if not other.hosts or other.draining or record.host not in (None, other.node):
        return False
    claim, bid = other.claims.get(record.model), other.bids.get(record.model)
    if claim is not None:
        return claim.state is ClaimState.PREPARING
    return bid is not None and bid.version >= record.version and bid.suits is not Suits.NO


def replicas(record: Deployment, demand: Mapping[ModelId, int]) -> int:
    """Hosts wanted."""
    if record.removed or record.asleep:
        return 0
    if record.host is not None:
        return 1
    return record.replicas if record.replicas is not None else demand.get(record.model, 1)


def options(record: Deployment) -> tuple[str, int | None, int | None]:
    return record.ref, record.context, record.parallel


def complaints(group: list[Station], judge: Judge, *, demand: Mapping[ModelId, int]) -> list[str]:
    """What is not as it should be among nodes that see each other, when all should be at rest."""
    books = [station.book.records for station in group]
    if any(book != books[0] for book in books):
        return ["their books of deployments differ"]
    found = [line for record in books[0] for line in _misplaced(group, judge, record, demand)]
    known = {record.model for record in books[0]}
    for station in group:
        held, running = set(station.machine.ledger.leases), set(station.engines.running)
        if held != running:
            found.append(f"{station.name} leases {sorted(held)} and runs {sorted(running)}")
        if not running <= known:
            found.append(f"{station.name} runs what nobody deployed: {sorted(running - known)}")
    return found


def _misplaced(
    group: list[Station], judge: Judge, record: Deployment, demand: Mapping[ModelId, int]
) -> list[str]:
    model, found, ready, able = record.model, [], [], []
    wanted = replicas(record, demand)
    for station in group:
        claim = next((c for c in station.claims if c.model == model), None)
        doomed = model in station.doomed
        offer = station.offers.get(model)
        may = record.host in (None, station.id)
        if claim is not None and claim.state is ClaimState.READY:
            ready.append(station.name)
            if may and options(station.engines.running[model].deployment) != options(record):
                found.append(f"{station.name} serves {model} with other options")
            key = station.index, station.boot, model
            seen, rival = judge.known.get(key, 0), judge.rivals.get(key, 0)
            if may and wanted == 1 and (claim.epoch < seen or claim.epoch <= rival):
                found.append(
                    f"{station.name} stands with {claim}, and epoch {max(seen, rival)} was served"
                )
        elif doomed:
            pass
        elif claim is not None:
            found.append(f"{station.name} is still at {claim}")
        elif station.ignores(model):
            pass
        elif may and offer is not None and offer.bid.suits is not Suits.NO:
            able.append(f"{station.name} ({offer.bid.suits})")
        if claim is not None and claim.state is ClaimState.READY and station.draining:
            found.append(f"{station.name} drains and hosts {model}")
    wanted = replicas(record, demand)
    pinned = record.host is None or any(s.id == record.host and s.name in ready for s in group)
    if len(ready) > wanted and pinned:  # until then, those that served before go on
        found.append(f"{model}: {wanted} wanted, ready on {ready}")
    if len(ready) < wanted and able:
        found.append(f"{model}: {wanted} wanted, ready on {ready}, and able: {able}")
    return found
