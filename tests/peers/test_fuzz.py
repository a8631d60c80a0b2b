"""Random and mutated bytes at the peer port: nothing dies, leaks or grows.

What one parser does with any input is tested beside it, with Hypothesis; this is the whole way in,
over real TLS: a stranger's bytes, a member's frames before the hello and after it, and streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import tracemalloc
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from meshd.kernel import Pool
from meshd.peers.links.codec import message_to_wire
from meshd.peers.links.frames import CONTROL_LIMIT, frame
from meshd.peers.protocol import ALPN_CTL, ALPN_RAW
from meshd.peers.swim.gossip import Dead, Digest, Gossip, Ping, PingReq, Suspect, Sync
from meshd.view import PeerState
from tests.peers.station import Station

ROUNDS = 150


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[tuple[Station, Station, Station]]:
    """The node under test, a member in good standing, and one whose certificate the fuzzer uses."""
    pool = Pool("work", workers=2)
    victim, friend, evil = (Station(n, tmp_path, pool) for n in ("victim", "friend", "evil"))
    victim.found()
    await victim.start()
    friend.join(victim)
    await friend.start(victim.address)
    evil.join(victim)
    await evil.start(victim.address)
    for other in (friend, evil):
        await victim.until(partial(named, victim, other), "both known")
    yield victim, friend, evil
    for station in (friend, evil, victim):
        await station.stop()
    pool.close()


HEARD_S = 0.1
"""How long an answer is waited for: half a frame gets none, until the node's own limit."""
AT_ONCE = 10


def named(at: Station, other: Station) -> bool:
    peer = at.peer(other)
    return peer is not None and peer.name == other.name


async def say(victim: Station, context: Any, data: bytes) -> bytes:
    """Connect, say `data`, listen for a moment, end; what came back."""
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", victim.port, ssl=context, server_hostname="" if context else None
            )
            try:
                writer.write(data)
                await writer.drain()
                if context is None:
                    writer.write_eof()
                async with asyncio.timeout(HEARD_S):
                    return await reader.read(4096)
            finally:
                writer.transport.abort()
                with contextlib.suppress(Exception):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return b""


async def say_all(victim: Station, context: Any, everything: list[bytes]) -> None:
    for start in range(0, len(everything), AT_ONCE):
        batch = everything[start : start + AT_ONCE]
        await asyncio.gather(*(say(victim, context, data) for data in batch))


