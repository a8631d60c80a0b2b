"""Headers of files that did not change since they were parsed, kept so that looking is cheap.

In this process the whole header is kept. On disk, for the next process, only where long arrays of
strings end: walking over a vocabulary is most of what parsing costs. All of it can be lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

import orjson

from meshd.cache.facts import FileFacts, is_settled
from meshd.cache.gguf_cursor import Walks
from meshd.cache.gguf_header import GgufHeader

MAX_KEPT_TENSORS: Final = 20_000
"""Of all headers kept together, some 400 bytes each."""
MAX_NOTE_BYTES: Final = 64 * 1024


class Headers:
    """Thread-safe; several processes may share `directory` (None: nothing is kept on disk)."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[FileFacts, GgufHeader]] = OrderedDict()
        self._tensors = 0

    def find(self, facts: FileFacts) -> GgufHeader | None:
        """The header of that file, if it was parsed here."""
        with self._lock:
            kept = self._kept.get(facts.real_path)
            if kept is None or kept[0] != facts:
                return None
            self._kept.move_to_end(facts.real_path)
            return kept[1]

    def find_walks(self, facts: FileFacts) -> Walks:
        """What helps to parse that file, if it was parsed by any process; blocking."""
        place = self._place(facts)
        if place is None:
            return {}
        try:
            with place.open("rb") as file:
                note = orjson.loads(file.read(MAX_NOTE_BYTES))
            if note["facts"] != _note_of(facts):
                return {}
            walks: Walks = {int(start): (0, int(end)) for start, end in note["ends"]}
        except (OSError, ValueError, TypeError, KeyError):
            return {}
        return walks if all(start < end for start, (_, end) in walks.items()) else {}

    def keep(
        self, facts: FileFacts, header: GgufHeader, walks: Walks, *, read_from_ns: int
    ) -> None:
        """Keep it, unless the file is so new that a later write might not show. `walks`: those that
        are not on disk yet."""
        if not all(is_settled(at, read_from_ns) for at in (facts.mtime_ns, facts.ctime_ns)):
            return
        with self._lock:
            self._drop(facts.real_path)
            self._kept[facts.real_path] = (facts, header)
            self._tensors += _weight(header)
            while self._tensors > MAX_KEPT_TENSORS:
                self._drop(next(iter(self._kept)))
        if walks:
            self._note(facts, walks)

    def _drop(self, real_path: str) -> None:
        kept = self._kept.pop(real_path, None)
        if kept is not None:
            self._tensors -= _weight(kept[1])

    def _place(self, facts: FileFacts) -> Path | None:
        if self._directory is None:
            return None
        name = hashlib.sha256(os.fsencode(facts.real_path)).hexdigest()
        return self._directory / f"{name[:40]}.json"

    def _note(self, facts: FileFacts, walks: Walks) -> None:
        place = self._place(facts)
        if place is None:
            return
        ends = [(start, end) for start, (_, end) in walks.items()]
        note = orjson.dumps({"facts": _note_of(facts), "ends": ends})
        # Not synced: this is done while a load waits, and what a crash tears is no note.
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
            with os.fdopen(fd, "wb") as file:
                file.write(note)
            Path(temporary).replace(place)


def _note_of(facts: FileFacts) -> list[str | int]:
    path = os.fsencode(facts.real_path).decode("latin-1")  # any bytes are allowed in paths
    return [path, facts.size, facts.mtime_ns, facts.inode, facts.ctime_ns]


def _weight(header: GgufHeader) -> int:
    return 1 + len(header.tensors) + len(header.metadata)
