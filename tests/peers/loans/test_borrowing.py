"""Loans between real sessions: a host and two workers of one mesh, over TLS on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from meshd.errors import MeshdError, PeerRefused, PeerUnreachable, SplitFailed
from meshd.ids import LoanId, NodeId
from meshd.kernel import Pool
from meshd.peers.links.frames import frame
from meshd.peers.links.streams import Open
from meshd.peers.loans import borrowing
from meshd.peers.loans.borrowing import Borrowed, borrow
from meshd.peers.loans.lending import LoanDesk
from meshd.peers.loans.line import Pace
from meshd.peers.loans.words import ask_to_wire
from meshd.view import Part, PeerState, Role
from tests.peers.loans.parts import FakeLender, a_part, an_ask, an_order
from tests.peers.station import Station

FAST = Pace(beat_s=0.05, silent_s=0.2)
LOAN = Open(service="loan")


class Worker:
    """A station with a desk; counts the streams it is opened."""

    def __init__(self, station: Station) -> None:
        self.station = station
        self.lender = FakeLender()
        self.desk = LoanDesk(self.lender, station.spawn, FAST)
        self.opened: list[asyncio.Protocol] = []
        self.openers: list[tuple[NodeId, str]] = []
        self.serves: Callable[[NodeId, str], asyncio.Protocol] = self.desk.serve
        station.serve_loan = self._serve

    @property
    def part(self) -> Part:
        return a_part(self.station.id, self.station.name)

    def _serve(self, node: NodeId, name: str) -> asyncio.Protocol:
        self.openers.append((node, name))
        self.opened.append(self.serves(node, name))
        return self.opened[-1]


class FakeTunnels:
    """Opens at once, or when `gate` is set; every probe answers, unless told otherwise."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: MeshdError | None = None
        self.bad_probe: MeshdError | None = None
        self.probe_gate = asyncio.Event()
        self.probe_gate.set()
        self.reached = asyncio.Event()
        """Somebody waits at a gate."""
        self.ends: list[tuple[Part, LoanId]] = []
        self.opened = self.closed = 0
        self.probed: list[tuple[str, str]] = []
        self.lost: Callable[[str], None] = lambda _: None

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(f"127.0.0.1:{4000 + n}" for n in range(len(self.ends)))

    async def open(
        self, ends: Sequence[tuple[Part, LoanId]], lost: Callable[[str], None]
    ) -> FakeTunnels:
        self.ends, self.lost = list(ends), lost
        if not self.gate.is_set():
            self.reached.set()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.opened += 1
        return self

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed += 1

    async def probe(self, endpoint: str, rpc_protocol: str) -> None:
        self.probed.append((endpoint, rpc_protocol))
        self.reached.set()
        await self.probe_gate.wait()
        if self.bad_probe is not None and endpoint == self.endpoints[-1]:
            raise self.bad_probe


class Scene:
    def __init__(self, host: Station, one: Worker, two: Worker) -> None:
        self.host, self.one, self.two = host, one, two
        self.workers = (one, two)
        self.tunnels = FakeTunnels()
        self.losses: list[str] = []
        self.lost = asyncio.Event()
        self.moved: list[str] = []

    async def borrow(self, *parts: Part) -> Borrowed:
        return await borrow(
            an_order(*(parts or tuple(w.part for w in self.workers))),
            connect=self.connect,
            open_tunnels=self.tunnels.open,
            probe=self.tunnels.probe,
            lost=self._lose,
            moved=self.moved.append,
            pace=FAST,
        )

    def connect(
        self, node: NodeId, name: str, make_protocol: Callable[[], asyncio.Protocol]
    ) -> Awaitable[asyncio.Protocol]:
        return self.host.session.open_stream(node, name, LOAN, make_protocol)

    def _lose(self, reason: str) -> None:
        self.losses.append(reason)
        self.lost.set()

    async def is_lost(self, within_s: float = 5.0) -> str:
        async with asyncio.timeout(within_s):
            await self.lost.wait()
        return self.losses[0]

    async def nothing_is_left(self) -> None:
        """Every loan was ended once, every stream is closed, and so are the tunnels."""
        for worker in self.workers:
            await worker.lender.all_ended()
            assert not worker.desk._lent
        assert self.tunnels.closed == self.tunnels.opened
        await eventually(self._no_stream_is_open)

    def _no_stream_is_open(self) -> bool:
        for worker in self.workers:
            worker.station.session.serving.streams.prune()
        return not any(worker.station.session.serving.streams._open for worker in self.workers)


