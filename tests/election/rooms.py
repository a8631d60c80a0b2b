"""The room of an election with a real board, store and driver, in a node whose engines, weights and
mesh say what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from meshd.config import Config
from meshd.election.memory import Memory
from meshd.election.room import ElectionRoom, Needs
from meshd.election.store import ElectionStore
from meshd.election.words import StartHost
from meshd.errors import BadReference, MeshdError, ModelNotFound, NotFound
from meshd.ids import LoanId, MeshId, ModelId, NodeId
from meshd.kernel import Board, Clock, FlightRecorder, MonotonicClock, Pool
from meshd.view import (
    Claim,
    Deployment,
    DeviceView,
    MeshState,
    MeshView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerState,
    PeerView,
    Preparing,
    ProofView,
    Role,
    RuntimeView,
    SplitPlan,
    View,
    with_local,
    with_peers,
)
from meshd.view.shape import LayerKind, MemoryParts, ModelShape

OWN, OTHER = NodeId("a" * 52), NodeId("b" * 52)
LLAMA, QWEN = ModelId("llama"), ModelId("qwen")
MIB = 1 << 20
SHAPE = ModelShape(
    architecture="llama",
    weight_unit=MIB,
    weights=(100, 100),
    pattern="aa",
    kinds=(LayerKind(key=64, value=64),),
    width=64,
    query=64,
    attended=64,
    feed_forward=128,
    heads=4,
    vocabulary=100,
    trained_context=1024,
)
ENGINE = "engine-1"
CPU = DeviceView("CPU", "cpu", None, 4096 * MIB, 4096 * MIB, True, None)


async def until(condition: Callable[[], object], what: str, timeout_s: float = 5.0) -> None:
    """Poll until `condition` is true; fails, naming `what`."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(f"not within {timeout_s} s: {what}")


