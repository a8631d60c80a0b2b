"""The host's side of splits: whom it avoids, what it counts, what it tells its workers."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshd.cache.manifest import Shard
from meshd.cache.room import CacheRoom
from meshd.cache.tensors import HeldShards, TensorPlace
from meshd.errors import (
    MeshdError,
    NoMesh,
    NotInCache,
    PeerRefused,
    PeerUnreachable,
    SplitFailed,
)
from meshd.ids import LoanId, ModelId, NodeId
from meshd.kernel import Board, ManualClock
from meshd.node import borrowing as borrowing_module
from meshd.node.borrowing import AVOIDED_S, BUSY_BYTES, TUNNELS, Borrowing
from meshd.peers.bulk.tunnel_words import TunnelEnd
from meshd.peers.bulk.tunnels import Tunnels
from meshd.peers.bulk.words import Credentials
from meshd.peers.links.streams import Open
from meshd.peers.loans.borrowing import Borrowed
from meshd.peers.loans.lending import LoanDesk
from meshd.peers.mesh import MeshService
from meshd.runtime.group import LoanOrder
from meshd.runtime.lending import rpc_client
from meshd.view import (
    ModelState,
    ModelView,
    NeededWeights,
    PeerState,
    SplitPlan,
    View,
    with_local,
    with_peers,
)
from tests.election.rooms import a_peer, a_view
from tests.peers.loans.parts import FakeLender, a_part
from tests.runtime.conftest import wait_for

B, C = (NodeId(letter * 51 + "a") for letter in "bc")
M = ModelId("m")
DIGEST = "sha256:" + "d" * 64
REF = "acme/model@" + "0" * 40 + ":F16"
SIZE = 11 << 20
"""Of a tensor that a worker can keep."""
ORDER = LoanOrder(M, 7, None, SplitPlan((a_part(B, "beta"), a_part(C, "gamma"))))
CREDENTIALS = Credentials(base64.b64encode(b"ca").decode(), "/c", "/k", "0" * 32)


class Pipe(asyncio.Transport):
    """One end of a stream between two protocols of this process."""

    def __init__(self, other: asyncio.Protocol) -> None:
        super().__init__()
        self.other = other
        self.twin: Pipe
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        asyncio.get_running_loop().call_soon(self.other.data_received, bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        for end in (self, self.twin):
            if not end._closing:
                end._closing = True
                asyncio.get_running_loop().call_soon(end.other.connection_lost, None)

    def abort(self) -> None:
        self.close()


def joined(one: asyncio.Protocol, other: asyncio.Protocol) -> None:
    ends = Pipe(other), Pipe(one)
    ends[0].twin, ends[1].twin = ends[1], ends[0]
    one.connection_made(ends[0])
    other.connection_made(ends[1])


class FakeMesh:
    """To workers of this process."""

    def __init__(self) -> None:
        self.lenders = {B: FakeLender(), C: FakeLender()}
        self.tasks: set[asyncio.Task[None]] = set()
        self.desks = {node: LoanDesk(lender, self._spawn) for node, lender in self.lenders.items()}
        self.credentials: Credentials | None = CREDENTIALS
        self.opened: list[Open] = []

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def open_stream(
        self, node: NodeId, name: str, wanted: Open, make: Callable[[], asyncio.Protocol]
    ) -> asyncio.Protocol:
        if node not in self.desks:
            raise PeerUnreachable(f"{name} cannot be reached")
        self.opened.append(wanted)
        protocol = make()
        joined(protocol, self.desks[node].serve(NodeId("h" * 52), "host"))
        return protocol

    def bulk_credentials(self) -> Credentials | None:
        return self.credentials

    def bulk_peers(self) -> tuple[Any, ...]:
        return (SimpleNamespace(node_id=B, addresses=["192.0.2.2:9338"]),)


class FakeCache:
    """Of a set in two shards, each with a layer; whole, or not."""

    def __init__(self) -> None:
        self.whole = True
        self.hangs = False
        self.error: MeshdError | None = None

    async def held_shards(self, digest: str) -> HeldShards | None:
        assert digest == DIGEST
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()
        tensors = [TensorPlace(f"blk.{n}.ffn_up.weight", f"/{n}", 0, SIZE) for n in (0, 12)]
        files = {
            f"/{n}": Shard(path=f"{n}.gguf", size=SIZE + 9, sha256=f"{n:064x}") for n in (0, 12)
        }
        return HeldShards(REF, tuple(tensors), files, self.whole)


class FakeTunnels:
    def __init__(self, ends: Sequence[TunnelEnd]) -> None:
        self.endpoints = tuple(f"127.0.0.1:{4000 + n}" for n in range(len(ends)))

    async def close(self) -> None: ...


class Bench:
    """A host, and what was asked of its tunnels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = ManualClock(100.0)
        view = a_view()
        assert view.runtime is not None
        runtime = replace(view.runtime, rpc_protocol="7.0.0")
        self.board: Board[View] = Board(replace(view, runtime=runtime))
        self.mesh, self.cache = FakeMesh(), FakeCache()
        self.borrowing = Borrowing(
            self.board,
            cast("CacheRoom", self.cache),
            lambda: cast("MeshService", self.mesh),
            clock=self.clock,
        )
        self.told: list[str] = []
        self.ends: tuple[TunnelEnd, ...] = ()
        self.tunnels_lost: Callable[[str], None]
        self.counted: Callable[[NodeId, int, int], None]
        self.unanswered: MeshdError | None = None
        """What probes end with."""
        patch.setattr(Tunnels, "open", self._open)
        patch.setattr(rpc_client, "probe", self._probe)
        self._borrowed: Borrowed | None = None

    async def borrow(self, order: LoanOrder = ORDER) -> Borrowed:
        self._borrowed = await self.borrowing.borrow(order, self.told.append, lambda _: None)
        return self._borrowed

    async def close(self) -> None:
        if self._borrowed is not None:
            await self._borrowed.end("the test ends")
        await asyncio.gather(*self.mesh.tasks)

    def becomes(self, state: ModelState) -> None:
        seen = ModelView(M, "m", state)
        self.board.publish(with_local(self.board.current, {M: seen}))

    async def _open(
        self,
        command: tuple[str, ...],
        credentials: Credentials,
        ends: Sequence[TunnelEnd],
        *,
        lost: Callable[[str], None],
        counted: Callable[[NodeId, int, int], None],
    ) -> FakeTunnels:
        assert command[-len(TUNNELS) :] == TUNNELS
        assert credentials == CREDENTIALS
        self.ends, self.tunnels_lost, self.counted = tuple(ends), lost, counted
        return FakeTunnels(ends)

    async def _probe(self, endpoint: str, rpc_protocol: str) -> None:
        assert rpc_protocol == "7.0.0"
        if self.unanswered is not None:
            raise self.unanswered


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    made = Bench(monkeypatch)
    yield made
    await made.close()


