"""Looking at files of weights without reading them through: facts, header, what is foreign.

Blocking, well below a millisecond a shard. What is wrong is part of what is seen: nothing is
raised. Links are followed; everything said is of the file that was opened at their end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Final

from meshd.cache.facts import FileFacts
from meshd.cache.gguf_cursor import GgufError, GgufTruncated, NeedMore, Walks
from meshd.cache.gguf_header import GgufHeader, parse_header
from meshd.cache.headers import Headers
from meshd.cache.ledger import facts_of_open
from meshd.cache.places import Places
from meshd.cache.verdict import Expected, Fault, Observation
from meshd.sizes import format_size

__all__ = ["Headers", "explain_missing", "is_locked", "observe"]

FIRST_READ_BYTES: Final = 16 * 1024
"""All of the header of a later shard."""
GROWTH: Final = 4
"""How much more is read at least when that was not enough: each time costs another parsing."""
MAX_HEADER_BYTES: Final = 32 * 1024 * 1024
"""Vocabularies of a quarter million tokens with their merges need about 13 MB."""


def observe(path: Path | str, headers: Headers | None = None) -> Observation:
    """Look at one file. `headers`: where to find the header if it was parsed before."""
    text = str(path)
    try:
        # Without O_NONBLOCK a named pipe would keep us until somebody writes into it.
        fd = os.open(text, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _observe_open(text, fd, headers)
        finally:
            os.close(fd)
    except OSError as error:
        return _unreadable(text, error)


def explain_missing(
    seen: Observation, expected: Expected, places: Places, repo: str
) -> Observation:
    """`seen`; or, if it is missing, why: another program is just downloading it, only the link to
    its bytes is not there, or a download of it did not end."""
    if seen.fault is not Fault.MISSING or expected.sha256 is None:
        return seen
    blob = places.blob(repo, expected.sha256)
    if is_locked(places.lock(repo, expected.sha256)):
        # Blocks, not size: some programs make the file as large as it will be, then fill it.
        there = _downloaded(blob, expected)
        return Observation(
            seen.path,
            fault=Fault.ELSEWHERE,
            problem=f"is being downloaded by another program, {there or 'nothing'} so far",
        )
    if blob.exists():
        problem = f"{seen.problem}, though its bytes are in {blob}"
        return Observation(seen.path, fault=Fault.MISSING, problem=problem)
    if there := _downloaded(blob, expected):
        problem = f"{seen.problem}; a download that did not end has {there}"
        return Observation(seen.path, fault=Fault.MISSING, problem=problem)
    return seen


def is_locked(path: Path) -> bool:
    """Whether any program holds the lock file at `path`; the kernel frees locks of the dead."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(fd)
    return False


def _observe_open(path: str, fd: int, headers: Headers | None) -> Observation:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        return Observation(path, fault=Fault.FOREIGN, problem=f"is {kind}, not a regular file")
    facts = facts_of_open(fd, path, status)
    header = headers.find(facts) if headers is not None else None
    if header is not None:
        return Observation(path, facts, header)
    read_from_ns = time.time_ns()
    start = os.pread(fd, FIRST_READ_BYTES, 0)
    if facts.size == 0:
        return Observation(path, facts, fault=Fault.SHORT, problem="is empty")
    if (problem := _foreign(start)) is not None:
        return Observation(path, facts, fault=Fault.FOREIGN, problem=problem)
    try:
        header, walks = _read_header(fd, start, facts, headers)
    except _Damaged as damage:
        return Observation(path, facts, fault=damage.fault, problem=damage.problem)
    if headers is not None:
        headers.keep(facts, header, walks, read_from_ns=read_from_ns)
    return Observation(path, facts, header)


class _Damaged(Exception):
    def __init__(self, fault: Fault, problem: str) -> None:
        super().__init__(problem)
        self.fault = fault
        self.problem = problem


def _read_header(
    fd: int, start: bytes, facts: FileFacts, headers: Headers | None
) -> tuple[GgufHeader, Walks]:
    """Parse the header, reading on while the parser asks for more; it, and those of its walks that
    were not known. Raises _Damaged."""
    walks: Walks | None = None
    known: Walks = {}
    likely = 0
    while True:
        try:
            header = parse_header(start, facts.size, walks)
            return header, walks if walks is not None and walks != known else {}
        except GgufTruncated as error:
            raise _Damaged(Fault.SHORT, f"is cut off: {error}") from None
        except GgufError as error:
            raise _Damaged(Fault.CORRUPT, f"is damaged: {error}") from None
        except NeedMore as more:
            needed = more.size
        if walks is None:
            known = headers.find_walks(facts) if headers is not None else {}
            walks = dict(known)
            likely = max((end for _, end in known.values()), default=0) + FIRST_READ_BYTES
        if needed > MAX_HEADER_BYTES:
            raise _Damaged(Fault.CORRUPT, f"has a header of more than {MAX_HEADER_BYTES} bytes")
        wanted = min(max(needed, likely, GROWTH * len(start)), MAX_HEADER_BYTES)
        # From the beginning, the old bytes gone first (the exception held them): one buffer is all
        # it ever takes.
        del start
        start = os.pread(fd, wanted, 0)
        if len(start) < needed:
            raise _Damaged(Fault.SHORT, "became shorter while it was read")


def _foreign(start: bytes) -> str | None:
    """Words for what is not weights at all: the usual left-overs of a failed download."""
    text = start[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights (`git lfs pull` fetches them)"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is a web page, not weights: what was saved is an error page"
    if text.startswith((b"<?xml", b"<error", b"<!doctype")):
        return "is XML, not weights: what was saved is an error message"
    if text.startswith((b"{", b"[")):
        return "is JSON, not weights: what was saved is an error message"
    return None


def _unreadable(path: str, error: OSError) -> Observation:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        problem = "is missing"
        link = Path(path)
        if link.is_symlink():
            problem = f"is a link to {link.readlink()}, which does not exist"
        return Observation(path, fault=Fault.MISSING, problem=problem)
    if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # how sockets refuse to be opened
        problem = "is a socket or device, not a regular file"
        return Observation(path, fault=Fault.FOREIGN, problem=problem)
    problem = f"cannot be read: {error.strerror or error}"
    return Observation(path, fault=Fault.CORRUPT, problem=problem)


def _downloaded(blob: Path, expected: Expected) -> str:
    """`1.2 GB of 4.8 GB` of what a download has got; empty for nothing."""
    # Blocks, not size: some programs make the file as large as it will be, then fill it.
    partials = blob.parent.glob(f"{blob.name}*.incomplete")
    there = max((_allocated(partial) for partial in partials), default=0)
    if not there:
        return ""
    whole = f" of {format_size(expected.size)}" if expected.size is not None else ""
    return f"{format_size(there)}{whole}"


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
