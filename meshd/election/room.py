"""The shell around the election: what it sees, and what it orders.

It follows the view and the clock, tells the machine what changed, and carries out its orders: by
way of `Needs`, which node.py wires. It publishes the deployments, bids, claims and demand of this
node, and how the deployments look that no node works on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, assert_never

from meshd.config import Config
from meshd.election.appraisal import Appraiser
from meshd.election.demand import Demand
from meshd.election.desk import Desk
from meshd.election.election import Election
from meshd.election.fit import HOST, Corrections, Fit
from meshd.election.hosted import Phase
from meshd.election.memory import Memory, untried
from meshd.election.offering import NodeFacts, Use, barred, offers
from meshd.election.replicas import Replicas
from meshd.election.shapes import Shapes
from meshd.election.standings import REACHABLE, myself, others
from meshd.election.store import ElectionStore, Saved
from meshd.election.table import Table
from meshd.election.unserved import unserved
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
from meshd.errors import MeshdError, ModelNotFound
from meshd.ids import ModelId, NodeId
from meshd.kernel import Board, Clock, Driver, FlightRecorder, Pool, Service, write_atomic
from meshd.sizes import parse_size
from meshd.view import (
    Cause,
    Deployment,
    MeshState,
    ModelState,
    ModelView,
    NodeState,
    PeerState,
    Preparing,
    Role,
    View,
    with_wanted,
)
from meshd.view.shape import MemoryParts, ModelShape

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
"""How often what only time changes is looked at: demand, idleness, waits that are over."""
SETTLE_S: Final = 3.0
"""How long a node that knows of others waits for their adverts before it decides alone."""
ADVERTS_S: Final = 0.3
"""From the first advert to a decision: those of the other nodes come together."""
SAVE_AGAIN_S: Final = 2.0
CORRECTIONS: Final = "corrections.json"


@dataclass(frozen=True, slots=True)
class Needs:
    """What the election needs of other rooms; all but the awaited ones return at once."""

    start: Callable[[Deployment, int | None], None]
    """Load it; the bytes the engine may keep of prompts. Raises MeshdError."""
    stop: Callable[[ModelId, bool], None]
    """Unload; with or without the requests in flight. Raises ModelNotFound."""
    taken: Callable[[ModelId], Mapping[str, MemoryParts] | None]
    """By device: what the engine of a model that is ready said it takes."""
    engine: Callable[[], tuple[str, str | None]]
    """(id of the engine, why there is none)."""
    shape: Callable[[str], Awaitable[ModelShape]]
    """Of a REF, from the headers of its weights. Raises MeshdError."""
    prepare: Callable[[str, Callable[[Preparing], None]], Awaitable[object]]
    """Make the weights of a REF whole on this disk, saying how far it is. Raises MeshdError."""
    here: Callable[[str], str | None]
    """Why a REF means nothing on this machine; None if it does."""
    identify: Callable[[str], tuple[ModelId, str]]
    find_node: Callable[[str], NodeId]
    spread: Callable[[Collection[ModelId]], None]
    """Tell other nodes of deployments."""
    expects_others: Callable[[], bool]
    """Whether this node's mesh is known to have other members."""
    look_at_devices: Callable[[], None]
    """Have `View.devices` made anew."""
    auto: Callable[[Memory], str | None]
    """The REF `--auto` chooses for this memory; may block."""