async def test_what_is_borrowed_of_whom(bench: Bench) -> None:
    borrowed = await bench.borrow()
    assert borrowed.endpoints == ("127.0.0.1:4000", "127.0.0.1:4001")
    assert {wanted.service for wanted in bench.mesh.opened} == {"loan"}
    ((loan,), (other,)) = (bench.mesh.lenders[node].granted for node in (B, C))
    assert (loan.ask.epoch, loan.ask.rpc_protocol, loan.ask.part) == (7, "7.0.0", a_part(B, "beta"))
    assert bench.ends == (
        TunnelEnd(B, "beta", ("192.0.2.2:9338",), loan.id),
        TunnelEnd(C, "gamma", (), other.id),
    )
    assert bench.borrowing.avoided() == frozenset()


async def needed(bench: Bench) -> list[NeededWeights | None]:
    """What the two workers are told they need of weights whose digest is known; their layers are
    those from 0 and from 12 on."""
    parts = (a_part(B, "beta"), replace(a_part(C, "gamma"), first_layer=12))
    borrowed = await bench.borrow(LoanOrder(M, 7, DIGEST, SplitPlan(parts)))
    found = [bench.mesh.lenders[node].granted[-1].ask.weights for node in (B, C)]
    await borrowed.end("enough")
    return found


async def test_workers_are_told_what_they_need_of_the_weights(bench: Bench) -> None:
    """Beta has both layers, gamma the second."""
    files = tuple((f"{n:064x}", SIZE + 9) for n in (0, 12))
    assert await needed(bench) == [
        NeededWeights(REF, files, 2 * SIZE, 3 * SIZE, 2, None),
        NeededWeights(REF, files[1:], SIZE, 3 * SIZE, 2, None),
    ]
    bench.counted(B, 0, BUSY_BYTES - 1)
    bench.counted(C, 0, BUSY_BYTES + 1)
    bench.counted(C, 10 * BUSY_BYTES, BUSY_BYTES)
    holder = a_peer(id=B, weights=frozenset({DIGEST}))
    bench.board.publish(with_peers(bench.board.current, (holder, a_peer(id=C))))
    assert await needed(bench) == [
        NeededWeights(REF, files, 2 * SIZE, SIZE, 1, None),
        NeededWeights(REF, files[1:], SIZE, SIZE, 1, float(BUSY_BYTES + 1)),
    ]


