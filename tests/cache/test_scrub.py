"""The scrub: what is due when, what it finds, at what pace, and that it stops at once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.cache import scrub
from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.facts import COARSE_STEP_NS, FileFacts
from meshd.cache.hashes import ChunkHashes, Stopped
from meshd.cache.hashing import FileChanged
from meshd.cache.ledger import Ledger, LedgerEntry, facts_of
from meshd.cache.places import Places
from meshd.cache.scrub import (
    LONGEST_WAIT_S,
    SHORTEST_WAIT_S,
    Damage,
    Pace,
    Scrubber,
    due,
    due_in_s,
    scrub_file,
)
from meshd.kernel.service import ServiceStack

DAY_S = 86_400.0
LIMIT_S = 10.0


class Bench:
    """Files, a ledger of them, and what was found damaged."""

    def __init__(self, directory: Path) -> None:
        places = Places(directory / "hub", directory / "state", directory / "builtin")
        self.directory = directory
        self.ledger = Ledger(places.ledger)
        self.store = ChunkHashes(places)
        self.damages: list[Damage] = []

    def add(self, name: str, content: bytes = b"bytes", sha256: str | None = None) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        self.ledger.record_landed(path, sha256 or hashlib.sha256(content).hexdigest())
        return path

    def entry(self, path: Path) -> LedgerEntry:
        entry = self.ledger.entry(facts_of(path))
        assert entry is not None
        return entry

    def scrub(self, entry: LedgerEntry) -> Damage | None:
        return scrub_file(
            entry, self.ledger, self.store, stop=lambda: False, advance=lambda _: None
        )

    def scrubber(
        self,
        *,
        period_s: float,
        rate: float = 1e9,
        on_damage: Callable[[Damage], None] | None = None,
    ) -> Scrubber:
        return Scrubber(
            self.ledger,
            self.store,
            period_s=period_s,
            rate=rate,
            on_damage=on_damage or self.damages.append,
            first_wait_s=0.0,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# -- when -----------------------------------------------------------------------------------------


def checked(at: float) -> LedgerEntry:
    return LedgerEntry(FileFacts(f"/{at}", 1, 1, 1, 1), "a" * 64, 0.0, at)


def test_what_is_due() -> None:
    now = 100 * DAY_S
    entries = [checked(now - days * DAY_S) for days in (1, 30, 31, 29.9, -1)]
    ages = [round((now - entry.checked_at) / DAY_S) for entry in due(entries, now, 30 * DAY_S)]
    assert ages == [30, 31, -1]


@given(st.lists(st.floats(-1e9, 1e9)), st.floats(0, 1e9), st.floats(1, 1e9))
def test_everything_is_due_or_waited_for(ats: list[float], now: float, period_s: float) -> None:
    entries = [checked(at) for at in ats]
    wait_s = due_in_s(entries, now, period_s)
    assert SHORTEST_WAIT_S <= wait_s <= LONGEST_WAIT_S
    if SHORTEST_WAIT_S < wait_s < LONGEST_WAIT_S:
        assert due(entries, now + wait_s * 1.001, period_s)


# -- one file -------------------------------------------------------------------------------------


def test_a_good_file_is_noted(bench: Bench) -> None:
    path = bench.add("f")
    before = bench.entry(path)
    assert bench.scrub(before) is None
    after = bench.entry(path)
    assert after.checked_at > before.checked_at
    assert after.hashed_at == before.hashed_at
    assert bench.store.has(after.sha256, 5)  # what was hashed without them has them now


def test_a_rotten_file_is_reported_and_forgotten(bench: Bench) -> None:
    path = bench.add("f", b"bytes", "a" * 64)
    found = hashlib.sha256(b"bytes").hexdigest()
    entry = bench.entry(path)
    problem = "changed although its size and time did not"
    assert bench.scrub(entry) == Damage(str(path), "a" * 64, found, problem)
    assert bench.ledger.known(facts_of(path)) is None
    assert not bench.store.has(found, 5)
    assert bench.scrub(entry) is None  # told once


def test_files_that_went_or_changed_are_forgotten_without_a_word(bench: Bench) -> None:
    gone, changed = bench.add("gone"), bench.add("changed")
    entries = [bench.entry(path) for path in (gone, changed)]
    gone.unlink()
    changed.write_bytes(b"other")
    assert [bench.scrub(entry) for entry in entries] == [None, None]
    assert list(bench.ledger.entries()) == []


def test_a_file_mended_since_is_left_alone(bench: Bench) -> None:
    path = bench.add("f", b"bytes", "a" * 64)
    entry = bench.entry(path)
    bench.add("f")
    assert bench.scrub(entry) is None
    assert bench.entry(path).sha256 == hashlib.sha256(b"bytes").hexdigest()


@pytest.mark.parametrize("told", [True, False])
def test_reading_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch, *, told: bool) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error") if told else FileChanged("changed")

    path = bench.add("f")
    entry = bench.entry(path)
    monkeypatch.setattr(scrub, "hash_file", fail)
    damage = bench.scrub(entry)
    if told:
        words = "cannot be read: Input/output error"
        assert damage == Damage(str(path), entry.sha256, None, words)
        assert list(bench.ledger.entries()) == []
    else:
        assert damage is None
        assert bench.entry(path) == entry


def test_a_stop(bench: Bench) -> None:
    entry = bench.entry(bench.add("f"))
    with pytest.raises(Stopped):
        scrub_file(entry, bench.ledger, bench.store, stop=lambda: True, advance=lambda _: None)


# -- pace -----------------------------------------------------------------------------------------


class Halt(threading.Event):
    """Lets time pass without waiting for it."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.clock[0] += timeout
        return self.is_set()


