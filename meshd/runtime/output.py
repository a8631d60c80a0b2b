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


class OutputLog:
    """Lines of one engine over all its lives. A file that cannot be written is given up with one
    warning: a full disk must not end the daemon, nor the engine."""

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.path = path
        self._limit = limit_bytes
        self._ring: deque[str] = deque(maxlen=RING_LINES)
        self._file: IO[str] | None = None
        self._size = 0
        self._open()

    def add(self, line: str, wall: float) -> None:
        """`wall`: Unix time, for the file."""
        self._ring.append(line)
        if self._file is None:
            return
        stamp = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
        try:
            self._size += self._file.write(f"{stamp} {line}\n")
            if self._size >= self._limit:
                self._rotate()
        except OSError as error:
            self._give_up(error)

    def last(self, count: int) -> tuple[str, ...]:
        return tuple(self._ring)[-count:]

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                log.warning("engine log %s: %s", self.path, error)
            self._file = None

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = self.path.open("a", buffering=1, errors="backslashreplace")
            self._size = self.path.stat().st_size
        except OSError as error:
            self._give_up(error)

    def _rotate(self) -> None:
        self.close()
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
