"""The worker's side of splits, by the frames of a host: what is granted, and how it ends."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from meshd.cache.room import CacheRoom
from meshd.cache.tensors import HeldShards, TensorPlace
from meshd.config import Config
from meshd.election.room import ElectionRoom
from meshd.errors import BadReference, MeshdError, ModelFailed, PeerRefused
from meshd.ids import LoanId, NodeId
from meshd.kernel import Board, Pool
from meshd.node import lending as lending_module
from meshd.node.lending import Lending
from meshd.peers.links.frames import frame
from meshd.peers.links.streams import Open
from meshd.peers.loans.words import ask_to_wire
from meshd.runtime.lending.rpc_client import probe
from meshd.runtime.lending.rpc_server import RpcSpec
from meshd.view import (
    BinaryView,
    Loan,
    LoanAsk,
    NeededWeights,
    NodeState,
    NodeView,
    ProofView,
    RuntimeView,
    View,
    with_peers,
)
from tests.election.rooms import a_peer
from tests.peers.loans.parts import FakeTransport, a_part, an_ask
from tests.runtime.conftest import wait_for

OWN, HOST, OTHER = (NodeId(letter * 51 + "a") for letter in "who")
PART = replace(a_part(OWN), memory=(("CPU", 32 << 20),), layers=(2,))
ASK = an_ask(PART)
MIB = 1 << 20


class FakeRoom:
    """The election, as far as it has to do with loans."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.lent: list[Loan] = []
        self.renewed: list[LoanId] = []
        self.ended: list[LoanId] = []

    def lend(self, loan: Loan) -> str | None:
        if self.refusal is None:
            self.lent.append(loan)
        return self.refusal

    def loan_renewed(self, loan: LoanId) -> None:
        self.renewed.append(loan)

    def loan_ended(self, loan: LoanId) -> None:
        assert loan not in self.ended
        self.ended.append(loan)


class FakeCache:
    """Of weights: one tensor of each layer, or what goes wrong."""

    def __init__(self) -> None:
        self.error: MeshdError | None = None
        self.whole = True
        self.settings = SimpleNamespace(from_peers=True)
        self.fetching = asyncio.Event()
        self.fetched = asyncio.Event()
        """Fetches wait for it."""

    async def missing_bytes(self, weights: NeededWeights) -> int:
        return weights.bytes

    async def fetch_shards(self, *_: object) -> int:
        self.fetching.set()
        await self.fetched.wait()
        self.whole = True
        return 1 << 30

    async def held_shards(self, digest: str) -> HeldShards | None:
        if self.error is not None:
            raise self.error
        tensors = (TensorPlace("blk.0.x", "/nowhere", 0, 100), TensorPlace("blk.9.x", "/", 0, 100))
        return HeldShards("acme/m", tensors, {}, True) if self.whole else None


class FakeServer:
    """In place of an RPC server."""

    started: list[FakeServer]
    failure: MeshdError | None
    port = 4321

    def __init__(self, spec: RpcSpec, on_exit: Callable[[str], None]) -> None:
        self.spec = spec
        self.on_exit = on_exit
        self.users: frozenset[int] = frozenset()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.stopping = False
        self.stopped_at_once = False
        self.at_rest = True

    @classmethod
    async def start(
        cls, spec: RpcSpec, *, on_exit: Callable[[str], None], **more: object
    ) -> FakeServer:
        if cls.failure is not None:
            raise cls.failure
        server = cls(spec, on_exit)
        cls.started.append(server)
        return server

    def strangers(self) -> frozenset[int]:
        return self.users

    async def stop(self, *, at_once: bool = False) -> bool:
        self.stopping, self.stopped_at_once = True, at_once
        await self.may_end.wait()
        return self.at_rest

    def keeps(self, name: str, size: int) -> None:
        """A tensor that its host sent."""
        self._directory.mkdir(exist_ok=True)
        (self._directory / name).write_bytes(bytes(size))

    def kept(self) -> list[str]:
        return sorted(path.name for path in self._directory.iterdir())

    @property
    def _directory(self) -> Path:
        assert self.spec.cache_dir is not None
        return self.spec.cache_dir / "rpc"


