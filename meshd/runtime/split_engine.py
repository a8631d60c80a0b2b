"""The shell around `Group`: borrows, runs the engine, gives back. It has the face of an
`EngineSupervisor`, for an engine whose model lies on other nodes too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final, assert_never

from meshd.errors import MeshdError
from meshd.kernel import Clock, Driver, FlightRecorder
from meshd.runtime.child_events import ChildState, StartAsked, StopAsked
from meshd.runtime.group import (
    AskingMoved,
    AskWorkers,
    Borrow,
    Borrowed,
    Effect,
    EndLoans,
    EngineMoved,
    Event,
    Granted,
    Group,
    KillLaunched,
    LaunchEngine,
    LoanOrder,
    LoansEnded,
    NotGranted,
    StopAsking,
    StopLaunched,
    Tell,
    WorkerLost,
)
from meshd.runtime.supervisor import EngineReport, EngineSupervisor, SpawnTask

log = logging.getLogger(__name__)

END_LIMIT_S: Final = 3.0
"""How long giving back may take. Workers end what they lend when they hear nothing, too."""

MakeEngine = Callable[[tuple[str, ...], Callable[[EngineReport], None]], EngineSupervisor]
"""(endpoints, on_report): the engine that uses these RPC servers, not started."""


class SplitEngine:
    """Runs one split model's engine until `stop` has been carried out; see `EngineSupervisor`."""

    def __init__(
        self,
        order: LoanOrder,
        *,
        borrow: Borrow,
        make: MakeEngine,
        clock: Clock,
        recorder: FlightRecorder,
        spawn_task: SpawnTask,
        on_report: Callable[[EngineReport], None],
    ) -> None:
        self._order = order
        self._workers = ", ".join(part.name for part in order.plan.parts)
        self._borrow = borrow
        self._make = make
        self._spawn_task = spawn_task
        self._on_report = on_report
        self._stopped = asyncio.Event()
        self._machine = Group(self._workers)
        self._driver: Driver[Event, Effect] = Driver(
            f"group {order.model}", self._machine, self._run, clock=clock, recorder=recorder
        )
        self._asking: asyncio.Task[None] | None = None
        self._borrowed: Borrowed | None = None
        self._engine: EngineSupervisor | None = None

    @property
    def report(self) -> EngineReport:
        state, reason = self._machine.state, self._machine.reason
        if self._engine is None:
            return _without_engine(self._order, state, reason)
        report = self._engine.report
        memory = None if report.memory is None else report.memory.own
        return replace(report, state=state, reason=reason, memory=memory)

    def start(self) -> None:
        self._driver.post(StartAsked())

    def stop(self, drain_s: float) -> None:
        """Drain for at most `drain_s`, then end all of it. A later call can only hurry."""
        self._driver.post(StopAsked(drain_s))

    @property
    def overdue_s(self) -> float:
        engine_s = 0.0 if self._engine is None else self._engine.overdue_s
        return max(self._driver.overdue_s, engine_s)

    @property
    def worker_lost(self) -> bool:
        """It FAILED because a worker refused or was lost: nothing is known to be wrong here."""
        return self._machine.worker_lost

    async def wait_stopped(self) -> None:
        await self._stopped.wait()

    # -- orders -----------------------------------------------------------------------------------

    def _run(self, effect: Effect) -> None:
        match effect:
            case AskWorkers():
                task = self._spawn_task(self._ask(), name=f"borrow for {self._order.model}")
                task.add_done_callback(self._asked)
                self._asking = task
            case StopAsking():
                assert self._asking is not None, "AskWorkers comes first"
                self._asking.cancel()
            case LaunchEngine():
                self._engine = self._make(effect.endpoints, self._engine_reported)
                self._engine.start()
            case StopLaunched():
                self._launched.stop(effect.drain_s)
            case KillLaunched():
                self._launched.kill()
            case EndLoans():
                work = self._end_loans(effect.reason)
                self._spawn_task(work, name=f"give back for {self._order.model}")
            case Tell():
                self._tell()
            case _:
                assert_never(effect)

    @property
    def _launched(self) -> EngineSupervisor:
        assert self._engine is not None, "LaunchEngine comes first"
        return self._engine

    async def _ask(self) -> None:
        order = self._order
        log.info("model %s: asking %s for memory", order.model, self._workers)
        try:
            borrowed = await self._borrow(
                order,
                lambda reason: self._driver.post(WorkerLost(reason)),
                lambda words: self._driver.post(AskingMoved(words)),
            )
        except MeshdError as error:
            log.warning("model %s: nothing is borrowed: %s", order.model, error.message)
            self._driver.post(NotGranted(error.message))
            return
        self._borrowed = borrowed
        log.info("model %s: %s lend memory; %d bytes of tensors were there", order.model,
                 self._workers, borrowed.warmed_bytes)  # fmt: skip
        self._driver.post(Granted(borrowed.endpoints))

    def _asked(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._driver.post(NotGranted("the workers are no longer asked"))

    async def _end_loans(self, reason: str) -> None:
        assert self._borrowed is not None, "Granted comes first"
        log.info("model %s: giving back what %s lent: %s", self._order.model, self._workers, reason)
        try:
            async with asyncio.timeout(END_LIMIT_S):
                await self._borrowed.end(reason)
        except (MeshdError, TimeoutError) as error:
            words = error.message if isinstance(error, MeshdError) else "no answer"
            log.warning("model %s: what %s lent was not given back in order: %s",
                        self._order.model, self._workers, words)  # fmt: skip
        self._driver.post(LoansEnded())

    def _engine_reported(self, report: EngineReport) -> None:
        self._driver.post(EngineMoved(report.state, report.reason, report.fault))

    def _tell(self) -> None:
        if self._machine.state is ChildState.STOPPED:
            self._driver.close()
            self._stopped.set()
        self._on_report(self.report)


def _without_engine(order: LoanOrder, state: ChildState, reason: str | None) -> EngineReport:
    return EngineReport(
        model=order.model,
        state=state,
        reason=reason,
        instance=None,
        socket_path=None,
        pid=None,
        attempt=0,
        slots=0,
        context_length=None,
        progress=None,
        degraded=None,
        retry_at=None,
        evidence=(),
    )
