"""What reaches no engine: every defect is found, and named with file and remedy."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.cache import builtin
from meshd.cache.facts import FileFacts
from meshd.cache.gguf_header import GgufHeader, TensorInfo
from meshd.cache.usage import read_usage
from meshd.cache.verdict import Expected, Fault, Observation, judge
from meshd.cache.weights import inspect, shard_paths
from meshd.errors import BadReference, BrokenWeights
from tests.models import small_model

NOWHERE = Path("/nonexistent")


def write_shards(directory: Path, count: int = 4, *, name: str = "big") -> list[Path]:
    """A split set as llama.cpp writes it: metadata in the first, tensors in all."""
    paths = []
    for number in range(count):
        path = directory / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            writer.add_context_length(512)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        writer.add_tensor(f"t{number}", np.zeros(64, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_one_file(tmp_path: Path) -> None:
    path = small_model(tmp_path / "m.gguf")
    weights = inspect(str(path), NOWHERE)
    assert weights.model == "m"
    assert weights.paths == (path,)
    assert weights.total_bytes == path.stat().st_size
    assert (weights.architecture, weights.trained_context) == ("llama", 8192)
    assert weights.capabilities == ("completion", "chat")
    assert weights.digest is None


def test_any_shard_names_the_set(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    for shard in shards:
        weights = inspect(str(shard), NOWHERE)
        assert weights.model == "big"
        assert weights.paths == tuple(shards)
        assert weights.first_shard == shards[0]


Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_header(path: Path) -> None:
    os.truncate(path, 60)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_number(path: Path) -> None:
    other = path.with_name(path.name.replace("00003-of", "00002-of"))
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing"),
        (cut, "1 bytes short"),
        (cut_header, "cut off"),
        (swap_number, "holds shard 2"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid x"), "Git LFS"),
        (lambda p: p.write_text("  <!DOCTYPE html><html>gone</html>"), "web page"),
        (lambda p: p.write_text('{"error": "Entry not found"}'), "JSON"),
        (lambda p: p.write_bytes(b"\x00" * 200), "does not begin with GGUF"),
        (lambda p: (p.unlink(), p.mkdir()), "directory"),
        (lambda p: (p.unlink(), p.symlink_to("/nowhere/blob")), "link to /nowhere/blob"),
        (make_pipe, "not a regular file"),
    ],
)
def test_a_broken_shard_is_named(tmp_path: Path, damage: Damage, words: str) -> None:
    shards = write_shards(tmp_path)
    damage(shards[2])
    with pytest.raises(BrokenWeights) as caught:
        inspect(str(shards[0]), NOWHERE)
    message = caught.value.message
    assert words in message
    assert str(shards[2]) in message
    assert "shard 00003-of-00004" in message
    assert caught.value.path == str(shards[2])
    assert caught.value.status == 503


def test_sets_that_do_not_belong_together(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    alien = write_shards(tmp_path, 5, name="other")[2]
    shards[2].write_bytes(alien.read_bytes())
    with pytest.raises(BrokenWeights, match="of 5 shards, its name says 4"):
        inspect(str(shards[0]), NOWHERE)
    shards[2].write_bytes(small_model(tmp_path / "s.gguf").read_bytes())
    with pytest.raises(BrokenWeights, match="says it is not split"):
        inspect(str(shards[0]), NOWHERE)


def test_a_shard_under_another_name(tmp_path: Path) -> None:
    shard = write_shards(tmp_path)[1].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BrokenWeights, match=r"is shard 2 of 4, but its name does not say so"):
        inspect(str(shard), NOWHERE)


def test_names_that_cannot_be() -> None:
    with pytest.raises(BadReference, match="no shard 00005 of 4"):
        shard_paths(Path("/m/x-00005-of-00004.gguf"))
    assert shard_paths(Path("/m/x.gguf")) == (Path("/m/x.gguf"),)


def test_what_does_not_exist_is_a_bad_reference(tmp_path: Path) -> None:
    with pytest.raises(BadReference, match="is missing"):
        inspect(str(tmp_path / "none.gguf"), NOWHERE)


def observation(number: int, count: int, tensors: int, *, arch: str = "llama") -> Observation:
    metadata = {"split.no": number - 1, "split.count": count, "split.tensors.count": count}
    infos = tuple(TensorInfo(f"t{number}.{i}", (1,), "F32", 64, 4) for i in range(tensors))
    header = GgufHeader(3, {"general.architecture": arch, **metadata}, infos, 32, 64)
    return Observation(f"/m/{number}", FileFacts(f"/m/{number}", 100, 0, number, 0), header)


@given(
    st.lists(st.sampled_from(["ok", "problem", "number", "count", "tensors"]), min_size=2),
)
def test_a_set_is_whole_only_if_every_part_is(parts: list[str]) -> None:
    count = len(parts)
    seen = []
    for number, part in enumerate(parts, start=1):
        one = observation(number, count, 1)
        match part:
            case "problem":
                one = Observation(one.path, fault=Fault.MISSING, problem="is missing")
            case "number":
                one = replace(observation(number + 1, count, 1), path=one.path)
            case "count":
                one = observation(number, count + 1, 1)
            case "tensors":
                one = observation(number, count, 2)
        seen.append(one)
    verdict = judge([Expected(one.path) for one in seen], seen, ["0" * 64] * count)
    assert verdict.ok == all(part == "ok" for part in parts)
    if not verdict.ok:
        assert verdict.to_error(None).path in {one.path for one in seen}


def test_weights_without_architecture() -> None:
    seen = [observation(1, 2, 1, arch=""), observation(2, 2, 1)]
    verdict = judge([Expected(one.path) for one in seen], seen, ["0" * 64] * 2)
    assert "general.architecture" in verdict.to_error(None).message


# -- the built-in model ---------------------------------------------------------------------------


def test_the_builtin_model_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    weights = inspect("builtin", tmp_path)
    assert weights.model == "builtin"
    assert weights.digest == f"sha256:{builtin.SHA256}"
    assert [p.name for p in tmp_path.iterdir()] == [builtin.FILE_NAME]
    made = weights.first_shard.stat()
    assert inspect("builtin", tmp_path).first_shard.stat().st_mtime_ns == made.st_mtime_ns
    data = bytearray(weights.first_shard.read_bytes())
    data[-1] ^= 1
    weights.first_shard.write_bytes(bytes(data))
    assert builtin._sha256(builtin.ensure(tmp_path)) == builtin.SHA256


def test_the_builtin_model_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BrokenWeights, match="cannot be written"):
        builtin.ensure(tmp_path / "file" / "below")


# -- usage ----------------------------------------------------------------------------------------


def test_usage_counts_blobs_not_links(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "1").write_bytes(bytes(1000))
    snapshot = tmp_path / "models--a--b" / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    (snapshot / "m.gguf").symlink_to(blobs / "1")
    usage = read_usage(tmp_path)
    assert usage.used_bytes == 1000
    assert usage.free_bytes > 0
    assert usage.budget_bytes is None
    assert read_usage(tmp_path / "not" / "there").used_bytes == 0
