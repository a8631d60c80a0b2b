"""Runs a small model on a device the way real models are run, and watches what comes of it.

The child is started through the guard, listens on a unix socket of its own, and has ended and been
reaped when `run_model` returns, whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from meshd.ids import InstanceId, ModelId
from meshd.kernel import Pool
from meshd.runtime import prober
from meshd.runtime.child_events import EngineFacts
from meshd.runtime.faults import classify
from meshd.runtime.launch import INSTANCE_PREFIX, LaunchSpec, server_argv
from meshd.runtime.orphans import write_pid_file
from meshd.runtime.process import ChildProcess
from meshd.runtime.proof.evidence import RuntimeEvidence
from meshd.runtime.proof.witness import Usage, pids_are_ours, read_usage, sees
from meshd.runtime.reported import VERBOSITY, MemoryHeard

LIMIT_S = 45.0
"""From the start of the process to the last token; a regression must be known within a minute."""
FIRST_LIMIT_S = 180.0
"""The first time: a driver may compile kernels from PTX, which takes minutes on small machines."""
LOOK_EVERY_S = 0.1
END_LIMIT_S = 5.0
CONTEXT, TOKENS = 512, 32
ALL_LAYERS = 999
KEPT_LINES = 4


@dataclass(frozen=True, slots=True)
class Trial:
    """What to run, and where."""

    server: Path
    weights: Path
    device: str
    """As the engine calls it."""
    run_dir: Path
    limit_s: float
    witnessed: bool
    """Whether NVIDIA's driver can tell who computes on the device."""


@dataclass(slots=True)
class _Heard:
    """What the engine said while it started."""

    memory: MemoryHeard = field(default_factory=MemoryHeard)
    last: list[str] = field(default_factory=list)
    no_memory: bool = False
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    status: int | None = None

    def line(self, line: str) -> None:
        self.memory.line(line)
        fault = classify(line)
        self.no_memory |= fault is not None and fault.out_of_memory
        self.last = [*self.last[-KEPT_LINES + 1 :], line]

    def ended(self, status: int) -> None:
        self.status = status
        self.exited.set()


async def run_model(
    trial: Trial,
    pool: Pool,
    rng: random.Random,
    *,
    usage: Callable[[], Usage | None] = read_usage,
    own_pids: Callable[[], bool] = pids_are_ours,
) -> RuntimeEvidence:
    """One run, at most `trial.limit_s` and a few seconds to end it. Raises nothing of its own: what
    went wrong is the evidence's problem."""
    before = await pool.run(usage) if trial.witnessed else None
    instance = InstanceId(f"{INSTANCE_PREFIX}{rng.getrandbits(64):016x}")
    stem = instance.removeprefix(INSTANCE_PREFIX)
    socket, pid_file = trial.run_dir / f"{stem}.sock", trial.run_dir / f"{stem}.pid"
    heard = _Heard()
    nothing = RuntimeEvidence(trial.device)
    try:
        trial.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        process = await ChildProcess.spawn(
            _argv(trial, instance, socket.name),
            cwd=trial.run_dir,
            on_line=heard.line,
            on_exit=heard.ended,
        )
    except OSError as error:
        return replace(nothing, problem=f"no process could be started: {error.strerror or error}")
    try:
        with contextlib.suppress(OSError):  # a full disk: the process runs, and the first net holds
            write_pid_file(pid_file, process.pid)
        seen = await _watch(trial, process, socket, instance, heard)
        if trial.witnessed and seen.generated:
            now = await pool.run(usage)
            driver_sees, said = sees(before, now, process.pid, own_pids=own_pids())
            seen = replace(seen, driver_sees=driver_sees, driver_said=said)
        return seen
    finally:
        await _end(process)
        for leftover in (socket, pid_file):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _argv(trial: Trial, instance: InstanceId, socket_name: str) -> tuple[str, ...]:
    spec = LaunchSpec(
        ModelId("proof"),
        str(trial.weights),
        context=CONTEXT,
        parallel=1,
        gpu_layers=ALL_LAYERS,
        extra=("--device", trial.device, "--verbosity", str(VERBOSITY)),
    )
    return server_argv(str(trial.server), spec, instance, socket_name)


async def _watch(
    trial: Trial, process: ChildProcess, socket: Path, instance: InstanceId, heard: _Heard
) -> RuntimeEvidence:
    found: EngineFacts | prober.NotYet | prober.Wrong = prober.NotYet()
    speed: float | prober.Wrong | None = None
    program: str | None = None
    try:
        async with asyncio.timeout(trial.limit_s):
            while isinstance(found, prober.NotYet) and not heard.exited.is_set():
                found = await prober.startup(str(socket), instance, trial.limit_s)
                if isinstance(found, prober.NotYet):
                    await process.wait_exit(LOOK_EVERY_S)
            if isinstance(found, EngineFacts):
                program = _program(process.pid)
                speed = await prober.measure(str(socket), TOKENS, trial.limit_s)
    except TimeoutError:
        pass
    return RuntimeEvidence(
        device=trial.device,
        executed=program,
        offloaded=heard.memory.offloaded,
        buffers=heard.memory.model_buffers,
        pid=process.pid,
        generated=isinstance(speed, float),
        tokens_per_s=speed if isinstance(speed, float) else None,
        no_memory=heard.no_memory,
        problem=_problem(trial, heard, found, speed),
    )


def _problem(
    trial: Trial,
    heard: _Heard,
    found: EngineFacts | prober.NotYet | prober.Wrong,
    speed: float | prober.Wrong | None,
) -> str | None:
    words = " / ".join(line for line in heard.last if line.strip())
    if isinstance(speed, float):
        return None
    if heard.exited.is_set():
        return f"the engine ended with status {heard.status} on {trial.device}: {words}"
    for trouble in (speed, found):
        if isinstance(trouble, prober.Wrong):
            return f"on {trial.device}: {trouble.reason}"
    return f"no answer on {trial.device} within {trial.limit_s:g} s; its last words: {words}"


def _program(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return None


async def _end(process: ChildProcess) -> None:
    """At once: there is nothing in it to save, and a cancelled proof leaves no process either."""
    process.signal_group(signal.SIGKILL)
    await process.wait_exit(END_LIMIT_S)