async def test_without_knowing_what_they_need_they_are_asked_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.cache.whole = False
    assert await needed(bench) == [None, None]
    bench.cache.error = NotInCache("the disk is gone")
    assert await needed(bench) == [None, None]
    bench.cache.error, bench.cache.hangs = None, True
    monkeypatch.setattr(borrowing_module, "LOOK_S", 0.01)
    assert await needed(bench) == [None, None]


async def test_an_engine_without_rpc_splits_nothing(bench: Bench) -> None:
    bench.board.publish(replace(bench.board.current, runtime=None))
    with pytest.raises(NoMesh, match="m cannot be split here"):
        await bench.borrow()


async def test_who_refuses_is_avoided_for_a_while(bench: Bench) -> None:
    bench.mesh.lenders[C].refusal = PeerRefused("this node is draining", reason="no_memory")
    with pytest.raises(SplitFailed, match="worker gamma: this node is draining"):
        await bench.borrow()
    assert bench.borrowing.avoided() == {C}
    await bench.mesh.lenders[B].all_ended()
    bench.clock.advance(AVOIDED_S - 0.1)
    assert bench.borrowing.avoided() == {C}
    bench.clock.advance(0.1)
    assert bench.borrowing.avoided() == frozenset()


async def test_who_cannot_be_reached_is_avoided(bench: Bench) -> None:
    del bench.mesh.desks[B]
    with pytest.raises(SplitFailed, match="beta cannot be reached"):
        await bench.borrow()
    assert bench.borrowing.avoided() == {B}


async def test_who_does_not_answer_through_its_tunnel_is_avoided(bench: Bench) -> None:
    bench.unanswered = PeerUnreachable("it speaks another protocol")
    with pytest.raises(SplitFailed, match="it speaks another protocol"):
        await bench.borrow()
    assert bench.borrowing.avoided() == {B}, "the first of them"


async def test_a_worker_that_is_lost_is_told_and_avoided(bench: Bench) -> None:
    await bench.borrow()
    (loan,) = bench.mesh.lenders[B].granted
    bench.mesh.desks[B].end(loan.id, "rpc-server of m ended with status -9")
    await wait_for(lambda: bench.told, "it is told")
    assert bench.told == ["worker beta: rpc-server of m ended with status -9"]
    assert bench.borrowing.avoided() == {B}


async def test_lost_tunnels_are_no_workers_fault(bench: Bench) -> None:
    await bench.borrow()
    bench.tunnels_lost("the process of tunnels ended with status -9")
    assert bench.told == ["the process of tunnels ended with status -9"]
    assert bench.borrowing.avoided() == frozenset()


async def test_a_node_that_left_its_mesh_borrows_nothing(bench: Bench) -> None:
    bench.mesh.credentials = None
    with pytest.raises(MeshdError, match="belongs to no mesh any more"):
        await bench.borrow()
    assert bench.borrowing.avoided() == frozenset()
    for lender in bench.mesh.lenders.values():
        await lender.all_ended()


async def test_what_tunnels_carry_is_counted(bench: Bench) -> None:
    bench.board.publish(
        with_peers(
            bench.board.current, (a_peer(id=B), a_peer(id=C, state=PeerState.DEAD, name="c"))
        )
    )
    await bench.borrow()
    bench.counted(B, 10, 1000)
    bench.counted(B, 50, 5000)
    bench.counted(B, 1, 2)
    bench.counted(NodeId("d" * 52), 0, 7)
    assert bench.borrowing.bytes_per_s() == {B: 5050.0, "d" * 52: 7.0}, "of the busiest second"
    told = {tuple(labels.values()): count for _, labels, count in bench.borrowing.metrics()}
    assert told == {
        ("beta", "in"): 61,
        ("beta", "out"): 6002,
        ("d" * 8, "in"): 0,
        ("d" * 8, "out"): 7,
    }


async def test_workers_are_told_when_the_engine_is_loaded(bench: Bench) -> None:
    bench.becomes(ModelState.LOADING)
    await bench.borrow()
    bench.becomes(ModelState.READY)
    lenders = bench.mesh.lenders.values()
    await wait_for(lambda: all(lender.loads for lender in lenders), "they are told")
    bench.becomes(ModelState.LOADING)
    bench.becomes(ModelState.READY)
    assert [lender.loads for lender in lenders] == [
        [LoanId(f"loan-{0:032x}")],
        [LoanId(f"loan-{0:032x}")],
    ]
