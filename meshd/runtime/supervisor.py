"""The shell around `Child`: runs its orders with a real process, and reports what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, assert_never

from meshd.config import EngineSettings
from meshd.errors import MeshdError
from meshd.ids import InstanceId, ModelId
from meshd.kernel import Clock, Driver, FlightRecorder
from meshd.runtime import prober
from meshd.runtime.activity import Activity, moved, read_activity
from meshd.runtime.child import Child, Policy
from meshd.runtime.child_events import (
    Announce,
    AwaitDrain,
    ChildState,
    Drained,
    Effect,
    EngineFacts,
    Event,
    Exited,
    FaultSeen,
    Force,
    Probe,
    ProbeFailed,
    ProbeKind,
    ProbeNotYet,
    ProbePassed,
    Progressed,
    SendSignal,
    Spawn,
    Spawned,
    SpawnFailed,
    StartAsked,
    StopAsked,
)
from meshd.runtime.faults import classify
from meshd.runtime.launch import INSTANCE_PREFIX, LaunchSpec, server_argv
from meshd.runtime.orphans import write_pid_file
from meshd.runtime.output import OutputLog
from meshd.runtime.process import ChildProcess
from meshd.runtime.reported import MemoryHeard, MemoryReport

log = logging.getLogger(__name__)

EVIDENCE_LINES = 20
WATCH_S = 1.0
"""How often the kernel is asked what a process does that owes an answer."""
OUTPUT_COUNTS_S = 0.25
"""Lines that follow each other faster are one sign of life: a loading engine prints hundreds."""


class SpawnTask(Protocol):
    """`Service.spawn`."""

    def __call__(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]: ...


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What there is to say of a model's engine now."""

    model: ModelId
    state: ChildState
    reason: str | None
    instance: InstanceId | None
    socket_path: str | None
    pid: int | None
    attempt: int
    slots: int
    context_length: int | None
    progress: float | None
    """0..1 of the weights in memory, while it starts; None if nothing can be said."""
    degraded: str | None
    retry_at: float | None
    """Monotonic."""
    evidence: tuple[str, ...]
    """Last lines of a FAILED engine."""
    memory: MemoryReport | None = None
    """What it said it took, if it was told to talk."""
    fault: str | None = None
    """Kind of what the last process of a FAILED engine said of its end, if it said anything."""


@dataclass(frozen=True, slots=True)
class EnginePlaces:
    """Directories an engine uses."""

    run_dir: Path
    log_dir: Path