async def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Nothing tells of it: looked at again and again."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    pool = Pool("work", workers=2)
    host, one, two = (Station(name, tmp_path, pool) for name in ("host", "one", "two"))
    host.found()
    await host.start()
    for worker in (one, two):
        worker.join(host)
        await worker.start(host.address)
        await knows(host, worker)
    yield Scene(host, Worker(one), Worker(two))
    for station in (host, one, two):
        await station.stop(goodbye=False)
    pool.close()


async def knows(at: Station, other: Station) -> None:
    def known() -> bool:
        peer = at.peer(other)
        return peer is not None and peer.state is PeerState.ALIVE and peer.name == other.name

    await at.until(known, f"{other.name} is known")


# -- all goes well --------------------------------------------------------------------------------


async def test_two_workers_lend_and_get_back(scene: Scene) -> None:
    scene.one.lender.words = ("warming: 1 GiB of 3",)
    scene.two.lender.warms = 5
    borrowed = await scene.borrow()
    (first,), (second,) = scene.one.lender.granted, scene.two.lender.granted
    assert (first.host, first.ask) == (scene.host.id, an_ask(scene.one.part))
    assert scene.one.openers == [(scene.host.id, "host")]
    assert scene.tunnels.ends == [(scene.one.part, first.id), (scene.two.part, second.id)]
    assert borrowed.endpoints == ("127.0.0.1:4000", "127.0.0.1:4001")
    assert sorted(scene.tunnels.probed) == [(e, "7.0.0") for e in borrowed.endpoints]
    one, two = (worker.station.id for worker in scene.workers)
    assert borrowed.loans == {one: first.id, two: second.id}
    assert borrowed.warmed == {one: 1000, two: 5}
    assert borrowed.warmed_bytes == 1005
    assert scene.moved == ["one: warming: 1 GiB of 3"]
    borrowed.loaded()
    async with asyncio.timeout(5):
        await asyncio.gather(*(w.lender.loading.wait() for w in scene.workers))
    assert [w.lender.loads for w in scene.workers] == [[first.id], [second.id]]
    await asyncio.gather(borrowed.end("the model was unloaded"), borrowed.end("again"))
    await scene.nothing_is_left()
    assert [reason for _, reason in scene.one.lender.ends] == ["the model was unloaded"]
    assert scene.tunnels.closed == 1
    assert scene.losses == []


async def renewals(scene: Scene, count: int) -> None:
    for _ in range(count):  # a beat each
        for worker in scene.workers:
            worker.lender.renewed.clear()
            async with asyncio.timeout(5):
                await worker.lender.renewed.wait()


async def test_beats_keep_a_loan_for_longer_than_silence_would(scene: Scene) -> None:
    borrowed = await scene.borrow()
    await renewals(scene, 8)
    assert scene.losses == []
    await borrowed.end("enough")
    await scene.nothing_is_left()


async def test_who_stood_still_itself_takes_nobody_for_silent(scene: Scene) -> None:
    """What was said meanwhile waits in the socket, and is read after the timers have run."""
    borrowed = await scene.borrow()
    await renewals(scene, 1)
    time.sleep(3 * FAST.silent_s)  # noqa: ASYNC251  (a daemon that was suspended)
    await renewals(scene, 2)
    assert scene.losses == []
    await borrowed.end("enough")
    await scene.nothing_is_left()


