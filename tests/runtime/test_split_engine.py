"""The shell around `Group`, with scripted processes and workers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from meshd.errors import PeerUnreachable
from meshd.ids import ModelId
from meshd.runtime.child_events import ChildState
from meshd.runtime.group import LoanOrder
from meshd.runtime.split_engine import SplitEngine
from meshd.runtime.supervisor import EngineReport, EngineSupervisor
from meshd.view.shape import MemoryParts
from tests.runtime.conftest import Stage, wait_for
from tests.runtime.lender import PLAN, FakeLender
from tests.runtime.scripted_process import ScriptedProcess

pytestmark = pytest.mark.usefixtures("scripted")

ORDER = LoanOrder(ModelId("m"), 3, None, PLAN)
LOST = "worker c was lost: its rpc-server ended"
ABORT = "/src/ggml-rpc.cpp:569: Remote RPC server crashed or returned malformed response"


@pytest.fixture
async def lender() -> FakeLender:
    return FakeLender()


@pytest.fixture
async def engine(stage: Stage, short_dir: Path, lender: FakeLender) -> SplitEngine:
    def make(
        endpoints: tuple[str, ...], on_report: Callable[[EngineReport], None]
    ) -> EngineSupervisor:
        return stage.supervise(
            short_dir / "llama-server", short_dir / "m.gguf", rpc=endpoints, on_report=on_report
        )

    return SplitEngine(
        ORDER,
        borrow=lender.borrow,
        make=make,
        clock=stage.clock,
        recorder=stage.recorder,
        spawn_task=stage.spawn,
        on_report=stage.reports.append,
    )


async def until(engine: SplitEngine, state: ChildState) -> EngineReport:
    await wait_for(lambda: engine.report.state is state, f"{state}; {engine.report}")
    return engine.report


async def stopped(engine: SplitEngine) -> None:
    async with asyncio.timeout(5.0):
        await engine.wait_stopped()


async def test_from_asking_to_ready_to_nothing(
    stage: Stage, engine: SplitEngine, lender: FakeLender
) -> None:
    lender.grants.clear()
    engine.start()
    await wait_for(lambda: lender.orders, "the workers are asked")
    assert lender.orders == [ORDER]
    assert engine.report.reason == "asking b, c for memory"
    lender.moved("c reads its weights")
    assert stage.reports[-1].reason == "c reads its weights"
    assert (engine.report.pid, engine.report.instance) == (None, None)
    lender.grants.set()
    report = await until(engine, ChildState.READY)
    assert report.instance is not None
    assert report.slots == 2
    (process,) = ScriptedProcess.made
    assert process.argv[process.argv.index("--rpc") + 1] == "127.0.0.1:1,127.0.0.1:2"
    stage.idle.clear()
    engine.stop(30.0)
    await until(engine, ChildState.DRAINING)
    assert lender.ended == []
    stage.idle.set()
    await stopped(engine)
    assert process.signals == [signal.SIGTERM]
    assert lender.ended == ["the model is no longer wanted here"]
    assert stage.states() == [
        *(ChildState.STARTING, ChildState.READY, ChildState.DRAINING),
        *(ChildState.STOPPING, ChildState.STOPPED),
    ]


async def test_memory_that_is_lent_is_not_reported_as_this_nodes(
    engine: SplitEngine, lender: FakeLender
) -> None:
    engine.start()
    await wait_for(lambda: ScriptedProcess.made, "a process")
    for device in ("RPC0[127.0.0.1:1]", "CPU"):
        ScriptedProcess.made[0].say(f"sched_reserve: {device} compute buffer size = 2.00 MiB")
    report = await until(engine, ChildState.READY)
    assert report.memory is not None
    assert dict(report.memory.devices) == {"CPU": MemoryParts(compute=2 << 20)}
    engine.stop(0.0)
    await stopped(engine)


async def test_a_lost_worker_ends_all_at_once(
    stage: Stage, engine: SplitEngine, lender: FakeLender
) -> None:
    engine.start()
    await until(engine, ChildState.READY)
    lender.lost(LOST)
    assert (engine.report.state, engine.report.reason) == (ChildState.FAILED, LOST)
    await wait_for(lambda: lender.ended, "giving back")
    assert ScriptedProcess.made[0].signals == [signal.SIGKILL]
    assert len(ScriptedProcess.made) == 1
    assert lender.ended == [LOST]
    engine.stop(30.0)
    await stopped(engine)
    assert lender.ended == [LOST]
    assert stage.files() == set()


async def test_an_abort_is_told_with_the_name_of_the_worker(
    engine: SplitEngine, lender: FakeLender
) -> None:
    engine.start()
    await until(engine, ChildState.READY)
    ScriptedProcess.made[0].say(ABORT)
    ScriptedProcess.made[0].exit(-signal.SIGABRT)
    assert engine.report.state is ChildState.STOPPING
    lender.lost(LOST)
    assert (engine.report.state, engine.report.reason) == (ChildState.FAILED, LOST)
    assert engine.report.evidence == (ABORT,)
    engine.stop(0.0)
    await stopped(engine)


async def test_an_abort_without_news_is_told_as_it_is(
    engine: SplitEngine, lender: FakeLender
) -> None:
    engine.start()
    await until(engine, ChildState.READY)
    ScriptedProcess.made[0].say(ABORT)
    ScriptedProcess.made[0].exit(-signal.SIGABRT)
    report = await until(engine, ChildState.FAILED)
    assert report.reason == "a worker's rpc-server went away"
    await wait_for(lambda: lender.ended, "giving back")
    engine.stop(0.0)
    await stopped(engine)


async def test_a_refusal_is_the_reason(engine: SplitEngine, lender: FakeLender) -> None:
    lender.refusal = PeerUnreachable("c did not answer within 5 s")
    engine.start()
    report = await until(engine, ChildState.FAILED)
    assert report.reason == "c did not answer within 5 s"
    assert ScriptedProcess.made == []
    engine.stop(0.0)
    await stopped(engine)
    assert lender.ended == []


async def test_a_stop_while_asking_waits_until_all_is_undone(
    stage: Stage, engine: SplitEngine, lender: FakeLender
) -> None:
    lender.grants.clear()
    lender.undone.clear()
    engine.start()
    await wait_for(lambda: lender.orders, "the workers are asked")
    engine.stop(0.0)
    engine.stop(0.0)
    await lender.undoing.wait()
    assert stage.states() == [ChildState.STARTING]
    lender.undone.set()
    await stopped(engine)
    assert ScriptedProcess.made == []
    assert lender.ended == []
    assert stage.states() == [ChildState.STARTING, ChildState.STOPPED]


async def test_workers_that_do_not_take_back_are_left_behind(
    engine: SplitEngine,
    lender: FakeLender,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("meshd.runtime.split_engine.END_LIMIT_S", 0.05)
    lender.gives_back.clear()
    engine.start()
    await until(engine, ChildState.READY)
    engine.stop(0.0)
    await stopped(engine)
    assert "was not given back in order: no answer" in caplog.text
