"""A single flipped byte anywhere in a verified set: seen by verifying, mended by one chunk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cache.chunks import CHUNK_BYTES, chunk_span
from meshd.cache.hashes import ChunkHashes
from meshd.cache.hashing import verify_files
from meshd.cache.ledger import Ledger
from meshd.cache.transfer.words import Resolved
from meshd.cache.verdict import Fault, SetVerdict
from meshd.cache.weights import look_at
from tests.cache.pulls import PrivateCache
from tests.cache.sets import write_set
from tests.hub import LocalHub

REPO = "owner/name"
SETS, FLIPS_EACH = 5, 10


class VerifiedSet:
    """A set that was pulled, and is looked at as before every load."""

    def __init__(self, cache: PrivateCache) -> None:
        self.cache = cache
        (self.manifest,) = (news.manifest for news in cache.run(REPO) if isinstance(news, Resolved))
        self.ledger = Ledger(cache.places.ledger)

    def look(self) -> SetVerdict:
        return look_at(self.manifest, self.cache.places, self.ledger)

    def verify(self) -> SetVerdict:
        """What `meshd cache verify` does: hash what was not hashed since it changed."""
        verify_files(self.look().unverified, self.ledger, ChunkHashes(self.cache.places))
        return self.look()

    def blob(self, number: int) -> Path:
        return self.cache.places.blob(REPO, self.manifest.shards[number].sha256)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SETS))
def test_flips(hub: LocalHub, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    sizes = [4 * chance.randrange(100_000, 3_000_000) for _ in range(3)]
    shards = write_set(tmp_path / "set", *sizes, seed=seed)
    hub.add(REPO, {path.name: path for path in shards})
    one = VerifiedSet(PrivateCache(tmp_path / "home", hub))
    assert one.look().ok  # nothing is hashed again after a pull
    for _ in range(FLIPS_EACH):
        number = chance.randrange(len(shards))
        at = chance.randrange(shards[number].stat().st_size)
        before = _flip(one.blob(number), at, chance.randrange(1, 256))
        assert not one.look().ok, f"byte {at} of {shards[number]}"
        _detected(one, number)
        _mended(one, hub, number, at)
        assert one.blob(number).read_bytes()[at] == before


def _detected(one: VerifiedSet, number: int) -> None:
    verdict = one.verify()
    wrong = [file for file in verdict.files if file.fault is not Fault.OK]
    # A byte of the header can make a file look foreign, or promise more than there is.
    assert [file.number for file in wrong] == [number + 1]
    assert wrong[0].fault in (Fault.CORRUPT, Fault.FOREIGN)


def _mended(one: VerifiedSet, hub: LocalHub, number: int, at: int) -> None:
    shard = one.manifest.shards[number]
    _, length = chunk_span(at // CHUNK_BYTES, shard.size)
    hub.forget_requests()
    done = one.cache.fetch(REPO, manifest=one.manifest, damaged=(shard.sha256,))
    hub.wait_idle()
    assert hub.sent() == length
    assert done.fetched_bytes == length
    assert one.look().ok


def _flip(path: Path, at: int, mask: int) -> int:
    """Returns what was there."""
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(1)[0]
        file.seek(at)
        file.write(bytes([before ^ mask]))
    return before
