"""The node's look at its devices, with drivers by script."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from meshd.config import load
from meshd.ids import NodeId
from meshd.kernel import Board, Pool
from meshd.node import survey
from meshd.runtime.devices import Driver, Gpu, Reading
from meshd.view import DeviceView, NodeState, NodeView, View

NODE = NodeView(NodeId("n"), "n", "1", "member", NodeState.READY, 0.0, "127.0.0.1:9337", None)
CPU = DeviceView("A CPU", "cpu", None, 64, 48, True, None)
LOST = "the GPU fell off the bus"


def reading(problem: str | None) -> Reading:
    view = DeviceView("NVIDIA H200", "cuda", "GPU-a", 140, 139, False, "9.0", problem=problem)
    return Reading((Gpu(view, 0),), CPU, (Driver("NVIDIA", "580.95.05", None),))


async def test_a_lost_gpu_is_shown_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board, pool = Board(View(NODE)), Pool("test", workers=1)
    service = survey.Survey(load({"data_dir": str(tmp_path)}).config, board, pool)
    loop = asyncio.get_running_loop()
    to_come = [reading(None), reading(LOST), reading(LOST)]

    def look() -> Reading:
        if len(to_come) == 1:
            loop.call_soon_threadsafe(service.stopping.set)
        return to_come.pop(0)

    seen: list[str | None] = []
    board.subscribe(lambda view: seen.append(view.devices[0].problem))
    monkeypatch.setattr(survey, "SURVEY_INTERVAL_S", 0.001)
    monkeypatch.setattr("meshd.runtime.devices.take_reading", look)
    async with asyncio.timeout(10):
        await service.run()
    pool.close()
    assert (seen, to_come) == ([None, LOST], [])
    lines = [r.getMessage() for r in caplog.records if r.name == "meshd.node.survey"]
    assert lines == [f"NVIDIA H200 (GPU-a) cannot be used any more: {LOST}"]
