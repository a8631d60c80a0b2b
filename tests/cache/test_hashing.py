"""Hashes of files and chunks: right, stopped at once, never of a file that changed meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshd.cache import hashing
from meshd.cache.chunks import CHUNK_BYTES, HASH_BYTES, chunk_count, chunk_span
from meshd.cache.facts import COARSE_STEP_NS
from meshd.cache.hashes import ChunkHashes, Stopped, damaged_chunks
from meshd.cache.hashing import Checked, FileChanged, hash_file, verify_files
from meshd.cache.ledger import Ledger, facts_of
from meshd.cache.places import Places
from meshd.cache.verdict import Expected, Fault
from meshd.cache.weights import local_set, look
from tests.models import small_model

SIZES = [0, 1, 1000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 4 * CHUNK_BYTES + 5]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "hub", tmp_path / "state", tmp_path / "builtin")


@pytest.fixture
def ledger(places: Places) -> Ledger:
    return Ledger(places.ledger)


@pytest.fixture
def store(places: Places) -> ChunkHashes:
    return ChunkHashes(places)


def write(path: Path, size: int, *, seed: int = 0) -> bytes:
    """Random bytes, written long ago."""
    content = random.Random(seed).randbytes(size)
    path.write_bytes(content)
    age(path)
    return content


def age(path: Path) -> None:
    past_ns = time.time_ns() - 2 * COARSE_STEP_NS
    os.utime(path, ns=(past_ns, past_ns))


def sha256(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


def chunks_of(content: bytes | bytearray) -> bytes:
    spans = [chunk_span(index, len(content)) for index in range(chunk_count(len(content)))]
    return b"".join(hashlib.sha256(content[at : at + length]).digest() for at, length in spans)


# -- one file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_whole_and_chunks(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    content = write(path, size)
    steps: list[int] = []
    hashed = hash_file(path, advance=steps.append, spare_cache=True)
    assert hashed.sha256 == sha256(content)
    assert hashed.chunk_hashes == chunks_of(content)
    assert hashed.facts == facts_of(path)
    assert sum(steps) == size
    only_whole = hash_file(path, chunks=False)
    assert (only_whole.sha256, only_whole.chunk_hashes) == (hashed.sha256, None)


def test_the_file_at_the_end_of_links(tmp_path: Path) -> None:
    content = write(tmp_path / "f", 1000)
    (tmp_path / "l").symlink_to("f")
    hashed = hash_file(tmp_path / "l")
    assert (hashed.sha256, hashed.facts) == (sha256(content), facts_of(tmp_path / "f"))


def test_stopped_within_a_chunk(tmp_path: Path) -> None:
    write(tmp_path / "f", 4 * CHUNK_BYTES)
    steps: list[int] = []
    with pytest.raises(Stopped):
        hash_file(tmp_path / "f", stop=lambda: len(steps) == 2, advance=steps.append)
    assert steps == 2 * [CHUNK_BYTES]


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


def replace_by_another(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    age(other)
    other.replace(path)


@pytest.mark.parametrize(
    "change", [append, overwrite, replace_by_another, lambda path: os.truncate(path, CHUNK_BYTES)]
)
def test_changed_while_it_was_read(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = tmp_path / "f"
    write(path, 3 * CHUNK_BYTES)
    pending = [lambda: change(path)]

    def advance(_: int) -> None:
        if pending:
            pending.pop()()

    with pytest.raises(FileChanged, match="changed while it was read"):
        hash_file(path, advance=advance)


def test_removed_while_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, 1000)
    with pytest.raises(FileNotFoundError):
        hash_file(path, advance=lambda _: path.unlink())


def test_a_new_file_is_read_when_its_time_has_settled(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"new")
    hashed = hash_file(path)
    assert ledger.record(hashed.facts, hashed.sha256, read_from_ns=hashed.read_from_ns)


def test_waiting_for_that_is_bounded_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write(path, 1000)
    monkeypatch.setattr(hashing, "settles_in_ns", lambda *_: COARSE_STEP_NS)
    with pytest.raises(Stopped):
        hash_file(path, stop=lambda: True)
    monkeypatch.setattr(hashing, "SETTLE_LIMIT_S", 0.0)
    with pytest.raises(FileChanged, match="being written"):
        hash_file(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError, match="not a regular file"):
        hash_file(tmp_path / "x")


# -- hashes of chunks -----------------------------------------------------------------------------


def test_hashes_are_kept_whole_or_not_at_all(store: ChunkHashes, places: Places) -> None:
    hashes = os.urandom(3 * HASH_BYTES)
    size = 2 * CHUNK_BYTES + 1
    name = "a" * 64
    assert store.load(name, size) is None
    assert not store.has(name, size)
    store.save(name, hashes)
    assert store.load(name, size) == hashes
    assert store.has(name, size)
    for other in (2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 1):
        assert store.load(name, other) is None
        assert not store.has(name, other)
    places.chunk_hashes(name).write_bytes(hashes[:-1])
    assert store.load(name, size) is None
    store.forget(name)
    store.forget(name)
    assert not places.chunk_hashes(name).exists()


@pytest.mark.parametrize("size", SIZES)
def test_flipped_bytes_are_found_in_their_chunks(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    content = bytearray(write(path, size))
    hashes = chunks_of(content)
    assert damaged_chunks(path, hashes) == ()
    for index in range(chunk_count(size)):
        offset, length = chunk_span(index, size)
        at = offset + random.Random(index).randrange(length)
        content[at] ^= 1
        path.write_bytes(content)
        assert damaged_chunks(path, hashes) == (index,)
        content[at] ^= 1
    path.write_bytes(bytes(size))
    if size > 0:
        assert damaged_chunks(path, hashes) == tuple(range(chunk_count(size)))


def test_chunks_of_a_file_of_another_length(tmp_path: Path) -> None:
    path = tmp_path / "f"
    content = write(path, 2 * CHUNK_BYTES + 100)
    hashes = chunks_of(content)
    path.write_bytes(content + b"x")
    assert damaged_chunks(path, hashes) == (2,)
    path.write_bytes(content[: CHUNK_BYTES + 1])
    assert damaged_chunks(path, hashes) == (1, 2)
    path.write_bytes(content[:CHUNK_BYTES])
    assert damaged_chunks(path, hashes) == (1, 2)
    with pytest.raises(Stopped):
        damaged_chunks(path, hashes, lambda: True)


# -- sets -----------------------------------------------------------------------------------------


def test_files_are_hashed_and_remembered(
    tmp_path: Path, ledger: Ledger, store: ChunkHashes
) -> None:
    files, contents = [], []
    for number in range(5):
        path = tmp_path / f"f{number}"
        content = write(path, CHUNK_BYTES + number, seed=number)
        files.append(Expected(str(path), len(content), sha256(content)))
        contents.append(content)
    told: list[int] = []
    checked = verify_files(files, ledger, store, progress=told.append)
    assert checked == tuple(Checked(file.path, file.sha256) for file in files)
    assert told == sorted(told)
    assert told[-1] == sum(len(content) for content in contents)
    for file, content in zip(files, contents, strict=True):
        assert ledger.known(facts_of(Path(file.path))) == file.sha256
        assert store.load(sha256(content), len(content)) == chunks_of(content)


def test_each_core_does_its_part(
    tmp_path: Path, ledger: Ledger, store: ChunkHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads a file until its chunks are known, then one; never more than there are cores."""
    files = []
    for number in range(6):
        content = write(tmp_path / f"f{number}", 1000, seed=number)
        files.append(Expected(str(tmp_path / f"f{number}"), 1000, sha256(content)))
    lock, busy, most = threading.Lock(), 0, 0
    together = threading.Barrier(2)
    real = hash_file

    def counting(path: Path, **more: object) -> object:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        together.wait(10)
        with lock:
            busy -= 1
        return real(path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing, "hash_file", counting)
    verify_files(files, ledger, store, threads=4)
    assert most == 2
    verify_files(files, ledger, store, threads=2)
    assert most == 2


