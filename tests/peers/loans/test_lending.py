"""The worker's side, frame by frame, over a transport that only keeps what is written."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import MeshdError
from meshd.ids import LoanId
from meshd.peers.links.frames import frame
from meshd.peers.loans import lending, line
from meshd.peers.loans.lending import LoanDesk
from meshd.peers.loans.line import Pace
from meshd.peers.loans.words import ask_to_wire
from tests.peers.loans.parts import A_NODE, FakeLender, FakeTransport, an_ask
from tests.peers.loans.test_words import JSON

ASK = ask_to_wire(an_ask())
COMMIT = {"t": "commit"}
LOADED = {"t": "loaded"}
BEAT = {"t": "beat"}
END = {"t": "end", "reason": "unloaded"}
CALM = Pace(beat_s=60.0, silent_s=240.0)


class Bench:
    """A desk, its lender, and one stream to it."""

    def __init__(self, pace: Pace = CALM) -> None:
        self.lender = FakeLender()
        self.tasks: set[asyncio.Task[None]] = set()
        self.desk = LoanDesk(self.lender, self.spawn, pace)
        self.line = self.desk.serve(A_NODE, "host")
        self.wire = FakeTransport(self.line)
        self.line.connection_made(self.wire)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def hear(self, *frames: dict[str, Any]) -> None:
        self.line.data_received(b"".join(frame(f) for f in frames))

    async def said(self, kind: str) -> dict[str, Any]:
        """Waits until the worker has said so."""
        async with asyncio.timeout(5):
            while True:
                for said in self.wire.said:
                    if said["t"] == kind:
                        return said
                await self.wire.more()

    async def gone(self) -> None:
        """The connection ends, if it has not: everything of it must be over then."""
        if not self.wire.is_closing():
            self.line.connection_lost(None)
        await self.lender.all_ended()
        while self.tasks:
            await asyncio.gather(*self.tasks, return_exceptions=True)
        assert not self.desk._lent


async def test_a_loan_from_the_ask_to_the_end() -> None:
    bench = Bench()
    bench.lender.words = ("warming: 1 GiB of 2",)
    bench.hear(ASK)
    (loan,) = bench.lender.granted
    assert (loan.host, loan.ask) == (A_NODE, an_ask())
    bench.hear(COMMIT)
    assert (await bench.said("serving"))["warmed_bytes"] == 1000
    assert bench.wire.kinds() == ["granted", "moved", "serving"]
    assert bench.wire.said[1] == {"t": "granted", "loan": loan.id}
    bench.hear(LOADED)
    assert bench.lender.loads == [loan.id]
    bench.hear(END)
    assert bench.lender.ends == [(loan.id, "unloaded")]
    assert bench.wire.is_closing()
    await bench.gone()


async def test_beats_renew() -> None:
    bench = Bench()
    bench.hear(BEAT)
    assert not bench.lender.renewed.is_set(), "nothing to renew yet"
    bench.hear(ASK, BEAT)
    assert bench.lender.renewed.is_set()
    await bench.gone()


async def test_a_refusal_has_the_lender_s_words() -> None:
    bench = Bench()
    bench.lender.refusal = MeshdError("2 GiB are free here, 4 GiB are asked for")
    bench.hear(ASK, BEAT, COMMIT)
    assert bench.wire.kinds() == ["refused"]
    assert "2 GiB are free" in (await bench.said("refused"))["message"]
    assert bench.wire.is_closing()
    await bench.gone()


async def test_a_commit_that_fails_ends_the_loan_with_its_words() -> None:
    bench = Bench()
    bench.lender.failure = MeshdError("the RPC server did not start")
    bench.hear(ASK, COMMIT)
    assert (await bench.said("ended"))["reason"] == "the RPC server did not start"
    assert [reason for _, reason in bench.lender.ends] == ["the RPC server did not start"]
    await bench.gone()


async def test_a_bug_in_a_commit_ends_the_loan_and_is_not_hidden() -> None:
    bench = Bench()
    bench.lender.failure = ZeroDivisionError()  # type: ignore[assignment]
    bench.hear(ASK, COMMIT)
    (task,) = bench.tasks
    with pytest.raises(ZeroDivisionError):
        await task
    await bench.said("ended")
    await bench.gone()


@pytest.mark.parametrize("begun", [False, True])
async def test_an_end_during_a_commit_waits_for_it(begun: bool) -> None:
    bench = Bench()
    bench.lender.go_on.clear()
    bench.hear(ASK, COMMIT)
    if begun:
        await bench.lender.committing.wait()
    bench.hear(END)
    assert bench.lender.ends == []  # FakeLender.end fails under a commit that runs
    await bench.lender.all_ended()
    assert [reason for _, reason in bench.lender.ends] == ["unloaded"]
    await bench.gone()


async def test_a_cancelled_commit_ends_the_loan() -> None:
    bench = Bench()
    bench.lender.go_on.clear()
    bench.hear(ASK, COMMIT)
    await bench.lender.committing.wait()
    for task in tuple(bench.tasks):
        task.cancel()
    await bench.said("ended")
    await bench.gone()


async def test_the_lender_takes_a_loan_back() -> None:
    bench = Bench()
    bench.hear(ASK)
    (loan,) = bench.lender.granted
    bench.desk.end(LoanId("loan-" + "f" * 32), "another one")
    assert not bench.wire.is_closing()
    bench.desk.end(loan.id, "the device is gone")
    bench.desk.end(loan.id, "twice")
    assert bench.wire.kinds() == ["granted", "ended"]
    assert bench.lender.ends == [(loan.id, "the device is gone")]
    await bench.gone()


async def test_a_desk_that_closes_ends_all() -> None:
    bench = Bench()
    other = bench.desk.serve(A_NODE, "other")
    wire = FakeTransport(other)
    other.connection_made(wire)
    bench.hear(ASK)
    bench.desk.close("this node stops")
    assert bench.wire.kinds() == ["granted", "ended"]
    assert wire.kinds() == ["ended"]
    await bench.gone()


@pytest.mark.parametrize(
    ("frames", "loans"),
    [
        ((COMMIT,), 0),
        ((ASK, ASK), 1),
        ((ASK, COMMIT, COMMIT), 1),
        ((ASK, LOADED), 1),
        ((ASK, COMMIT, LOADED), 1),
        ((ASK, {**ASK, "epoch": "8"}), 1),
        (({**ASK, "part": {}},), 0),
    ],
)
async def test_who_breaks_the_rules_ends_the_loan(
    frames: tuple[dict[str, Any], ...], loans: int
) -> None:
    bench = Bench()
    bench.hear(*frames)
    assert bench.wire.is_closing()
    assert len(bench.lender.granted) == loans
    await bench.gone()


async def test_what_a_later_version_says_is_ignored() -> None:
    bench = Bench()
    bench.hear({"t": "resize", "bytes": 5}, ASK, {"t": "resize"}, {})
    assert bench.wire.kinds() == ["granted"]
    await bench.gone()


@pytest.mark.parametrize(("limit", "frames"), [("ASK_S", (BEAT,)), ("COMMIT_S", (ASK, BEAT))])
async def test_who_does_not_go_on_is_not_waited_for(
    limit: str, frames: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, limit, 0.05)
    bench = Bench()
    bench.hear(*frames)
    assert "within" in (await bench.said("ended"))["reason"]
    await bench.gone()


async def test_silence_ends_a_loan_and_words_of_any_kind_keep_it() -> None:
    bench = Bench(Pace(beat_s=0.02, silent_s=0.08))
    bench.hear(ASK)
    for _ in range(20):  # of its own beats: more than it would wait for
        async with asyncio.timeout(5):
            await bench.wire.more()
        bench.hear({"t": "anything"})
    assert bench.lender.ends == []
    await bench.lender.all_ended()
    assert "nothing was heard" in bench.lender.ends[0][1]
    await bench.gone()


async def test_progress_is_left_out_for_who_does_not_read() -> None:
    bench = Bench()
    bench.lender.go_on.clear()
    bench.lender.words = ("warming",)
    bench.wire.backlog_bytes = line.BACKLOG_BYTES + 1
    bench.hear(ASK, COMMIT)
    await bench.lender.committing.wait()
    bench.lender.go_on.set()
    await bench.said("serving")
    assert "moved" not in bench.wire.kinds()
    await bench.gone()


FRAMES = st.sampled_from([ASK, COMMIT, BEAT, END, {"t": "granted"}, {"t": "ask"}]) | st.builds(
    lambda kind, field, value: {**ASK, "t": kind, field: value},
    st.sampled_from(["ask", "commit", "loaded", "beat", "end", "ended"]),
    st.sampled_from(["t", "part", "epoch", "reason", "model"]),
    JSON,
)


@given(
    talk=st.lists(FRAMES, max_size=6),
    noise=st.binary(max_size=40),
    cut=st.integers(1, 200),
    turns=st.lists(st.integers(0, 3), max_size=6),
    refuses=st.booleans(),
)
def test_whatever_a_host_says_each_loan_ends_once(
    talk: list[dict[str, Any]], noise: bytes, cut: int, turns: list[int], refuses: bool
) -> None:
    """In pieces of any length, with turns of the loop between them, and noise at the end."""

    async def talks() -> None:
        bench = Bench()
        if refuses:
            bench.lender.refusal = MeshdError("no")
        data = b"".join(len(b := orjson.dumps(f)).to_bytes(4) + b for f in talk) + noise
        pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
        waits = [*turns, *([0] * len(pieces))]
        for piece, wait in zip(pieces, waits, strict=False):
            bench.line.data_received(piece)
            for _ in range(wait):
                await asyncio.sleep(0)
        assert len(bench.lender.granted) <= 1
        await bench.gone()
        assert bench.wire.kinds().count("granted") == len(bench.lender.granted)

    asyncio.run(talks())