class ElectionRoom(Service):
    """`saved`: what `store.load` found. `usage` methods (api.usage.Usage) are part of it: `asked`,
    `answered`, `began`, `ended`, `missing`."""

    name = "election"

    def __init__(
        self,
        config: Config,
        board: Board[View],
        needs: Needs,
        store: ElectionStore,
        saved: Saved,
        *,
        clock: Clock,
        recorder: FlightRecorder,
        pool: Pool,
    ) -> None:
        super().__init__()
        self._config = config
        self._board = board
        self._needs = needs
        self._store = store
        self._clock = clock
        self._pool = pool
        self._started_at = clock.now()
        self._corrections = config.data_dir / CORRECTIONS
        self._appraiser = Appraiser(config.engine, _read_corrections(self._corrections))
        self._memory = Memory(None if config.max_vram is None else parse_size(config.max_vram))
        self._demand = Demand()
        self._replicas = Replicas()
        view = board.current
        self._machine = Election(view.node.id, view.node.name, saved.epochs, saved.floor)
        self._driver: Driver[Event, Effect] = Driver(
            self.name, self._machine, self._run, clock=clock, recorder=recorder
        )
        self._table = Table(
            store,
            saved.deployments,
            board,
            pool,
            spawn=lambda work: self.spawn(work, name="keep deployments"),
            spread=needs.spread,
            changed=self._deployments_changed,
        )
        self._shapes = Shapes(
            needs.shape,
            needs.prepare,
            clock=clock,
            spawn=lambda work: self.spawn(work, name="what a model needs"),
            found=self._shape_found,
            changed=self.look_again,
        )
        self.desk = Desk(
            board,
            self._table,
            self._shapes,
            self._appraiser,
            on_demand=config.on_demand,
            identify=needs.identify,
            find_node=needs.find_node,
            demand=lambda: self._replicas.wanted,
        )
        self.shared = self._table.shared
        self.host_changes: Counter[tuple[ModelId, str]] = Counter()
        """By model and cause."""
        self._heard_at: float | None = None
        """When the first advert of another node came."""
        self._settled = False
        self._draining = False
        self._withdrawn = False
        self._disk_problem: str | None = None
        self._nodes: tuple[Standing, ...] | None = None
        self._offers: tuple[Offer, ...] = ()
        self._reported: dict[ModelId, tuple[ModelState, str | None]] = {}
        self._failed: dict[ModelId, ModelView] = {}
        """How own attempts looked when they failed."""
        self._auto_done = False
        self._looking = False

    # -- service ----------------------------------------------------------------------------------

    async def main(self) -> None:
        view = self._board.current
        self._board.publish(replace(view, deployments=self._table.book.records))
        self._driver.post(DeploymentsSeen(self._table.book.records))
        await self._take_flags()
        unsubscribe = self._board.subscribe(self._view_changed)
        try:
            self.ready.set()
            self.spawn(self._watch(), name="watch")
            self.look_again()
            await self.stopping.wait()
        finally:
            unsubscribe()
            self._driver.close()

    async def _take_flags(self) -> None:
        """`--model`: deploy those of now, unload those of this node's last start that are gone."""
        from meshd.election.desk import Wish

        config, own = self._config, self._board.current.node.id
        wanted = [self._needs.identify(ref)[0] for ref in config.model]
        for record in self._table.book.records:
            mine = record.origin == own and record.cause is Cause.FLAG and not record.removed
            if mine and record.model not in wanted:
                self._table.written(self._table.book.unload(record.model, own))
        for ref in config.model:
            try:
                await self.desk.load(Wish(ref), Cause.FLAG)
            except MeshdError as error:
                log.error("--model %s: %s", ref, error.message)

    def withdraw(self) -> None:
        """The node ends: from now on it hosts nothing as far as others are told."""
        self._withdrawn = True
        self._driver.close()
        self._board.publish(replace(self._board.current, claims=(), bids=()))

    @property
    def overdue_s(self) -> float:
        return self._driver.overdue_s

    async def _watch(self) -> None:
        while True:
            self.look_again()
            await asyncio.sleep(LOOK_S)
            self._look_at_demand()
            await self._choose()

    # -- what is seen -----------------------------------------------------------------------------

    def look_again(self) -> None:
        """Something may have changed: look soon, once for all that changes now."""
        if not self._looking and not self._withdrawn:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _view_changed(self, view: View) -> None:
        self.look_again()

    def _look(self) -> None:
        self._looking = False
        if self._withdrawn or self.stopping.is_set():
            return
        view = self._board.current
        self._look_at_nodes(view)
        self._look_at_hosting(view)
        self._look_at_memory(view)
        draining = view.node.state is NodeState.DRAINING
        if draining is not self._draining:
            self._draining = draining
            self._driver.post(DrainAsked(draining))
        self._look_for_shapes(view)
        self._make_offers(anew=False)
        self._show_unserved()

    def _look_at_nodes(self, view: View) -> None:
        if not self._settled and not self._is_settled(view):
            return
        self._settled = True
        nodes = others(view)
        if nodes != self._nodes:
            self._nodes = nodes
            self._driver.post(NodesSeen(nodes))

    def _is_settled(self, view: View) -> bool:
        """Whether the other nodes have had time to say what they host: who decides before that
        would host everything itself."""
        now = self._clock.now()
        if view.mesh.state is MeshState.MEMBER and not self._needs.expects_others():
            return True
        if self._heard_at is None and any(
            p.version and p.state is PeerState.ALIVE for p in view.peers
        ):
            self._heard_at = now
        since = (self._started_at, SETTLE_S)
        if self._heard_at is not None:
            since = (self._heard_at, ADVERTS_S)
        left = sum(since) - now
        if left > 0:
            asyncio.get_running_loop().call_later(left + 0.001, self.look_again)
        return left <= 0

    def _look_at_hosting(self, view: View) -> None:
        """What became of what this node was told to host."""
        for model, hosted in tuple(self._machine.hosted.items()):
            if not hosted.engine:
                self._reported.pop(model, None)
                continue
            seen = view.local.get(model)
            state = ModelState.ABSENT if seen is None else seen.state
            reason = None if seen is None else seen.reason
            if self._reported.get(model) == (state, reason):
                continue
            self._reported[model] = (state, reason)
            now = self._clock.now()
            if state is ModelState.READY:
                self._failed.pop(model, None)
                self._demand.became_ready(model, now)
                self._learn(model, view)
            elif state is ModelState.FAILED and seen is not None:
                self._failed[model] = seen
            elif state is ModelState.ABSENT:
                self._demand.stopped(model)
                self._needs.look_at_devices()
            self._driver.post(HostReported(model, state, reason))

    def _learn(self, model: ModelId, view: View) -> None:
        """Its engine is loaded: lease what it took, and remember how that differs."""
        self._needs.look_at_devices()
        seen = self._needs.taken(model)
        hosted, local = self._machine.hosted.get(model), view.local.get(model)
        if not seen or hosted is None:
            return
        counted = self._appraiser.counted(hosted.deployment)
        total = Counter({device: parts.total for device, parts in seen.items()})
        total[HOST] += 0 if counted is None else counted.prompts  # taken by and by
        self._driver.post(HostMeasured(model, self._memory.counted(total)))
        digest = None if local is None else local.digest
        engine, _ = self._needs.engine()
        if digest and self._appraiser.learn(hosted.deployment, digest, engine, seen):
            self.spawn(self._keep_corrections(self._appraiser.to_json()), name="keep corrections")

    async def _keep_corrections(self, data: bytes) -> None:
        try:
            await self._pool.run(write_atomic, self._corrections, data)
        except (OSError, MeshdError) as error:
            log.warning("%s cannot be written: %s", self._corrections, error)

    def _look_at_memory(self, view: View) -> None:
        _, problem = self._needs.engine()
        if untried(view.runtime, problem) is not None:
            return
        held: Counter[str] = Counter()
        for model in view.local:
            for device, parts in (self._needs.taken(model) or {}).items():
                held[device] += parts.private
        hosted = self._machine.hosted.values()
        calm = not any(h.engine and h.phase is not Phase.READY for h in hosted)
        if self._memory.measure(view.devices, self._memory.counted(held), calm=calm):
            self._driver.post(CapacityMeasured(self._memory.capacity))

    # -- deployments ------------------------------------------------------------------------------

    def _deployments_changed(self) -> None:
        self._driver.post(DeploymentsSeen(self._table.book.records))
        self.look_again()

    def _look_for_shapes(self, view: View) -> None:
        """Of records without one: by who wrote them, or has the weights; by the first node of all
        if the writer is gone."""
        own = view.node.id
        if view.node.role == Role.CLIENT.value or not self._settled:
            return
        alive = {own, *(p.id for p in view.peers if p.state in REACHABLE and p.role is Role.MEMBER)}
        on_disk = {weights.model for weights in view.weights}
        for record in self._table.book.records:
            if record.removed or record.shape is not None:
                continue
            reader = record.origin if record.origin in alive else min(alive)
            if reader == own or record.model in on_disk:
                self._shapes.want(record)

    def _shape_found(self, model: ModelId, shape: ModelShape) -> None:
        record = self._table.book.get(model)
        if record is not None and not record.removed and record.shape is None:
            own = self._board.current.node.id
            self._table.written(self._table.book.change(model, own, shape=shape))

    # -- offers -----------------------------------------------------------------------------------

    def _make_offers(self, *, anew: bool) -> None:
        """`anew`: the last ones are out of date, even if they look the same."""
        view = self._board.current
        if view.node.role == Role.CLIENT.value:
            return
        made = offers(
            self._table.book.records,
            self._facts(view),
            lambda deployment, free: self._fit(view, deployment, free),
            self._clock.now(),
            bar=self._bar(view),
        )
        if anew or made != self._offers:
            self._offers = made
            bids = tuple(offer.bid for offer in made)
            if bids != view.bids:
                self._board.publish(replace(view, bids=bids))
            self._driver.post(OffersMade(made))

    def _bar(self, view: View) -> str | None:
        problem = untried(view.runtime, self._needs.engine()[1])
        if problem is None and not self._memory.budgets:
            problem = "its memory is not known yet"
        return barred(
            client=False,
            draining=self._draining,
            engine_problem=problem or self._disk_problem,
        )

    def _facts(self, view: View) -> NodeFacts:
        uses = {}
        for model, hosted in self._machine.hosted.items():
            if hosted.phase is Phase.READY:
                last_at = self._demand.last_at(model)
                since = hosted.ready_at if hosted.ready_at is not None else self._clock.now()
                uses[model] = Use(
                    self._demand.busy(model), max(since, last_at if last_at is not None else since)
                )
        return NodeFacts(
            capacity=self._memory.capacity,
            leases={m: lease.memory for m, lease in self._machine.ledger.leases.items()},
            uses=uses,
            weights=frozenset(w.model for w in view.weights) | {ModelId("builtin")},
        )

    def _fit(self, view: View, deployment: Deployment, free: Mapping[str, int]) -> Fit | None:
        elsewhere = self._needs.here(deployment.ref)
        if elsewhere is not None:
            return Fit(False, elsewhere)
        local = view.local.get(deployment.model)
        digest = None if local is None else local.digest
        if digest is None:
            digest = next((w.digest for w in view.weights if w.model == deployment.model), None)
        engine, _ = self._needs.engine()
        found = self._appraiser.fit(
            deployment, self._memory.budgets, free, digest=digest, engine=engine
        )
        problem = self._shapes.problem(deployment)
        if found is None and problem is not None:
            return Fit(False, problem.words)
        return found

    # -- orders -----------------------------------------------------------------------------------

    def _run(self, effect: Effect) -> None:
        match effect:
            case SaveEpoch():
                self.spawn(self._save_epoch(effect), name="keep an epoch")
            case StartHost():
                self._start(effect)
            case StopHost():
                self._stop(effect)
            case PublishClaims():
                self._board.publish(replace(self._board.current, claims=effect.claims))
            case LeasesChanged():
                self._make_offers(anew=True)
            case PutToSleep():
                self._put_to_sleep(effect.model, f"its memory is needed for {effect.wanted_for}")
            case HostChanged():
                log.info("%s: %s", effect.model, effect.why)
                self.host_changes[effect.model, effect.cause] += 1
            case _:
                assert_never(effect)
        self.look_again()

    async def _save_epoch(self, order: SaveEpoch) -> None:
        while True:
            try:
                await self._pool.run(self._store.save_epoch, order.model, order.epoch)
            except MeshdError as error:
                if self._disk_problem is None:
                    log.error("nothing is claimed any more: %s", error.message)
                self._disk_problem = error.message
                self.look_again()
                await asyncio.sleep(SAVE_AGAIN_S)
            else:
                self._disk_problem = None
                self._driver.post(EpochSaved(order.model, order.epoch))
                return

    def _start(self, order: StartHost) -> None:
        model = order.deployment.model
        self._reported.pop(model, None)
        counted = self._appraiser.counted(order.deployment)
        try:
            self._needs.start(order.deployment, None if counted is None else counted.prompts)
        except MeshdError as error:
            self._driver.post(HostReported(model, ModelState.FAILED, error.message))

    def _stop(self, order: StopHost) -> None:
        try:
            self._needs.stop(order.model, order.drain)
        except ModelNotFound:
            self._driver.post(HostReported(order.model, ModelState.ABSENT))

    def _put_to_sleep(self, model: ModelId, why: str) -> None:
        log.info("%s goes to sleep: %s", model, why)
        own = self._board.current.node.id
        result = self._table.book.put_to_sleep(model, own)
        try:
            self._table.written(result)
        except MeshdError as error:
            log.warning("%s cannot be put to sleep: %s", model, error.message)

    # -- demand -----------------------------------------------------------------------------------

    def asked(self, model: ModelId) -> None:
        self._demand.asked(model, self._clock.now())

    def answered(self, model: ModelId, service_s: float) -> None:
        self._demand.answered(model, service_s, self._clock.now())

    def began(self, model: ModelId) -> None:
        self._demand.began(model, self._clock.now())

    def ended(self, model: ModelId) -> None:
        self._demand.ended(model, self._clock.now())

    def missing(self, name: str) -> bool:
        changed = self.desk.missing(name)
        if changed:
            self._show_unserved()
        return changed

    def _look_at_demand(self) -> None:
        """Tell and hear what clients ask for; more or fewer hosts; sleep for what nobody uses."""
        view, now = self._board.current, self._clock.now()
        self._demand.keep_only(p.id for p in view.peers if p.state in REACHABLE)
        for peer in view.peers:
            if peer.state in REACHABLE:
                self._demand.hear(peer.id, dict(peer.demand))
        told = tuple(sorted(self._demand.tell(now).items()))
        if told != view.demand:
            self._board.publish(replace(view, demand=told))
        nodes = (myself(view), *others(view))
        if self._replicas.look(self._table.book.records, nodes, view.models, self._demand, now):
            self._driver.post(DemandMoved(self._replicas.wanted))
        limit_s = self._config.idle_unload_s
        if limit_s is not None:
            for model in self._demand.idle(now, limit_s):
                hosted = self._machine.hosted.get(model)
                if hosted is not None and hosted.phase is Phase.READY:
                    self._put_to_sleep(model, f"nobody has asked for it for {limit_s:g} s")

    async def _choose(self) -> None:
        """`--auto`: if nothing is deployed, something is chosen, once a start."""
        if not self._config.auto or self._auto_done or not self._settled:
            return
        if not self._memory.budgets or any(not r.removed for r in self._table.book.records):
            return
        from meshd.election.desk import Wish

        self._auto_done = True
        ref = await self._pool.run(self._needs.auto, self._memory)
        if ref is None:
            log.warning("--auto: no model of the catalog fits on this node")
            return
        log.info("--auto chooses %s", ref)
        try:
            await self.desk.load(Wish(ref), Cause.AUTO)
        except MeshdError as error:
            log.error("--auto: %s cannot be deployed: %s", ref, error.message)

    # -- what is shown ----------------------------------------------------------------------------

    def _show_unserved(self) -> None:
        view, records = self._board.current, self._table.book.records
        nodes = (myself(view), *others(view))
        shown = dict(unserved(records, nodes, self._replicas.wanted, self._failed))
        shown.update(self._unknown(records))
        if shown != view.wanted:
            self._board.publish(with_wanted(view, MappingProxyType(shown)))

    def _unknown(self, records: Iterable[Deployment]) -> Mapping[ModelId, ModelView]:
        """Deployments that nobody can count yet, as far as this node works on that."""
        found = {}
        for record in records:
            if record.removed or record.asleep or record.shape is not None:
                continue
            now, problem = self._shapes.preparing(record.model), self._shapes.problem(record)
            look = ModelView(record.model, record.ref, ModelState.FAILED)
            if now is not None:
                found[record.model] = replace(
                    look, state=now.state, reason=now.reason, progress=now.progress, fetch=now.fetch
                )
            elif problem is not None:
                at = problem.retry_at
                wait_s = None if at is None else max(1.0, at - self._clock.now())
                found[record.model] = replace(look, reason=problem.words, retry_after_s=wait_s)
        return found

    def metrics(self) -> Iterable[tuple[str, Mapping[str, str], float]]:
        for (model, cause), count in sorted(self.host_changes.items()):
            yield "meshd_host_changes_total", {"model": model, "reason": cause}, count


def _read_corrections(path: Path) -> Corrections:
    try:
        return Corrections.from_json(path.read_bytes())
    except FileNotFoundError:
        return Corrections()
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror)
        return Corrections()
