"""Shards that a worker fetches before its host connects: when it does, and what ends it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from meshd.cache.manifest import Shard
from meshd.cache.room import CacheRoom
from meshd.cache.tensors import HeldShards
from meshd.cache.transfer.words import Done, News, Progress, Said
from meshd.errors import HubUnavailable, MeshdError, NotInCache
from meshd.ids import LoanId, NodeId
from meshd.kernel import Board
from meshd.node import supplying as supplying_module
from meshd.node.supplying import MAX_REMEMBERED, Supplying
from meshd.runtime.lending.supply import choose
from meshd.view import Loan, NeededWeights, PeerState, View, with_peers
from tests.election.rooms import a_peer, a_view
from tests.peers.loans.parts import an_ask
from tests.runtime.conftest import wait_for

GB = 10**9
HOST, OTHER, THIRD = (NodeId(letter * 51 + "a") for letter in "hot")
WEIGHTS = NeededWeights(
    ref="acme/m@" + "0" * 40 + ":F16",
    files=(("1" * 64, 3 * GB), ("2" * 64, 2 * GB)),
    bytes=5 * GB,
    pushed_bytes=10 * GB,
    pushed_to=2,
    bytes_per_s=None,
)
ASK = replace(an_ask(), weights=WEIGHTS)
DIGEST = ASK.digest or ""


class FakeCache:
    """A cache that lacks all of it, and a fetch a test leads."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(from_peers=True)
        self.missing = 5 * GB
        self.held: HeldShards | None = None
        self.error: MeshdError | OSError | None = None
        self.failure: MeshdError | OSError | None = None
        """Of fetches."""
        self.fetches: list[tuple[str, NeededWeights, int]] = []
        self.running = 0
        self.told: Callable[[News], None] = lambda _: None
        self.go_on = asyncio.Event()
        """Fetches end then."""

    async def held_shards(self, digest: str) -> HeldShards | None:
        return self.held

    async def missing_bytes(self, weights: NeededWeights) -> int:
        if self.error is not None:
            raise self.error
        return self.missing

    async def fetch_shards(
        self,
        digest: str,
        weights: NeededWeights,
        missing_bytes: int,
        told: Callable[[News], None],
    ) -> int:
        self.fetches.append((digest, weights, missing_bytes))
        self.told = told
        self.running += 1
        try:
            await self.go_on.wait()
        finally:
            self.running -= 1
        if self.failure is not None:
            raise self.failure
        told(Done(fetched_bytes=missing_bytes, sources={"beta": missing_bytes}))
        return missing_bytes


def holding(*names: str) -> HeldShards:
    files = {f"/{n}": Shard(path=f"{n}.gguf", size=GB, sha256=n * 64) for n in names}
    return HeldShards(WEIGHTS.ref, (), files, whole=False)


