"""The node's look at its devices, with drivers by script."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from meshd.config import load
from meshd.ids import NodeId
from meshd.kernel import Board, Pool
from meshd.node import survey
from meshd.runtime.devices import Driver, Gpu, Reading, parse_list
from meshd.view import DeviceView, NodeState, NodeView, View

NODE = NodeView(NodeId("n"), "n", "1", "member", NodeState.READY, 0.0, "127.0.0.1:9337", None)
CPU = DeviceView("A CPU", "cpu", None, 64, 48, True, None)
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
    board.subscribe(lambda v: seen.append((v.devices[0].engine_name, v.devices[0].problem)))
    monkeypatch.setattr(survey, "SURVEY_INTERVAL_S", 0.001)
    monkeypatch.setattr("meshd.runtime.devices.take_reading", look)
    async with asyncio.timeout(10):
        await service.run()
    pool.close()
    assert (seen, to_come) == ([("CUDA0", None), (None, LOST)], [])
    lines = [r.getMessage() for r in caplog.records if r.name == "meshd.node.survey"]
    assert lines == [f"NVIDIA H200 (GPU-a) cannot be used any more: {LOST}"]
