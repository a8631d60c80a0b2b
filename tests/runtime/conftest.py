"""What the tests of this room share: short directories, and a supervisor in a TaskGroup."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd.config import EngineSettings
from meshd.ids import InstanceId, ModelId
from meshd.kernel import FlightRecorder, MonotonicClock
from meshd.runtime import prober
from meshd.runtime.child_events import ChildState, EngineFacts
from meshd.runtime.launch import LaunchSpec
from meshd.runtime.supervisor import EnginePlaces, EngineReport, EngineSupervisor
from tests.runtime.scripted_process import ScriptedProcess


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short path: unix sockets must fit into 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="meshd-"))
    yield path
    shutil.rmtree(path)


async def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 15.0) -> None:
    """Poll until `condition` is true; fails, naming `what`, after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 (conditions of other processes have no event)
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"not within {timeout_s} s: {what}")


class Stage:
    """One supervisor, all its reports, and a say in what the other rooms would say."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        self.reports: list[EngineReport] = []
        self.idle = asyncio.Event()
        self.idle.set()
        self.last_request_at: float | None = None
        self.recorder = FlightRecorder()
        self.clock = MonotonicClock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._made: list[EngineSupervisor] = []

    def supervise(
        self,
        binary: Path,
        weights: Path,
        *,
        parallel: int = 2,
        rpc: tuple[str, ...] = (),
        on_report: Callable[[EngineReport], None] | None = None,
        **settings: Any,
    ) -> EngineSupervisor:
        defaults: dict[str, Any] = {"stop_grace_s": 5.0, "threads": 1}
        limits = EngineSettings(**{**defaults, **settings})
        supervisor = EngineSupervisor(
            ModelId(weights.stem),
            LaunchSpec(
                ModelId(weights.stem),
                str(weights),
                context=512,
                parallel=parallel,
                threads=limits.threads,
                rpc=rpc,
                extra=limits.extra_args,
            ),
            binary,
            settings=limits,
            places=EnginePlaces(self.run_dir, self.directory / "logs"),
            weights_bytes=weights.stat().st_size if weights.exists() else 0,
            clock=self.clock,
            rng=random.Random(1),
            recorder=self.recorder,
            spawn_task=self.spawn,
            wait_idle=self._wait_idle,
            last_request_at=lambda _: self.last_request_at,
            on_report=on_report or self.reports.append,
        )
        self._made.append(supervisor)
        return supervisor

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # an exception here takes a node down: it goes to the loop's handler

    async def _wait_idle(self, _: InstanceId) -> None:
        await self.idle.wait()

    def states(self) -> list[ChildState]:
        """Without repetitions."""
        seen = [r.state for r in self.reports]
        return [s for i, s in enumerate(seen) if i == 0 or seen[i - 1] is not s]

    def files(self) -> set[str]:
        return {path.name for path in self.run_dir.iterdir()}

    async def close(self) -> None:
        for supervisor in self._made:
            if supervisor.report.state is not ChildState.STOPPED:
                supervisor.stop(0.0)
                async with asyncio.timeout(15.0):
                    await supervisor.wait_stopped()
        self.idle.set()
        async with asyncio.timeout(15.0):
            while self._tasks:
                await asyncio.wait(self._tasks)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are scripted processes; whatever they are asked, they answer that all is well."""
    monkeypatch.setattr("meshd.runtime.supervisor.ChildProcess", ScriptedProcess)
    ScriptedProcess.made.clear()
    ScriptedProcess.exit_before_spawned.clear()

    async def startup(*_: object) -> EngineFacts:
        return EngineFacts(2, 512)

    async def fine(*_: object) -> None:
        return None

    monkeypatch.setattr(prober, "startup", startup)
    monkeypatch.setattr(prober, "liveness", fine)
    monkeypatch.setattr(prober, "generate", fine)


@pytest.fixture
async def stage(short_dir: Path) -> AsyncIterator[Stage]:
    stage = Stage(short_dir)
    yield stage
    await stage.close()