def progress(done: int, *sources: str) -> Progress:
    return Progress(
        stage="fetching",
        reason="",
        done_bytes=done,
        total_bytes=5 * GB,
        bytes_per_s=1.0,
        sources={source: done // len(sources) for source in sources},
    )


class Bench:
    """A worker, and two other nodes: its host, and one that holds the weights too."""

    def __init__(self) -> None:
        holder = a_peer(id=OTHER, weights=frozenset({DIGEST}))
        host = a_peer(id=HOST, name="host", weights=frozenset({DIGEST}))
        self.board: Board[View] = Board(with_peers(a_view(), (holder, host)))
        self.cache = FakeCache()
        self.supplying = Supplying(self.board, cast("CacheRoom", self.cache))
        self.moves: list[str] = []

    async def supply(self, *, kept_bytes: int = 0, **changes: object) -> None:
        ask = replace(ASK, **changes)  # type: ignore[arg-type]
        loan = Loan(LoanId("loan-1"), HOST, ask)
        async with asyncio.timeout(10):
            await self.supplying.supply(loan, kept_bytes, self.moves.append)

    def begin(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.supply())

    async def fetching(self) -> None:
        await wait_for(lambda: self.cache.running, "it fetches")


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_what_is_needed_is_fetched_and_counted(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        task = bench.begin()
        await bench.fetching()
        bench.cache.told(Said(message="eve is not asked any more"))
        bench.cache.told(progress(2 << 30, "beta", "host"))
        bench.cache.go_on.set()
        await task
    assert bench.cache.fetches == [(DIGEST, WEIGHTS, 5 * GB)]
    assert bench.moves == [
        "fetching shards: 5.0 GB",
        "fetching shards: 2048 of 4768 MiB from beta, host",
    ]
    assert bench.supplying.fetched_bytes == 5 * GB
    story = [record.message for record in caplog.records]
    assert story[0] == (
        "fetching 5.0 GB of m from other nodes: "
        "over 1 Gbit/s that takes some 81 s, its host's push 91 s"
    )
    assert story[1] == "fetching shards: eve is not asked any more"
    assert story[2].startswith("fetched 5.0 GB of shards from beta in ")


async def test_when_nothing_is_fetched(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await bench.supply(weights=None)
        await bench.supply(digest=None)
        bench.cache.held = holding("1", "2")
        await bench.supply()
        bench.cache.held, bench.cache.missing = holding("1"), 9 * GB
        assert caplog.records == [], "there is nothing to say"
        await bench.supply()
        await bench.supply(kept_bytes=5 * GB)
    assert [record.message.partition("other nodes: ")[2] for record in caplog.records] == [
        "over 1 Gbit/s that takes some 117 s, its host's push 91 s",
        "its tensors are kept from an earlier load",
    ]
    bench.cache.missing = 5 * GB
    bench.cache.settings.from_peers = False
    await bench.supply()
    assert bench.cache.fetches == []
    assert bench.moves == []


@pytest.mark.parametrize("error", [NotInCache("full"), OSError("the disk is gone")])
async def test_what_cannot_be_looked_for_is_sent(bench: Bench, error: MeshdError | OSError) -> None:
    bench.cache.error = error
    await bench.supply()
    assert bench.cache.fetches == []


async def test_only_who_lives_and_is_not_the_host_counts_as_holder(bench: Bench) -> None:
    holds = frozenset({DIGEST})
    for peers in (
        (a_peer(id=HOST, weights=holds),),
        (a_peer(id=OTHER, weights=holds, state=PeerState.SUSPECT),),
        (a_peer(id=OTHER, weights=frozenset({"sha256:" + "0" * 64})),),
        (),
    ):
        bench.board.publish(with_peers(bench.board.current, peers))
        await bench.supply()
    assert bench.cache.fetches == []


@pytest.mark.parametrize("failure", [HubUnavailable("nobody has it"), OSError("no process")])
async def test_after_a_failure_its_host_sends_them_for_a_while(
    bench: Bench,
    failure: MeshdError | OSError,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A host plans anew at once: it is not to wait for the same again."""
    bench.cache.failure = failure
    bench.cache.go_on.set()
    await bench.supply()
    assert f"its host sends the rest: {failure}" in caplog.text
    await bench.supply()
    assert len(bench.cache.fetches) == 1
    await bench.supply(digest="sha256:" + "0" * 64)
    assert len(bench.cache.fetches) == 1, "nobody holds those"
    monkeypatch.setattr(supplying_module, "REST_S", 0.0)
    bench.supplying._rests.clear()
    await bench.supply()
    await bench.supply()
    assert len(bench.cache.fetches) == 3


async def test_a_fetch_that_stands_still_is_given_up_and_one_that_moves_is_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supplying_module, "STALL_S", 1.0)
    task = bench.begin()
    await bench.fetching()
    for step in range(8):  # twice as long as it may stand still, in all
        await asyncio.sleep(0.25)
        assert not task.done(), step
        bench.cache.told(progress(step << 20, "beta"))
    for _ in range(5):  # it hashes what is there: nothing comes meanwhile
        await asyncio.sleep(0.25)
        bench.cache.told(progress(7 << 20, "beta").model_copy(update={"stage": "verifying"}))
    began = asyncio.get_running_loop().time()
    while not task.done():
        bench.cache.told(progress(7 << 20, "beta"))
        await asyncio.sleep(0.01)
    assert 0.8 < asyncio.get_running_loop().time() - began < 5
    await task
    assert bench.cache.running == 0
    assert "is given up, its host sends the rest: it is too slow" in caplog.text
    assert bench.supplying.fetched_bytes == 7 << 20


async def test_a_fetch_may_not_take_longer_than_the_push(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supplying_module, "choose", lambda ways: replace(choose(ways), limit_s=0.3))
    task = bench.begin()
    step = 0
    while not task.done():
        step += 1
        bench.cache.told(progress(step << 20, "beta"))
        await asyncio.sleep(0.01)
    await task
    assert bench.cache.fetches
    assert bench.cache.running == 0


async def test_a_loan_that_ends_ends_the_fetch_and_the_next_one_goes_on(bench: Bench) -> None:
    task = bench.begin()
    await bench.fetching()
    bench.cache.told(progress(1 << 30, "beta"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.cache.running == 0
    assert bench.supplying.fetched_bytes == 1 << 30
    bench.cache.go_on.set()
    await bench.supply()
    assert len(bench.cache.fetches) == 2


async def test_what_these_nodes_brought_the_last_time_counts(bench: Bench) -> None:
    bench.cache.go_on.set()
    await bench.supply()
    ((holders, rate),) = bench.supplying._rates.items()
    assert holders == {OTHER}
    assert rate > 0
    bench.supplying._rates[holders] = 10e6
    await bench.supply(weights=replace(WEIGHTS, bytes_per_s=50e6))
    assert len(bench.cache.fetches) == 1, "it would be slower"
    more = a_peer(id=THIRD, name="third", weights=frozenset({DIGEST}))
    bench.board.publish(with_peers(bench.board.current, (*bench.board.current.peers, more)))
    await bench.supply(weights=replace(WEIGHTS, bytes_per_s=50e6))
    assert len(bench.cache.fetches) == 2, "of others nothing is known"


async def test_what_is_remembered_is_bounded(bench: Bench) -> None:
    bench.cache.go_on.set()
    for number in range(MAX_REMEMBERED + 5):
        peer = a_peer(id=NodeId(f"{number:052}"), weights=frozenset({DIGEST}))
        bench.board.publish(with_peers(bench.board.current, (peer,)))
        await bench.supply()
    assert len(bench.supplying._rates) == MAX_REMEMBERED
    assert frozenset({NodeId(f"{0:052}")}) not in bench.supplying._rates
