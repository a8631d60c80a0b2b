"""Deployments between real sessions on loopback: what one node writes, all have."""

from __future__ import annotations

import gc
import math
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meshd.election.deployments import MAX_RECORDS
from meshd.election.records import to_json
from meshd.election.sharing import SharedDeployments
from meshd.errors import ProtocolError
from meshd.ids import ModelId, NodeId
from meshd.kernel import MonotonicClock, Pool
from meshd.peers.deploying import DIGEST_EVERY_S, MAX_ENTRIES, MAX_LACKING, Deploying
from meshd.peers.links.frames import CONTROL_LIMIT, frame
from meshd.peers.links.links import LinkTable
from meshd.view import Deployment, Role
from tests.peers.station import Station

Maker = Callable[..., Awaitable[Station]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Maker]:
    """`await make("a")` founds a mesh; `await make("b", a)` joins it and knows where `a` is."""
    pool, made = Pool("work", workers=2), []

    async def one(name: str, issuer: Station | None = None, role: Role = Role.MEMBER) -> Station:
        station = Station(name, tmp_path, pool)
        if issuer is None:
            station.found()
            await station.start()
        else:
            station.join(issuer, role)
            await station.start(issuer.address)
            await linked(station, issuer)
        made.append(station)
        return station

    yield one
    for station in made:
        await station.stop()
    pool.close()


async def linked(one: Station, other: Station) -> None:
    await one.heard_by(other)
    await other.heard_by(one)


async def has(at: Station, *records: Deployment) -> None:
    """Until the view of `at` shows exactly these deployments."""
    await at.until(partial(shows, at, records), f"{[r.model for r in records]} at {at.name}")


def shows(at: Station, records: tuple[Deployment, ...]) -> bool:
    return at.board.current.deployments == tuple(sorted(records, key=lambda r: r.model))


def never_compares(station: Station) -> None:
    """But on new links."""
    station.session.deploying._digest_at = math.inf


