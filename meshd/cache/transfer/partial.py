"""A file on its way: its bytes, and the journal of which of its chunks are there. Blocking.

The bytes lie where the blob will be, under another name (`Places.partial`), in a file that has its
full size from the start, with holes. The journal is a header and 32 bytes a chunk: its sha256 when
it came, or zeros. A chunk's bytes are written before its line, and its line is cleared before its
bytes are overwritten, so a process may be killed at any moment and no line claims bytes that are
not there. After a loss of power it may: then chunk and line do not match, which is seen before the
file counts (`Plan.torn`), and the sha256 of the whole decides in any case.

One process at a time writes, under the blob's lock; any number read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Self

from meshd.cache.chunks import CHUNK_BYTES, HASH_BYTES, chunk_count, chunk_span
from meshd.cache.hashes import Stopped, damaged_chunks, read_fully
from meshd.cache.manifest import Shard
from meshd.cache.places import Places

MAGIC: Final = b"meshd journal 1\n"
HEADER_BYTES: Final = 64
QUIET_S: Final = 60.0
"""Another program's partial that was not written for so long is nobody's any more."""

Stop = Callable[[], bool]

_EMPTY = bytes(HASH_BYTES)


def _never() -> bool:
    return False


class Partial:
    """Opened for writing. Methods may be called from several threads, for different chunks."""

    def __init__(self, path: Path, journal: Path, size: int, there: Mapping[int, bytes]) -> None:
        self.path = path
        self.size = size
        self.there = dict(there)
        """Chunks that lay there when it was opened, and the hash each had when it came."""
        self._journal_path = journal
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._journal = os.open(journal, os.O_RDWR | os.O_CLOEXEC)

    @classmethod
    def open(
        cls, places: Places, repo: str, shard: Shard, *, own: bytes | None, stop: Stop = _never
    ) -> Self:
        """Go on with what is there: a partial of ours, else what another program left of the file,
        else nothing. `own`: hashes of its chunks, if this machine knows them. The blob's lock must
        be held. Raises OSError, Stopped."""
        path, journal = places.partial(repo, shard.sha256), places.journal(shard.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        journal.parent.mkdir(parents=True, exist_ok=True)
        there = _read_journal(journal, shard.size)
        if there is not None and _is_partial(path, shard.size):
            return cls(path, journal, shard.size, there)
        journal.unlink(missing_ok=True)
        if not _is_regular(path):
            path.unlink(missing_ok=True)
            _adopt(path, shard.sha256)
        there = _make_full(path, shard.size, own, stop)
        _write_journal(journal, shard.size, there)
        return cls(path, journal, shard.size, there)

    @classmethod
    def from_damaged(
        cls, places: Places, repo: str, shard: Shard, own: bytes, *, stop: Stop = _never
    ) -> Self:
        """Make the damaged blob itself the partial, with those of its chunks that are right by the
        `own` hashes. The blob's lock must be held. Raises OSError, Stopped."""
        path, journal = places.partial(repo, shard.sha256), places.journal(shard.sha256)
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.unlink(missing_ok=True)
        blob = places.blob(repo, shard.sha256)
        blob.replace(path)
        path.chmod(path.stat().st_mode | stat.S_IWUSR | stat.S_IRUSR)
        there = _make_full(path, shard.size, own, stop)
        _write_journal(journal, shard.size, there)
        return cls(path, journal, shard.size, there)

    def write(self, index: int, data: memoryview, digest: bytes) -> None:
        """Keep chunk `index`, which hashes to `digest`. Raises OSError."""
        offset = index * CHUNK_BYTES
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)
        os.pwrite(self._journal, digest, HEADER_BYTES + index * HASH_BYTES)

    def read(self, index: int, buffer: memoryview) -> memoryview:
        """Chunk `index`, in `buffer`; shorter only if the file was cut. Raises OSError."""
        offset, length = chunk_span(index, self.size)
        return buffer[: read_fully(self._fd, buffer[:length], offset)]

    def forget(self, indices: Iterable[int]) -> None:
        """These are not there (any more). Raises OSError."""
        for index in indices:
            os.pwrite(self._journal, _EMPTY, HEADER_BYTES + index * HASH_BYTES)

    def sync(self) -> None:
        """Have the bytes on the disk itself."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._journal)

    def discard_journal(self) -> None:
        """It is no partial any more."""
        self._journal_path.unlink(missing_ok=True)


def journal_bits(path: Path | str) -> bytes:
    """One bit a chunk, lowest first: what of the partial with that journal is there. Raises
    OSError; ValueError if it is no journal."""
    found = Path(path).read_bytes()
    size = _size_in(found)
    if size is None:
        raise ValueError("not a journal")
    there = _chunks_in(found, size)
    bits = bytearray(-(-chunk_count(size) // 8))
    for index in there:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def journaled_bytes(path: Path, size: int) -> int:
    """How many bytes of a file of `size` bytes are there by the journal at `path`; 0 without."""
    there = _read_journal(path, size) or {}
    return sum(chunk_span(index, size)[1] for index in there)


def _read_journal(path: Path, size: int) -> dict[int, bytes] | None:
    """None if there is no whole journal for a file of that size."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    return _chunks_in(found, size) if _size_in(found) == size else None


