"""The way to an engine: nothing is given to one that is not whole, and what is not whole is mended.

Real fetch children against the local hub.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.manifest import Manifest
from meshd.cache.references import parse_hub_ref
from meshd.cache.transfer.words import FetchFailed, News
from meshd.errors import BadReference, BrokenWeights, HubRefused, HubUnavailable, NoSpace
from meshd.view import ModelState, NeededWeights
from tests.cache.rooms import REPO, Moves, RoomMaker
from tests.cache.sets import write_set
from tests.hub import LocalHub, Slow, Status

SIZES = (400_000, 900_000, 500_000)
REF = f"{REPO}:Q4_K_M"
STEM = "model-Q4_K_M"
FETCHING, VERIFYING = ModelState.FETCHING, ModelState.VERIFYING

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def shards(hub: LocalHub, tmp_path: Path) -> list[Path]:
    paths = write_set(tmp_path / "set", *SIZES, stem=STEM)
    hub.add(REPO, {path.name: path for path in paths})
    return paths


@pytest.fixture
def rooms(
    hub: LocalHub, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RoomMaker]:
    maker = RoomMaker(tmp_path / "home", monkeypatch, hub)
    yield maker
    maker.close()


def total(shards: list[Path]) -> int:
    return sum(path.stat().st_size for path in shards)


async def test_what_is_not_here_is_fetched_and_known_from_then_on(
    rooms: RoomMaker, hub: LocalHub, shards: list[Path]
) -> None:
    room, moves = rooms.make(), Moves()
    weights = await room.prepare(REF, moves)
    assert moves.states[0] is FETCHING
    assert all(move.reason for move in moves.all)
    assert weights.model == STEM
    assert [path.read_bytes() for path in weights.paths] == [p.read_bytes() for p in shards]
    assert weights.total_bytes == total(shards)
    assert weights.digest is not None
    # again, without the hub, and by another process' eyes
    hub.close()
    moves = Moves()
    assert await rooms.make().prepare(REF, moves) == weights
    assert moves.all == []


async def test_a_missing_shard_alone_is_fetched(
    rooms: RoomMaker, hub: LocalHub, shards: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    room = rooms.make()
    weights = await room.prepare(REF, Moves())
    weights.paths[1].resolve().unlink()
    hub.wait_idle()
    hub.forget_requests()
    with caplog.at_level(logging.INFO):
        again = await room.prepare(REF, Moves())
    hub.wait_idle()
    assert (again.paths, again.digest) == (weights.paths, weights.digest)
    assert hub.sent() == hub.sent(f"{STEM}-00002-of-00003.gguf") == shards[1].stat().st_size
    story = [r.message for r in caplog.records if r.name == "meshd.cache.preparing"]
    assert len(story) == 2
    assert story[0].startswith(f"model {STEM}: shard 00002-of-00003 {weights.paths[1]} is a link")
    assert story[0].endswith("; fetching what is wrong")
    assert story[1].startswith(f"model {STEM}: the weights are whole (90")


async def test_a_changed_file_is_hashed_again_and_mended(
    rooms: RoomMaker, hub: LocalHub, shards: list[Path]
) -> None:
    room = rooms.make()
    weights = await room.prepare(REF, Moves())
    with weights.paths[2].open("r+b") as file:
        file.seek(450_000)
        file.write(b"\xff\x00\xff\x00")
    hub.forget_requests()
    moves = Moves()
    assert (await room.prepare(REF, moves)).digest == weights.digest
    assert moves.states[:2] == [VERIFYING, FETCHING]
    assert weights.paths[2].read_bytes() == shards[2].read_bytes()
    hub.wait_idle()
    assert hub.sent() == hub.sent("*00003-of*") <= CHUNK_BYTES


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>"])
async def test_rubbish_in_a_shards_place_is_replaced(
    rooms: RoomMaker, shards: list[Path], content: bytes
) -> None:
    room = rooms.make()
    weights = await room.prepare(REF, Moves())
    weights.paths[0].resolve().write_bytes(content)
    again = await room.prepare(REF, Moves())
    assert again.paths[0].read_bytes() == shards[0].read_bytes()


async def test_what_cannot_be_mended_says_everything_there_is_to_know(
    rooms: RoomMaker, hub: LocalHub, shards: list[Path]
) -> None:
    room = rooms.make()
    weights = await room.prepare(REF, Moves())
    third = weights.paths[2].resolve()
    third.write_bytes(third.read_bytes()[:-1000])
    hub.faults.add("*", Status(404), times=1000)
    with pytest.raises(BrokenWeights) as caught:
        await room.prepare(REF, Moves())
    words = caught.value.message
    size = shards[2].stat().st_size
    assert f"shard 00003-of-00003 {weights.paths[2]} is 1000 bytes too short" in words
    assert f"expected {size / 1000:.0f} kB, {size} bytes" in words
    assert f"found {(size - 1000) / 1000:.0f} kB, {size - 1000} bytes" in words
    assert f"`meshd cache repair {REF}`" in words
    assert caught.value.retry_after_s is None  # the hub said no; it is not asked for ever
    assert not caught.value.retryable


async def test_a_hub_that_is_away_is_a_trouble_that_passes(rooms: RoomMaker) -> None:
    rooms.use_none()
    with pytest.raises(HubUnavailable) as caught:
        await rooms.make().prepare(REF, Moves())
    assert caught.value.retryable


async def test_a_hub_that_refuses_is_not(rooms: RoomMaker) -> None:
    with pytest.raises(HubRefused, match="no-such-GGUF") as caught:
        await rooms.make().prepare("acme/no-such-GGUF:Q4_K_M", Moves())
    assert (caught.value.retryable, caught.value.retry_after_s) == (False, None)


async def test_two_that_want_the_same_share_one_fetch(
    rooms: RoomMaker, hub: LocalHub, shards: list[Path]
) -> None:
    room, second = rooms.make(), Moves()
    a, b = await asyncio.gather(room.prepare(REF, Moves()), room.prepare(REF, second))
    assert a == b
    assert second.all[0].state is ModelState.WAITING
    hub.wait_idle()
    assert hub.sent() == total(shards)
    assert room.preparer.busy_with == {}


async def test_a_cancelled_fetch_is_gone_on_with(
    rooms: RoomMaker, hub: LocalHub, tmp_path: Path
) -> None:
    paths = write_set(tmp_path / "big", 3 * CHUNK_BYTES, 2 * CHUNK_BYTES, stem="big-Q8_0")
    hub.add("acme/big-GGUF", {path.name: path for path in paths})
    hub.faults.add("big*", Slow(4_000_000), times=1000)
    room = rooms.make()
    task = asyncio.create_task(room.prepare("acme/big-GGUF:Q8_0", Moves()))
    async with asyncio.timeout(30):
        # Of both files at once: so much that a whole chunk has come, whatever is still on its way.
        while hub.sent("big*") < 4 * CHUNK_BYTES:  # noqa: ASYNC110 (counted by another thread)
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hub.faults.clear()
    hub.wait_idle()
    hub.forget_requests()
    weights = await room.prepare("acme/big-GGUF:Q8_0", Moves())
    assert [path.read_bytes() for path in weights.paths] == [p.read_bytes() for p in paths]
    hub.wait_idle()
    assert hub.sent() < total(paths)


async def test_a_path_into_the_cache_is_the_hubs(rooms: RoomMaker, shards: list[Path]) -> None:
    room = rooms.make()
    weights = await room.prepare(REF, Moves())
    weights.paths[1].resolve().unlink()
    again = await rooms.make().prepare(str(weights.paths[0]), Moves())
    assert again.paths == weights.paths
    assert again.paths[1].read_bytes() == shards[1].read_bytes()


async def test_local_files_are_hashed_once(rooms: RoomMaker, shards: list[Path]) -> None:
    room, moves = rooms.make(), Moves()
    weights = await room.prepare(str(shards[1]), moves)
    assert moves.states == [VERIFYING]
    assert weights.paths == tuple(shards)
    assert weights.digest is not None
    moves = Moves()
    again = await room.prepare(str(shards[0]), moves)
    assert (again.paths, again.digest) == (weights.paths, weights.digest)
    assert moves.all == []
    shards[2].write_bytes(shards[2].read_bytes()[:-100])
    with pytest.raises(BrokenWeights, match="shard 00003-of-00003") as caught:
        await room.prepare(str(shards[0]), Moves())
    assert caught.value.retry_after_s is not None  # a file that is put back needs no command


async def test_a_local_file_that_is_not_there(rooms: RoomMaker, tmp_path: Path) -> None:
    with pytest.raises(BadReference, match="is missing"):
        await rooms.make().prepare(str(tmp_path / "none.gguf"), Moves())


async def test_one_name_and_one_spelling(rooms: RoomMaker) -> None:
    room = rooms.make()
    assert room.identify(f"{REPO}@main:q4_k_m") == ("model-Q4_K_M", REF)
    assert room.identify("builtin") == ("builtin", "builtin")
    name, ref = room.identify("qwen3-8b-q4_k_m")
    assert name == "Qwen3-8B-Q4_K_M"
    assert ref.startswith("unsloth/Qwen3-8B-GGUF/")


# -- budget ---------------------------------------------------------------------------------------


async def test_what_was_used_longest_ago_makes_room(
    rooms: RoomMaker, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_set(tmp_path / "other", 1_500_000, stem="other-Q8_0")
    hub.add("acme/other-GGUF", {path.name: path for path in other})
    room = rooms.make(budget="2 MB", reserve="0")
    first = await room.prepare(REF, Moves())
    with pytest.raises(NoSpace, match="budget"):  # alone in the world, it is the last copy
        await room.prepare("acme/other-GGUF:Q8_0", Moves())
    assert all(path.exists() for path in first.paths)
    monkeypatch.setattr(room._neighbours, "hold", lambda _: True)
    second = await room.prepare("acme/other-GGUF:Q8_0", Moves())
    assert not any(path.exists() for path in first.paths)
    assert second.paths[0].read_bytes() == other[0].read_bytes()


async def test_the_disk_keeps_its_reserve(rooms: RoomMaker) -> None:
    with pytest.raises(NoSpace, match=r"cache\.reserve"):
        await rooms.make(reserve="100%").prepare(REF, Moves())


def needed(shards: list[Path], manifest: Manifest) -> NeededWeights:
    """What a host would say of the first of `shards`."""
    first = manifest.shards[0]
    ref = f"{REPO}@{manifest.revision}:Q4_K_M"
    return NeededWeights(ref, ((first.sha256, first.size),), first.size, first.size, 1, None)


async def test_shards_for_a_split_make_nothing_go_and_are_not_of_the_hub(
    rooms: RoomMaker, hub: LocalHub, shards: list[Path]
) -> None:
    room = rooms.make()
    weights = await room.prepare(REF, Moves())
    manifest = room.preparer.known(parse_hub_ref(REF))
    assert manifest is not None
    wanted = needed(shards, manifest)
    assert await room.missing_bytes(wanted) == 0
    weights.paths[0].resolve().unlink()
    assert await room.missing_bytes(wanted) == wanted.bytes
    used = (await room.usage()).used_bytes
    small = rooms.make(budget=str(used + wanted.bytes - 1))
    with pytest.raises(NoSpace, match="budget leaves 1 B too little"):
        await small.fetch_shards(manifest.digest, wanted, wanted.bytes, lambda _: None)
    assert all(path.exists() for path in weights.paths[1:])
    hub.forget_requests()
    told: list[News] = []
    enough = rooms.make(budget=str(used + wanted.bytes))
    with pytest.raises(HubRefused, match="nobody can bring what is missing"):
        await enough.fetch_shards(manifest.digest, wanted, wanted.bytes, told.append)
    assert isinstance(told[-1], FetchFailed)
    assert hub.sent() == 0
    assert enough.preparer.busy_with == {}
    # Too little disk for shards and their tensors: it says so before anything comes.
    with pytest.raises(NoSpace, match="are to be fetched"):
        await enough.fetch_shards(
            manifest.digest, replace(wanted, bytes=1 << 52), wanted.bytes, told.append
        )