# -- a worker says no, or nothing -----------------------------------------------------------------


async def test_one_refusal_unwinds_all_with_the_worker_s_words(scene: Scene) -> None:
    scene.two.lender.refusal = MeshdError("2 GiB are free here")
    with pytest.raises(SplitFailed, match=r"^worker two: 2 GiB are free here$"):
        await scene.borrow()
    assert scene.tunnels.ends == []
    await scene.nothing_is_left()


async def test_a_worker_that_lends_nothing_says_so(scene: Scene) -> None:
    def refuse(node: NodeId, name: str) -> asyncio.Protocol:
        raise PeerRefused("this node drains", reason="node_draining")

    scene.two.serves = refuse
    with pytest.raises(SplitFailed, match=r"worker two: this node drains"):
        await scene.borrow()
    await scene.nothing_is_left()


async def test_a_worker_nobody_can_reach(scene: Scene) -> None:
    with pytest.raises(SplitFailed, match=r"worker w: no address of node w is known"):
        await scene.borrow(scene.one.part, a_part())
    await scene.nothing_is_left()


async def test_a_commit_that_fails_ends_the_others(scene: Scene) -> None:
    scene.one.lender.go_on.clear()
    scene.two.lender.failure = MeshdError("ggml-rpc-server exited with 1")
    with pytest.raises(SplitFailed, match=r"worker two: ggml-rpc-server exited with 1"):
        await scene.borrow()
    await scene.nothing_is_left()


async def test_a_worker_that_dies_while_it_commits(scene: Scene) -> None:
    scene.one.lender.go_on.clear()
    scene.two.lender.go_on.clear()
    work = asyncio.create_task(scene.borrow())
    await scene.two.lender.committing.wait()
    scene.two.station.session.serving.streams.cut()
    with pytest.raises(SplitFailed, match=r"worker two: the connection "):
        await work
    await scene.nothing_is_left()


async def test_a_commit_in_which_nothing_moves_is_given_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(borrowing, "STALL_S", 0.1)
    scene.two.lender.go_on.clear()
    with pytest.raises(SplitFailed, match=r"worker two: nothing moved there"):
        await scene.borrow()
    await scene.nothing_is_left()


async def test_a_worker_that_does_not_answer_is_not_waited_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(borrowing, "ASK_S", 0.3)
    scene.two.serves = lambda *_: Mute(beats=True)
    with pytest.raises(SplitFailed, match=r"no answer of two within"):
        await scene.borrow()
    await scene.nothing_is_left()


class Mute(asyncio.Protocol):
    """A worker that answers `ask` and `commit` with these words, and says nothing by itself;
    `beats`: it answers beats with one."""

    def __init__(self, *answers: dict[str, Any], beats: bool = False) -> None:
        self._answers = list(answers)
        self._beats = beats
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        for kind in (b'"ask"', b'"commit"'):
            if kind in data and self._answers:
                self._transport.write(frame(self._answers.pop(0)))
        if self._beats:
            self._transport.write(frame({"t": "beat"}))


GRANTED = {"t": "granted", "loan": "loan-" + "0" * 32}
SERVING = {"t": "serving", "warmed_bytes": 0}


async def test_a_worker_that_grants_and_falls_silent_fails_the_loan(scene: Scene) -> None:
    scene.two.serves = lambda *_: Mute(GRANTED)
    with pytest.raises(SplitFailed, match=r"worker two: nothing was heard of it"):
        await scene.borrow()
    await scene.nothing_is_left()


async def test_a_worker_that_serves_and_falls_silent_is_lost(scene: Scene) -> None:
    scene.two.serves = lambda *_: Mute(GRANTED, SERVING)
    borrowed = await scene.borrow()
    assert "worker two: nothing was heard of it" in await scene.is_lost()
    await borrowed.end("a worker was lost")
    await scene.nothing_is_left()
    assert len(scene.losses) == 1


