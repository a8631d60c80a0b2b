"""The ledger: what it remembers, when it must not, and that nothing tears it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.cache.facts import (
    COARSE_STEP_NS,
    FINE_STEP_NS,
    FileFacts,
    is_settled,
    settles_in_ns,
)
from meshd.cache.ledger import Ledger, facts_of, facts_of_open

A, B = "a" * 64, "b" * 64
OLD_NS = 1_600_000_000_123_456_789


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "ledger")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"bytes")
    os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


def test_what_was_recorded_is_known(ledger: Ledger, file: Path) -> None:
    facts = facts_of(file)
    assert ledger.known(facts) is None
    assert ledger.record(facts, A, read_from_ns=time.time_ns())
    assert ledger.known(facts) == A
    entry = ledger.entry(facts)
    assert entry is not None
    assert entry.hashed_at == entry.checked_at == pytest.approx(time.time(), abs=60)
    ledger.forget(file)
    assert ledger.known(facts) is None
    ledger.forget(file)


def test_every_name_of_a_file_is_one_entry(ledger: Ledger, file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    ledger.record(facts_of(link), A, read_from_ns=time.time_ns())
    assert ledger.known(facts_of(file)) == A
    with link.open("rb") as opened:
        fd = opened.fileno()
        assert facts_of_open(fd, str(link), os.fstat(fd)) == facts_of(file)
        file.unlink()
        gone = facts_of_open(fd, str(link), os.fstat(fd))
    assert gone.real_path == str(file)
    ledger.forget(link)
    assert ledger.known(gone) is None


@pytest.mark.parametrize(
    "change",
    [
        {"size": 6},
        {"mtime_ns": OLD_NS + 1},
        {"inode": 1},
        {"real_path": "/elsewhere"},
    ],
)
def test_a_changed_file_is_not_known(
    ledger: Ledger, file: Path, change: dict[str, int | str]
) -> None:
    facts = facts_of(file)
    ledger.record(facts, A, read_from_ns=time.time_ns())
    assert ledger.known(replace(facts, **change)) is None  # type: ignore[arg-type]


def test_a_new_name_or_mode_is_no_change(ledger: Ledger, file: Path) -> None:
    ledger.record(facts_of(file), A, read_from_ns=time.time_ns())
    file.chmod(0o600)
    assert ledger.known(facts_of(file)) == A


def test_a_check_keeps_when_it_was_hashed_first(ledger: Ledger, file: Path) -> None:
    facts = facts_of(file)
    ledger.record(facts, A, read_from_ns=time.time_ns())
    first = ledger.entry(facts)
    ledger.record(facts, A, read_from_ns=time.time_ns())
    again = ledger.entry(facts)
    ledger.record(facts, B, read_from_ns=time.time_ns())
    other = ledger.entry(facts)
    assert first is not None
    assert again is not None
    assert other is not None
    assert again.hashed_at == first.hashed_at < again.checked_at
    assert other.hashed_at == other.checked_at > first.hashed_at


def test_paths_of_any_bytes(ledger: Ledger, tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\xc3\xa9\n\"'.gguf"))
    path.write_bytes(b"bytes")
    os.utime(path, ns=(OLD_NS, OLD_NS))
    ledger.record(facts_of(path), A, read_from_ns=time.time_ns())
    assert ledger.known(facts_of(path)) == A
    assert [entry.facts for entry in ledger.entries()] == [facts_of(path)]


# -- steps of time --------------------------------------------------------------------------------


def test_a_file_read_right_after_it_was_written_is_not_recorded(ledger: Ledger, file: Path) -> None:
    """A second write in the same step of the clock would leave no trace."""
    read_from_ns = OLD_NS + FINE_STEP_NS - 1
    assert not ledger.record(facts_of(file), A, read_from_ns=read_from_ns)
    assert ledger.known(facts_of(file)) is None
    assert ledger.record(facts_of(file), A, read_from_ns=OLD_NS + FINE_STEP_NS)


def test_the_trap_itself(ledger: Ledger, file: Path) -> None:
    """Written, hashed, written again with the same length: never known by the first hash."""
    for content in (b"first", b"other"):
        file.write_bytes(content)
        read_from_ns = time.time_ns()
        ledger.record(facts_of(file), A, read_from_ns=read_from_ns)
        file.write_bytes(content[::-1])
        assert ledger.known(facts_of(file)) is None


def test_a_landed_file_is_known_at_once_and_every_later_write_shows(
    ledger: Ledger, file: Path
) -> None:
    file.write_bytes(b"first")
    facts = ledger.record_landed(file, A)
    assert ledger.known(facts) == ledger.known(facts_of(file)) == A
    assert is_settled(facts.mtime_ns, time.time_ns())
    file.write_bytes(b"other")
    assert ledger.known(facts_of(file)) is None


@given(mtime_ns=st.integers(0, 2**62), apart_ns=st.integers(-3 * 10**9, 3 * 10**9))
def test_after_the_wait_a_later_write_has_another_time(mtime_ns: int, apart_ns: int) -> None:
    now_ns = mtime_ns + apart_ns
    wait_ns = settles_in_ns(mtime_ns, now_ns)
    assert 0 <= wait_ns <= 2 * COARSE_STEP_NS
    assert is_settled(mtime_ns, now_ns) == (wait_ns == 0)
    assert is_settled(mtime_ns, now_ns + wait_ns)
    if is_settled(mtime_ns, now_ns) and apart_ns >= 0:
        step_ns = COARSE_STEP_NS if mtime_ns % 10**9 == 0 else FINE_STEP_NS
        assert now_ns // step_ns != mtime_ns // step_ns


# -- many, and at once ----------------------------------------------------------------------------


def _facts(number: int) -> FileFacts:
    return FileFacts(f"/hub/blobs/{number:064d}", number, OLD_NS + number, number, 0)


def test_oldest_first(ledger: Ledger) -> None:
    numbers = [3, 1, 2]
    for number in numbers:
        ledger.record(_facts(number), A, read_from_ns=time.time_ns())
    assert [entry.facts.size for entry in ledger.oldest_checked()] == numbers
    ledger.record(_facts(3), A, read_from_ns=time.time_ns())
    assert [entry.facts.size for entry in ledger.oldest_checked()] == [1, 2, 3]


def test_no_ledger_yet(ledger: Ledger) -> None:
    assert ledger.oldest_checked() == []
    ledger.forget("/nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'{"format": 2}',
        b"\xff\xfe",
        b"[" * 20_000,
    ],
)
def test_a_torn_entry_is_none(ledger: Ledger, tmp_path: Path, damage: bytes) -> None:
    ledger.record(_facts(1), A, read_from_ns=time.time_ns())
    ledger.record(_facts(2), A, read_from_ns=time.time_ns())
    (place,) = (
        path
        for path in (tmp_path / "state" / "ledger").iterdir()
        if f"{1:064d}" in path.read_text()
    )
    place.write_bytes(damage)
    assert ledger.known(_facts(1)) is None
    assert [entry.facts for entry in ledger.entries()] == [_facts(2)]
    ledger.record(_facts(1), B, read_from_ns=time.time_ns())
    assert ledger.known(_facts(1)) == B


def test_an_entry_cut_anywhere_is_none(ledger: Ledger, tmp_path: Path) -> None:
    ledger.record(_facts(1), A, read_from_ns=time.time_ns())
    (place,) = (tmp_path / "state" / "ledger").iterdir()
    whole = place.read_bytes()
    for length in range(len(whole)):
        place.write_bytes(whole[:length])
        assert ledger.known(_facts(1)) is None


def test_threads_do_not_disturb_each_other(ledger: Ledger) -> None:
    def work(thread: int) -> None:
        for number in range(20):
            ledger.record(_facts(number), f"{thread:x}" * 64, read_from_ns=time.time_ns())
            assert ledger.known(_facts(number)) in {f"{other:x}" * 64 for other in range(4)}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(ledger.oldest_checked()) == 20


WRITER = """
import sys, time
from pathlib import Path
from meshd.cache.facts import FileFacts
from meshd.cache.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
print("begun", flush=True)
for turn in range(1_000_000):
    number = turn % 50
    facts = FileFacts(f"/hub/blobs/{number:064d}", number, 1600000000123456789 + number, number, 0)
    ledger.record(facts, f"{number % 16:x}" * 64, read_from_ns=time.time_ns())
"""


def test_killed_at_any_moment_it_still_tells_the_truth(tmp_path: Path) -> None:
    directory = tmp_path / "ledger"
    ledger = Ledger(directory)
    chance = random.Random(4)
    for _ in range(4):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        looks = chance.randrange(20, 200)
        for number in (chance.randrange(50) for _ in range(looks)):
            assert ledger.known(_facts(number)) in (None, f"{number % 16:x}" * 64)
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
        for entry in ledger.entries():
            assert entry.sha256 == f"{entry.facts.size % 16:x}" * 64
    assert list(ledger.entries())


def test_ten_thousand_entries_are_as_quick_as_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(_facts(0), A, read_from_ns=time.time_ns())
    (place,) = tmp_path.iterdir()
    for number in range(1, 10_000):
        (tmp_path / f"{number:040x}.json").hardlink_to(place)
    began_at = time.process_time()
    for _ in range(100):
        assert ledger.known(_facts(0)) == A
    assert time.process_time() - began_at < 0.1
