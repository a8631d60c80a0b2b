"""Where the tensors of a set lie: only of what was verified, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from meshd.cache.manifest import Manifest
from meshd.cache.references import parse_hub_ref
from meshd.cache.tensors import tensors_of
from tests.cache.sets import write_set
from tests.cache.shelves import Shelves
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


def known(shelves: Shelves, files: Mapping[str, bytes], *, mmproj: str | None = None) -> Manifest:
    shelves.add(REPO, files)
    return shelves.know(REF, files, mmproj=mmproj)


def test_of_a_verified_set_all_tensors_are_found(
    shelves: Shelves, files: Mapping[str, bytes]
) -> None:
    manifest = known(shelves, files)
    for content in files.values():
        shelves.verify(REPO, content)
    places = tensors_of(manifest.digest, shelves.store)
    assert [(place.name, place.size) for place in places] == [
        (f"t{number}", size) for number, size in enumerate(SIZES)
    ]
    for place in places:
        with Path(place.path).open("rb") as file:
            file.seek(place.offset)
            said = file.read(place.size)
        (tensor,) = gguf.GGUFReader(place.path).tensors
        assert said == tensor.data.tobytes()


def test_a_set_of_which_a_file_was_not_verified_has_none(
    shelves: Shelves, files: Mapping[str, bytes]
) -> None:
    manifest = known(shelves, files)
    for content in list(files.values())[1:]:
        shelves.verify(REPO, content)
    assert tensors_of(manifest.digest, shelves.store) == ()


def test_a_set_of_which_a_file_is_gone_has_none(
    shelves: Shelves, files: Mapping[str, bytes]
) -> None:
    manifest = known(shelves, files)
    for content in files.values():
        shelves.verify(REPO, content)
    Path(tensors_of(manifest.digest, shelves.store)[1].path).unlink()
    assert tensors_of(manifest.digest, shelves.store) == ()


def test_a_set_nobody_knows_has_none(shelves: Shelves, files: Mapping[str, bytes]) -> None:
    known(shelves, files)
    assert tensors_of("sha256:" + "0" * 64, shelves.store) == ()


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
    names = [place.name for place in tensors_of(manifest.digest, shelves.store)]
    assert names == [tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
