"""The ledger: which file had which sha256, so that nothing is hashed twice without need.

One small file an entry, named by the hash of the path and replaced atomically: any number of
processes may write at once, a kill leaves the old entry or the new one, and a look-up reads one
file however many there are. An entry that cannot be read is none. Lost, the ledger costs hashing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from meshd.cache.facts import COARSE_STEP_NS, FileFacts, is_settled
from meshd.kernel.files import write_atomic

FORMAT: Final = 1
MAX_ENTRY_BYTES: Final = 16 * 1024
"""Paths have 4096 bytes at most, some more as JSON."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    facts: FileFacts
    sha256: str
    hashed_at: float
    """Unix time these bytes were first hashed."""
    checked_at: float
    """Unix time they were last found to be still so."""


class Ledger:
    """What was hashed, in files below `directory`. Blocking; safe from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def known(self, facts: FileFacts) -> str | None:
        """The sha256 of the file if it was hashed and nothing says that it changed since."""
        entry = self.entry(facts)
        return entry.sha256 if entry is not None else None

    def entry(self, facts: FileFacts) -> LedgerEntry | None:
        """The whole entry behind `known`."""
        found = _read(self._place(facts.real_path))
        if found is None or found.facts.real_path != facts.real_path:
            return None
        return found if found.facts.same_bytes(facts) else None

    def record(self, facts: FileFacts, sha256: str, *, read_from_ns: int) -> bool:
        """Remember that the file has that hash; `read_from_ns`: Unix time reading it began.

        `facts` must be the same before and after reading. False, and nothing is remembered, if the
        file was so new then that a later write might not show; hash it again. Raises OSError.
        """
        if not is_settled(facts.mtime_ns, read_from_ns):
            return False
        self._write(facts, sha256)
        return True

    def record_landed(self, path: Path, sha256: str) -> FileFacts:
        """Remember the hash of a file that this process just wrote, hashing what it wrote.

        Its time is set back first, so that a write by anybody else shows even if it follows at
        once. Call it while nobody else may write there. Raises OSError.
        """
        past_ns = time.time_ns() - 2 * COARSE_STEP_NS
        os.utime(path, ns=(past_ns, past_ns))
        facts = facts_of(path)
        self._write(facts, sha256)
        return facts

    def forget(self, path: Path | str) -> None:
        """Drop the entry of the file at `path`, which need not be there any more."""
        with contextlib.suppress(OSError):
            Path(self._place(os.path.realpath(path))).unlink()

    def entries(self) -> Iterator[LedgerEntry]:
        """All of them, in no order; those that cannot be read are left out."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as found:
            for item in found:
                if item.name.endswith(".json"):
                    entry = _read(item.path)
                    if entry is not None:
                        yield entry

    def oldest_checked(self) -> list[LedgerEntry]:
        """All entries, those first that were not looked at for longest."""
        return sorted(self.entries(), key=lambda entry: (entry.checked_at, entry.facts.real_path))

    def _place(self, real_path: str) -> str:
        name = hashlib.sha256(os.fsencode(real_path)).hexdigest()
        return f"{self._directory}/{name[:40]}.json"

    def _write(self, facts: FileFacts, sha256: str) -> None:
        now = time.time()
        before = self.entry(facts)
        same = before is not None and before.sha256 == sha256
        entry = {
            "format": FORMAT,
            "path": _as_text(facts.real_path),
            "size": facts.size,
            "mtime_ns": facts.mtime_ns,
            "inode": facts.inode,
            "ctime_ns": facts.ctime_ns,
            "sha256": sha256,
            "hashed_at": before.hashed_at if before is not None and same else now,
            "checked_at": now,
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(self._place(facts.real_path)), orjson.dumps(entry))


def facts_of(path: Path) -> FileFacts:
    """The facts of the regular file at `path`, links followed. Raises OSError."""
    return facts_from(os.path.realpath(path), path.stat())


def facts_of_open(fd: int, path: str, status: os.stat_result) -> FileFacts:
    """The facts of a file that was opened at `path`; `status`: its fstat."""
    # Linux tells what was really opened, and much faster than links can be followed one by one.
    try:
        real_path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    except OSError:
        real_path = ""
    if not real_path.startswith("/") or real_path.endswith(" (deleted)"):
        real_path = os.path.realpath(path)
    return facts_from(real_path, status)


def facts_from(real_path: str, status: os.stat_result) -> FileFacts:
    return FileFacts(
        real_path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns
    )


def _read(path: str) -> LedgerEntry | None:
    """The entry in the file at `path`; None for whatever is not a whole one of this format."""
    try:
        # A hundred shards are looked up before every load: no more layers than it takes.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = orjson.loads(os.read(fd, MAX_ENTRY_BYTES))
        finally:
            os.close(fd)
        if found["format"] != FORMAT or not _is_sha256(found["sha256"]):
            return None
        facts = FileFacts(
            _as_path(found["path"]),
            int(found["size"]),
            int(found["mtime_ns"]),
            int(found["inode"]),
            int(found["ctime_ns"]),
        )
        return LedgerEntry(
            facts, found["sha256"], float(found["hashed_at"]), float(found["checked_at"])
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def _as_text(path: str) -> str:
    """A path as text that JSON can hold: any bytes are allowed in paths, one character each."""
    return os.fsencode(path).decode("latin-1")


def _as_path(text: str) -> str:
    return os.fsdecode(text.encode("latin-1"))


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None