class Stream:
    """One that `host` has opened."""

    def __init__(self, lending: Lending, host: NodeId) -> None:
        self.line = lending.desk.serve(host, "host")
        self.wire = FakeTransport(self.line)
        self.line.connection_made(self.wire)

    def hear(self, *frames: dict[str, Any]) -> None:
        self.line.data_received(b"".join(frame(f) for f in frames))

    async def said(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while True:
                for said in self.wire.said:
                    if said["t"] == kind:
                        return said
                await self.wire.more()

    async def serving(self) -> LoanId:
        self.hear({"t": "commit"})
        await self.said("serving")
        return LoanId((await self.said("granted"))["loan"])


class Bench:
    """A node that lends."""

    def __init__(self, directory: Path, binary: Path, **settings: Any) -> None:
        directory = directory / "d"
        directory.mkdir()
        self.config = Config(name="w", data_dir=directory, cache_dir=directory, **settings)
        self.config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        node = NodeView(OWN, "w", "1", "member", NodeState.READY, 0.0, "", None)
        binaries = (BinaryView("ggml-rpc-server", str(binary), ""),)
        proof = ProofView("backend", True, 0.0, ())
        runtime = RuntimeView("e", "cpu", "b1", "7.0.0", "/", binaries, proof)
        self.board = Board(View(node, runtime=runtime))
        self.room, self.cache = FakeRoom(), FakeCache()
        self.expected = 0
        """Tunnels that the carrier was told of."""
        self.pool = Pool("test", workers=2)
        self.lending = Lending(
            self.config,
            self.board,
            cast("CacheRoom", self.cache),
            lambda: cast("ElectionRoom", self.room),
            expect_tunnel=self._expect_tunnel,
            rng=random.Random(7),
            pool=self.pool,
        )

    def _expect_tunnel(self) -> None:
        self.expected += 1

    def runs(self, **changes: Any) -> None:
        """Its engine is another one."""
        runtime = self.board.current.runtime
        assert runtime is not None
        changed = replace(runtime, **changes) if changes else None
        self.board.publish(replace(self.board.current, runtime=changed))

    def asked(self, ask: LoanAsk = ASK, host: NodeId = HOST) -> Stream:
        stream = Stream(self.lending, host)
        stream.hear(ask_to_wire(ask))
        return stream

    def tunnel(self, loan: str | None, node: NodeId = HOST) -> dict[str, Any]:
        return self.lending.tunnel(node, Open(service="rpc", instance=loan))

    def metric(self, name: str) -> float:
        return {metric: value for metric, _, value in self.lending.metrics()}[name]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Bench]:
        task = asyncio.create_task(self.lending.run())
        await self.lending.ready.wait()
        try:
            yield self
        finally:
            self.lending.stopping.set()
            async with asyncio.timeout(5):
                await task
            self.pool.close()


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """Its RPC servers are none."""
    FakeServer.started, FakeServer.failure = [], None
    monkeypatch.setattr(lending_module, "RpcServer", FakeServer)
    monkeypatch.setattr(lending_module, "WATCH_S", 0.01)
    async with Bench(tmp_path, tmp_path / "ggml-rpc-server").running() as made:
        yield made
        for server in FakeServer.started:
            server.may_end.set()


# -- grants ---------------------------------------------------------------------------------------


async def test_a_loan_from_the_ask_to_the_end(bench: Bench) -> None:
    stream = bench.asked()
    (lent,) = bench.room.lent
    assert (lent.host, lent.ask) == (HOST, ASK)
    assert await stream.said("granted") == {"t": "granted", "loan": lent.id}
    assert await stream.serving() == lent.id
    (server,) = FakeServer.started
    spec = server.spec
    assert (spec.loan, spec.devices, spec.rpc_protocol) == (lent.id, ("CPU",), "7.0.0")
    assert spec.cache_dir == bench.config.data_dir / "tensors" / ("a" * 64)
    stream.hear({"t": "beat"})
    assert bench.room.renewed == [lent.id]
    assert bench.metric("meshd_loans") == 1
    stream.hear({"t": "end", "reason": "unloaded"})
    await wait_for(lambda: bench.room.ended == [lent.id], "the memory is free")
    assert server.stopping
    assert not server.stopped_at_once
    assert bench.metric("meshd_loans") == 0


async def test_what_the_books_refuse_is_refused(bench: Bench) -> None:
    bench.room.refusal = "needs 4.0 GB, 1.0 GB free on CPU"
    said = await bench.asked().said("refused")
    assert said["message"] == "needs 4.0 GB, 1.0 GB free on CPU"
    assert bench.room.ended == [], "nothing was leased"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "its engine has no RPC server"),
        ({"rpc_protocol": None}, "its engine has no RPC server"),
        ({"binaries": ()}, "its engine has no RPC server"),
        ({"rpc_protocol": "8.0.0"}, "its engine speaks RPC protocol 8.0.0, and yours 7.0.0"),
    ],
)
async def test_an_engine_that_is_not_fit_for_it(
    bench: Bench, changes: dict[str, Any], words: str
) -> None:
    bench.runs(**changes)
    assert (await bench.asked().said("refused"))["message"] == words
    assert bench.room.lent == []