class EngineSupervisor:
    """Runs one model's engine until `stop` has been carried out.

    `on_report` is called after every change. After a report of STOPPED nothing comes any more.
    """

    def __init__(
        self,
        model: ModelId,
        spec: LaunchSpec,
        binary: Path,
        *,
        settings: EngineSettings,
        places: EnginePlaces,
        weights_bytes: int,
        clock: Clock,
        rng: random.Random,
        recorder: FlightRecorder,
        spawn_task: SpawnTask,
        wait_idle: Callable[[InstanceId], Awaitable[None]],
        last_request_at: Callable[[InstanceId], float | None],
        on_report: Callable[[EngineReport], None],
    ) -> None:
        self.model = model
        self._binary = binary
        self._settings = settings
        self._run_dir = places.run_dir
        self._weights_bytes = weights_bytes
        self._clock = clock
        self._rng = rng
        self._spawn_task = spawn_task
        self._wait_idle = wait_idle
        self._last_request_at = last_request_at
        self._on_report = on_report
        self._stopped = asyncio.Event()
        self.output = OutputLog(places.log_dir / f"{model}.log", limit_bytes=settings.log_bytes)
        self._child = Child(spec, _policy(settings))
        self._driver: Driver[Event, Effect] = Driver(
            f"child {model}", self._child, self._run, clock=clock, recorder=recorder
        )
        self._instance: InstanceId | None = None
        self._process: ChildProcess | None = None
        self._exited_generation = 0
        self._wanted_force: Force | None = None
        self._output_counted_at = float("-inf")
        self._probes_out = 0
        self._heard = MemoryHeard()

    @property
    def report(self) -> EngineReport:
        child = self._child
        starting, failed = child.state is ChildState.STARTING, child.state is ChildState.FAILED
        facts = child.facts
        return EngineReport(
            model=self.model,
            state=child.state,
            reason=child.reason,
            instance=self._instance,
            socket_path=str(self._socket()) if self._instance else None,
            pid=child.pid,
            attempt=child.generation,
            slots=facts.slots if facts else 0,
            context_length=facts.context_length if facts else None,
            progress=self._progress() if starting else None,
            degraded=child.degraded,
            retry_at=child.retry_at,
            evidence=self.output.last(EVIDENCE_LINES) if failed else (),
            memory=self._heard.report() if child.state is ChildState.READY else None,
            fault=child.fault.kind if failed and child.fault else None,
        )

    def start(self) -> None:
        self._driver.post(StartAsked())

    def stop(self, drain_s: float) -> None:
        """Drain for at most `drain_s`, then end the process. A later call can only hurry."""
        self._driver.post(StopAsked(drain_s))

    def kill(self) -> None:
        """End the process at once, if it lives."""
        self._driver.post(StopAsked(0.0, kill=True))

    @property
    def overdue_s(self) -> float:
        """How long this supervisor has not done what it meant to do by now; see `Driver`."""
        return self._driver.overdue_s

    async def wait_stopped(self) -> None:
        await self._stopped.wait()

    # -- orders -----------------------------------------------------------------------------------

    def _run(self, effect: Effect) -> None:
        match effect:
            case Spawn():
                self._begin_instance()
                self._spawn_task(self._spawn(effect), name=f"spawn {self.model}")
            case SendSignal():
                self._signal(effect.force)
            case Probe():
                self._spawn_task(self._probe(effect), name=f"probe {self.model}")
            case AwaitDrain():
                self._spawn_task(self._drain(effect.generation), name=f"drain {self.model}")
            case Announce():
                self._announce(effect)
            case _:
                assert_never(effect)

    def _begin_instance(self) -> None:
        self._instance = InstanceId(f"{INSTANCE_PREFIX}{self._rng.getrandbits(64):016x}")
        self._wanted_force = None
        self._heard = MemoryHeard()

    async def _spawn(self, order: Spawn) -> None:
        generation, instance = order.generation, self._instance
        assert instance is not None, "_begin_instance comes first"
        argv = server_argv(str(self._binary), order.spec, instance, self._socket().name)
        try:
            process = await ChildProcess.spawn(
                argv,
                cwd=self._run_dir,
                on_line=lambda line: self._line(generation, line),
                on_exit=lambda status: self._exited(generation, instance, status),
            )
        except OSError as error:
            reason = f"no process could be started: {error.strerror or error}"
            self._driver.post(SpawnFailed(generation, reason))
            return
        if self._exited_generation == generation:
            return  # it was faster than we
        self._process = process
        try:
            write_pid_file(self._pid_file(instance), process.pid)
        except OSError as error:  # a full disk; the process runs, and the first net holds
            log.warning("no pid file for the engine of %s: %s", self.model, error.strerror)
        self._driver.post(Spawned(generation, process.pid))
        if self._wanted_force is not None:  # a stop came before there was anything to signal
            self._signal(self._wanted_force)
        await self._watch(process, generation)

    async def _watch(self, process: ChildProcess, generation: int) -> None:
        """Tell of progress that shows nowhere else, while the process owes an answer."""
        before: Activity | None = None
        while not await process.wait_exit(WATCH_S):
            owes = self._child.state is ChildState.STARTING or self._probes_out
            now = read_activity(process.pid) if owes else None
            if before is not None and now is not None and moved(before, now):
                self._driver.post(Progressed(generation))
            before = now

    def _signal(self, force: Force) -> None:
        self._wanted_force = force
        if self._process is not None:
            number = signal.SIGTERM if force is Force.TERM else signal.SIGKILL
            self._process.signal_group(number)

    def _line(self, generation: int, line: str) -> None:
        self.output.add(line, self._clock.wall())
        if self._child.state is ChildState.STARTING:
            self._heard.line(line)
        fault = classify(line)
        if fault is not None:
            self._driver.post(FaultSeen(generation, fault))
        now = self._clock.now()
        if now >= self._output_counted_at + OUTPUT_COUNTS_S:
            self._output_counted_at = now
            self._driver.post(Progressed(generation))

    def _exited(self, generation: int, instance: InstanceId, status: int) -> None:
        self._process, self._exited_generation = None, generation
        for leftover in (self._socket(instance), self._pid_file(instance)):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        self._driver.post(Exited(generation, status))

    async def _drain(self, generation: int) -> None:
        if self._instance is not None:
            await self._wait_idle(self._instance)
        self._driver.post(Drained(generation))

    def _announce(self, effect: Announce) -> None:
        level = logging.WARNING if effect.state in _TROUBLE else logging.INFO
        log.log(level, "engine of %s is %s%s", self.model, effect.state,
                f": {effect.reason}" if effect.reason else "")  # fmt: skip
        if effect.state is ChildState.STOPPED:
            self._driver.close()
            self.output.close()
            self._stopped.set()
        self._on_report(self.report)

    # -- probes -----------------------------------------------------------------------------------

    async def _probe(self, order: Probe) -> None:
        path, instance = str(self._socket()), self._instance
        assert instance is not None, "a process that is probed has an instance"
        self._probes_out += 1
        try:
            event = await self._ask(order, path, instance)
        except MeshdError as error:
            event = ProbeFailed(order.generation, order.kind, error.message)
        finally:
            self._probes_out -= 1
        self._driver.post(event)
        if isinstance(event, ProbeNotYet):
            self._on_report(self.report)  # how far it is

    async def _ask(
        self, order: Probe, path: str, instance: InstanceId
    ) -> ProbePassed | ProbeNotYet | ProbeFailed:
        generation, kind, began = order.generation, order.kind, self._clock.now()
        found: EngineFacts | prober.NotYet | prober.Wrong | None
        match kind:
            case ProbeKind.STARTUP:
                found = await prober.startup(path, instance, self._settings.start_silence_s)
            case ProbeKind.LIVENESS:
                found = await prober.liveness(path)
            case ProbeKind.CANARY:
                found = await prober.generate(path, self._settings.hang_after_s)
            case _:
                assert_never(kind)
        match found:
            case prober.NotYet():
                return ProbeNotYet(generation, kind)
            case prober.Wrong() if (
                kind is ProbeKind.CANARY and self._idle_s(instance) <= self._clock.now() - began
            ):
                # A request came meanwhile, and its long prompt goes first: no verdict.
                return ProbeNotYet(generation, kind)
            case prober.Wrong():
                return ProbeFailed(generation, kind, found.reason, found.final)
            case EngineFacts():
                return ProbePassed(generation, kind, found)
            case None:
                return ProbePassed(generation, kind, idle_s=self._idle_s(instance))
            case _:
                assert_never(found)

    def _idle_s(self, instance: InstanceId) -> float:
        last = self._last_request_at(instance)
        return self._clock.now() - last if last is not None else float("inf")

    def _progress(self) -> float | None:
        activity = read_activity(self._child.pid) if self._child.pid is not None else None
        if activity is None or not self._weights_bytes:
            return None
        return round(min(0.99, activity.resident_bytes / self._weights_bytes), 2)

    def _socket(self, instance: InstanceId | None = None) -> Path:
        name = instance or self._instance or InstanceId("")
        return self._run_dir / f"{name.removeprefix(INSTANCE_PREFIX)}.sock"

    def _pid_file(self, instance: InstanceId) -> Path:
        return self._run_dir / f"{instance.removeprefix(INSTANCE_PREFIX)}.pid"


_TROUBLE = (ChildState.BACKOFF, ChildState.FAILED)


def _policy(settings: EngineSettings) -> Policy:
    return Policy(
        start_silence_s=settings.start_silence_s,
        probe_interval_s=settings.probe_interval_s,
        hang_after_s=settings.hang_after_s,
        canary_interval_s=settings.canary_interval_s,
        stop_grace_s=settings.stop_grace_s,
        restart_budget=settings.restart_budget,
        restart_window_s=settings.restart_window_s,
    )
