"""What an engine printed: the last lines in memory, all of it in a file of bounded size."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

RING_LINES = 500
LINE_BYTES = 4096
"""A longer line is cut into several."""
BACKUPS = 3
REOPEN_S = 60.0
"""A file that could not be written is tried again this often."""


class OutputLog:
    """Lines of one engine over all its lives. A file that cannot be written is left alone for
    `REOPEN_S`, with a warning: a full disk must not end the daemon, nor the engine."""

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.path = path
        self._limit = limit_bytes
        self._ring: deque[str] = deque(maxlen=RING_LINES)
        self._file: IO[bytes] | None = None
        self._size = 0
        self._reopen_at: float | None = None
        self._closed = False
        self._open()

    def add(self, line: str, wall: float) -> None:
        """`wall`: Unix time, for the file."""
        self._ring.append(line)
        if self._file is None and not self._try_reopen(wall):
            return
        assert self._file is not None, "just reopened"
        stamp = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
        data = f"{stamp} {line}\n".encode(errors="backslashreplace")
        try:
            self._file.write(data)
            self._size += len(data)
            if self._size >= self._limit:
                self._rotate()
        except OSError as error:
            self._give_up(error)

    def last(self, count: int) -> tuple[str, ...]:
        return tuple(self._ring)[-count:] if count else ()

    def close(self) -> None:
        self._closed = True
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                log.warning("engine log %s: %s", self.path, error)
            self._file = None

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Unbuffered: a line is one write, there for `meshd logs -f` at once, and nothing is
            # left to be flushed to a full disk at the end.
            self._file = self.path.open("ab", buffering=0)
            self._size = self.path.stat().st_size
        except OSError as error:
            self._give_up(error)

    def _try_reopen(self, wall: float) -> bool:
        if self._closed:
            return False
        if self._reopen_at is None:
            self._reopen_at = wall + REOPEN_S
        if wall < self._reopen_at:
            return False
        self._reopen_at = None
        self._open()
        return self._file is not None

    def _rotate(self) -> None:
        self._close_file()
        for number in range(BACKUPS, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path if number == 1 else self.path.with_name(
                f"{self.path.name}.{number - 1}"
            )  # fmt: skip
            if newer.exists():
                newer.replace(older)
        self._open()

    def _give_up(self, error: OSError) -> None:
        log.warning("engine log %s cannot be written: %s", self.path, error.strerror)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # the same full disk again
                file.close()


class LineSplitter:
    """Bytes of a pipe to lines; a line without end is cut at `LINE_BYTES`."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, rest = (self._rest + data).split(b"\n")
        while len(rest) > LINE_BYTES:
            lines.append(rest[:LINE_BYTES])
            rest = rest[LINE_BYTES:]
        self._rest = rest
        return [part for line in lines for part in _cut(line)]

    def end(self) -> list[str]:
        """What came after the last newline."""
        rest, self._rest = self._rest, b""
        return list(_cut(rest)) if rest else []


def _cut(line: bytes) -> list[str]:
    line = line.rstrip(b"\r")
    starts = range(0, max(len(line), 1), LINE_BYTES)
    return [line[at : at + LINE_BYTES].decode(errors="replace") for at in starts]
