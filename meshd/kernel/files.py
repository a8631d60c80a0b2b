"""Small files that survive a crash."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from meshd.errors import DataDirectoryBusy


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data` so that a reader, or a start after a crash, sees old or new whole.

    Blocks on fsync; call it through a pool from a loop. Raises OSError, leaving nothing behind.
    """
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class DirectoryLock:
    """Holds `<directory>/lock` for as long as this process lives; the kernel frees it on any death.

    Raises DataDirectoryBusy, naming the holder's pid, if another process has it.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DataDirectoryBusy(
                f"data directory {directory} is in use by another meshd (pid {holder}); stop that "
                "one, or give this node a --data-dir of its own"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)
