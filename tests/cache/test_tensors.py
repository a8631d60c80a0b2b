"""Where the tensors of a set lie: only of what was verified, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.references import parse_hub_ref
from meshd.cache.tensors import HeldShards, held_shards, missing_bytes
from meshd.cache.transfer.partial import Partial
from tests.cache.sets import write_set
from tests.cache.shelves import Shelves, commit, sha256
from tests.models import small_model

REPO = "acme/model-GGUF"
REF = parse_hub_ref(f"{REPO}:Q4_K_M")
SIZES = (4096, 1024, 8192)


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, bytes]:
    """Three shards with a tensor each."""
    return {path.name: path.read_bytes() for path in write_set(tmp_path / "made", *SIZES)}


@pytest.fixture
def shelves(tmp_path: Path) -> Shelves:
    return Shelves(tmp_path / "home")


def found(shelves: Shelves, manifest: Manifest) -> HeldShards:
    held = held_shards(manifest.digest, shelves.store)
    assert held is not None
    return held


def known(shelves: Shelves, files: Mapping[str, bytes], *, mmproj: str | None = None) -> Manifest:
    shelves.add(REPO, files)
    return shelves.know(REF, files, mmproj=mmproj)


def test_of_a_verified_set_all_tensors_are_found(
    shelves: Shelves, files: Mapping[str, bytes]
) -> None:
    manifest = known(shelves, files)
    for content in files.values():
        shelves.verify(REPO, content)
    held = found(shelves, manifest)
    assert held.whole
    assert held.ref == f"{REPO}@{commit(1)}:Q4_K_M"
    assert [shard.sha256 for shard in held.files.values()] == [sha256(c) for c in files.values()]
    places = held.tensors
    assert [(place.name, place.size) for place in places] == [
        (f"t{number}", size) for number, size in enumerate(SIZES)
    ]
    for place in places:
        with Path(place.path).open("rb") as file:
            file.seek(place.offset)
            said = file.read(place.size)
        (tensor,) = gguf.GGUFReader(place.path).tensors
        assert said == tensor.data.tobytes()


def test_of_a_set_of_which_a_file_was_not_verified_the_others_are_found(
    shelves: Shelves, files: Mapping[str, bytes]
) -> None:
    manifest = known(shelves, files)
    assert held_shards(manifest.digest, shelves.store) is None
    for content in list(files.values())[1:]:
        shelves.verify(REPO, content)
    held = found(shelves, manifest)
    assert not held.whole
    assert [place.name for place in held.tensors] == ["t1", "t2"]
    assert [shard.path for shard in held.files.values()] == list(files)[1:]


def test_of_a_set_of_which_a_file_is_gone_the_others_are_found(
    shelves: Shelves, files: Mapping[str, bytes]
) -> None:
    manifest = known(shelves, files)
    for content in files.values():
        shelves.verify(REPO, content)
    Path(found(shelves, manifest).tensors[1].path).unlink()
    held = found(shelves, manifest)
    assert not held.whole
    assert [place.name for place in held.tensors] == ["t0", "t2"]


def test_of_two_revisions_the_one_of_which_more_is_here(
    shelves: Shelves, files: Mapping[str, bytes]
) -> None:
    """They share their blobs, and each has links of its own."""
    first = known(shelves, files)
    for content in files.values():
        shelves.verify(REPO, content)
    root = shelves.places.snapshot(REPO, first.revision)
    for name in list(files)[:2]:
        (root / name).unlink()
    shelves.know(parse_hub_ref(f"{REPO}@{commit(2)}:Q4_K_M"), files, revision=2)
    other = shelves.places.snapshot(REPO, commit(2))
    other.mkdir()
    for name in list(files)[:2]:
        (other / name).symlink_to(shelves.places.blob(REPO, sha256(files[name])))
    held = found(shelves, first)
    assert [place.name for place in held.tensors] == ["t0", "t1"]
    assert held.ref == f"{REPO}@{commit(2)}:Q4_K_M"


def test_a_set_nobody_knows_has_none(shelves: Shelves, files: Mapping[str, bytes]) -> None:
    known(shelves, files)
    assert held_shards("sha256:" + "0" * 64, shelves.store) is None


def test_what_is_missing_is_what_was_not_verified_and_has_not_come(shelves: Shelves) -> None:
    first, second = b"a" * 1000, b"b" * (CHUNK_BYTES + 7)
    wanted = [(sha256(content), len(content)) for content in (first, second)]
    assert missing_bytes(REPO, wanted, shelves.store) == len(first) + len(second)
    shelves.add(REPO, {"a.gguf": first})
    assert missing_bytes(REPO, wanted, shelves.store) == len(first) + len(second)
    shelves.verify(REPO, first)
    assert missing_bytes(REPO, wanted, shelves.store) == len(second)
    shard = Shard(path="b.gguf", size=len(second), sha256=sha256(second))
    partial = Partial.open(shelves.places, REPO, shard, own=None)
    partial.write(1, memoryview(second)[CHUNK_BYTES:], hashlib.sha256(b"b" * 7).digest())
    partial.close()
    assert missing_bytes(REPO, wanted, shelves.store) == CHUNK_BYTES
    partial.path.unlink()
    assert missing_bytes(REPO, wanted, shelves.store) == len(second), "its journal lies alone"


def test_a_projector_is_no_part_of_the_layers(shelves: Shelves, tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.gguf").read_bytes()
    projector = gguf.GGUFWriter(tmp_path / "p.gguf", "clip")
    projector.add_tensor("v.blk.0.x", np.zeros(64, dtype=np.float32))
    projector.write_header_to_file()
    projector.write_kv_data_to_file()
    projector.write_tensors_to_file()
    projector.close()
    both = {"m-Q4_K_M.gguf": model, "mmproj-m.gguf": (tmp_path / "p.gguf").read_bytes()}
    manifest = known(shelves, both, mmproj="mmproj-m.gguf")
    for content in both.values():
        shelves.verify(REPO, content)
    held = found(shelves, manifest)
    assert list(held.files) == [str(shelves.places.snapshot(REPO, commit(1), "m-Q4_K_M.gguf"))]
    names = [place.name for place in held.tensors]
    assert names == [tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
