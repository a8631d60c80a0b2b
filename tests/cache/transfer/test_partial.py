"""Partials: what is there after any end of the process that wrote it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.manifest import Shard
from meshd.cache.transfer.partial import Partial, journal_bits, journaled_bytes
from tests.cache.transfer.world import REPO, chunk_hashes, content, flipped, places_in, sha256

DATA = content(1, 3 * CHUNK_BYTES + 100)
SHARD = Shard(path="a.gguf", size=len(DATA), sha256=sha256(DATA))


def chunk(index: int) -> bytes:
    return DATA[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


def digest(index: int) -> bytes:
    return hashlib.sha256(chunk(index)).digest()


def open_partial(home: Path, own: bytes | None = None) -> Partial:
    return Partial.open(places_in(home), REPO, SHARD, own=own)


def write(partial: Partial, *indices: int) -> None:
    for index in indices:
        partial.write(index, memoryview(chunk(index)), digest(index))


def journal_of(home: Path) -> Path:
    return places_in(home).journal(SHARD.sha256)


def test_a_new_one_is_full_of_holes(tmp_path: Path) -> None:
    partial = open_partial(tmp_path)
    assert partial.there == {}
    status = partial.path.stat()
    assert status.st_size == len(DATA)
    assert status.st_blocks * 512 < CHUNK_BYTES
    assert journal_bits(journal_of(tmp_path)) == b"\0"
    partial.close()


def test_what_was_written_is_there_the_next_time(tmp_path: Path) -> None:
    partial = open_partial(tmp_path)
    write(partial, 3, 1)
    partial.close()
    again = open_partial(tmp_path)
    assert again.there == {1: digest(1), 3: digest(3)}
    buffer = memoryview(bytearray(CHUNK_BYTES))
    assert again.read(3, buffer) == chunk(3)
    assert journal_bits(journal_of(tmp_path)) == bytes([0b1010])
    assert journaled_bytes(journal_of(tmp_path), len(DATA)) == CHUNK_BYTES + 100
    again.forget((1,))
    again.close()
    third = open_partial(tmp_path)
    assert list(third.there) == [3]
    third.close()


def test_another_size_or_a_torn_journal_counts_for_nothing(tmp_path: Path) -> None:
    partial = open_partial(tmp_path)
    write(partial, 1)
    partial.close()
    journal = journal_of(tmp_path)
    journal.write_bytes(journal.read_bytes()[:-1])
    assert journaled_bytes(journal, len(DATA)) == 0
    with pytest.raises(ValueError, match="not a journal"):
        journal_bits(journal)
    again = open_partial(tmp_path)
    assert again.there == {}
    again.close()


def test_a_journal_without_its_file_claims_nothing(tmp_path: Path) -> None:
    partial = open_partial(tmp_path)
    write(partial, 0)
    partial.close()
    partial.path.unlink()
    again = open_partial(tmp_path)
    assert again.there == {}
    again.close()


def test_a_lost_journal_is_made_again_up_to_the_first_hole(tmp_path: Path) -> None:
    partial = open_partial(tmp_path)
    write(partial, 0, 1, 3)
    partial.close()
    journal_of(tmp_path).unlink()
    again = open_partial(tmp_path)
    assert again.there == {0: digest(0), 1: digest(1)}
    again.close()


def test_a_lost_journal_is_made_again_wholly_with_own_hashes(tmp_path: Path) -> None:
    partial = open_partial(tmp_path)
    write(partial, 0, 1, 3)
    partial.close()
    journal_of(tmp_path).unlink()
    again = open_partial(tmp_path, chunk_hashes(DATA))
    assert sorted(again.there) == [0, 1, 3]
    again.close()


@pytest.mark.parametrize("ending", ["incomplete", "0123abcd.incomplete"])
@pytest.mark.parametrize(("age_s", "adopted"), [(3600, True), (0, False)])
def test_what_huggingface_hub_left_is_taken_over_once_it_is_quiet(
    tmp_path: Path, age_s: int, adopted: bool, ending: str
) -> None:
    path = places_in(tmp_path).partial(REPO, SHARD.sha256)
    path.parent.mkdir(parents=True)
    left = path.with_name(f"{SHARD.sha256}.{ending}")
    left.write_bytes(DATA[: 2 * CHUNK_BYTES + 5])
    os.utime(left, (left.stat().st_mtime - age_s,) * 2)
    partial = open_partial(tmp_path)
    assert sorted(partial.there) == ([0, 1] if adopted else [])
    assert left.exists() is not adopted
    partial.close()


def test_a_link_is_never_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(DATA[:10])
    path = places_in(tmp_path).partial(REPO, SHARD.sha256)
    path.parent.mkdir(parents=True)
    path.symlink_to(precious)
    partial = open_partial(tmp_path)
    write(partial, 0)
    partial.close()
    assert precious.read_bytes() == DATA[:10]


@pytest.mark.parametrize(
    "damaged",
    [
        flipped(DATA, CHUNK_BYTES + 7),
        DATA[: CHUNK_BYTES + 7],
        DATA[:CHUNK_BYTES] + b"long" * len(DATA),
    ],
    ids=["flipped", "short", "long"],
)
def test_a_damaged_blob_becomes_its_own_partial(tmp_path: Path, damaged: bytes) -> None:
    blob = places_in(tmp_path).blob(REPO, SHARD.sha256)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(damaged)
    blob.chmod(0o444)
    partial = Partial.from_damaged(places_in(tmp_path), REPO, SHARD, chunk_hashes(DATA))
    right = [i for i in range(4) if damaged[i * CHUNK_BYTES :][: len(chunk(i))] == chunk(i)]
    assert sorted(partial.there) == right
    assert 0 in right
    assert 1 not in right
    assert not blob.exists()
    write(partial, *(i for i in range(4) if i not in right))
    partial.close()
    assert partial.path.read_bytes() == DATA


WRITER = """
import hashlib, random, sys
from pathlib import Path
from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.manifest import Shard
from meshd.cache.places import Places
from meshd.cache.transfer.partial import Partial
data = random.Random(1).randbytes(3 * CHUNK_BYTES + 100)
shard = Shard(path="a.gguf", size=len(data), sha256=hashlib.sha256(data).hexdigest())
home = Path(sys.argv[1])
places = Places(home / "hub", home / "state", home / "builtin")
partial = Partial.open(places, "owner/Name-GGUF", shard, own=None)
chunks = [memoryview(data)[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES] for i in range(4)]
while True:
    for index in (2, 0, 3, 1):
        partial.forget((index,))
        partial.write(index, chunks[index], hashlib.sha256(chunks[index]).digest())
        print(flush=True)
"""


def test_kill_9_never_leaves_a_claim_without_its_bytes(tmp_path: Path) -> None:
    for round_number in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(1 + 3 * round_number):  # another moment each time
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        again = open_partial(tmp_path)
        assert again.there
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for index, told in again.there.items():
            assert hashlib.sha256(again.read(index, buffer)).digest() == told == digest(index)
        again.close()