def _size_in(found: bytes) -> int | None:
    if len(found) < HEADER_BYTES or not found.startswith(MAGIC):
        return None
    size = int.from_bytes(found[len(MAGIC) : len(MAGIC) + 8], "little")
    if len(found) != HEADER_BYTES + chunk_count(size) * HASH_BYTES:
        return None
    chunk_bytes = int.from_bytes(found[len(MAGIC) + 8 : len(MAGIC) + 16], "little")
    return size if chunk_bytes == CHUNK_BYTES else None


def _chunks_in(found: bytes, size: int) -> dict[int, bytes]:
    lines = (
        (index, found[start : start + HASH_BYTES])
        for index in range(chunk_count(size))
        if (start := HEADER_BYTES + index * HASH_BYTES)
    )
    return {index: line for index, line in lines if line != _EMPTY}


def _write_journal(path: Path, size: int, there: Mapping[int, bytes]) -> None:
    """A new journal, whole or not at all: a reader must not take a piece of one for one."""
    header = MAGIC + size.to_bytes(8, "little") + CHUNK_BYTES.to_bytes(8, "little")
    lines = bytearray(chunk_count(size) * HASH_BYTES)
    for index, digest in there.items():
        lines[index * HASH_BYTES : (index + 1) * HASH_BYTES] = digest
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(header.ljust(HEADER_BYTES, b"\0") + lines)
    temporary.replace(path)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _is_partial(path: Path, size: int) -> bool:
    return _is_regular(path) and path.lstat().st_size == size


def _make_full(path: Path, size: int, own: bytes | None, stop: Stop) -> dict[int, bytes]:
    """Give the file at `path`, made if need be, its full size. Which chunks of it are worth
    keeping: those that are right by the `own` hashes; without any, those before the first hole,
    unchecked. With the hash each has now."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        filled = min(_first_hole(fd), size)
        os.ftruncate(fd, size)
        if own is not None and filled:
            wrong = set(damaged_chunks(path, own, stop))
            return {
                index: own[index * HASH_BYTES : (index + 1) * HASH_BYTES]
                for index in range(chunk_count(size))
                if index not in wrong
            }
        whole = chunk_count(size) if filled == size else filled // CHUNK_BYTES
        buffer = memoryview(bytearray(CHUNK_BYTES))
        found = {}
        for index in range(whole):
            if stop():
                raise Stopped
            found[index] = _hash_chunk(fd, index, size, buffer)
        return found
    finally:
        os.close(fd)


def _hash_chunk(fd: int, index: int, size: int, buffer: memoryview) -> bytes:
    offset, length = chunk_span(index, size)
    return hashlib.sha256(buffer[: read_fully(fd, buffer[:length], offset)]).digest()


def _first_hole(fd: int) -> int:
    """Offset of the first hole; the size if there is none, or none can be told."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENXIO):
            raise
        return size


def _adopt(path: Path, sha256: str) -> None:
    """Take over the longest of what huggingface_hub left of the file (`<sha256>.incomplete` or
    `<sha256>.<8 hex digits>.incomplete`, from its start on), if nobody writes there any more."""
    pattern = re.compile(re.escape(sha256) + r"(\.[0-9a-f]{8})?\.incomplete")
    found = []
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                if time.time() - status.st_mtime >= QUIET_S:
                    found.append((status.st_size, entry.path))
    if found:
        with contextlib.suppress(FileNotFoundError):
            Path(max(found)[1]).replace(path)
