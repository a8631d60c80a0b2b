"""The node's look at its devices, with drivers by script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.config import load
from meshd.ids import ModelId, NodeId
from meshd.kernel import Board, Pool
from meshd.node import survey
from meshd.runtime.devices import Driver, EngineList, Gpu, Reading, measure_memory_speed, parse_list
from meshd.view import (
    DeviceView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    ProofView,
    RuntimeView,
    View,
)

NODE = NodeView(NodeId("n"), "n", "1", "member", NodeState.READY, 0.0, "127.0.0.1:9337", None)
CPU = DeviceView("A CPU", "cpu", None, 64, 48, True, None)
ROOMY = replace(CPU, memory_total_bytes=8 << 30, memory_free_bytes=1 << 30)
ENGINE = RuntimeView("e", "cpu", "b", "7.0.0", "/e", (), ProofView("none", False, 0.0, ()))
PROVED = replace(ENGINE, backend="cuda", built_for="cuda")
LOADING = ModelView(ModelId("m"), "m", ModelState.LOADING)
LISTING = parse_list("  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)\n", "cuda")
LOST = "the GPU fell off the bus"


def reading(problem: str | None) -> Reading:
    total, free = 143771 << 20, 143000 << 20
    view = DeviceView("NVIDIA H200", "cuda", "GPU-a", total, free, False, "9.0", problem=problem)
    return Reading((Gpu(view, 0),), CPU, (Driver("NVIDIA", "580.95.05", None),))


async def test_a_lost_gpu_is_shown_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board, pool = Board(View(NODE)), Pool("test", workers=1)
    config = load({"data_dir": str(tmp_path)}).config
    service = survey.Survey(config, board, pool, lambda: LISTING)
    loop = asyncio.get_running_loop()
    to_come = [reading(None), reading(LOST), reading(LOST)]

    def look() -> Reading:
        if len(to_come) == 1:
            loop.call_soon_threadsafe(service.stopping.set)
        return to_come.pop(0)

    seen: list[tuple[str | None, str | None]] = []

    def see(view: View) -> None:
        found = (view.devices[0].engine_name, view.devices[0].problem)
        if found not in seen[-1:]:  # the disk, which is looked at as well, is never still
            seen.append(found)

    board.subscribe(see)
    monkeypatch.setattr(survey, "SURVEY_INTERVAL_S", 0.001)
    monkeypatch.setattr("meshd.runtime.devices.take_reading", look)
    async with asyncio.timeout(10):
        await service.run()
    pool.close()
    assert (seen, to_come) == ([("CUDA0", None), (None, LOST)], [])
    lines = [r.getMessage() for r in caplog.records if r.name == "meshd.node.survey"]
    assert lines == [f"NVIDIA H200 (GPU-a) cannot be used any more: {LOST}"]


# -- speed of main memory --------------------------------------------------------------------------


@asynccontextmanager
async def surveying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: View, speed: str | None = None
) -> AsyncIterator[tuple[Board[View], list[int]]]:
    """The board of a node with that view and setting, and how often memory was measured."""
    stated = {} if speed is None else {"engine.memory_speed": speed}
    config = load({"data_dir": str(tmp_path), **stated}).config
    board, pool = Board(view), Pool("test", workers=1)
    service = survey.Survey(config, board, pool, lambda: None)
    measured: list[int] = []

    def measure(free_bytes: int) -> int | None:
        measured.append(free_bytes)
        return measure_memory_speed(free_bytes)

    monkeypatch.setattr(survey, "UNDISTURBED_S", 0.0)
    monkeypatch.setattr("meshd.runtime.devices.measure_memory_speed", measure)
    monkeypatch.setattr("meshd.runtime.devices.take_reading", lambda: Reading((), ROOMY, ()))
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(service.run())
        yield board, measured
        service.stopping.set()
    pool.close()


async def told(board: Board[View]) -> int | None:
    """The speed of main memory, once there is one."""
    found: asyncio.Queue[int] = asyncio.Queue(9)

    def look(view: View) -> None:
        for device in view.devices:
            if device.memory_bytes_per_s is not None:
                found.put_nowait(device.memory_bytes_per_s)

    unsubscribe = board.subscribe(look)
    look(board.current)
    speed = await found.get()
    unsubscribe()
    return speed


async def test_memory_is_measured_once_when_nothing_is_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = View(NODE, runtime=ENGINE, local={LOADING.id: LOADING})
    async with surveying(tmp_path, monkeypatch, view) as (board, measured):
        looked = asyncio.Event()
        unsubscribe = board.subscribe(lambda view: looked.set())
        await looked.wait()
        unsubscribe()
        assert measured == []
        board.publish(replace(board.current, local={}))
        speed = await told(board)
        board.publish(replace(board.current, local={LOADING.id: LOADING}))
        board.publish(replace(board.current, local={}))
    assert speed is not None
    assert speed > 100_000_000
    assert measured == [1 << 30]


@pytest.mark.parametrize("engine", [None, replace(ENGINE, rpc_protocol=None)])
async def test_memory_is_not_measured_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: RuntimeView | None
) -> None:
    async with surveying(tmp_path, monkeypatch, View(NODE, runtime=engine)) as (board, measured):
        for reason in "abc":
            board.publish(replace(board.current, local={LOADING.id: replace(LOADING, ref=reason)}))
            board.publish(replace(board.current, local={}))
            await asyncio.sleep(0)
    assert measured == []


async def test_what_is_configured_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = View(NODE, runtime=ENGINE)
    async with surveying(tmp_path, monkeypatch, view, "60GB") as (board, measured):
        assert await told(board) == 60 * 10**9
    assert measured == []
    async with surveying(tmp_path, monkeypatch, view, "0B") as (board, measured):
        looked = asyncio.Event()
        board.subscribe(lambda view: looked.set())
        await looked.wait()
        assert [device.memory_bytes_per_s for device in board.current.devices] == [None]
    assert measured == []


async def test_devices_are_looked_at_as_soon_as_the_engine_has_listed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are placed by these names: that must not wait for the next look by the clock."""
    board, pool = Board(View(NODE)), Pool("test", workers=1)
    listed: list[EngineList] = []
    config = load({"data_dir": str(tmp_path)}).config
    service = survey.Survey(config, board, pool, lambda: listed[0] if listed else None)
    monkeypatch.setattr("meshd.runtime.devices.take_reading", lambda: reading(None))
    names: asyncio.Queue[str | None] = asyncio.Queue()
    board.subscribe(lambda view: names.put_nowait(view.devices[0].engine_name))
    running = asyncio.ensure_future(service.run())
    async with asyncio.timeout(10):
        assert await names.get() is None
        listed.append(LISTING)
        board.publish(replace(board.current, runtime=PROVED))
        assert await names.get() is None, "this was published with the devices of before"
        assert await names.get() == "CUDA0"
        service.stopping.set()
        await running
    assert names.empty(), "one look is enough"
    pool.close()