async def turns(count: int = 20) -> None:
    """Let everything that is ready to run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def a_view(*, role: Role = Role.MEMBER) -> View:
    node = NodeView(OWN, "alpha", "1", role.value, NodeState.READY, 0.0, "", None)
    runtime = RuntimeView(ENGINE, "cpu", "b1", None, "/", (), ProofView("backend", True, 0.0, ()))
    mesh = MeshView(MeshId("mesh"), "home", MeshState.MEMBER)
    return View(node, runtime=runtime, devices=(CPU,), mesh=mesh)


def a_peer(*claims: Claim, **changes: Any) -> PeerView:
    return replace(PeerView(OTHER, "beta", PeerState.ALIVE, version="1", claims=claims), **changes)


class Stage:
    """One room, and a say in what its node has."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Clock | None = None,
        role: Role = Role.MEMBER,
        **settings: Any,
    ) -> None:
        self.config = Config(name="alpha", data_dir=directory, cache_dir=directory, **settings)
        self.board = Board(a_view(role=role))
        self.clock = clock or MonotonicClock()
        self.store = ElectionStore(directory)
        self.pool = Pool("test", workers=2)
        self.started: list[tuple[Deployment, int | None]] = []
        self.plans: list[SplitPlan | None] = []
        """Of those."""
        self.stopped: list[tuple[ModelId, bool]] = []
        self.spread: list[tuple[ModelId, ...]] = []
        self.looked_at_devices = 0
        self.shapes: dict[str, ModelShape | MeshdError] = {}
        """By REF; what is not named has `SHAPE`."""
        self.hold: asyncio.Event | None = None
        """While it is there and not set, no shape is found."""
        self.preparing: Callable[[Callable[[Preparing], None]], Awaitable[object]] | None = None
        self.start_fails: MeshdError | None = None
        self.elsewhere: dict[str, str] = {}
        self.memory: dict[ModelId, Mapping[str, MemoryParts]] = {}
        self.others_expected = False
        self.lends_nothing: str | None = "this node has no RPC server"
        self.loans_to_end: list[tuple[LoanId, str]] = []
        self.lost_workers: set[ModelId] = set()
        """Models that failed for want of one."""
        self.avoided: set[NodeId] = set()
        self.auto: str | None = None
        self.room = ElectionRoom(
            self.config,
            self.board,
            self._needs(),
            self.store,
            self.store.load(),
            clock=self.clock,
            recorder=FlightRecorder(),
            pool=self.pool,
        )

    @property
    def view(self) -> View:
        return self.board.current

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ElectionRoom]:
        task = asyncio.create_task(self.room.run())
        ready = asyncio.create_task(self.room.ready.wait())
        try:
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
            yield self.room
        finally:
            ready.cancel()
            self.room.stopping.set()
            try:
                async with asyncio.timeout(5):
                    await task
            finally:
                self.pool.close()

    # -- what happens -----------------------------------------------------------------------------

    def publish(self, **changes: Any) -> None:
        self.board.publish(replace(self.view, **changes))

    def becomes(self, model: ModelId, state: ModelState, **more: Any) -> None:
        """This node's engine of `model` is so far; ABSENT: it is gone."""
        local = dict(self.view.local)
        if state is ModelState.ABSENT:
            local.pop(model, None)
        else:
            local[model] = ModelView(model, f"org/{model}", state, **more)
        self.board.publish(with_local(self.view, MappingProxyType(local)))

    def lists(self, model: ModelId) -> None:
        """Its weights are here, and nothing asks for it."""
        listed = ModelView(model, f"org/{model}", ModelState.ABSENT, "not loaded")
        self.board.publish(
            with_local(self.view, MappingProxyType({**self.view.local, model: listed}))
        )

    def sees(self, *peers: PeerView) -> None:
        self.board.publish(with_peers(self.view, peers))

    def now(self, state: NodeState) -> None:
        self.publish(node=replace(self.view.node, state=state))

    async def serving(self, model: ModelId = LLAMA) -> None:
        """Wait until it is started here, and let it be ready."""
        count = sum(d.model == model for d, _ in self.started)
        await until(lambda: model in self.view.local, f"{model} started after {count} starts")
        self.becomes(model, ModelState.READY)
        await until(lambda: self.claim(model) == "ready", f"{model} claimed to be ready")

    # -- what is seen -----------------------------------------------------------------------------

    def claim(self, model: ModelId = LLAMA) -> str | None:
        return next((str(c.state) for c in self.view.claims if c.model == model), None)

    def bid(self, model: ModelId = LLAMA) -> tuple[str, str]:
        return next((str(b.suits), b.reason) for b in self.view.bids if b.model == model)

    def shown(self, model: ModelId = LLAMA) -> ModelState | None:
        """As a client sees it."""
        seen = self.view.models.get(model)
        return None if seen is None else seen.state

    def record(self, model: ModelId = LLAMA) -> Deployment:
        return next(d for d in self.view.deployments if d.model == model)

    # -- other rooms ------------------------------------------------------------------------------

    def _needs(self) -> Needs:
        return Needs(
            start=self._start,
            stop=self._stop,
            taken=self._taken,
            engine=lambda: (ENGINE, None),
            shape=self._shape,
            prepare=self._prepare,
            here=self.elsewhere.get,
            identify=identify,
            find_node=self._find_node,
            spread=self._spread,
            expects_others=lambda: self.others_expected,
            look_at_devices=self._look_at_devices,
            auto=self._auto,
            lends=lambda: self.lends_nothing,
            end_loan=lambda loan, reason: self.loans_to_end.append((loan, reason)),
            worker_lost=self.lost_workers.__contains__,
            avoided=lambda: self.avoided,
        )

    def _start(self, order: StartHost, prompts: int | None) -> None:
        deployment = order.deployment
        self.started.append((deployment, prompts))
        self.plans.append(order.plan)
        if self.start_fails is not None:
            raise self.start_fails
        self.becomes(deployment.model, ModelState.LOADING, reason="loading")

    def _stop(self, model: ModelId, drain: bool) -> None:
        self.stopped.append((model, drain))
        if model not in self.view.local:
            raise ModelNotFound(f"no {model}")
        self.becomes(model, ModelState.ABSENT)

    def _taken(self, model: ModelId) -> Mapping[str, MemoryParts] | None:
        seen = self.view.local.get(model)
        ready = seen is not None and seen.state is ModelState.READY
        return self.memory.get(model) if ready else None

    async def _shape(self, ref: str) -> ModelShape:
        if self.hold is not None:
            await self.hold.wait()
        found = self.shapes.get(ref, SHAPE)
        if isinstance(found, MeshdError):
            raise found
        return found

    async def _prepare(self, ref: str, moved: Callable[[Preparing], None]) -> object:
        if self.preparing is None:
            found = self.shapes.get(ref)
            assert isinstance(found, MeshdError), "weights are made whole where headers fail"
            raise found
        return await self.preparing(moved)

    def _find_node(self, name: str) -> NodeId:
        for peer in self.view.peers:
            if peer.name == name:
                return peer.id
        raise NotFound(f"no node {name}")

    def _spread(self, models: Collection[ModelId]) -> None:
        self.spread.append(tuple(sorted(models)))

    def _look_at_devices(self) -> None:
        self.looked_at_devices += 1

    def _auto(self, memory: Memory) -> str | None:
        assert memory.budgets, "asked for once its memory is known"
        return self.auto


def identify(ref: str) -> tuple[ModelId, str]:
    if ref.startswith("bad"):
        raise BadReference(f"{ref} cannot be read")
    return ModelId(ref.rpartition("/")[2]), ref if "/" in ref else f"org/{ref}"
