"""When devices get the names that the engine has for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.config import load
from meshd.kernel import Board, Pool
from meshd.node.survey import Survey
from meshd.runtime.devices import EngineList
from meshd.view import ProofView, RuntimeView, View
from tests.node.test_survey import LISTING, NODE, reading

PROVED = RuntimeView("e", "cuda", "b", None, "/", (), ProofView("runtime", True, 0.0, ()), "cuda")


async def test_devices_are_looked_at_as_soon_as_the_engine_has_listed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are placed by these names: that must not wait for the next look by the clock."""
    board, pool = Board(View(NODE)), Pool("test", workers=1)
    listed: list[EngineList] = []
    config = load({"data_dir": str(tmp_path)}).config
    service = Survey(config, board, pool, lambda: listed[0] if listed else None)
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
