"""Locks on files of the Hugging Face cache, as huggingface_hub takes them. Blocking.

huggingface_hub locks with flock(2), through filelock, and leaves the lock's file where it is. So do
we: a file that is removed while somebody waits for it would be locked twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

LOCK_MODE: Final = 0o664
"""Users of one group share caches."""


@contextlib.contextmanager
def try_lock(path: Path, *, mode: int = LOCK_MODE) -> Iterator[bool]:
    """Hold the lock at `path` inside the block, if nobody else has it: True then.

    On a file system without flock the answer is True, as nobody can lock there; huggingface_hub
    falls back to the existence of another file, which a killed process leaves behind for ever.
    Raises OSError if the lock's file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            held = _try_flock(fd)
            if held and os.fstat(fd).st_nlink == 0:
                continue  # somebody tidied it away between our open and our flock
            yield held
            return
        finally:
            os.close(fd)


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
            raise
    return True