async def test_what_was_meant_for_another_node_is_refused(bench: Bench) -> None:
    said = await bench.asked(replace(ASK, part=replace(PART, node=OTHER))).said("refused")
    assert said["message"] == "you took it for another node"
    assert bench.room.lent == []


async def test_a_node_that_is_told_to_lend_nothing(tmp_path: Path) -> None:
    binary = tmp_path / "ggml-rpc-server"
    async with Bench(tmp_path, binary, engine={"lend": False}).running() as bench:
        assert "engine.lend" in (bench.lending.problem() or "")
        assert "engine.lend" in (await bench.asked().said("refused"))["message"]


async def test_a_node_that_ends_grants_nothing(bench: Bench) -> None:
    stream = bench.asked()
    await stream.serving()
    FakeServer.started[0].may_end.clear()
    bench.lending.stopping.set()
    await stream.said("ended")
    said = await bench.asked(host=OTHER).said("refused")
    assert said["message"] == "this node is about to end"
    FakeServer.started[0].may_end.set()


# -- commits --------------------------------------------------------------------------------------


async def test_weights_that_cannot_be_looked_for_are_no_reason_to_refuse(bench: Bench) -> None:
    bench.cache.error = BadReference("no such digest")
    assert await bench.asked().serving()


@pytest.mark.parametrize("digest", [None, "not a digest"])
async def test_without_a_digest_nothing_is_kept(bench: Bench, digest: str | None) -> None:
    stream = bench.asked(replace(ASK, digest=digest))
    assert await stream.serving()
    assert FakeServer.started[0].spec.cache_dir is None
    assert (await stream.said("serving"))["warmed_bytes"] == 0


async def test_a_digest_that_is_none_keeps_nothing_from_others(bench: Bench) -> None:
    await bench.asked(replace(ASK, digest="not a digest"), OTHER).serving()
    await bench.asked().serving()
    assert FakeServer.started[1].spec.cache_dir is not None


async def test_a_server_that_does_not_start_gives_the_memory_back(bench: Bench) -> None:
    FakeServer.failure = ModelFailed("unknown device: CPU")
    stream = bench.asked()
    stream.hear({"t": "commit"})
    assert (await stream.said("ended"))["reason"] == "unknown device: CPU"
    await wait_for(lambda: len(bench.room.ended) == 1, "the memory is free")


async def test_shards_are_fetched_before_the_server_starts(bench: Bench) -> None:
    stream = _asked_to_fetch(bench)
    await bench.cache.fetching.wait()
    assert FakeServer.started == []
    assert (await stream.said("moved"))["words"] == "looking for its weights"
    bench.cache.fetched.set()
    await stream.said("serving")
    assert len(FakeServer.started) == 1
    words = [said["words"] for said in stream.wire.said if said["t"] == "moved"]
    assert words[1:] == ["fetching shards: 8.6 GB", "starting the RPC server"]


async def test_a_loan_that_ends_while_it_fetches_gives_everything_back(bench: Bench) -> None:
    stream = _asked_to_fetch(bench)
    await bench.cache.fetching.wait()
    stream.hear({"t": "end"})
    await wait_for(lambda: bench.room.ended, "the memory is free")
    assert FakeServer.started == []
    bench.cache.fetched.set()
    await bench.asked().serving()
    assert FakeServer.started[0].spec.cache_dir is not None, "nobody else keeps its tensors"


def _asked_to_fetch(bench: Bench) -> Stream:
    """A loan of one of two workers, whose weights another node holds too."""
    assert ASK.digest is not None
    holder = a_peer(id=OTHER, weights=frozenset({ASK.digest}))
    bench.board.publish(with_peers(bench.board.current, (holder,)))
    bench.cache.whole = False
    size = 8 << 30
    needed = NeededWeights("acme/m", (("1" * 64, size),), size, 2 * size, 2, None)
    stream = bench.asked(replace(ASK, weights=needed))
    stream.hear({"t": "commit"})
    return stream


# -- ends -----------------------------------------------------------------------------------------


