"""Accepting: what floods, silence and a lack of descriptors do to the peer port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from meshd.kernel import Pool
from meshd.peers.links import listener
from meshd.peers.links.frames import FrameReader, parse
from meshd.peers.protocol import ALPN_BULK
from meshd.peers.trust.tls import joining_context
from tests.peers.reception import Reception, new_node


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Reception]:
    pool = Pool("work", workers=2)
    identity, store = new_node(tmp_path, "a")
    store.found("home")
    reception = await Reception("a", identity, store, pool).start()
    yield reception
    await reception.stop()
    pool.close()


async def greeted(a: Reception) -> bool:
    """Whether somebody who comes to join is."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", a.port, ssl=joining_context(), server_hostname=""
        )
        (body,) = FrameReader(1 << 16).feed(await reader.read(1 << 16))
        writer.transport.abort()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
        return bool(parse(body)["t"] == "greeting")


async def silent(a: Reception, said: bytes = b"") -> tuple[Any, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", a.port)
    writer.write(said)
    return reader, writer


def arriving(a: Reception) -> int:
    return len(a.listener._arriving)


async def until_arriving(a: Reception, count: int) -> None:
    async with asyncio.timeout(10):
        while arriving(a) != count:  # noqa: ASYNC110  (nothing tells of it)
            await asyncio.sleep(0.01)


async def test_the_silent_make_room_for_others_oldest_first(
    a: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MAX_ARRIVING", 5)
    crowd = []
    for number in range(5):
        crowd.append(await silent(a, b"\x16\x03\x01\x02" if number % 2 else b""))
        await until_arriving(a, number + 1)
    assert await greeted(a)
    async with asyncio.timeout(5):
        assert await crowd[0][0].read() == b""  # shown out
    assert arriving(a) == 4
    for _, writer in crowd:
        writer.transport.abort()
    await a.idle()


async def test_one_that_says_nothing_is_shown_out_in_time(
    a: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "FIRST_WORDS_S", 0.2)
    crowd = [await silent(a), await silent(a, b"\x16\x03\x01\x02\x00\x01")]
    async with asyncio.timeout(5):
        for reader, writer in crowd:
            assert await reader.read() == b""
            writer.transport.abort()
    await a.idle()


async def test_the_port_survives_a_lack_of_descriptors(
    a: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is lost: who came meanwhile waits in the kernel's queue."""
    monkeypatch.setattr(listener, "BREATHER_S", 0.05)
    accept, refusals = socket.socket.accept, 3

    def scarce(self: socket.socket) -> Any:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    assert await greeted(a)
    assert refusals == 0
    assert await greeted(a)
    await a.idle()


async def test_a_connection_that_is_gone_before_it_is_taken_stops_nothing(
    a: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, gone = socket.socket.accept, True

    def once_gone(self: socket.socket) -> Any:
        nonlocal gone
        if gone:
            gone = False
            raise ConnectionAbortedError(errno.ECONNABORTED, "gone")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", once_gone)
    assert await greeted(a)
    await a.idle()


async def test_a_listener_that_was_stopped_starts_again_on_its_port(a: Reception) -> None:
    assert await greeted(a)
    speakers, spawn = a.listener._speakers, a.listener._spawn
    assert speakers is not None
    assert spawn is not None
    _, writer = await silent(a)
    await until_arriving(a, 1)
    a.listener.stop()
    await a.idle()
    writer.transport.abort()
    await a.listener.start(a.context, speakers, spawn)
    assert await greeted(a)
    await a.idle()


@pytest.mark.parametrize("taken", [True, False])
async def test_bulk_is_given_away_untouched_and_nothing_else_is(a: Reception, taken: bool) -> None:
    given = asyncio.Queue[socket.socket]()
    speakers, spawn = a.listener._speakers, a.listener._spawn
    assert speakers is not None
    assert spawn is not None
    a.listener._speakers = listener.Speakers(
        speakers.authenticate, speakers.join, speakers.control, speakers.raw, given.put_nowait
    )
    context = joining_context()
    context.set_alpn_protocols([ALPN_BULK] if taken else [ALPN_BULK, "meshd-join/1"])
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    hello = outgoing.read()
    reader, writer = await silent(a, hello)
    async with asyncio.timeout(5):
        if taken:
            with await given.get() as connection:
                assert connection.recv(1 << 16) == hello
        else:
            assert (await reader.read(1))[0] == 0x16  # the daemon's own TLS goes on
    assert given.empty()
    writer.transport.abort()
    await a.idle()
