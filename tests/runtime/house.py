"""A node's `ModelHost` without the rest of a node."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from meshd.config import Config, EngineSettings
from meshd.ids import InstanceId, ModelId, NodeId
from meshd.kernel import Board, FlightRecorder, MonotonicClock, Pool
from meshd.runtime.host import ModelHost, Rooms
from meshd.runtime.hosting_events import WeightFacts
from meshd.runtime.record import RuntimeRecord
from meshd.view import ModelState, ModelView, NodeState, NodeView, Preparing, RuntimeView, View
from tests.runtime.conftest import wait_for
from tests.runtime.lender import FakeLender

M = ModelId("m")


class House:
    """A running `ModelHost` of the model `m`, and its view."""

    def __init__(
        self,
        directory: Path,
        *,
        lender: FakeLender | None = None,
        server: Path = Path("/e/llama-server"),
        weights: Path = Path("/w/m.gguf"),
    ) -> None:
        node = NodeView(NodeId("a"), "a", "0", "member", NodeState.READY, 0.0, "", None)
        self.board = Board(View(node=node))
        self._weights = str(weights)
        self._pool = Pool("test", workers=1)
        engine = cast("RuntimeRecord", SimpleNamespace(id="e", server_path=server, version="v"))
        settings = EngineSettings(threads=1)
        config = Config(name="a", data_dir=directory, cache_dir=directory, engine=settings)
        config.run_dir.mkdir()
        rooms = Rooms(
            find_engine=lambda: engine,
            prepare=self._prepare,
            identify=lambda ref: (M, ref),
            wait_idle=self._wait_idle,
            last_request_at=lambda _: None,
            always_listed=dict,
            shown=lambda _: cast("RuntimeView", None),
        )
        self.host = ModelHost(
            config,
            self.board,
            replace(rooms, borrow=lender.borrow) if lender else rooms,
            clock=MonotonicClock(),
            rng=random.Random(1),
            recorder=FlightRecorder(),
            pool=self._pool,
        )
        self._running = asyncio.create_task(self.host.run())

    async def _prepare(self, ref: str, moved: Callable[[Preparing], None]) -> WeightFacts:
        return WeightFacts(self._weights, 10**6, 4096, ("completion",), "d1", 0)

    async def _wait_idle(self, instance: InstanceId) -> None:
        return None

    @property
    def view(self) -> ModelView | None:
        return self.board.current.local.get(M)

    async def until(self, state: ModelState) -> ModelView:
        await wait_for(lambda: self.view and self.view.state is state, f"{state}; {self.view}")
        assert self.view is not None
        return self.view

    async def start(self) -> None:
        """Return when it has found its engine: no model is given to a node before."""
        await wait_for(lambda: self.host.engine_problem is None, "the engine")

    async def stop(self) -> None:
        self.host.stopping.set()
        async with asyncio.timeout(self.host.stop_limit_s):
            await self._running
        self._pool.close()
