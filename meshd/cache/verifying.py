"""Verifying files from within the loop: hashing in a pool, with words on how far it is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from meshd.cache.hashes import Stopped
from meshd.cache.hashing import Checked, verify_files
from meshd.cache.store import Store
from meshd.cache.verdict import Expected
from meshd.kernel import Pool
from meshd.view import FetchView, ModelState, Preparing

AT_ONCE: Final = 2
"""Sets; each uses several threads."""
TELL_EVERY_S: Final = 0.25

Moved: TypeAlias = Callable[[Preparing], None]


class Verifier:
    def __init__(self, store: Store) -> None:
        self.verified_bytes = 0
        """Since the process began; whoever verifies otherwise, as a fetch does, adds to it."""
        self._store = store
        self._pool = Pool("hash", workers=AT_ONCE)

    def close(self) -> None:
        self._pool.close()

    async def verify(
        self, files: Sequence[Expected], total_bytes: int, moved: Moved
    ) -> tuple[Checked, ...]:
        """Hash `files`, of so many bytes together; look at them again afterwards.

        Cancelling it ends the hashing within a chunk; what was done by then stays done.
        """
        meter = _Meter(total_bytes, moved)
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()

        def progress(done_bytes: int) -> None:
            if meter.is_due(done_bytes):
                loop.call_soon_threadsafe(meter.tell, done_bytes)

        try:
            checked = await self._pool.run(
                verify_files,
                files,
                self._store.ledger,
                self._store.chunks,
                stop=abandoned.is_set,
                progress=progress,
            )
        except Stopped:  # only by our own leaving
            raise asyncio.CancelledError from None
        finally:
            abandoned.set()
        self.verified_bytes += total_bytes
        return checked


class _Meter:
    """Turns bytes hashed into words now and then. `is_due` may be called by any thread."""

    def __init__(self, total_bytes: int, moved: Moved) -> None:
        self._total_bytes = total_bytes
        self._moved = moved
        self._started_at = self._told_at = time.monotonic()

    def is_due(self, done_bytes: int) -> bool:
        now = time.monotonic()
        if now - self._told_at < TELL_EVERY_S and done_bytes < self._total_bytes:
            return False
        self._told_at = now
        return True

    def tell(self, done_bytes: int) -> None:
        rate = done_bytes / max(1e-3, time.monotonic() - self._started_at)
        left = max(0, self._total_bytes - done_bytes)
        fetch = FetchView(done_bytes, self._total_bytes, rate, left / rate if rate else None)
        progress = min(1.0, done_bytes / max(1, self._total_bytes))
        self._moved(Preparing(ModelState.VERIFYING, "hashing the weights", progress, fetch))
