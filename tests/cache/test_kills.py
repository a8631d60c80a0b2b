"""kill -9 at any moment of a pull or a repair: the next run finds its way, and nothing is lost.

Moments are spread over the work by what has been done (bytes sent, not seconds, so that a slow
machine is killed in the same places), each with a little chance of its own. Removals are killed in
test_killed_removals.py.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from meshd.cache.chunks import CHUNK_BYTES
from tests.cache.pulls import PrivateCache, kill
from tests.cache.sets import write_set
from tests.hub import LocalHub, Slow

pytestmark = pytest.mark.slow

REPO = "owner/name"
SHARD_BYTES = 12_000_000
WORKERS = 2
MOMENTS = 5
"""Of each kind of work."""
LAST_SHARE = 0.85
"""Of the work; behind that it could be done before it is killed, which the last moment allows."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_set(tmp_path_factory.mktemp("set"), *[SHARD_BYTES] * 4)


@pytest.fixture
def hub(shards: list[Path]) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {path.name: path for path in shards})
        yield hub


@pytest.fixture
def cache(tmp_path: Path, hub: LocalHub) -> PrivateCache:
    return PrivateCache(tmp_path / "home", hub)


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_pull(hub: LocalHub, cache: PrivateCache, shards: list[Path], moment: int) -> None:
    total = sum(path.stat().st_size for path in shards)
    hub.faults.add("*", Slow(bytes_per_s=12e6), times=None)
    child = cache.start(REPO, workers=WORKERS)
    _kill_at(hub, child, moment, total)
    hub.wait_idle()
    sent = hub.sent()
    _consistent(cache)

    hub.faults.clear()
    hub.forget_requests()
    cache.fetch(REPO, workers=WORKERS)
    _whole(cache, shards)
    # Only what was on its way or not yet noted as a whole chunk is fetched again.
    assert hub.sent() <= total - sent + WORKERS * 4 * CHUNK_BYTES
    assert "All checksums match" in cache.hf("cache", "verify", REPO)


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_repair(
    hub: LocalHub, cache: PrivateCache, shards: list[Path], moment: int
) -> None:
    cache.fetch(REPO)
    hurt = shards[1:3]
    for shard in hurt:
        _flip(_blob(cache, shard), SHARD_BYTES // 2)
    hub.wait_idle()
    hub.forget_requests()
    hub.faults.add("*", Slow(bytes_per_s=2e6), times=None)
    child = cache.start(REPO, damaged=tuple(_sha256(shard) for shard in hurt), workers=WORKERS)
    _kill_at(hub, child, moment, len(hurt) * CHUNK_BYTES)
    _consistent(cache, damaged=hurt)
    for shard in (shards[0], shards[3]):
        assert _sha256(_blob(cache, shard)) == _sha256(shard)

    hub.faults.clear()
    still = tuple(
        blob.name for shard in hurt if (blob := _blob(cache, shard)).exists() and not _right(blob)
    )
    cache.fetch(REPO, damaged=still, workers=WORKERS)
    _whole(cache, shards)
    # What was good in the damaged files was never fetched, nor lost.
    assert hub.sent() <= 2 * len(hurt) * CHUNK_BYTES


def _kill_at(hub: LocalHub, child: subprocess.Popen[bytes], moment: int, total: int) -> None:
    """At some byte of that fifth of the work; in the last one also after the last byte."""
    chance = random.Random(f"{total} {moment}")
    share = (moment + chance.random()) / (MOMENTS - 1)
    if moment < MOMENTS - 1:
        share = min(share, LAST_SHARE)
    hub.wait_sent("*", min(total, round(share * total)))
    try:
        child.wait(timeout=chance.random() * 0.05)
    except subprocess.TimeoutExpired:
        kill(child)
    else:
        assert moment == MOMENTS - 1, "it was done before it could be killed"
        assert child.stdout is not None
        child.stdout.close()


def _consistent(cache: PrivateCache, damaged: Sequence[Path] = ()) -> None:
    """What has a blob's name has its content, what is linked is there, and nobody holds a lock."""
    known_bad = {_sha256(shard) for shard in damaged}
    repo = cache.places.repo(REPO)
    for blob in (repo / "blobs").glob("*"):
        if "." not in blob.name and blob.name not in known_bad:
            assert _right(blob)
    for link in (repo / "snapshots").rglob("*.gguf"):
        if link.readlink().name not in known_bad:
            assert link.exists()
    assert cache.held_locks() == []


def _whole(cache: PrivateCache, shards: list[Path]) -> None:
    """Every file of the set is linked and byte-identical; no piece of the work is left over."""
    repo = cache.places.repo(REPO)
    commit = cache.places.branch(REPO, "main").read_text()
    for shard in shards:
        assert _sha256(cache.places.snapshot(REPO, commit, shard.name)) == _sha256(shard)
    assert sorted(path.name for path in (repo / "blobs").iterdir()) == sorted(
        _sha256(shard) for shard in shards
    )
    assert cache.held_locks() == []


def _blob(cache: PrivateCache, shard: Path) -> Path:
    return cache.places.blob(REPO, _sha256(shard))


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def _right(blob: Path) -> bool:
    return _sha256(blob) == blob.name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
