"""Cached tensors on the disk: only whole ones stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshd.errors import BadReference
from meshd.runtime.lending import tensor_cache
from meshd.runtime.lending.extents import TensorExtent
from meshd.runtime.lending.tensor_cache import TensorCache, TensorCaches

DIGEST = "a" * 64
TENSOR = TensorExtent("blk.0.x", "/w", 0, 100)


@pytest.fixture
def caches(tmp_path: Path) -> TensorCaches:
    return TensorCaches(tmp_path / "tensors", 1000)


@pytest.fixture
def cache(caches: TensorCaches) -> TensorCache:
    return opened(caches)


def opened(caches: TensorCaches, digest: str = DIGEST) -> TensorCache:
    cache = caches.directory(digest, 0)
    assert cache is not None
    return cache


def put(cache: TensorCache, name: str, size: int) -> None:
    """What a server does."""
    (cache.path / "rpc").mkdir(exist_ok=True)
    (cache.path / "rpc" / name).write_bytes(bytes(size))


def kept(cache: TensorCache, tensor: TensorExtent = TENSOR, file: str = "f1") -> None:
    before = cache.files()
    put(cache, file, tensor.size)
    name = cache.keep_tensor(tensor, before)
    assert name == file
    cache.write_down({tensor.name: name}, "7.0.0")


def names(cache: TensorCache) -> set[str]:
    return set(cache.files())


def test_a_directory_is_private(caches: TensorCaches, cache: TensorCache, tmp_path: Path) -> None:
    assert cache.path == tmp_path / "tensors" / DIGEST
    cache.path.chmod(0o755)
    assert opened(caches, f"sha256:{DIGEST}").path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "digest", ["", "..", "../" + "a" * 61, "A" * 64, "a" * 65, "a" * 64 + "\n"]
)
def test_what_is_no_digest_names_no_directory(
    caches: TensorCaches, digest: str, tmp_path: Path
) -> None:
    with pytest.raises(BadReference):
        caches.directory(digest, 0)
    assert not (tmp_path / "tensors").exists()


def test_a_kept_tensor_is_not_lacking(caches: TensorCaches, cache: TensorCache) -> None:
    other = TensorExtent("blk.1.x", "/w", 0, 100)
    assert cache.lacking([TENSOR, other], "7.0.0") == (TENSOR, other)
    kept(cache)
    again = opened(caches)
    assert again.lacking([TENSOR, other], "7.0.0") == (other,)
    assert again.lacking([TENSOR], "7.0.1") == (TENSOR,)  # who knows how that one hashes
    kept(again, other, "f2")
    assert opened(caches).lacking([TENSOR, other], "7.0.0") == ()


@pytest.mark.parametrize("size", [99, 100, None])
def test_a_file_that_was_touched_is_lacking_and_removed(
    caches: TensorCaches, cache: TensorCache, size: int | None
) -> None:
    kept(cache)
    path = cache.path / "rpc" / "f1"
    path.unlink()
    if size is not None:
        put(cache, "f1", size)
        os.utime(path, ns=(1, 1))
    assert cache.lacking([TENSOR], "7.0.0") == (TENSOR,)
    assert names(opened(caches)) == set()


@pytest.mark.parametrize("content", [b"", b"{", b'{"files": {"f1": "x"}}', b"[]"])
def test_an_index_that_makes_no_sense_vouches_for_nothing(
    caches: TensorCaches, cache: TensorCache, content: bytes
) -> None:
    kept(cache)
    (cache.path / "kept.json").write_bytes(content)
    assert cache.lacking([TENSOR], "7.0.0") == (TENSOR,)
    assert names(opened(caches)) == set()


def test_a_tensor_that_was_cut_short_is_removed_at_once(cache: TensorCache) -> None:
    put(cache, "f1", 60)
    with pytest.raises(OSError, match="60 bytes were kept, not 100"):
        cache.keep_tensor(TENSOR, {})
    assert names(cache) == set()


def test_of_two_new_files_none_is_taken_for_the_tensor(cache: TensorCache) -> None:
    put(cache, "f1", 100)
    put(cache, "f2", 100)
    assert cache.keep_tensor(TENSOR, {}) is None


def test_what_was_pushed_is_counted_and_stays(caches: TensorCaches, cache: TensorCache) -> None:
    kept(cache)
    before = cache.files()
    put(cache, "pushed", 50)
    assert cache.measure(before, whole=True) == 50
    assert cache.measure(cache.files(), whole=True) == 0
    again = opened(caches)
    assert names(again) == {"f1", "pushed"}
    assert again.lacking([TENSOR], "7.0.0") == ()


def test_what_a_server_may_have_left_half_written_is_removed(
    caches: TensorCaches, cache: TensorCache
) -> None:
    kept(cache)
    before = cache.files()
    put(cache, "pushed", 50)
    assert cache.measure(before, whole=False) == 50
    assert names(opened(caches)) == {"f1"}


def test_on_a_full_disk_pushed_files_may_be_short(
    caches: TensorCaches, cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, "pushed", 50)
    monkeypatch.setattr(tensor_cache, "SPARE_BYTES", 1 << 60)
    assert cache.measure({}, whole=True) == 50
    assert names(opened(caches)) == set()


def test_without_room_there_is_no_cache(
    caches: TensorCaches, cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(cache)
    assert caches.directory(DIGEST, 1001) is None  # more than all may hold
    monkeypatch.setattr(tensor_cache, "SPARE_BYTES", 1 << 60)
    assert caches.directory(DIGEST, 101) is None
    assert caches.directory(DIGEST, 100) is not None  # all of it is there


def test_prune_removes_what_was_longest_unused(caches: TensorCaches, tmp_path: Path) -> None:
    for age, letter in enumerate("abcd"):
        kept(opened(caches, letter * 64), TensorExtent("t", "/w", 0, 400))
        os.utime(tmp_path / "tensors" / (letter * 64), (1000 - age, 1000 - age))
    (tmp_path / "tensors" / "something else").mkdir()
    assert caches.prune(in_use=["sha256:" + "d" * 64]) == 800
    left = {path.name for path in (tmp_path / "tensors").iterdir()}
    assert left == {"a" * 64, "d" * 64, "something else"}
    assert caches.prune(in_use=[]) == 0


def test_prune_never_takes_what_is_in_use(caches: TensorCaches) -> None:
    kept(opened(caches), TensorExtent("t", "/w", 0, 2000))
    assert caches.prune(in_use=[DIGEST]) == 0
    assert caches.prune(in_use=[]) == 2000


def test_prune_of_nothing(caches: TensorCaches) -> None:
    assert caches.prune(in_use=[]) == 0