async def test_memory_is_free_once_the_server_is_gone(bench: Bench) -> None:
    stream = bench.asked()
    loan = await stream.serving()
    (server,) = FakeServer.started
    server.may_end.clear()
    bench.lending.end_loan(loan, "this node is draining")
    assert (await stream.said("ended"))["reason"] == "this node is draining"
    await wait_for(lambda: server.stopping, "it is told to stop")
    assert bench.room.ended == []
    with pytest.raises(PeerRefused):
        bench.tunnel(loan)
    bench.lending.end_loan(loan, "again")
    server.may_end.set()
    await wait_for(lambda: bench.room.ended == [loan], "the memory is free")


async def test_a_server_that_ends_by_itself_ends_its_loan(bench: Bench) -> None:
    first, second = bench.asked(), bench.asked(host=OTHER)
    loan = await first.serving()
    await second.serving()
    FakeServer.started[0].on_exit("rpc-server of m ended with status -9")
    assert "status -9" in (await first.said("ended"))["reason"]
    await wait_for(lambda: bench.room.ended == [loan], "and only that")
    assert bench.metric("meshd_loans") == 1


async def test_another_user_at_the_server_ends_the_loan(bench: Bench) -> None:
    stream = bench.asked()
    loan = await stream.serving()
    FakeServer.started[0].users = frozenset({1001})
    reason = (await stream.said("ended"))["reason"]
    assert reason == "another user (1001) is connected to its RPC server"
    await wait_for(lambda: bench.room.ended == [loan], "the memory is free")
    assert FakeServer.started[0].stopped_at_once, "or it would serve him next"


async def test_a_host_that_is_gone_ends_its_loan(bench: Bench) -> None:
    stream = bench.asked()
    loan = await stream.serving()
    stream.wire.close()
    await wait_for(lambda: bench.room.ended == [loan], "the memory is free")


async def test_the_end_of_the_node_waits_for_all_of_them(bench: Bench) -> None:
    for host in (HOST, OTHER):
        await bench.asked(host=host).serving()
    for server in FakeServer.started:
        server.may_end.clear()
    bench.lending.stopping.set()
    first, second = FakeServer.started
    await wait_for(lambda: first.stopping and second.stopping, "both are told to stop")
    first.may_end.set()
    await wait_for(lambda: len(bench.room.ended) == 1, "the first is gone")
    assert bench.lending._group is not None, "it runs still"
    second.may_end.set()
    await wait_for(lambda: bench.lending._group is None, "it ends")
    assert len(bench.room.ended) == 2


# -- tunnels --------------------------------------------------------------------------------------


async def test_with_the_process_of_tunnels_end_the_loans_that_had_some(bench: Bench) -> None:
    first, second = bench.asked(), bench.asked(host=OTHER)
    loan = await first.serving()
    await second.serving()
    bench.tunnel(loan)
    bench.lending.tunnels_lost()
    assert "carries its tunnels" in (await first.said("ended"))["reason"]
    await wait_for(lambda: bench.room.ended == [loan], "and only that")
    assert bench.metric("meshd_loans") == 1


async def test_a_tunnel_leads_to_the_server_of_ones_own_loan_only(bench: Bench) -> None:
    stream = bench.asked()
    loan = (await stream.said("granted"))["loan"]
    with pytest.raises(PeerRefused, match="no such loan"):
        bench.tunnel(loan)  # there is no server yet
    await stream.serving()
    assert bench.tunnel(loan) == {"port": FakeServer.port}
    for wanted, node in ((loan, OTHER), ("loan-" + "0" * 32, HOST), (None, HOST)):
        with pytest.raises(PeerRefused, match="no such loan"):
            bench.tunnel(wanted, node)


# -- tensors --------------------------------------------------------------------------------------


async def test_what_a_host_sent_is_counted_when_it_is_done(bench: Bench) -> None:
    stream = bench.asked()
    loan = await stream.serving()
    (server,) = FakeServer.started
    server.keeps("0" * 16, 11 * MIB)
    server.keeps("1" * 16, 12 * MIB)
    stream.hear({"t": "end"})
    await wait_for(lambda: bench.room.ended == [loan], "it has ended")
    assert bench.metric("meshd_tensors_pushed_bytes_total") == 23 * MIB
    stream = bench.asked()
    await stream.serving()
    FakeServer.started[1].keeps("2" * 16, MIB)
    stream.hear({"t": "end"})
    await wait_for(lambda: len(bench.room.ended) == 2, "it has ended")
    assert bench.lending.pushed_bytes == 24 * MIB, "what lay there is found again"