async def settled(victim: Station, friend: Station, tasks_before: int) -> None:
    """The victim is as it was: its tasks ended, its member alive, its link up.

    All nodes share one loop here: a flood that holds it up may make one suspected for a moment,
    which it refutes; who was taken for dead would not come back by itself within the time.
    """
    async with asyncio.timeout(15):
        while len(victim.tasks) > tasks_before:
            await asyncio.wait(victim.tasks, return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
    await alive(victim, friend)
    await victim.until(
        lambda: victim.session.linking.links.get(friend.id) is not None, "the friend's link"
    )
    assert not victim.session.serving.streams._open


async def alive(at: Station, other: Station) -> None:
    def is_alive() -> bool:
        peer = at.peer(other)
        return peer is not None and peer.state is PeerState.ALIVE

    await at.until(is_alive, f"{other.name} alive at {at.name}")


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One of: flip bytes, cut, repeat a piece, put a piece of noise in."""
    body = bytearray(data)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randint(1, 8)):
                if body:
                    body[rng.randrange(len(body))] = rng.randrange(256)
        case 1:
            del body[rng.randrange(len(body) + 1) :]
        case 2:
            start = rng.randrange(len(body) + 1)
            body[start:start] = body[start : start + rng.randint(1, 64)] * rng.randint(1, 8)
        case _:
            start = rng.randrange(len(body) + 1)
            body[start:start] = rng.randbytes(rng.randint(1, 64))
    return bytes(body)


def samples(victim: Station, evil: Station) -> list[dict[str, Any]]:
    """A frame of every kind."""
    a, b = victim.id, evil.id
    statement = evil.session._statement
    envelope = evil.session.telling._envelope
    entry = {"model": "m", "ref": "owner/m", "version": 1, "origin": b, "replicas": None}
    stamp = {"model": "m", "version": 1, "origin": b, "mark": "0" * 16}
    messages = (
        Ping(1, (statement, Suspect(a, 1, b))),
        PingReq(2, a, (Dead(a, 1 << 40, b),)),
        Gossip((statement, Dead(b, 1 << 50, a))),
        Digest(tuple(range(16)), True),
        Sync(tuple(range(16)), (statement,), True),
    )
    return [
        *(message_to_wire(m) for m in messages),
        {"t": "adverts", "list": [envelope]},
        {"t": "want", "nodes": [a, b]},
        {"t": "load", "s": {"~x": 3}},
        {"t": "deny", "entries": []},
        {"t": "deployed", "digest": "0" * 16},
        {"t": "deploy", "entries": [entry, {**entry, "version": 1 << 52, "host": b}]},
        {"t": "stamps", "of": {"after": "", "until": "m", "entries": [stamp]}},
        {"t": "lacking", "models": ["m", "of-old"]},
        {"t": "renew", "csr": "-----BEGIN CERTIFICATE REQUEST-----"},
        {"t": "renewed", "certificate": "x"},
        {"t": "echo", "n": [1, {"a": "b"}]},
        {"t": "echoed", "n": (1 << 63) - 1},
        {"t": "refused", "reason": "x" * 500, "message": "\x1b[31m\n" * 100},
        {"t": "from-the-future", "x": [[[[]]]]},
        evil.session.own_hello("link").to_wire(),
        evil.session.own_hello("doctor").to_wire(),
    ]


def twisted(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    """The same frame with one value replaced by something else."""
    odd: list[Any] = [None, True, -1, 1 << 64, 1e308, "", "x" * 5000, [], {}, [[]] * 50, "\0"]
    result = orjson.loads(orjson.dumps(value))
    place: Any = result
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return dict(result)
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        place[key] = rng.choice([o for o in odd if not (type(o) is int and o >= 1 << 64)])
        return dict(result)


async def test_a_stranger_s_bytes(nodes: tuple[Station, Station, Station]) -> None:
    victim, friend, _ = nodes
    before, rng = len(victim.tasks), random.Random(1)
    await say_all(victim, None, [rng.randbytes(rng.randint(0, 300)) for _ in range(ROUNDS)])
    await say(victim, None, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await say(victim, None, b"\x16\x03\x01\xff\xff" + b"\0" * 70_000)
    await settled(victim, friend, before)


@pytest.mark.parametrize("alpn", [ALPN_CTL, ALPN_RAW])
async def test_a_member_s_first_words(nodes: tuple[Station, Station, Station], alpn: str) -> None:
    victim, friend, evil = nodes
    before, rng = len(victim.tasks), random.Random(2)
    context = evil.session.trust.client_context(alpn)
    hello = evil.session.own_hello("link").to_wire()
    opening = {"t": "open", "service": "api", "instance": "~x"}
    sample = hello if alpn == ALPN_CTL else opening
    twists = [frame(twisted(rng, sample)) for _ in range(ROUNDS // 2)]
    twists += [mutated(rng, frame(sample)) for _ in range(ROUNDS // 2)]
    await say_all(victim, context, [t + rng.randbytes(rng.randint(0, 50)) for t in twists])
    for length in (0xFFFFFFFF, 64 * 1024 + 1):
        await say(victim, context, length.to_bytes(4) + b"{" * 1000)
    victim.session.serving.streams.cut()
    await settled(victim, friend, before)


async def test_a_member_s_frames_after_the_hello(
    nodes: tuple[Station, Station, Station],
) -> None:
    victim, friend, evil = nodes
    before, rng = len(victim.tasks), random.Random(3)
    context = evil.session.trust.client_context(ALPN_CTL)
    hello = frame(evil.session.own_hello("link").to_wire())
    kinds = samples(victim, evil)
    talks = []
    for _ in range(ROUNDS):
        data = b"".join(frame(twisted(rng, rng.choice(kinds))) for _ in range(5))
        talks.append(hello + (mutated(rng, data) if rng.random() < 0.5 else data))
    await say_all(victim, context, talks)
    await settled(victim, friend, before)
    await alive(friend, victim)


async def test_what_floods_does_not_grow(nodes: tuple[Station, Station, Station]) -> None:
    """Everything a member can make another keep is capped: made-up nodes, frames, slots."""
    victim, friend, evil = nodes
    before, rng = len(victim.tasks), random.Random(4)
    link = evil.session.linking.links.get(victim.id)
    assert link is not None
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"

    async def flood(times: int) -> None:
        for number in range(times):
            made_up = ["".join(rng.choices(alphabet, k=51)) + "a" for _ in range(6)]
            link.send(message_to_wire(Gossip(tuple(Suspect(n, 1, n) for n in made_up))))  # type: ignore[arg-type]
            link.send(message_to_wire(Sync((1,), tuple(Dead(n, 1, n) for n in made_up), True)))  # type: ignore[arg-type]
            link.send({"t": "want", "nodes": made_up})
            link.send({"t": "load", "s": dict.fromkeys(made_up, 1)})
            if number % 50 == 0:
                await evil.heard_by(victim)
        await evil.heard_by(victim)

    await flood(50)
    gc.collect()
    tracemalloc.start()
    try:
        base, _ = tracemalloc.get_traced_memory()
        await flood(300)
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now - base < 8 * 1024 * 1024, f"kept {now - base} bytes"
    assert peak - base < 32 * 1024 * 1024
    assert len(victim.session._swim.members) <= 4096
    await settled(victim, friend, before)


async def test_a_frame_as_large_as_may_be_is_read_and_a_larger_one_ends_the_link(
    nodes: tuple[Station, Station, Station],
) -> None:
    victim, friend, evil = nodes
    link = evil.session.linking.links.get(victim.id)
    there = victim.session.linking.links.get(evil.id)
    assert link is not None
    assert there is not None
    padding = CONTROL_LIMIT - len(frame({"t": "none", "x": ""})) + 4
    link.send({"t": "none", "x": "y" * padding})
    await evil.heard_by(victim)
    assert victim.session.linking.links.get(evil.id) is there
    link.send({"t": "none", "x": "y" * (padding + 1)})
    async with asyncio.timeout(5):
        while victim.session.linking.links.get(evil.id) is there:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert victim.session.linking.links.get(friend.id) is not None
