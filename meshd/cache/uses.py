"""When weights were last used. Blocking, microseconds.

One empty file a set, whose time of change is the answer: any number of nodes on this machine may
note uses at once. Lost, a set counts as used when its files came.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path


class UseBook:
    """Notes in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def used(self, digest: str, at: float) -> None:
        """An engine was given the set at that Unix time. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        note = self._note(digest)
        note.touch()
        os.utime(note, (at, at))

    def last_used_at(self, digest: str) -> float | None:
        """Unix time; None if it never was, as far as is known."""
        try:
            return self._note(digest).stat().st_mtime
        except OSError:
            return None

    def forget(self, digest: str) -> None:
        with contextlib.suppress(OSError):
            self._note(digest).unlink()

    def _note(self, digest: str) -> Path:
        return self._directory / hashlib.sha256(digest.encode()).hexdigest()[:40]