async def test_what_came_before_the_model_was_loaded_is_whole_however_it_ends(
    bench: Bench,
) -> None:
    stream = bench.asked()
    loan = await stream.serving()
    (server,) = FakeServer.started
    server.keeps("0" * 16, 2 * MIB)
    stream.hear({"t": "loaded"})
    await wait_for(lambda: bench.lending.pushed_bytes == 2 * MIB, "it is counted")
    server.at_rest = False
    server.keeps("1" * 16, MIB)
    stream.wire.close()
    await wait_for(lambda: bench.room.ended == [loan], "it has ended")
    assert bench.lending.pushed_bytes == 3 * MIB, "none is counted twice"
    await bench.asked().serving()
    assert server.kept() == ["0" * 16]


async def test_what_a_server_may_have_cut_short_is_not_found_again(bench: Bench) -> None:
    stream = bench.asked()
    await stream.serving()
    (server,) = FakeServer.started
    server.at_rest = False
    server.keeps("0" * 16, MIB)
    stream.wire.close()
    await wait_for(lambda: bench.room.ended, "it has ended")
    await bench.asked().serving()
    assert server.kept() == []


async def test_a_loan_waits_for_the_server_before_it_that_may_still_write_a_tensor(
    bench: Bench,
) -> None:
    """An RPC server believes a file by its name: one that is killed while it writes must not leave
    one after what may not be whole was removed."""
    stream = bench.asked()
    await stream.serving()
    (first,) = FakeServer.started
    first.at_rest = False
    first.may_end.clear()
    stream.hear({"t": "end"})
    await wait_for(lambda: first.stopping, "it is told to stop")
    again = bench.asked()
    again.hear({"t": "commit"})
    other = bench.asked(replace(ASK, digest="sha256:" + "b" * 64), OTHER)
    await other.serving()
    assert len(FakeServer.started) == 2, "other weights need not wait"
    first.keeps("0" * 16, MIB)
    first.may_end.set()
    await again.said("serving")
    assert first.kept() == []


async def test_two_servers_at_once_do_not_share_a_cache(bench: Bench) -> None:
    """What one of them writes is not whole yet when the other one looks for it."""
    await bench.asked().serving()
    stream = bench.asked(replace(ASK, digest="a" * 64), OTHER)
    await stream.serving()
    first, second = FakeServer.started
    assert first.spec.cache_dir is not None
    assert second.spec.cache_dir is None
    stream.hear({"t": "end"})
    await wait_for(lambda: len(bench.room.ended) == 1, "the second has ended")
    await bench.asked(host=OTHER).serving()
    assert FakeServer.started[2].spec.cache_dir is None, "the first has it still"


async def test_a_loan_that_ends_before_it_has_its_cache_leaves_it_to_others(bench: Bench) -> None:
    stream = bench.asked()
    stream.hear({"t": "commit"})
    stream.hear({"t": "end"})
    await wait_for(lambda: bench.room.ended, "it has ended")
    await bench.asked(host=OTHER).serving()
    assert FakeServer.started[-1].spec.cache_dir is not None


# -- the real thing -------------------------------------------------------------------------------


@pytest.mark.engine
async def test_a_real_server_serves_a_loan_and_its_end_is_told(
    tmp_path: Path, engine_dir: Path
) -> None:
    async with Bench(tmp_path, engine_dir / "ggml-rpc-server").running() as bench:
        stream = bench.asked()
        loan = await stream.serving()
        await probe(f"127.0.0.1:{bench.tunnel(loan)['port']}", "7.0.0")
        pid = _pid(bench, loan)
        os.kill(pid, signal.SIGKILL)
        assert "ended with status -9" in (await stream.said("ended"))["reason"]
        await wait_for(lambda: bench.room.ended == [loan], "the memory is free")
        assert not psutil.pid_exists(pid)


@pytest.mark.engine
async def test_the_end_of_the_node_ends_real_servers(tmp_path: Path, engine_dir: Path) -> None:
    async with Bench(tmp_path, engine_dir / "ggml-rpc-server").running() as bench:
        pids = [_pid(bench, await bench.asked(host=h).serving()) for h in (HOST, OTHER)]
    assert len(bench.room.ended) == 2
    assert not any(map(psutil.pid_exists, pids))


def _pid(bench: Bench, loan: LoanId) -> int:
    server = bench.lending._held[loan].server
    assert server is not None
    return server.pid
