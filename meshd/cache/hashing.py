"""Hashing files: the sha256 of the whole and, in the same pass, those of its chunks.

Blocking; hashlib lets other threads run meanwhile. Hashes of chunks are made by a second thread
out of the same buffers, so that with a free core they cost no time; hashed as one, two hashes of a
byte take twice the work, so a file whose chunk hashes are known already is hashed once only.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshd.cache.chunks import CHUNK_BYTES, chunk_count, chunk_span
from meshd.cache.facts import FileFacts, settles_in_ns
from meshd.cache.hashes import ChunkHashes, Stopped, cores, read_fully
from meshd.cache.ledger import Ledger, facts_from, facts_of_open
from meshd.cache.verdict import Expected

BUFFERS: Final = 3
"""One is filled and hashed whole, one hashed as a chunk, one waits between them."""
MAX_THREADS: Final = 8
SETTLE_POLL_S: Final = 0.02
SETTLE_LIMIT_S: Final = 3.0

Stop = Callable[[], bool]
Advance = Callable[[int], None]
"""Told how many more bytes were hashed; it may block, which slows the hashing down."""
Progress = Callable[[int], None]
"""Told how many bytes are done by now."""


class FileChanged(Exception):
    """The file was written or replaced while it was read; the hash would be of nothing."""


@dataclass(frozen=True, slots=True)
class FileHash:
    facts: FileFacts
    """The same before and after."""
    read_from_ns: int
    """Unix time reading began; for `Ledger.record`."""
    sha256: str
    chunk_hashes: bytes | None
    """None if they were not asked for."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of verifying one file; exactly one of `sha256` and `problem`, or both when the
    bytes changed and the file's size and time did not."""

    path: str
    sha256: str | None = None
    problem: str | None = None


def hash_file(
    path: Path,
    *,
    stop: Stop = lambda: False,
    advance: Advance = lambda _: None,
    chunks: bool = True,
    spare_cache: bool = False,
) -> FileHash:
    """Hash the regular file at `path`, links followed; waits up to 2 s if it is brand-new.

    `spare_cache`: leave no trace in the page cache, where weights of engines may lie. Raises
    OSError, FileChanged, Stopped.
    """
    # Without O_NONBLOCK a named pipe would keep us until somebody writes into it.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = facts_of_open(fd, str(path), _settled(fd, stop))
        read_from_ns = time.time_ns()
        _advise(fd, "POSIX_FADV_SEQUENTIAL")
        whole, parts = _hash(fd, facts.size, stop, advance, chunks=chunks, spare_cache=spare_cache)
        # By name, too: it may have been replaced, and the next reader gets the other file.
        for now in (os.fstat(fd), path.stat()):
            if not facts.same_bytes(facts_from(facts.real_path, now)):
                raise FileChanged("changed while it was read")
        return FileHash(facts, read_from_ns, whole, parts)
    finally:
        os.close(fd)