# -- tunnels --------------------------------------------------------------------------------------


async def test_tunnels_that_cannot_be_opened(scene: Scene) -> None:
    scene.tunnels.failure = SplitFailed("the tunnels' process did not start")
    with pytest.raises(SplitFailed, match="did not start"):
        await scene.borrow()
    await scene.nothing_is_left()


async def test_they_are_opened_while_workers_get_ready(scene: Scene) -> None:
    scene.two.lender.go_on.clear()
    scene.tunnels.gate.clear()
    work = asyncio.create_task(scene.borrow())
    async with asyncio.timeout(5):
        await scene.two.lender.committing.wait()
        await scene.tunnels.reached.wait()
    scene.tunnels.gate.set()
    assert scene.tunnels.probed == []
    scene.two.lender.go_on.set()
    borrowed = await work
    assert len(scene.tunnels.probed) == 2
    await borrowed.end("enough")
    await scene.nothing_is_left()


async def test_they_are_closed_when_a_worker_does_not_get_ready(scene: Scene) -> None:
    scene.two.lender.go_on.clear()
    scene.two.lender.failure = PeerUnreachable("no port was free")
    work = asyncio.create_task(scene.borrow())
    async with asyncio.timeout(5):
        while not scene.tunnels.opened:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0.01)
    scene.two.lender.go_on.set()
    with pytest.raises(SplitFailed, match="worker two: no port was free"):
        await work
    assert scene.tunnels.closed == 1
    await scene.nothing_is_left()


async def test_a_probe_that_fails_names_its_worker(scene: Scene) -> None:
    scene.tunnels.bad_probe = PeerUnreachable("no hello came back")
    with pytest.raises(SplitFailed, match=r"worker two: no hello came back"):
        await scene.borrow()
    assert scene.tunnels.closed == 1
    await scene.nothing_is_left()


@pytest.mark.parametrize("gate", ["gate", "probe_gate"])
async def test_a_worker_lost_at_the_last_step_fails_the_loan(scene: Scene, gate: str) -> None:
    getattr(scene.tunnels, gate).clear()
    work = asyncio.create_task(scene.borrow())
    async with asyncio.timeout(5):
        await scene.tunnels.reached.wait()
    scene.one.desk.close("this node stops")
    with pytest.raises(SplitFailed, match=r"worker one: this node stops"):
        await work
    assert scene.losses == []
    await scene.nothing_is_left()


# -- afterwards -----------------------------------------------------------------------------------


async def test_the_first_loss_is_told_and_no_other(scene: Scene) -> None:
    borrowed = await scene.borrow()
    scene.one.desk.end(scene.one.lender.granted[0].id, "the rpc-server exited")
    assert await scene.is_lost() == "worker one: the rpc-server exited"
    scene.tunnels.lost("the tunnels' process died")
    scene.two.station.session.serving.streams.cut()
    await scene.two.lender.all_ended()
    await borrowed.end("a worker was lost")
    assert len(scene.losses) == 1
    await scene.nothing_is_left()


async def test_the_loss_of_the_tunnels_is_told(scene: Scene) -> None:
    borrowed = await scene.borrow()
    scene.tunnels.lost("the tunnels' process died")
    assert scene.losses == ["the tunnels' process died"]
    await borrowed.end("the tunnels were lost")
    scene.tunnels.lost("again")
    assert len(scene.losses) == 1
    await scene.nothing_is_left()


async def test_nothing_is_lost_after_the_end(scene: Scene) -> None:
    borrowed = await scene.borrow()
    await borrowed.end("unloaded")
    scene.tunnels.lost("closed")
    await scene.nothing_is_left()
    assert scene.losses == []


