"""Landing: the layout of huggingface_hub, whatever lies there already."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshd.cache import landing
from meshd.cache.hashes import ChunkHashes
from meshd.cache.ledger import Ledger, facts_of
from meshd.cache.manifest import Manifest, Shard
from tests.cache.transfer.world import (
    COMMIT,
    REPO,
    chunk_hashes,
    landed,
    manifest_of,
    places_in,
    sha256,
)

DATA = b"GGUF" * 100


def land(home: Path, path: str = "a.gguf") -> Manifest:
    manifest = manifest_of({path: DATA})
    places = places_in(home)
    partial = places.partial(REPO, sha256(DATA))
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(DATA)
    landing.land(places, manifest, manifest.shards[0], partial, chunk_hashes(DATA))
    return manifest


@pytest.mark.parametrize(
    ("path", "target"), [("a.gguf", "../../blobs/"), ("Q4/x/a.gguf", "../../../../blobs/")]
)
def test_blob_link_ledger_and_hashes(tmp_path: Path, path: str, target: str) -> None:
    manifest = land(tmp_path, path)
    places = places_in(tmp_path)
    assert landed(tmp_path, manifest, path) == DATA
    link = places.snapshot(REPO, COMMIT, path)
    assert str(link.readlink()) == target + sha256(DATA)
    assert not places.partial(REPO, sha256(DATA)).exists()
    assert Ledger(places.ledger).known(facts_of(link)) == sha256(DATA)
    assert ChunkHashes(places).load(sha256(DATA), len(DATA)) == chunk_hashes(DATA)


def test_what_was_set_aside_goes_when_the_replacement_is_there(tmp_path: Path) -> None:
    land(tmp_path)
    places = places_in(tmp_path)
    aside = landing.set_aside(places, REPO, sha256(DATA))
    assert aside.read_bytes() == DATA
    assert not places.blob(REPO, sha256(DATA)).exists()
    land(tmp_path)
    assert not aside.exists()


def test_a_link_or_file_in_the_way_is_replaced(tmp_path: Path) -> None:
    path = places_in(tmp_path).snapshot(REPO, COMMIT, "a.gguf")
    path.parent.mkdir(parents=True)
    path.symlink_to("../../blobs/other")
    manifest = land(tmp_path)
    assert landed(tmp_path, manifest, "a.gguf") == DATA
    path.unlink()
    path.write_bytes(b"a copy by a tool without links")
    land(tmp_path)
    assert path.is_symlink()
    assert [p.name for p in path.parent.iterdir()] == ["a.gguf"]


def test_a_branch_names_its_commit(tmp_path: Path) -> None:
    places = places_in(tmp_path)
    manifest = manifest_of({"a.gguf": DATA})
    newer = manifest_of({"a.gguf": DATA}, "d" * 40)
    landing.name_branch(places, manifest, newest=False)
    assert places.branch(REPO, "main").read_text() == COMMIT
    landing.name_branch(places, newer, newest=False)
    assert places.branch(REPO, "main").read_text() == COMMIT
    landing.name_branch(places, newer, newest=True)
    assert places.branch(REPO, "main").read_text() == "d" * 40


@pytest.mark.parametrize("branch", ["../../x", "/etc/x", "a//b", COMMIT])
def test_a_branch_that_leads_elsewhere_or_is_a_commit_is_not_written(
    tmp_path: Path, branch: str
) -> None:
    shard = Shard(path="a.gguf", size=1, sha256=sha256(DATA))
    manifest = Manifest.model_construct(
        repo=REPO, revision=COMMIT, branch=branch, shards=(shard,), mmproj=None
    )
    landing.name_branch(places_in(tmp_path), manifest, newest=True)
    assert not list(tmp_path.rglob("*"))


def test_the_cache_is_tagged_once(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    landing.tag_directory(hub)
    tag = hub / "CACHEDIR.TAG"
    assert tag.read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    tag.write_text("mine")
    landing.tag_directory(hub)
    assert tag.read_text() == "mine"
