"""The scrub: files that were verified once are hashed again now and then, as disks forget.

What is due says `due`, a function of the ledger and the time; `scrub_file` does one file, blocking;
`Scrubber` runs it in a thread, slowly, without filling the page cache in which engines keep their
weights. It changes no file: it reports what is damaged and makes the ledger forget it, so that the
next look at the set finds it unverified.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshd.cache.hashes import ChunkHashes, Stopped
from meshd.cache.hashing import Advance, FileChanged, Stop, hash_file
from meshd.cache.ledger import Ledger, LedgerEntry, facts_of
from meshd.kernel.pool import Pool
from meshd.kernel.service import Service

log = logging.getLogger(__name__)

FIRST_WAIT_S: Final = 60.0
"""After the start: models are loaded first."""
SHORTEST_WAIT_S: Final = 600.0
"""Between rounds: what could not be hashed now is not tried for ever."""
LONGEST_WAIT_S: Final = 3600.0
"""Files are added and clocks are set."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not any more what was verified, though its size and time are the same."""

    path: str
    expected: str
    """sha256."""
    found: str | None
    """sha256; None if it cannot be read."""
    problem: str
    """Words to follow the path."""


def due(entries: Iterable[LedgerEntry], now: float, period_s: float) -> list[LedgerEntry]:
    """Those of `entries`, in their order, that were not checked for `period_s`, or in the future:
    a clock that was set back spares no file for ever."""
    return [entry for entry in entries if not 0 <= now - entry.checked_at < period_s]


def due_in_s(entries: Iterable[LedgerEntry], now: float, period_s: float) -> float:
    """How long until something is due, within the bounds above."""
    next_at = min((entry.checked_at + period_s for entry in entries), default=now + LONGEST_WAIT_S)
    return min(max(next_at - now, SHORTEST_WAIT_S), LONGEST_WAIT_S)


class Pace:
    """Lets bytes pass at a rate; waiting ends when `halt` is set. For one thread."""

    def __init__(self, rate: float, halt: threading.Event) -> None:
        self._rate = rate
        self._halt = halt
        self._free_at = 0.0

    def advance(self, count: int) -> None:
        """Return when `count` bytes, just read, have taken the time they may take."""
        now = time.monotonic()
        # Not from the first byte on: after a pause of the machine nothing is to be made up for.
        self._free_at = max(self._free_at, now) + count / self._rate
        self._halt.wait(self._free_at - now)


def scrub_file(
    entry: LedgerEntry, ledger: Ledger, store: ChunkHashes, *, stop: Stop, advance: Advance
) -> Damage | None:
    """Hash the file of `entry` again and note the result in the ledger; what is damaged, or None.

    A file that is gone, or was changed as files are, is forgotten without a word. Raises Stopped.
    """
    path = Path(entry.facts.real_path)
    try:
        known = ledger.known(facts_of(path))
        if known is None:
            ledger.forget(path)
        if known != entry.sha256:
            return None  # changed, or mended and verified since the round began
        chunks = not store.has(entry.sha256, entry.facts.size)
        hashed = hash_file(path, stop=stop, advance=advance, chunks=chunks, spare_cache=True)
    except FileNotFoundError:
        ledger.forget(path)
        return None
    except FileChanged:
        return None  # whoever writes it now is not done; the next round looks again
    except OSError as error:
        ledger.forget(path)
        problem = f"cannot be read: {error.strerror or error}"
        return Damage(str(path), entry.sha256, None, problem)
    if not hashed.facts.same_bytes(entry.facts):
        return None
    if hashed.sha256 != entry.sha256:
        ledger.forget(path)
        problem = "changed although its size and time did not"
        return Damage(str(path), entry.sha256, hashed.sha256, problem)
    if hashed.chunk_hashes is not None:
        store.save(hashed.sha256, hashed.chunk_hashes)
    ledger.record(hashed.facts, hashed.sha256, read_from_ns=hashed.read_from_ns)
    return None


class Scrubber(Service):
    """Scrubs everything in the ledger every `period_s`, at `rate` bytes/s at most."""

    name = "scrub"

    def __init__(
        self,
        ledger: Ledger,
        store: ChunkHashes,
        *,
        period_s: float,
        rate: float,
        on_damage: Callable[[Damage], None],
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        """`on_damage` is called in the loop, once for each damaged file."""
        super().__init__()
        self._ledger = ledger
        self._store = store
        self._period_s = period_s
        self._on_damage = on_damage
        self._first_wait_s = first_wait_s
        self._halt = threading.Event()
        self._pace = Pace(rate, self._halt)

    async def main(self) -> None:
        pool = Pool(self.name, workers=1)
        try:
            self.ready.set()
            rounds = self.spawn(self._rounds(pool), name="rounds")
            await self.stopping.wait()
            self._halt.set()
            await asyncio.wait({rounds})
        finally:
            self._halt.set()  # the thread ends within a chunk, even if we are cancelled
            pool.close()

    async def _rounds(self, pool: Pool) -> None:
        pause_s = self._first_wait_s
        while not await self._stopped_within(pause_s):
            entries = await pool.run(self._ledger.oldest_checked)
            for entry in due(entries, time.time(), self._period_s):
                damage = await pool.run(self._scrub, entry)
                if damage is not None:
                    self._on_damage(damage)
                if self.stopping.is_set():
                    return
            entries = await pool.run(self._ledger.oldest_checked)
            pause_s = due_in_s(entries, time.time(), self._period_s)

    def _scrub(self, entry: LedgerEntry) -> Damage | None:
        try:
            return scrub_file(
                entry,
                self._ledger,
                self._store,
                stop=self._halt.is_set,
                advance=self._pace.advance,
            )
        except Stopped:
            return None
        except OSError as error:
            log.warning("what was scrubbed cannot be noted: %s", error)
            return None

    async def _stopped_within(self, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await self.stopping.wait()
        except TimeoutError:
            return False
        return True
