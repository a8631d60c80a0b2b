"""The host's side against workers that say anything: it borrows or fails, and leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import SplitFailed
from meshd.ids import NodeId
from meshd.peers.loans.borrowing import borrow
from meshd.peers.loans.line import Pace
from tests.peers.loans.parts import FakeTransport, a_part, an_order
from tests.peers.loans.test_words import JSON, WORKER_WORDS

GRANTED, REFUSED, MOVED, SERVING, ENDED = WORKER_WORDS
CALM = Pace(beat_s=60.0, silent_s=240.0)
FRAMES = st.sampled_from([*WORKER_WORDS, GRANTED, SERVING, {"t": "beat"}, {"t": "commit"}])
TWISTED = st.builds(
    lambda word, field, value: {**word, field: value},
    st.sampled_from(WORKER_WORDS),
    st.sampled_from(["t", "loan", "reason", "message", "words", "warmed_bytes"]),
    JSON,
)


class Scene:
    """A host that borrows of one worker, whose words the test says."""

    def __init__(self) -> None:
        self._connected = asyncio.Event()
        self.wire: FakeTransport | None = None
        self.line: asyncio.Protocol | None = None
        self.endpoints = ("127.0.0.1:4000",)
        self.opened = self.closed = 0
        self.losses: list[str] = []

    async def connect(
        self, node: NodeId, name: str, make_protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Protocol:
        self.line = make_protocol()
        self.wire = FakeTransport(self.line)
        self.line.connection_made(self.wire)
        self._connected.set()
        return self.line

    async def open(self, *_: Any) -> Scene:
        self.opened += 1
        return self

    async def close(self) -> None:
        self.closed += 1

    async def probe(self, endpoint: str, rpc_protocol: str) -> None:
        await asyncio.sleep(0)

    async def plays(self, pieces: list[tuple[bytes, int]]) -> bool:
        """Whether memory was borrowed. The pieces, each after so many turns of the loop."""
        work = asyncio.create_task(
            borrow(
                an_order(a_part()),
                connect=self.connect,
                open_tunnels=self.open,
                probe=self.probe,
                lost=self.losses.append,
                moved=lambda _: None,
                pace=CALM,
            )
        )
        await self._connected.wait()
        assert self.wire is not None
        assert self.line is not None
        for data, turns in pieces:
            for _ in range(turns):
                await asyncio.sleep(0)
            if not self.wire.is_closing():
                self.line.data_received(data)
        for _ in range(20):  # more than any step takes
            await asyncio.sleep(0)
        self.wire.close()  # if it has not
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, SplitFailed), outcome
            assert outcome.message.startswith("worker w: ")
            assert self.losses == []
            return False
        assert len(self.losses) == 1
        await outcome.end("enough")
        return True


@given(
    talk=st.lists(st.tuples(FRAMES | TWISTED, st.integers(0, 4)), max_size=8),
    noise=st.binary(max_size=40),
)
def test_whatever_a_worker_says(talk: list[tuple[dict[str, Any], int]], noise: bytes) -> None:
    pieces = [(len(b := orjson.dumps(f)).to_bytes(4) + b, turns) for f, turns in talk]
    scene = Scene()
    asyncio.run(scene.plays([*pieces, (noise, 1)]))
    assert scene.closed == scene.opened


@pytest.mark.parametrize(
    ("talk", "borrows"),
    [
        ((GRANTED, SERVING), True),
        ((GRANTED, MOVED, {"t": "resize"}, SERVING), True),
        ((GRANTED, MOVED, ENDED, SERVING), False),
        ((REFUSED, GRANTED, SERVING), False),
        ((GRANTED, GRANTED, SERVING), False),
        ((SERVING, GRANTED, SERVING), False),
        ((MOVED, GRANTED, SERVING), True),
    ],
)
def test_what_is_a_loan_and_what_is_none(talk: tuple[dict[str, Any], ...], borrows: bool) -> None:
    pieces = [(len(b := orjson.dumps(f)).to_bytes(4) + b, 4) for f in talk]
    scene = Scene()
    assert asyncio.run(scene.plays(pieces)) is borrows
    assert scene.closed == scene.opened
    assert scene.opened or not borrows
