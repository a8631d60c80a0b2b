"""Whole fetches from the hub, and what is on disk at every kind of end."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from pathlib import Path

import pytest

from meshd.cache import landing
from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.hashes import ChunkHashes
from meshd.cache.ledger import Ledger, facts_of
from meshd.cache.manifest import Manifest
from meshd.cache.manifests import ManifestStore
from meshd.cache.references import parse_hub_ref
from meshd.cache.transfer import pace
from meshd.cache.transfer.words import Progress, Resolved
from tests.cache.transfer.world import (
    NAMES,
    REPO,
    carry_out,
    chunk_hashes,
    content,
    done,
    failed,
    flipped,
    landed,
    manifest_of,
    order_for,
    places_in,
    said,
)
from tests.conftest import wait_until
from tests.hub import Flip, LocalHub, Reset, Slow, Status

FILES = {NAMES[0]: content(1, 3 * CHUNK_BYTES + 1), NAMES[1]: content(2, 2 * CHUNK_BYTES)}
TOTAL = sum(len(data) for data in FILES.values())


@pytest.fixture
def manifest(hub: LocalHub) -> Manifest:
    return manifest_of(FILES, hub.add(REPO, FILES))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_DELAY_S", 0.02)


def blob(home: Path, manifest: Manifest, number: int) -> Path:
    return places_in(home).blob(REPO, manifest.shards[number].sha256)


def check(home: Path, manifest: Manifest) -> None:
    """Everything is as if it had always been there."""
    places = places_in(home)
    for shard in manifest.files:
        assert landed(home, manifest, shard.path) == FILES[shard.path]
        path = places.snapshot(REPO, manifest.revision, shard.path)
        assert path.readlink() == Path("../../blobs", shard.sha256)
        assert Ledger(places.ledger).known(facts_of(path)) == shard.sha256
        known = ChunkHashes(places).load(shard.sha256, shard.size)
        assert known == chunk_hashes(FILES[shard.path])
        assert not places.journal(shard.sha256).exists()
    names = {path.name for path in places.blob(REPO, "x").parent.iterdir()}
    assert names == {shard.sha256 for shard in manifest.files}
    assert places.branch(REPO, "main").read_text() == manifest.revision


def test_a_reference_becomes_a_set_on_disk(hub: LocalHub, tmp_path: Path) -> None:
    manifest = manifest_of(FILES, hub.add(REPO, FILES))
    news = carry_out(order_for(tmp_path, None))
    assert done(news).fetched_bytes == TOTAL
    assert done(news).sources == {"hub": TOTAL}
    assert news[0] == Resolved(manifest=manifest)
    check(tmp_path, manifest)
    store = ManifestStore(places_in(tmp_path).manifests)
    assert store.find(parse_hub_ref(REPO)) == manifest


def test_resolving_only_fetches_nothing(hub: LocalHub, tmp_path: Path) -> None:
    hub.add(REPO, FILES)
    assert done(carry_out(order_for(tmp_path, None, resolve_only=True))).fetched_bytes == 0
    assert not hub.content_requests()


def test_what_is_there_is_not_fetched_again(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    carry_out(order_for(tmp_path, manifest))
    hub.forget_requests()
    assert done(carry_out(order_for(tmp_path, manifest))).fetched_bytes == 0
    assert not hub.requests
    check(tmp_path, manifest)


def test_a_blob_without_a_word_in_the_ledger_is_hashed_and_linked(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    path = blob(tmp_path, manifest, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(FILES[NAMES[0]])
    assert done(carry_out(order_for(tmp_path, manifest))).fetched_bytes == len(FILES[NAMES[1]])
    check(tmp_path, manifest)


def test_other_tools_agree(hub: LocalHub, tmp_path: Path) -> None:
    hub.add(REPO, FILES)
    done(carry_out(order_for(tmp_path, None)))
    hf = Path(os.environ.get("VIRTUAL_ENV", ".venv"), "bin/hf").absolute()
    environment = hub.environment(tmp_path)
    listed = subprocess.run([hf, "cache", "ls"], env=environment, capture_output=True, text=True)
    assert REPO in listed.stdout, listed.stderr
    verified = subprocess.run(
        [hf, "cache", "verify", REPO], env=environment, capture_output=True, text=True
    )
    assert "Verified 2 file(s)" in verified.stdout, verified.stderr


def test_interruptions_cost_no_more_than_the_chunk_under_way(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    hub.faults.add(NAMES[0], Reset(CHUNK_BYTES + 100), times=2)
    news = carry_out(order_for(tmp_path, manifest, workers=1))
    assert done(news).fetched_bytes == TOTAL
    assert "asking again" in said(news)
    check(tmp_path, manifest)


def test_a_hub_that_stays_ill_is_left_and_gone_on_with_later(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    hub.faults.add(NAMES[1], Reset(CHUNK_BYTES + 100), times=None)
    news = carry_out(order_for(tmp_path, manifest))
    end = failed(news)
    assert (end.code, end.permanent) == ("hub_unavailable", False)
    assert NAMES[1] in end.message
    hub.faults.clear()
    hub.forget_requests()
    done(carry_out(order_for(tmp_path, manifest)))
    assert hub.sent() < TOTAL - CHUNK_BYTES
    check(tmp_path, manifest)


def test_permanent_refusals_end_it_at_once(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    hub.faults.add(NAMES[0], Status(404), times=None)
    end = failed(carry_out(order_for(tmp_path, manifest)))
    assert (end.code, end.permanent) == ("hub_refused", True)
    assert not hub.content_requests(NAMES[0])


def test_a_flipped_byte_on_the_way_is_not_landed(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    hub.faults.add(NAMES[1], Flip(10), times=1)
    news = carry_out(order_for(tmp_path, manifest))
    assert "is not what it should be; fetching again" in said(news)
    assert done(news).fetched_bytes == TOTAL + len(FILES[NAMES[1]])
    check(tmp_path, manifest)


def test_wrong_bytes_for_ever_end_with_a_reason_and_land_nothing(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    hub.faults.add(NAMES[1], Flip(10), times=None)
    end = failed(carry_out(order_for(tmp_path, manifest)))
    assert "fetched twice" in end.message
    assert NAMES[1] in end.message
    assert end.permanent
    assert not blob(tmp_path, manifest, 1).exists()


@pytest.mark.parametrize("listed", [True, False])
def test_a_flipped_byte_on_disk_costs_one_chunk(
    hub: LocalHub, manifest: Manifest, tmp_path: Path, listed: bool
) -> None:
    carry_out(order_for(tmp_path, manifest))
    path = blob(tmp_path, manifest, 0)
    path.write_bytes(flipped(FILES[NAMES[0]], CHUNK_BYTES + 3))
    hub.forget_requests()
    damaged = (manifest.shards[0].sha256,) if listed else ()
    news = carry_out(order_for(tmp_path, manifest, damaged=damaged))
    hub.wait_sent("*", CHUNK_BYTES)
    assert done(news).fetched_bytes == hub.sent() == CHUNK_BYTES
    assert "mending" in said(news)
    check(tmp_path, manifest)


def test_a_damaged_blob_without_chunk_hashes_is_set_aside_until_its_replacement_is_verified(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    path = blob(tmp_path, manifest, 0)
    path.parent.mkdir(parents=True)
    wrong = flipped(FILES[NAMES[0]], 3)
    path.write_bytes(wrong)
    hub.faults.add(NAMES[0], Status(404), times=None)
    news = carry_out(order_for(tmp_path, manifest))
    failed(news)
    assert "aside" in said(news)
    aside = landing.set_aside_path(places_in(tmp_path), REPO, manifest.shards[0].sha256)
    assert aside.read_bytes() == wrong
    hub.faults.clear()
    done(carry_out(order_for(tmp_path, manifest)))
    check(tmp_path, manifest)


def test_a_chunk_lost_with_the_power_is_noticed(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    hub.faults.add(NAMES[0], Reset(2 * CHUNK_BYTES + 100), times=None)
    failed(carry_out(order_for(tmp_path, manifest, workers=1)))
    partial = places_in(tmp_path).partial(REPO, manifest.shards[0].sha256)
    with partial.open("r+b") as file:
        file.write(bytes(4096))
    hub.faults.clear()
    hub.forget_requests()
    done(carry_out(order_for(tmp_path, manifest)))
    assert {r.range[0] for r in hub.content_requests(NAMES[0]) if r.range} >= {0}
    check(tmp_path, manifest)


def test_another_program_that_is_downloading_is_waited_for(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    lock = places_in(tmp_path).lock(REPO, manifest.shards[0].sha256)
    lock.parent.mkdir(parents=True)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    path = blob(tmp_path, manifest, 0)

    def other_program() -> None:
        wait_until(lambda: blob(tmp_path, manifest, 1).exists())
        path.write_bytes(FILES[NAMES[0]])
        os.close(fd)

    thread = threading.Thread(target=other_program)
    thread.start()
    news = carry_out(order_for(tmp_path, manifest))
    thread.join()
    assert done(news).fetched_bytes == len(FILES[NAMES[1]])
    assert f"another program is downloading {NAMES[0]}" in said(news)
    check(tmp_path, manifest)


def test_space_is_checked_before_anything_is_fetched(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    end = failed(carry_out(order_for(tmp_path, manifest, reserve_bytes=1 << 60)))
    assert (end.code, end.permanent) == ("no_space", True)
    assert "meshd cache prune" in end.message
    assert not hub.requests


def test_offline_without_anybody(hub: LocalHub, manifest: Manifest, tmp_path: Path) -> None:
    end = failed(carry_out(order_for(tmp_path, None, offline=True)))
    assert (end.code, end.permanent) == ("hub_unavailable", False)
    assert not hub.requests


def test_offline_what_was_resolved_before_is_known(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    carry_out(order_for(tmp_path, None))
    hub.forget_requests()
    assert done(carry_out(order_for(tmp_path, None, offline=True))).fetched_bytes == 0
    assert not hub.requests


def test_an_older_manifest_does_not_move_the_branch_back(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    branch = places_in(tmp_path).branch(REPO, "main")
    branch.parent.mkdir(parents=True)
    branch.write_text("d" * 40)
    done(carry_out(order_for(tmp_path, manifest)))
    assert branch.read_text() == "d" * 40


def test_progress_adds_up(hub: LocalHub, manifest: Manifest, tmp_path: Path) -> None:
    hub.faults.add(NAMES[0], Slow(10e6), times=None)
    progress = [
        one for one in carry_out(order_for(tmp_path, manifest)) if isinstance(one, Progress)
    ]
    assert progress
    assert {one.total_bytes for one in progress} == {TOTAL}
    counts = [one.done_bytes for one in progress]
    assert counts == sorted(counts)
    assert any(one.bytes_per_s > 0 and one.eta_s for one in progress)
