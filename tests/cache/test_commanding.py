"""The commands of `meshd cache`, as the daemon and the CLI without one carry them out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.commanding import CacheCommander
from meshd.errors import InvalidRequest, NotInCache, WeightsInUse
from tests.cache.rooms import REPO, Moves, RoomMaker, by_kind, told
from tests.cache.sets import write_set
from tests.hub import LocalHub, Slow

REF = f"{REPO}:Q4_K_M"

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def shards(hub: LocalHub, tmp_path: Path) -> list[Path]:
    paths = write_set(tmp_path / "set", 300_000, 200_000, stem="model-Q4_K_M")
    hub.add(REPO, {path.name: path for path in paths})
    return paths


@pytest.fixture
def rooms(
    hub: LocalHub, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RoomMaker]:
    maker = RoomMaker(tmp_path / "home", monkeypatch, hub)
    yield maker
    maker.close()


async def test_pull_tells_its_story(rooms: RoomMaker, shards: list[Path]) -> None:
    events = await told(rooms.commands().pull(REF))
    (resolved,) = by_kind(events, "resolved")
    assert [s["path"] for s in resolved["manifest"]["shards"]] == [p.name for p in shards]
    assert events[-1]["t"] == "done"
    assert events[-1]["fetched_bytes"] == sum(p.stat().st_size for p in shards)
    again = await told(rooms.commands().pull(REF))
    assert again[-1] == {"t": "done", "fetched_bytes": 0, "sources": {}}


async def test_pull_follows_the_branch(rooms: RoomMaker, hub: LocalHub, tmp_path: Path) -> None:
    commands = rooms.commands()
    await told(commands.pull(REF))
    newer = write_set(tmp_path / "newer", 350_000, stem="model-Q4_K_M", seed=9)
    commit = hub.add(REPO, {path.name: path for path in newer})
    events = await told(commands.pull(REF))
    (resolved,) = by_kind(events, "resolved")
    assert resolved["manifest"]["revision"] == commit


async def test_pull_without_a_hub_is_content_with_what_is_here(rooms: RoomMaker) -> None:
    commands = rooms.commands()
    await told(commands.pull(REF))
    rooms.use_none()
    assert (await told(commands.pull(REF)))[-1]["t"] == "done"


async def test_a_pull_that_fails_says_so_last(rooms: RoomMaker) -> None:
    events = await told(rooms.commands().pull("acme/none-GGUF:Q4_K_M"))
    assert events[-1]["t"] == "failed"
    assert events[-1]["code"] == "hub_refused"
    assert events[-1]["permanent"]
    assert len(by_kind(events, "failed")) == 1


async def test_leaving_a_pull_ends_its_child(
    rooms: RoomMaker, hub: LocalHub, tmp_path: Path
) -> None:
    big = write_set(tmp_path / "big", 4 * CHUNK_BYTES, stem="big-Q8_0")
    hub.add("acme/big-GGUF", {path.name: path for path in big})
    hub.faults.add("big*", Slow(2_000_000), times=1000)
    commands = rooms.commands()
    events = commands.pull("acme/big-GGUF:Q8_0")
    async for event in events:
        if event["t"] == "progress" and event["done_bytes"]:
            break
    await events.aclose()
    assert [t for t in asyncio.all_tasks() if "cache command" in t.get_name()] == []
    hub.wait_idle()  # the child's connections are closed
    hub.faults.clear()
    assert (await told(commands.pull("acme/big-GGUF:Q8_0")))[-1]["t"] == "done"


async def test_verify_finds_what_the_ledger_does_not_know(
    rooms: RoomMaker, shards: list[Path]
) -> None:
    room = rooms.make()
    weights = await room.prepare(REF, Moves())
    commands = rooms.commands()
    events = await told(commands.verify(REF))
    assert events[-1] == {
        "t": "verified",
        "files": 2,
        "wrong": 0,
        "hashed_bytes": sum(p.stat().st_size for p in shards),
    }
    blob = weights.paths[1].resolve()
    status = blob.stat()
    content = bytearray(blob.read_bytes())
    content[150_000] ^= 1
    blob.write_bytes(content)
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk that forgets would
    assert (await room.inventory()).sets[0].verdict.ok
    events = await told(commands.verify(None))
    (good, bad) = by_kind(events, "file")
    assert (good["fault"], good["advice"]) == ("ok", None)
    assert (bad["fault"], bad["number"], bad["advice"]) == (
        "corrupt",
        2,
        f"meshd cache repair {REF}",
    )
    assert bad["expected"].startswith("sha256 ")
    assert events[-1]["wrong"] == 1
    events = await told(commands.repair(REF))
    assert events[-1]["t"] == "done"
    assert blob.read_bytes() == shards[1].read_bytes()


async def test_verify_local_files_and_the_built_in_model(
    rooms: RoomMaker, shards: list[Path]
) -> None:
    commands = rooms.commands()
    assert (await told(commands.verify(str(shards[0]))))[-1]["wrong"] == 0
    assert (await told(commands.verify("builtin")))[-1] | {"hashed_bytes": 0} == {
        "t": "verified",
        "files": 1,
        "wrong": 0,
        "hashed_bytes": 0,
    }
    with pytest.raises(NotInCache):
        await told(commands.verify(REF))


async def test_repair_and_pull_are_for_what_a_hub_has(rooms: RoomMaker, shards: list[Path]) -> None:
    commands = rooms.commands()
    with pytest.raises(InvalidRequest):
        commands.pull("builtin")
    with pytest.raises(InvalidRequest):
        commands.repair(str(shards[0]))


async def test_rm_takes_everything_but_what_is_in_use(rooms: RoomMaker) -> None:
    used: set[str] = set()
    room = rooms.make(in_use=lambda: frozenset(used))
    weights = await room.prepare(REF, Moves())
    commands = CacheCommander(room)
    used.add(str(weights.first_shard))
    with pytest.raises(WeightsInUse, match="an engine runs on it"):
        await commands.rm(REF, force=True)
    used.clear()
    report = await commands.rm(REF, force=False)
    assert report["freed_bytes"] == weights.total_bytes
    assert (await commands.ls())["sets"] == []
    with pytest.raises(NotInCache):
        await commands.rm(REF, force=False)


async def test_ls_and_prune(rooms: RoomMaker, shards: list[Path]) -> None:
    commands = rooms.commands(budget="1 kB")
    await told(rooms.commands().pull(REF))
    (row,) = (await commands.ls())["sets"]
    assert (row["model"], row["state"], row["refs"][0]) == ("model-Q4_K_M", "ok", REF)
    plan = await commands.prune(dry_run=True, force=True)
    assert [r["what"] for r in plan["remove"]] == ["model-Q4_K_M"]
    assert len((await commands.ls())["sets"]) == 1
    kept = await commands.prune(dry_run=False, force=False)
    assert (kept["remove"], kept["still_over_bytes"] > 0) == ([], True)
    done = await commands.prune(dry_run=False, force=True)
    assert done["freed_bytes"] == sum(p.stat().st_size for p in shards)
    assert (await commands.ls())["sets"] == []
