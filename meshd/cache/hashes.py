"""Hashes of chunks: kept for files that were verified whole, to find what of them is damaged.

Blocking. One file per sha256 (`Places.chunk_hashes`): 32 bytes a chunk, in order, nothing else, so
that it can be sent to another node as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from meshd.cache.chunks import CHUNK_BYTES, HASH_BYTES, chunk_count
from meshd.cache.places import Places
from meshd.kernel.files import write_atomic


class Stopped(Exception):
    """Whoever asked for the hashing does not want it any more."""


class ChunkHashes:
    """The store. Safe for several processes: files are replaced whole."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def load(self, sha256: str, size: int) -> bytes | None:
        """The hashes of the file with that sha256 and size; None if there are none that fit it."""
        length = chunk_count(size) * HASH_BYTES
        try:
            with self._places.chunk_hashes(sha256).open("rb") as file:
                found = file.read(length + 1)
        except OSError:
            return None
        return found if len(found) == length else None

    def has(self, sha256: str, size: int) -> bool:
        """Whether `load` would find them, without reading them."""
        try:
            length = self._places.chunk_hashes(sha256).stat().st_size
        except OSError:
            return False
        return length == chunk_count(size) * HASH_BYTES

    def save(self, sha256: str, hashes: bytes) -> None:
        """Keep the hashes of a file that was found to have that sha256. Raises OSError."""
        path = self._places.chunk_hashes(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, hashes)

    def forget(self, sha256: str) -> None:
        with contextlib.suppress(OSError):
            self._places.chunk_hashes(sha256).unlink()


def damaged_chunks(
    path: Path, hashes: bytes, stop: Callable[[], bool] = lambda: False
) -> tuple[int, ...]:
    """Which chunks of the file at `path` do not have their hash, those it lacks included.

    What lies behind the last chunk is not looked at, except that a last chunk which goes on is
    damaged. Uses every core. Raises OSError, Stopped.
    """
    count = len(hashes) // HASH_BYTES
    threads = max(1, min(cores(), 4, count))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="meshd-chunks") as pool:
            parts = [
                pool.submit(_damaged_among, fd, range(first, count, threads), hashes, stop)
                for first in range(threads)
            ]
            return tuple(sorted(index for part in parts for index in part.result()))
    finally:
        os.close(fd)


def cores() -> int:
    """How many threads of this process can run at once."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _damaged_among(fd: int, indexes: range, hashes: bytes, stop: Callable[[], bool]) -> list[int]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    damaged = []
    for index in indexes:
        if stop():
            raise Stopped
        length = read_fully(fd, buffer, index * CHUNK_BYTES)
        found = hashlib.sha256(buffer[:length]).digest()
        if length == 0 or found != hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]:
            damaged.append(index)
    return damaged


def read_fully(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` on; how many bytes there were, fewer only at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