def verify_files(
    files: Sequence[Expected],
    ledger: Ledger,
    store: ChunkHashes,
    *,
    stop: Stop = lambda: False,
    progress: Progress = lambda _: None,
    threads: int | None = None,
) -> tuple[Checked, ...]:
    """Hash `files` and remember what came out, in the ledger and, for what is as expected, the
    hashes of chunks; what that means says a look (`weights.look`) afterwards.

    `progress` is told the bytes done so far; `threads` (default: one a core) are shared by the
    files. What is wrong with a file is in its `Checked`. Raises Stopped; what was done by then
    stays done.
    """
    work = _Verification(ledger, store, stop, progress)
    budget = min(threads or cores(), MAX_THREADS)
    each = 1 if all(work.knows_chunks(file) for file in files) else 2
    with ThreadPoolExecutor(max(1, budget // each), thread_name_prefix="meshd-verify") as pool:
        futures = [pool.submit(work.check, file) for file in files]
        try:
            return tuple(future.result() for future in futures)
        except BaseException:
            work.abandon()
            raise


class _Verification:
    """One call of `verify_files`, shared by its threads."""

    def __init__(self, ledger: Ledger, store: ChunkHashes, stop: Stop, progress: Progress) -> None:
        self._ledger = ledger
        self._store = store
        self._stop = stop
        self._progress = progress
        self._abandoned = threading.Event()
        self._lock = threading.Lock()
        self._done_bytes = 0

    def abandon(self) -> None:
        self._abandoned.set()

    def knows_chunks(self, file: Expected) -> bool:
        return (
            file.sha256 is not None
            and file.size is not None
            and self._store.has(file.sha256, file.size)
        )

    def check(self, file: Expected) -> Checked:
        try:
            hashed = hash_file(
                Path(file.path),
                stop=self._is_stopped,
                advance=self._advance,
                chunks=not self.knows_chunks(file),
            )
        except FileChanged as error:
            return Checked(file.path, problem=str(error))
        except OSError as error:
            return Checked(file.path, problem=f"cannot be read: {error.strerror or error}")
        try:
            return self._remember(file, hashed)
        except OSError as error:
            problem = f"was hashed, but that cannot be noted: {error.strerror or error}"
            return Checked(file.path, problem=problem)

    def _remember(self, file: Expected, hashed: FileHash) -> Checked:
        before = self._ledger.known(hashed.facts)
        problem = None
        if before is not None and before != hashed.sha256:
            problem = (
                f"changed although its size and time did not: its sha256 was {before}, it is "
                f"{hashed.sha256}"
            )
        if problem is not None and file.sha256 is None:
            # Nothing else could tell afterwards that these are not the bytes they were.
            self._ledger.forget(hashed.facts.real_path)
            return Checked(file.path, hashed.sha256, problem)
        # Before the ledger: what it knows is not hashed again, and would stay without them.
        if hashed.chunk_hashes is not None and file.sha256 in (None, hashed.sha256):
            self._store.save(hashed.sha256, hashed.chunk_hashes)
        if not self._ledger.record(hashed.facts, hashed.sha256, read_from_ns=hashed.read_from_ns):
            return Checked(file.path, problem="is being written; verify it again later")
        return Checked(file.path, hashed.sha256, problem)

    def _is_stopped(self) -> bool:
        return self._abandoned.is_set() or self._stop()

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done_bytes += count
            self._progress(self._done_bytes)


def _hash(
    fd: int, size: int, stop: Stop, advance: Advance, *, chunks: bool, spare_cache: bool
) -> tuple[str, bytes | None]:
    """The sha256 of the first `size` bytes, and of their chunks if wanted; less if there is less,
    which is for the caller to notice."""
    whole = hashlib.sha256()
    with _Chunks(chunks) as parts:
        for index in range(chunk_count(size)):
            if stop():
                raise Stopped
            offset, expected = chunk_span(index, size)
            data = parts.buffer(index)[:expected]
            length = read_fully(fd, data, offset)
            if length < expected:
                break
            parts.begin(data)
            whole.update(data)
            if spare_cache:
                _advise(fd, "POSIX_FADV_DONTNEED", offset, length)
            advance(length)
        return whole.hexdigest(), parts.finish()


class _Chunks:
    """Buffers, and the thread that hashes each as a chunk while it is hashed as part of the whole;
    if the hashes are not wanted, one buffer only."""

    def __init__(self, wanted: bool) -> None:
        self._buffers = [
            memoryview(bytearray(CHUNK_BYTES)) for _ in range(BUFFERS if wanted else 1)
        ]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="meshd-chunks") if wanted else None
        self._pending: deque[Future[bytes]] = deque()
        self._hashes = bytearray()

    def __enter__(self) -> _Chunks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def buffer(self, index: int) -> memoryview:
        """The buffer for chunk `index`, once nobody reads it any more."""
        while len(self._pending) >= len(self._buffers):
            self._hashes += self._pending.popleft().result()
        return self._buffers[index % len(self._buffers)]

    def begin(self, data: memoryview) -> None:
        if self._pool is not None:
            self._pending.append(self._pool.submit(_digest, data))

    def finish(self) -> bytes | None:
        while self._pending:
            self._hashes += self._pending.popleft().result()
        return bytes(self._hashes) if self._pool is not None else None


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _settled(fd: int, stop: Stop) -> os.stat_result:
    """The state of the file once a write would leave another time than it has: 0.1 s after the
    last one, or 2 s where times are coarse."""
    give_up_at = time.monotonic() + SETTLE_LIMIT_S
    while True:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        wait_ns = settles_in_ns(status.st_mtime_ns, time.time_ns())
        if wait_ns == 0:
            return status
        if stop():
            raise Stopped
        if time.monotonic() > give_up_at:
            raise FileChanged("is being written")
        time.sleep(min(wait_ns / 1e9, SETTLE_POLL_S))


def _advise(fd: int, advice: str, offset: int = 0, length: int = 0) -> None:
    """Tell the kernel how the file is read, where that can be said."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, offset, length, getattr(os, advice))
