"""The shell around `Hosting`: runs its orders with real weights, engines and supervisors.

Publishes `View.models` and `View.runtime`. What is in other rooms comes in as callables that
node.py wires.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import assert_never

from meshd.config import Config
from meshd.errors import InvalidRequest, MeshdError, ModelNotFound, NoMesh
from meshd.ids import InstanceId, ModelId
from meshd.kernel import Board, Clock, Driver, FlightRecorder, Pool, Service
from meshd.runtime.child_events import ChildState
from meshd.runtime.group import Borrow, Borrowed, LoanOrder
from meshd.runtime.hosting import Entry, Hosting
from meshd.runtime.hosting_events import (
    AbandonWeights,
    AcceptLoad,
    Effect,
    EngineFound,
    EngineNotFound,
    EngineReported,
    Event,
    LoadAsked,
    LoadOptions,
    PrepareWeights,
    RefuseLoad,
    StartEngine,
    StopEngine,
    UnloadAsked,
    WeightFacts,
    WeightsAccepted,
    WeightsMoved,
    WeightsRejected,
)
from meshd.runtime.measured import Launch
from meshd.runtime.measuring import Measurements
from meshd.runtime.record import RuntimeRecord
from meshd.runtime.reported import MemoryReport
from meshd.runtime.shown import STATE_OF_ENGINE, model_view, proved_memory
from meshd.runtime.split_engine import SplitEngine
from meshd.runtime.supervisor import EngineReport, EngineSupervisor
from meshd.runtime.workshop import Workshop
from meshd.view import (
    ModelState,
    ModelView,
    Preparing,
    RuntimeView,
    View,
    with_local,
)

log = logging.getLogger(__name__)

ENGINE_RECHECK_S = 15.0
"""How often a node without an engine looks for one."""


async def _borrow_nothing(
    order: LoanOrder, lost: Callable[[str], None], moved: Callable[[str], None]
) -> Borrowed:
    raise NoMesh(f"{order.model} needs memory of other nodes, and this node borrows none")


@dataclass(frozen=True, slots=True)
class Rooms:
    """What hosting needs of other rooms. The blocking ones are called in a pool."""

    find_engine: Callable[[], RuntimeRecord]
    prepare: Callable[[str, Callable[[Preparing], None]], Awaitable[WeightFacts]]
    """Make the weights of a REF usable: check, fetch, mend them, saying how far it is. Raises
    MeshdError; its `retry_after_s` says before when trying again is in vain.
    Cancelling it leaves what was got for the next time."""
    identify: Callable[[str], tuple[ModelId, str]]
    """REF to the name clients use, and to the one way of writing that REF; raises BadReference."""
    wait_idle: Callable[[InstanceId], Awaitable[None]]
    last_request_at: Callable[[InstanceId], float | None]
    always_listed: Callable[[], Mapping[ModelId, str]]
    """Models that can be loaded any time, with their REFs."""
    shown: Callable[[RuntimeRecord], RuntimeView] = RuntimeRecord.to_view
    """What to say of an engine that was found; whoever proves engines hears of it here."""
    hosts: bool = True
    """False for a client node, which loads nothing."""
    changed: Callable[[], None] = lambda: None
    """Called when `engine_problem` changed and nothing in the view did."""
    borrow: Borrow = _borrow_nothing
    """Ask other nodes for memory of theirs."""


class ModelHost(Service):
    name = "models"

    def __init__(
        self,
        config: Config,
        board: Board[View],
        rooms: Rooms,
        *,
        clock: Clock,
        rng: random.Random,
        recorder: FlightRecorder,
        pool: Pool,
    ) -> None:
        super().__init__()
        # An engine may use its drain, its grace and a moment to be reaped.
        self.stop_limit_s = config.engine.stop_grace_s + 5.0
        self._config = config
        self._board = board
        self._rooms = rooms
        self._clock = clock
        self._pool = pool
        self._machine = Hosting(restart_drain_s=config.drain_s)
        self._driver: Driver[Event, Effect] = Driver(
            "hosting", self._machine, self._run, clock=clock, recorder=recorder
        )
        self._workshop = Workshop(
            config,
            clock,
            rng,
            recorder,
            self.spawn,
            wait_idle=rooms.wait_idle,
            last_request_at=rooms.last_request_at,
            borrow=rooms.borrow,
            on_report=self._engine_reported,
        )
        self._engines: dict[ModelId, EngineSupervisor | SplitEngine] = {}
        self._binary: Path | None = None
        self._engine_id = ""
        self._shown_with: object = None
        """What of the view the models were last shown with."""
        self.engine_problem: str | None = "looking for an engine on this machine"
        """Why this node can run nothing; None once it has an engine."""
        self._tickets = itertools.count(1)
        self._refusals: dict[int, str] = {}
        self._attempts: dict[ModelId, int] = {}
        self._launches: dict[ModelId, Launch] = {}
        self._measurements = Measurements(
            config.data_dir / "measured.json",
            pool,
            lambda work: self.spawn(work, name="keep what an engine takes"),
        )
        self._preparing: dict[int, asyncio.Task[None]] = {}
        self.restarts = 0
        """Engines started again since the node began, all models together."""
        self._publish()

    # -- asked from outside -----------------------------------------------------------------------

    def load(
        self,
        ref: str,
        options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
        *,
        name: ModelId | None = None,
    ) -> ModelId:
        """Start loading; what becomes of it is in the view. `name`: what it is served as; default:
        what REF says, which of a model of the catalog is the name of its file.

        Raises BadReference, InvalidRequest.
        """
        identified, ref = self._rooms.identify(ref)
        model = identified if name is None else name
        ticket = next(self._tickets)
        self._post(LoadAsked(ticket, model, ref, options))
        refusal = self._refusals.pop(ticket, None)
        if refusal is not None:
            raise InvalidRequest(refusal, param="ref")
        return model

    def unload(self, name: str, drain_s: float | None) -> ModelId:
        """Stop the model called `name`, or loaded from that REF. Raises ModelNotFound."""
        for entry in self._machine.entries.values():
            if name in (entry.model, entry.ref):
                drain = self._config.drain_s if drain_s is None else drain_s
                self._post(UnloadAsked(entry.model, drain))
                return entry.model
        loaded = ", ".join(self._machine.entries) or "none"
        raise ModelNotFound(f"no model `{name}` is loaded here; loaded are: {loaded}")

    def weights_in_use(self) -> frozenset[str]:
        """Paths of first shards, and digests, that an engine runs on or is about to."""
        facts = [e.facts for e in self._machine.entries.values() if e.facts is not None]
        return frozenset(f.first_shard for f in facts) | {f.digest for f in facts if f.digest}

    def taken(self, model: ModelId) -> MemoryReport | None:
        """What the engine of a model that is ready said it takes of this node; None if that is not
        known."""
        engine = self._engines.get(model)
        return None if engine is None else self._memory(engine.report)

    def worker_lost(self, model: ModelId) -> bool:
        """Whether a model that FAILED did so because a worker refused or was lost."""
        engine = self._engines.get(model)
        return isinstance(engine, SplitEngine) and engine.worker_lost

    @property
    def engine_id(self) -> str:
        """Of the engine that models run on; empty while none is known."""
        return self._engine_id

    def overdue_s(self) -> float:
        """How long the supervision of engines stands still; 0.0 when all of it moves."""
        return max([self._driver.overdue_s, *(e.overdue_s for e in self._engines.values())])

    def serving_pids(self) -> frozenset[int]:
        """Of the engines that answer."""
        reports = (engine.report for engine in self._engines.values())
        return frozenset(r.pid for r in reports if r.state is ChildState.READY and r.pid)

    # -- service ----------------------------------------------------------------------------------

    async def main(self) -> None:
        unsubscribe = self._board.subscribe(self._view_changed)
        try:
            await self._serve()
        finally:
            unsubscribe()

    async def _serve(self) -> None:
        self.ready.set()
        if self._rooms.hosts:
            # Nothing asks for it yet, but nobody bids for a model without one.
            self.spawn(self._await_engine(), name="look for an engine")
        await self.stopping.wait()
        stopping = tuple(self._engines)
        for model in stopping:
            self._post(UnloadAsked(model, 0.0))
        while self._engines:
            await next(iter(self._engines.values())).wait_stopped()
        self._driver.close()

    def _post(self, event: Event) -> None:
        self._driver.post(event)
        self._publish()

    def _run(self, effect: Effect) -> None:
        match effect:
            case AcceptLoad():
                pass
            case RefuseLoad():
                self._refusals[effect.ticket] = effect.reason
            case PrepareWeights():
                number = effect.preparation
                task = self.spawn(self._prepare(effect), name=f"prepare {effect.model}")
                self._preparing[number] = task
                task.add_done_callback(lambda _: self._preparing.pop(number, None))
            case AbandonWeights():
                self._preparing[effect.preparation].cancel()
            case StartEngine():
                self._start(effect)
            case StopEngine():
                self._engines[effect.model].stop(effect.drain_s)
            case _:
                assert_never(effect)

    async def _prepare(self, effect: PrepareWeights) -> None:
        model, number = effect.model, effect.preparation

        def moved(now: Preparing) -> None:
            if number in self._preparing:
                self._post(WeightsMoved(model, number, now))

        try:
            facts = await self._rooms.prepare(effect.ref, moved)
        except MeshdError as error:
            log.warning("model %s cannot be loaded: %s", model, error.message)
            self._post(WeightsRejected(model, number, error.message, error.retry_after_s))
        else:
            self._post(WeightsAccepted(model, number, facts))

    async def _await_engine(self) -> None:
        while True:
            if await self._look_for_engine():
                return
            await asyncio.sleep(ENGINE_RECHECK_S)

    async def _look_for_engine(self) -> bool:
        """Whether there is one."""
        try:
            record = await self._pool.run(self._rooms.find_engine)
        except MeshdError as error:
            if error.message != self.engine_problem:
                log.warning("no engine: %s", error.message)
                self.engine_problem = error.message
                self._post(EngineNotFound(error.message))
                self._rooms.changed()
            return False
        self._engine_found(record)
        return True

    def _engine_found(self, record: RuntimeRecord) -> None:
        self._binary, self._engine_id = Path(record.server_path), record.id
        self.engine_problem = None
        log.info("engine %s: %s at %s", record.id, record.version, record.server_path)
        runtime = self._rooms.shown(record)
        self._board.publish(replace(self._board.current, runtime=runtime))
        self._post(EngineFound())

    def _start(self, effect: StartEngine) -> None:
        assert self._binary is not None, "StartEngine comes after EngineFound"
        spec, facts = self._workshop.spec(effect), effect.facts
        if effect.options.split is None:  # what a split takes depends on more than this
            launch = Launch(
                weights=facts.digest or facts.first_shard,
                bytes=facts.total_bytes,
                engine=self._engine_id,
                context=spec.context,
                parallel=spec.parallel,
            )
            self._launches[effect.model] = launch
            spec = replace(spec, talkative=self._measurements.find(launch) is None)
        engine = self._workshop.engine(effect, spec, self._binary)
        self._engines[effect.model] = engine
        engine.start()

    def _engine_reported(self, report: EngineReport) -> None:
        state = STATE_OF_ENGINE[report.state]
        if report.attempt > max(1, self._attempts.get(report.model, 1)):
            self.restarts += 1
        self._attempts[report.model] = report.attempt
        launch = self._launches.get(report.model)
        if launch is not None and report.memory is not None and report.degraded is None:
            self._measurements.keep(launch, report.memory)
        if report.state is ChildState.STOPPED:
            self._engines.pop(report.model, None)
            self._launches.pop(report.model, None)
            del self._attempts[report.model]
        self._post(EngineReported(report.model, state, report.reason))

    # -- view -------------------------------------------------------------------------------------

    def _publish(self) -> None:
        models = {m: self._model_view(entry) for m, entry in self._machine.entries.items()}
        for model, ref in self._rooms.always_listed().items():
            if model not in models:
                reason = f"not loaded; `meshd load {ref}` loads it"
                models[model] = ModelView(model, ref, ModelState.ABSENT, reason)
        ordered = MappingProxyType(dict(sorted(models.items())))
        self._board.publish(with_local(self._board.current, ordered))

    def _model_view(self, entry: Entry) -> ModelView:
        engine, view = self._engines.get(entry.model), self._board.current
        report = None if engine is None else engine.report
        memory = None if report is None else proved_memory(self._memory(report), view.runtime)
        epoch = next((c.epoch for c in view.claims if c.model == entry.model), 0)
        return model_view(entry, report, memory, view.node, epoch, self._clock.now())

    def _memory(self, report: EngineReport) -> MemoryReport | None:
        """What the engine of a model that is ready said it takes, now or the last time."""
        if report.memory is not None:
            return report.memory
        if report.state is not ChildState.READY or report.degraded is not None:
            return None
        launch = self._launches.get(report.model)
        return None if launch is None else self._measurements.find(launch)

    def _view_changed(self, view: View) -> None:
        """A proof that was made or lost changes what is shown of the models, as a new epoch does,
        and other weights on the disk."""
        epochs = tuple((claim.model, claim.epoch) for claim in view.claims)
        backend = None if view.runtime is None else view.runtime.backend
        shown_with = (backend, epochs, view.weights)
        if shown_with != self._shown_with:
            self._shown_with = shown_with
            self._publish()