def made_up(at: Station, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Records such as a node could send that makes them up."""
    return [
        to_json(
            Deployment(
                ModelId(f"{rng.getrandbits(64):x}"),
                "r" * 1000,
                rng.randint(1, 1 << 52),
                at.id,
                removed=rng.random() < 0.5,
            )
        )
        for _ in range(count)
    ]


async def test_what_is_written_at_one_node_is_at_all_of_them(make: Maker) -> None:
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    await linked(b, c)
    began = time.monotonic()
    record = a.deploy("m", replicas=None, context=4096, parallel=2, host=b.id)
    for station in (b, c):
        await has(station, record)
    assert time.monotonic() - began < DIGEST_EVERY_S / 2, "it came by comparing, not at once"
    newer = b.deploy("m", replicas=2)
    gone = c.deploy("n")
    for station in (a, b, c):
        await has(station, newer, gone)
    tombstone = a.undeploy("n")
    for station in (b, c):
        await has(station, newer, tombstone)
    assert tombstone.removed


async def test_it_goes_on_from_node_to_node(make: Maker) -> None:
    """Sent on one link alone it comes back over the third node."""
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    await linked(b, c)
    for station in (a, b, c):
        never_compares(station)
    link = b.session.linking.links.get(a.id)
    assert link is not None
    record = replace(b.deploy("m", tell=False), version=7)
    link.send({"t": "deploy", "entries": [to_json(record)]})
    for station in (a, c, b):
        await has(station, record)


async def test_what_is_not_newer_goes_no_further(make: Maker) -> None:
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    await linked(b, c)
    record = a.deploy("m")
    for station in (b, c):
        await has(station, record)
    for one, other in ((a, b), (b, c), (c, a), (a, b), (b, c), (c, a)):
        await linked(one, other)  # whatever still echoes has been heard
    heard = [station.session.gossip_bytes()[0] for station in (b, c)]
    link = a.session.linking.links.get(b.id)
    assert link is not None
    entries = [to_json(record)] * MAX_ENTRIES
    for _ in range(100):
        link.send({"t": "deploy", "entries": entries})
    await linked(a, b)
    await linked(b, c)
    grown = [s.session.gossip_bytes()[0] - h for s, h in zip((b, c), heard, strict=True)]
    size = len(frame({"t": "deploy", "entries": entries}))
    assert grown[0] > 100 * size
    assert grown[1] < 10 * size


async def test_what_was_lost_on_the_way_is_found(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a)
    here, there = a.deploy("here", tell=False), b.deploy("there", tell=False)
    await has(a, here, there)
    await has(b, here, there)


async def test_stamps_are_answered_with_what_is_newer_or_missing_there(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a)
    for station in (a, b):
        never_compares(station)
    same = a.deploy("same")
    await has(b, same)
    b.deploy("newer")
    await has(a, same, b.deployments.records[0])
    newer, missing = a.deploy("newer", replicas=2, tell=False), a.deploy("x", tell=False)
    link = b.session.linking.links.get(a.id)
    assert link is not None
    for chunk in SharedDeployments(b.deployments, lambda _: None).stamps():
        link.send({"t": "stamps", "of": chunk})
    await has(b, same, newer, missing)


async def test_a_node_that_was_away_learns_and_tells(make: Maker) -> None:
    """A tombstone stands against the record that the node comes back with."""
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    kept, lost = a.deploy("kept"), a.deploy("lost")
    for station in (b, c):
        await has(station, kept, lost)
    await c.stop(goodbye=False)
    while_away = [c.deploy(f"c{n}", tell=False) for n in range(MAX_ENTRIES + 5)]
    tombstone, fresh = a.undeploy("lost"), b.deploy("fresh")
    await has(a, kept, tombstone, fresh)
    await c.start(a.address, port=c.port)
    for station in (a, b, c):
        await has(station, kept, tombstone, fresh, *while_away)


async def test_a_newcomer_gets_a_full_table_with_its_link(make: Maker) -> None:
    a = await make("a")
    never_compares(a)
    records = [a.deploy(f"m{n:04d}", tell=False) for n in range(MAX_RECORDS)]
    b = await make("b", a)
    never_compares(b)
    await has(b, *records)


async def test_who_is_asked_too_often_answers_later(make: Maker) -> None:
    """All stamps of a table are much for the few bytes that ask for them."""
    a = await make("a")
    records = [a.deploy(f"m{n:04d}", tell=False) for n in range(MAX_RECORDS)]
    b = await make("b", a)
    await has(b, *records)
    link = b.session.linking.links.get(a.id)
    assert link is not None
    await b.heard_by(a)
    before = link.bytes_in
    for _ in range(50):
        link.send({"t": "deployed", "digest": "0" * 16})
    await b.heard_by(a)
    stamps = SharedDeployments(a.deployments, lambda _: None).stamps()
    size = sum(len(frame({"t": "stamps", "of": chunk})) for chunk in stamps)
    assert link.bytes_in - before < 3 * size


async def test_a_client_learns_and_is_not_believed(make: Maker) -> None:
    a = await make("a")
    record = a.deploy("m")
    client = await make("client", a, Role.CLIENT)
    await has(client, record)
    client.deploy("its-own")
    client.undeploy("m")
    await client.heard_by(a)
    assert shows(a, (record,))


async def test_a_flood_of_made_up_records_does_not_grow(make: Maker) -> None:
    a = await make("a")
    evil = await make("evil", a)
    kept = a.deploy("m")
    await has(evil, kept)
    link = evil.session.linking.links.get(a.id)
    assert link is not None
    rng = random.Random(7)

    async def flood(frames: int) -> None:
        for number in range(frames):
            link.send({"t": "deploy", "entries": made_up(evil, MAX_ENTRIES, rng)})
            if number % 10 == 0:
                await evil.heard_by(a)
        await evil.heard_by(a)

    await flood(MAX_RECORDS // MAX_ENTRIES * 2)
    assert len(a.deployments.records) == MAX_RECORDS
    gc.collect()
    tracemalloc.start()
    try:
        base, _ = tracemalloc.get_traced_memory()
        await flood(MAX_RECORDS // MAX_ENTRIES)
        gc.collect()
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(a.deployments.records) == MAX_RECORDS
    # All records may have been replaced since: that many, and their sizes, and not more.
    assert now - base < MAX_RECORDS * 4096, f"kept {now - base} bytes"
    assert a.deployments.get(kept.model) == kept
    assert a.session.linking.links.get(evil.id) is not None


@pytest.mark.parametrize(
    "words",
    [
        {"t": "deploy"},
        {"t": "deploy", "entries": {}},
        {"t": "deploy", "entries": [{}] * (MAX_ENTRIES + 1)},
        {"t": "deployed"},
        {"t": "deployed", "digest": 7},
        {"t": "deployed", "digest": "0" * 65},
        {"t": "stamps"},
        {"t": "stamps", "of": {"after": "", "until": None, "entries": [{"model": "m"}]}},
        {"t": "lacking", "models": "m"},
        {"t": "lacking", "models": [7]},
        {"t": "lacking", "models": ["m" * 257]},
        {"t": "lacking", "models": ["m"] * (MAX_LACKING + 1)},
    ],
)
async def test_malformed_frames_end_the_link(make: Maker, words: dict[str, Any]) -> None:
    a = await make("a")
    b = await make("b", a)
    link = a.session.linking.links.get(b.id)
    assert link is not None
    with pytest.raises(ProtocolError):
        a.session.deploying.frame_came(link, words)


async def test_what_is_no_record_is_left_out(make: Maker) -> None:
    """A later version may know causes that this one does not."""
    a = await make("a")
    b = await make("b", a)
    link = a.session.linking.links.get(b.id)
    assert link is not None
    good = Deployment(ModelId("m"), "owner/m", 1, b.id)
    bad: list[Any] = [7, {}, {**to_json(good), "model": "x", "cause": "whim"}]
    assert a.session.deploying.frame_came(link, {"t": "deploy", "entries": [*bad, to_json(good)]})
    assert a.deployments.records == (good,)


def test_without_a_table_its_frames_are_ignored() -> None:
    """Whatever is in them: the node takes no part in what they are about."""
    idle = Deploying(None, LinkTable(NodeId("a" * 52)), MonotonicClock(), random.Random(0))
    link: Any = object()
    for kind in ("deploy", "deployed", "stamps", "lacking"):
        assert idle.frame_came(link, {"t": kind})
    assert not idle.frame_came(link, {"t": "deny"})
    idle.spread([ModelId("m")])
    idle.greet(link)
    idle.look()


def test_the_longest_records_fit_into_a_frame() -> None:
    node = "a" * 52
    longest = {
        **to_json(Deployment(ModelId("m"), "r", (1 << 53) - 1, node, host=node)),  # type: ignore[arg-type]
        "model": "\1" * 256,
        "ref": "\1" * 1024,
        "replicas": 4096,
        "context": 1 << 28,
        "parallel": 1024,
        "asleep": True,
        "removed": True,
    }
    assert len(frame({"t": "deploy", "entries": [longest] * MAX_ENTRIES})) < CONTROL_LIMIT
    names = ["\1" * 256] * MAX_LACKING
    assert len(frame({"t": "lacking", "models": names})) < CONTROL_LIMIT
