"""kill -9 at any moment of `meshd cache rm` and `meshd cache prune`.

What was to stay stays, byte for byte; what was to go is gone after the next command; nothing is
left that neither meshd nor `hf` knows what to do with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.pulls import PrivateCache
from tests.cache.sets import write_set
from tests.hub import LocalHub

pytestmark = pytest.mark.slow

STAYS, GOES = "owner/stays", "owner/goes"
ROOM_FOR_ONE = "4MB"
MOMENTS = 5
"""Of each command."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    directory = tmp_path_factory.mktemp("sets")
    return {
        repo: write_set(directory / repo, *[1_000_000] * 3, seed=seed)
        for seed, repo in enumerate((STAYS, GOES))
    }


@pytest.fixture
def cache(tmp_path: Path, sets: dict[str, list[Path]]) -> Iterator[PrivateCache]:
    with LocalHub() as hub:
        for repo, shards in sets.items():
            hub.add(repo, {path.name: path for path in shards})
        cache = PrivateCache(tmp_path / "home", hub)
        cache.environment["MESHD_CACHE__PINS"] = STAYS
        cache.meshd("cache", "pull", STAYS)
        cache.meshd("cache", "pull", GOES)
        yield cache


@pytest.mark.parametrize("command", [("rm", GOES), ("prune",)], ids=["rm", "prune"])
def test_killed(cache: PrivateCache, sets: dict[str, list[Path]], command: tuple[str, ...]) -> None:
    words = ("cache", *command, "--force")
    cache.environment["MESHD_CACHE__BUDGET"] = ROOM_FOR_ONE
    total = cache.doomed(0, *words)
    _only_what_stays(cache, sets)
    chance = random.Random(total)
    for moment in range(MOMENTS):
        del cache.environment["MESHD_CACHE__BUDGET"]
        cache.meshd("cache", "pull", GOES)
        cache.environment["MESHD_CACHE__BUDGET"] = ROOM_FOR_ONE
        at = 1 + (moment * total + chance.randrange(total)) // MOMENTS
        cache.doomed(at, *words)
        _whole(cache, sets, STAYS)
        assert cache.held_locks() == []
        cache.meshd("cache", "prune", "--force")
        _only_what_stays(cache, sets)


def _only_what_stays(cache: PrivateCache, sets: dict[str, list[Path]]) -> None:
    _whole(cache, sets, STAYS)
    assert not cache.places.repo(GOES).exists()
    listed = json.loads(cache.meshd("cache", "ls", "--json"))
    assert [row["refs"][0] for row in listed["sets"]] == [STAYS]
    assert listed["leftovers"] == []
    assert not list((cache.places.state / "removals").glob("*.json"))


def _whole(cache: PrivateCache, sets: dict[str, list[Path]], repo: str) -> None:
    commit = cache.places.branch(repo, "main").read_text()
    for shard in sets[repo]:
        there = cache.places.snapshot(repo, commit, shard.name)
        assert there.read_bytes() == shard.read_bytes()
