"""What is found in a cache: sets, their sizes and uses, leftovers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from meshd.cache.commands import SetRow
from meshd.cache.inventory import Inventory, StoredSet, listing, take_inventory
from meshd.cache.leftovers import SETTLED_AFTER_S, STALE_AFTER_S
from meshd.cache.locks import try_lock
from meshd.cache.references import HubRef
from meshd.cache.removal import Remover
from meshd.cache.usage import read_usage
from meshd.cache.verdict import Fault
from tests.cache.sets import write_set
from tests.cache.shelves import Shelves, commit, sha256
from tests.models import small_model

REPO = "owner/some-GGUF"
DAY_S = 86_400.0


@pytest.fixture
def shelves(tmp_path: Path) -> Shelves:
    return Shelves(tmp_path)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model in one file."""
    path = small_model(tmp_path_factory.mktemp("one") / "some-Q8_0.gguf")
    return {path.name: path.read_bytes()}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model in three files."""
    paths = write_set(tmp_path_factory.mktemp("three"), 400, 400, 400, stem="some-Q4_K_M")
    return {path.name: path.read_bytes() for path in paths}


def take(shelves: Shelves, *, later_s: float = 0.0) -> Inventory:
    return take_inventory(shelves.store, shelves.uses, now=time.time() + later_s)


def only(shelves: Shelves) -> StoredSet:
    (found,) = take(shelves).sets
    return found


# -- sets -----------------------------------------------------------------------------------------


def test_nothing(shelves: Shelves) -> None:
    assert take(shelves) == Inventory((), ())


def test_a_set_with_a_manifest(shelves: Shelves, three: dict[str, bytes]) -> None:
    shelves.add(REPO, three)
    manifest = shelves.know(HubRef(REPO, quant="Q4_K_M"), three)
    found = only(shelves)
    total = sum(map(len, three.values()))
    assert (found.repo, found.digest, found.manifest) == (REPO, manifest.digest, manifest)
    assert (found.ref, found.model) == (f"{REPO}:Q4_K_M", "some-Q4_K_M")
    assert found.verdict.needs_hash
    assert found.size_bytes == sum(found.blobs.values()) == total
    assert {link.blob for link in found.links} == {sha256(content) for content in three.values()}
    for content in three.values():
        shelves.verify(REPO, content)
    assert only(shelves).verdict.ok


def test_a_missing_shard_is_seen_with_and_without_a_manifest(
    shelves: Shelves, three: dict[str, bytes]
) -> None:
    there = dict(list(three.items())[:2])
    shelves.add(REPO, there)
    for known in (False, True):
        if known:
            shelves.know(HubRef(REPO, quant="Q4_K_M"), three)
        found = only(shelves)
        assert found.verdict.worst.fault is Fault.MISSING
        assert "shard 00003-of-00003" in found.verdict.worst.words
        assert sum(found.blobs.values()) == sum(map(len, there.values()))
        assert not found.holding().intact
    assert only(shelves).size_bytes == sum(map(len, three.values()))


def test_what_is_only_known_is_not_here(shelves: Shelves, one: dict[str, bytes]) -> None:
    shelves.add(REPO, {"README.md": b"read"})
    shelves.know(HubRef(REPO, quant="Q8_0"), one)
    assert take(shelves).sets == ()


def test_a_set_that_has_only_begun_is_here(shelves: Shelves, one: dict[str, bytes]) -> None:
    manifest = shelves.know(HubRef(REPO, quant="Q8_0"), one)
    partial = shelves.places.partial(REPO, manifest.shards[0].sha256)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"some")
    inventory = take(shelves)
    (found,) = inventory.sets
    assert found.verdict.worst.fault is Fault.MISSING
    assert found.blobs == {str(partial): 4}, "what a pull goes on with is a part of it"
    assert found.last_used_at == partial.stat().st_mtime
    assert inventory.leftovers == ()
    stale = take(shelves, later_s=STALE_AFTER_S + DAY_S)
    assert stale.sets[0].blobs == {}
    assert [item.path for item in stale.leftovers] == [str(partial)]
    removed = Remover(shelves.store, shelves.uses).remove(found.removal())
    assert removed.freed_bytes == 4
    assert take(shelves) == Inventory((), ())


def test_files_of_other_tools_are_sets_by_their_names(
    shelves: Shelves, one: dict[str, bytes], three: dict[str, bytes]
) -> None:
    shelves.add(REPO, {**one, **{f"Q4/{name}": content for name, content in three.items()}})
    shelves.add(REPO, {"README.md": b"read", "model.safetensors": b"tensors"})
    small, split = sorted(take(shelves).sets, key=lambda found: len(found.links))
    assert small.ref == f"{REPO}/some-Q8_0.gguf"
    assert small.digest == f"sha256:{sha256(one['some-Q8_0.gguf'])}"
    assert split.ref == f"{REPO}/Q4/some-Q4_K_M-00001-of-00003.gguf"
    assert [link.path for link in split.links] == [f"Q4/{name}" for name in three]
    assert small.manifest is split.manifest is None
    # The name of the blob says which sha256 it should have.
    assert small.verdict.needs_hash
    shelves.verify(REPO, one["some-Q8_0.gguf"])
    assert {found.verdict.ok for found in take(shelves).sets} == {True, False}


def test_revisions_with_the_same_files_are_one_set(shelves: Shelves, one: dict[str, bytes]) -> None:
    shelves.add(REPO, one, revision=1, branch="old")
    shelves.add(REPO, one, revision=2)
    found = only(shelves)
    assert [ref.revision for ref in found.refs] == [None, commit(1)]
    assert {link.revision for link in found.links} == {commit(1), commit(2)}
    shelves.know(HubRef(REPO, quant="Q8_0"), one, revision=2)
    assert only(shelves).ref == f"{REPO}:Q8_0"
    assert len(only(shelves).links) == 2
    Remover(shelves.store, shelves.uses).remove(only(shelves).removal())
    assert shelves.tree() == set()


def test_hidden_files_foreign_names_and_datasets_are_no_sets(
    shelves: Shelves, one: dict[str, bytes]
) -> None:
    content = one["some-Q8_0.gguf"]
    shelves.add(REPO, {".some-Q8_0.gguf": content, "a-00009-of-00003.gguf": content})
    (shelves.places.hub / "datasets--owner--data" / "blobs").mkdir(parents=True)
    (shelves.places.hub / "models--alone").mkdir()
    (shelves.places.hub / "models--file--x").write_text("a file")
    stray = shelves.places.repo(REPO) / "snapshots" / "main" / "b.gguf"
    stray.parent.mkdir()
    stray.write_bytes(content)
    assert take(shelves).sets == ()


def test_a_copied_file(shelves: Shelves, one: dict[str, bytes]) -> None:
    place = shelves.places.snapshot(REPO, commit(1), "some-Q8_0.gguf")
    place.parent.mkdir(parents=True)
    place.write_bytes(one["some-Q8_0.gguf"])
    found = only(shelves)
    assert found.digest == f"{REPO}@{commit(1)}/some-Q8_0.gguf"
    assert found.blobs == {str(place): len(one["some-Q8_0.gguf"])}
    (row,) = rows(shelves)
    assert row.digest is None


def test_shared_blobs_count_where_they_lie(shelves: Shelves, one: dict[str, bytes]) -> None:
    content = one["some-Q8_0.gguf"]
    shelves.add(REPO, one)
    payload = shelves.places.hub / "blobs" / "ab" / ("ab" + "1" * 62)
    payload.parent.mkdir(parents=True)
    blob = shelves.places.blob(REPO, sha256(content))
    blob.rename(payload)
    blob.symlink_to(os.path.relpath(payload, blob.parent))
    assert only(shelves).blobs == {str(payload): len(content)}
    assert read_usage(shelves.places.hub).used_bytes < len(content) + 200, "counted once"


# -- finding --------------------------------------------------------------------------------------


def test_finding_by_reference(
    shelves: Shelves, one: dict[str, bytes], three: dict[str, bytes]
) -> None:
    shelves.add(REPO, {**one, **three})
    shelves.know(HubRef(REPO, quant="Q8_0"), one)
    inventory = take(shelves)

    def found(**parts: str) -> str | None:
        stored = inventory.find(HubRef(REPO, **parts))
        return None if stored is None else stored.model

    assert found(quant="Q8_0") == "some-Q8_0"
    assert found(quant="Q4_K_M") == "some-Q4_K_M", "although no manifest tells of it"
    assert found(path="some-Q4_K_M-00001-of-00003.gguf") == "some-Q4_K_M"
    assert found(path="some-Q8_0.gguf") == "some-Q8_0"
    assert found(path="some-Q8_0.gguf", revision=commit(1)) == "some-Q8_0"
    assert found(path="some-Q8_0.gguf", revision="other") is None
    assert found(quant="Q2_K") is None
    assert found() is None, "it may be either"
    assert inventory.find(HubRef("owner/none")) is None


# -- uses -----------------------------------------------------------------------------------------


def test_last_use(shelves: Shelves, one: dict[str, bytes]) -> None:
    shelves.add(REPO, one)
    link = shelves.places.snapshot(REPO, commit(1), "some-Q8_0.gguf")
    os.utime(link, (1000.0, 1000.0))
    os.utime(link, (900.0, 900.0), follow_symlinks=False)
    found = only(shelves)
    assert found.last_used_at == 1000.0, "when it came"
    shelves.uses.used(found.digest, 2000.0)
    shelves.uses.used(found.digest, 3000.0)
    assert only(shelves).last_used_at == 3000.0
    shelves.uses.forget(found.digest)
    shelves.uses.forget(found.digest)
    assert only(shelves).last_used_at == 1000.0


# -- leftovers ------------------------------------------------------------------------------------


def left(shelves: Shelves, *, later_s: float = 0.0) -> dict[str, tuple[str, int, bool]]:
    """By name: kind, bytes, whether it may go."""
    return {
        Path(item.path).name: (item.kind.value, item.size_bytes, item.useless)
        for item in take(shelves, later_s=later_s).leftovers
    }


def test_partials(shelves: Shelves) -> None:
    partial = shelves.places.partial(REPO, "ab" * 32)
    partial.parent.mkdir(parents=True)
    with partial.open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 8192)
        os.fsync(file)
    ((kind, size, useless),) = left(shelves).values()
    assert (kind, useless) == ("partial", False)
    assert 8192 <= size < 1 << 20, "holes take nothing"
    assert read_usage(shelves.places.hub).used_bytes < 1 << 20
    ((_, _, useless),) = left(shelves, later_s=STALE_AFTER_S + DAY_S).values()
    assert useless
    with try_lock(shelves.places.lock(REPO, "ab" * 32)):
        ((_, _, useless),) = left(shelves, later_s=STALE_AFTER_S + DAY_S).values()
    assert not useless, "somebody downloads it"


def test_damaged_files_stay_until_their_replacement_is_verified(
    shelves: Shelves, one: dict[str, bytes]
) -> None:
    content = one["some-Q8_0.gguf"]
    shelves.add(REPO, one)
    blob = shelves.places.blob(REPO, sha256(content))
    damaged = blob.with_name(f"{blob.name}.damaged")
    damaged.write_bytes(b"bad!")
    far = 365 * DAY_S
    assert left(shelves, later_s=far) == {damaged.name: ("damaged", 4, False)}
    shelves.verify(REPO, content)
    assert left(shelves) == {damaged.name: ("damaged", 4, True)}
    blob.unlink()
    assert left(shelves, later_s=far) == {damaged.name: ("damaged", 4, False)}


def test_orphans(shelves: Shelves, one: dict[str, bytes]) -> None:
    shelves.add(REPO, one)
    orphan = shelves.places.blob(REPO, sha256(b"none"))
    orphan.write_bytes(b"none")
    later = SETTLED_AFTER_S + 60
    assert left(shelves) == {orphan.name: ("orphan", 4, False)}
    assert left(shelves, later_s=later) == {orphan.name: ("orphan", 4, True)}
    with try_lock(shelves.places.lock(REPO, orphan.name)):
        assert left(shelves, later_s=later) == {orphan.name: ("orphan", 4, False)}


def test_a_blob_of_a_known_set_is_no_orphan(shelves: Shelves, three: dict[str, bytes]) -> None:
    """A kill between the blob and its link leaves what the next pull needs."""
    shelves.add(REPO, three)
    shelves.know(HubRef(REPO, quant="Q4_K_M"), three)
    shelves.places.snapshot(REPO, commit(1), next(iter(three))).unlink()
    assert left(shelves, later_s=365 * DAY_S) == {}
    assert only(shelves).verdict.worst.fault is Fault.MISSING
    assert sum(only(shelves).blobs.values()) == sum(map(len, three.values()))


# -- the answer to ls -----------------------------------------------------------------------------


def rows(shelves: Shelves) -> list[SetRow]:
    inventory = take(shelves)
    holdings = [found.holding(pinned=True, elsewhere=False) for found in inventory.sets]
    usage = read_usage(shelves.places.hub, budget="50%")
    answer = listing(inventory, holdings, usage)
    assert answer.used_bytes == usage.used_bytes
    return list(answer.sets)


def test_the_listing(shelves: Shelves, one: dict[str, bytes], three: dict[str, bytes]) -> None:
    there = dict(list(three.items())[:2])
    shelves.add(REPO, {**one, **there})
    shelves.know(HubRef(REPO, quant="Q8_0"), one)
    shelves.know(HubRef(REPO, quant="Q4_K_M"), three)
    shelves.verify(REPO, one["some-Q8_0.gguf"])
    split, small = (row.model_dump() for row in rows(shelves))
    assert (small["state"], small["problem"], small["files"]) == ("ok", None, 1)
    assert small["refs"][0] == f"{REPO}:Q8_0"
    assert small["own_bytes"] == small["size_bytes"] == small["disk_bytes"]
    assert (small["pinned"], small["in_use"], small["elsewhere"]) == (True, False, False)
    assert split["state"] == "missing"
    assert "shard 00003-of-00003" in split["problem"]
    assert split["size_bytes"] == sum(map(len, three.values()))
    assert split["disk_bytes"] == sum(map(len, there.values()))


def test_the_budget_of_the_disk(tmp_path: Path) -> None:
    assert read_usage(tmp_path).budget_bytes is None
    assert read_usage(tmp_path, budget="5GB").budget_bytes == 5_000_000_000
    half = read_usage(tmp_path, budget="50%").budget_bytes
    disk = os.statvfs(tmp_path)
    assert half == disk.f_blocks * disk.f_frsize // 2


def test_a_file_with_several_names_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert read_usage(tmp_path).used_bytes == 100