async def test_an_end_waits_for_no_worker_that_does_not_answer(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowed = await scene.borrow()
    wedged = asyncio.Event()
    monkeypatch.setattr(scene.tunnels, "close", wedged.wait)
    monkeypatch.setattr(borrowing, "END_S", 0.1)
    async with asyncio.timeout(3):
        await borrowed.end("unloaded")
    scene.tunnels.closed += 1
    await scene.nothing_is_left()


# -- cancelled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["ask", "commit", "tunnels", "probe"])
async def test_cancelled_at_any_step_nothing_is_left(scene: Scene, step: str) -> None:
    reached = scene.tunnels.reached
    if step == "ask":
        reached = asyncio.Event()

        def late(node: NodeId, name: str) -> asyncio.Protocol:
            reached.set()
            return Mute(beats=True)

        scene.two.serves = late
    elif step == "commit":
        scene.two.lender.go_on.clear()
        reached = scene.two.lender.committing
    else:
        (scene.tunnels.gate if step == "tunnels" else scene.tunnels.probe_gate).clear()
    work = asyncio.create_task(scene.borrow())
    async with asyncio.timeout(5):
        await reached.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await scene.nothing_is_left()


async def test_a_cancel_that_comes_with_a_failure_is_not_lost() -> None:
    """Python 3.11 raises the failures of a TaskGroup instead."""

    async def fails(work: asyncio.Future[None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(refused(work))
            await work

    async def refused(work: asyncio.Future[None]) -> None:
        await asyncio.wait([work])
        raise SplitFailed("worker two: no")

    both: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(borrowing._first_error(fails(both)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    both.set_result(None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_bug_is_not_taken_for_a_failure(scene: Scene) -> None:
    scene.tunnels.bad_probe = ZeroDivisionError()  # type: ignore[assignment]
    with pytest.raises(ExceptionGroup) as raised:
        await scene.borrow()
    assert raised.group_contains(ZeroDivisionError)
    await scene.nothing_is_left()


# -- the host, from the worker's side -------------------------------------------------------------


class Talker(asyncio.Protocol):
    """A host that says what it is told to, and nothing by itself."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


async def asked(scene: Scene) -> Talker:
    """A stream to worker `one` on which a loan was granted and is committed."""
    talker = Talker()
    await scene.connect(scene.one.station.id, "one", lambda: talker)
    assert talker.transport is not None
    talker.transport.write(frame(ask_to_wire(an_ask(scene.one.part))) + frame({"t": "commit"}))
    async with asyncio.timeout(5):
        await scene.one.lender.committing.wait()
    return talker


async def test_a_host_that_vanishes_ends_its_loan_within_a_second(scene: Scene) -> None:
    talker = await asked(scene)
    assert talker.transport is not None
    talker.transport.abort()
    await scene.one.lender.all_ended(within_s=1.0)
    await scene.nothing_is_left()


async def test_a_host_that_falls_silent_ends_its_loan(scene: Scene) -> None:
    talker = await asked(scene)
    await scene.one.lender.all_ended()
    assert "nothing was heard" in scene.one.lender.ends[0][1]
    async with asyncio.timeout(5):
        await talker.lost.wait()
    await scene.nothing_is_left()


async def test_a_host_that_is_revoked_ends_its_loan(scene: Scene) -> None:
    await asked(scene)
    scene.one.station.session.denied((scene.host.id,))
    await scene.one.lender.all_ended(within_s=1.0)
    await scene.nothing_is_left()


async def test_memory_is_no_client_s_business(scene: Scene, tmp_path: Path) -> None:
    client = Station("client", tmp_path, scene.host.pool)
    client.join(scene.host, Role.CLIENT)
    client.serve_loan = scene.one.desk.serve
    await client.start(scene.host.address)
    try:
        await knows(client, scene.one.station)
        await knows(scene.host, client)
        for at, other, why in (
            (client, scene.one.station, "lent to members"),
            (scene.host, client, "a client node lends no memory"),
            (scene.one.station, scene.host, "this node lends no memory"),
        ):
            with pytest.raises(PeerRefused, match=why):
                await at.session.open_stream(other.id, other.name, LOAN, Talker)
    finally:
        await client.stop()