def test_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = Pace(50e6, Halt(clock))
    for _ in range(25):
        pace.advance(4_000_000)
        clock[0] += 0.01  # reading and hashing
    assert clock[0] - 1000 == pytest.approx(2.0 + 0.01, abs=0.3)
    clock[0] += 3600  # the machine slept; nothing is made up for
    began_at = clock[0]
    pace.advance(100_000_000)
    assert clock[0] - began_at == pytest.approx(2.0)


# -- the service ----------------------------------------------------------------------------------


async def test_everything_due_is_scrubbed_and_damage_told(bench: Bench) -> None:
    good = [bench.add(f"good{number}") for number in range(3)]
    rotten = bench.add("rotten", b"bytes", "a" * 64)
    before = {path: bench.entry(path).checked_at for path in good}
    told = asyncio.Event()

    def tell(damage: Damage) -> None:
        bench.damages.append(damage)
        told.set()

    stack = ServiceStack()
    await stack.start(bench.scrubber(period_s=1e-9, on_damage=tell))
    async with asyncio.timeout(LIMIT_S):
        await told.wait()
    await stack.stop()
    assert [damage.path for damage in bench.damages] == [str(rotten)]
    assert all(bench.entry(path).checked_at > before[path] for path in good)  # oldest first


async def test_nothing_due_nothing_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Event()
    loop = asyncio.get_running_loop()
    bench.add("f", b"bytes", "a" * 64)

    def oldest_checked() -> list[LedgerEntry]:
        found = Ledger.oldest_checked(bench.ledger)
        loop.call_soon_threadsafe(looked.set)
        return found

    monkeypatch.setattr(bench.ledger, "oldest_checked", oldest_checked)
    stack = ServiceStack()
    await stack.start(bench.scrubber(period_s=30 * DAY_S))
    async with asyncio.timeout(LIMIT_S):
        await looked.wait()
    await stack.stop()
    assert bench.damages == []


async def test_it_stops_in_the_middle_of_a_file(bench: Bench) -> None:
    path = bench.add("large", os.urandom(2 * CHUNK_BYTES))
    before = bench.entry(path)
    reading = asyncio.Event()
    loop = asyncio.get_running_loop()
    service = bench.scrubber(period_s=1e-9, rate=1.0)  # the first chunk takes 48 days
    advance = service._pace.advance

    def begun(count: int) -> None:
        loop.call_soon_threadsafe(reading.set)
        advance(count)

    service._pace.advance = begun  # type: ignore[method-assign]
    stack = ServiceStack()
    await stack.start(service)
    async with asyncio.timeout(LIMIT_S):
        await reading.wait()
        await stack.stop()
    assert bench.entry(path) == before
    assert bench.damages == []


async def test_a_full_disk_does_not_take_the_node_down(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.add("f")
    logged = asyncio.Event()
    loop = asyncio.get_running_loop()

    def record(*_: object, **__: object) -> bool:
        loop.call_soon_threadsafe(logged.set)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.ledger, "record", record)
    stack = ServiceStack()
    await stack.start(bench.scrubber(period_s=1e-9))
    async with asyncio.timeout(LIMIT_S):
        await logged.wait()
        await stack.stop()
    assert "cannot be noted" in caplog.text


def test_the_cache_of_pages_is_spared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that was read is given back."""
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, at, length, what: advised.append((at, length, what))
    )
    size = CHUNK_BYTES + 5
    assert bench.scrub(bench.entry(bench.add("f", bytes(size)))) is None
    given_back = [(at, length) for at, length, what in advised if what == os.POSIX_FADV_DONTNEED]
    assert given_back == [(0, CHUNK_BYTES), (CHUNK_BYTES, 5)]


def test_a_landed_file_is_settled(bench: Bench) -> None:
    assert facts_of(bench.add("f")).mtime_ns < time.time_ns() - COARSE_STEP_NS