def test_a_wrong_hash_is_remembered_as_what_it_is(
    tmp_path: Path, ledger: Ledger, store: ChunkHashes
) -> None:
    content = write(tmp_path / "f", 1000)
    file = Expected(str(tmp_path / "f"), 1000, "a" * 64)
    (checked,) = verify_files([file], ledger, store)
    assert checked == Checked(file.path, sha256(content))
    assert ledger.known(facts_of(tmp_path / "f")) == sha256(content)
    assert not store.has(sha256(content), 1000)


def flip_silently(path: Path) -> str:
    """One byte, as a failing disk does: size and time stay. The new sha256."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    return sha256(content)


def test_bytes_that_change_by_themselves_are_told(
    tmp_path: Path, ledger: Ledger, store: ChunkHashes
) -> None:
    path = small_model(tmp_path / "m.gguf")
    age(path)
    (local,) = local_set(path)
    (before,) = verify_files([local], ledger, store)
    assert look([local], ledger).ok
    flipped = flip_silently(path)
    (checked,) = verify_files([local], ledger, store)
    assert checked.sha256 == flipped
    assert checked.problem == (
        f"changed although its size and time did not: its sha256 was {before.sha256}, it is "
        f"{flipped}"
    )
    assert look([local], ledger).worst.fault is Fault.UNVERIFIED
    promised = Expected(str(path), path.stat().st_size, before.sha256)
    verify_files([promised], ledger, store)
    assert look([promised], ledger).worst.fault is Fault.CORRUPT


def test_one_that_cannot_be_hashed_does_not_stop_the_others(
    tmp_path: Path, ledger: Ledger, store: ChunkHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "good", 1000)
    write(tmp_path / "changing", 1000)
    (tmp_path / "directory").mkdir()
    real = hash_file

    def hash_some(path: Path, **more: object) -> object:
        if path.name == "changing":
            raise FileChanged("changed while it was read")
        if path.name == "failing":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing, "hash_file", hash_some)
    names = ["missing", "directory", "changing", "failing", "good"]
    checked = verify_files([Expected(str(tmp_path / name)) for name in names], ledger, store)
    assert [one.problem for one in checked] == [
        "cannot be read: No such file or directory",
        "cannot be read: is not a regular file",
        "changed while it was read",
        "cannot be read: Input/output error",
        None,
    ]
    assert checked[-1].sha256 == sha256(content)


def test_a_state_directory_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path / "f", 1000)
    (tmp_path / "state").write_text("in the way")
    places = Places(tmp_path / "hub", tmp_path / "state", tmp_path / "builtin")
    (checked,) = verify_files(
        [Expected(str(tmp_path / "f"))], Ledger(places.ledger), ChunkHashes(places)
    )
    assert checked.problem is not None
    assert checked.problem.startswith("was hashed, but that cannot be noted")


def test_what_was_hashed_before_a_stop_stays(
    tmp_path: Path, ledger: Ledger, store: ChunkHashes
) -> None:
    files = []
    for number in range(3):
        write(tmp_path / f"f{number}", 1000, seed=number)
        files.append(Expected(str(tmp_path / f"f{number}"), 1000, "a" * 64))
    done: list[int] = []
    with pytest.raises(Stopped):
        verify_files(
            files, ledger, store, stop=lambda: len(done) > 0, progress=done.append, threads=1
        )
    known = [ledger.known(facts_of(Path(file.path))) is not None for file in files]
    assert known == [True, False, False]


def test_a_listener_that_fails_ends_the_hashing(
    tmp_path: Path, ledger: Ledger, store: ChunkHashes
) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("gone")

    write(tmp_path / "f", 1000)
    with pytest.raises(RuntimeError, match="gone"):
        verify_files([Expected(str(tmp_path / "f"))] * 3, ledger, store, progress=fail)
