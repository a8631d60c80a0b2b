from __future__ import annotations

import asyncio

import pytest

from meshd.errors import JoinRefused
from meshd.ids import MeshId, NodeId
from meshd.peers.lan.sightings import MAX_ADDRESSES, MAX_SIGHTINGS, Sightings

HOME, OTHER = MeshId("a" * 32), MeshId("b" * 32)


def node(number: int) -> NodeId:
    return NodeId(f"n{number}")


async def test_addresses_of_one_mesh_without_repetition_and_bounded() -> None:
    seen = Sightings()
    seen.add(HOME, node(1), ("a:1", "b:1"))
    seen.add(OTHER, node(2), ("x:1",))
    seen.add(HOME, node(3), ("b:1", "c:1"))
    assert seen.of(HOME) == ("a:1", "b:1", "c:1")
    seen.add(HOME, node(1), ("d:1",))
    assert seen.of(HOME) == ("d:1", "b:1", "c:1")
    for number in range(4, 20):
        seen.add(HOME, node(number), (f"h{number}:1",))
    assert len(seen.of(HOME)) == MAX_ADDRESSES


async def test_a_flood_of_announcements_is_not_kept() -> None:
    seen = Sightings()
    for number in range(2 * MAX_SIGHTINGS):
        seen.add(OTHER, node(number), ("x:1",))
    assert len(list(seen)) == MAX_SIGHTINGS
    seen.add(OTHER, node(0), ("y:1",))
    assert ("y:1",) in [addresses for _, _, addresses in seen]


async def test_a_silent_attempt_gives_way_to_news() -> None:
    seen = Sightings()
    asked: list[tuple[str, ...]] = []
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def attempt(also: tuple[str, ...]) -> str:
        asked.append(also)
        begun.set()
        if also:
            return "in"
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    async with asyncio.timeout(5):
        joining = asyncio.create_task(seen.heeding(HOME, attempt))
        await begun.wait()
        seen.add(OTHER, node(1), ("x:1",))
        seen.add(HOME, node(2), ("b:1",))
        assert await joining == "in"
    assert asked == [(), ("b:1",)]
    assert cancelled.is_set()


async def test_an_attempt_keeps_its_head_start() -> None:
    """News that comes while a member is answering does not start it all over."""
    seen = Sightings()
    asked = 0

    async def attempt(also: tuple[str, ...]) -> str:
        nonlocal asked
        asked += 1
        for number in range(50):
            seen.add(HOME, node(number), (f"h{number}:1",))
            await asyncio.sleep(0)
        return "in"

    async with asyncio.timeout(5):
        assert await seen.heeding(HOME, attempt) == "in"
    assert asked == 1


async def test_what_an_attempt_raises_is_raised() -> None:
    async def attempt(also: tuple[str, ...]) -> str:
        raise JoinRefused("no")

    with pytest.raises(JoinRefused, match="no"):
        await Sightings().heeding(HOME, attempt)


async def test_cancelling_cancels_the_attempt() -> None:
    ended = asyncio.Event()
    begun = asyncio.Event()

    async def attempt(also: tuple[str, ...]) -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with asyncio.timeout(5):
        joining = asyncio.create_task(Sightings().heeding(HOME, attempt))
        await begun.wait()
        joining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joining
    assert ended.is_set()


async def test_a_pause_ends_early_with_news_of_this_mesh_alone() -> None:
    seen = Sightings()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        pausing = asyncio.create_task(seen.pause(HOME, 60))
        await asyncio.sleep(0)
        seen.add(OTHER, node(1), ("x:1",))
        done, _ = await asyncio.wait({pausing}, timeout=0.05)
        assert not done
        seen.add(HOME, node(2), ("b:1",))
        await pausing
        began = loop.time()
        await seen.pause(HOME, 0.05)
        assert loop.time() - began >= 0.04
