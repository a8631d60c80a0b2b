"""What says, without reading it, that a file is still the one that was read. Pure.

A file is taken for unchanged while its size, time of change and inode stay. The time alone would
not do: file systems stamp in steps (4 ms of a kernel's clock, 2 s on FAT), and a second write in
the same step leaves no trace. So what was read counts only if reading began when that step was
over (`is_settled`); git calls entries for which it was not "racy".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FINE_STEP_NS: Final = 100_000_000
"""Longer than the step of any file system that keeps parts of seconds."""
COARSE_STEP_NS: Final = 2_000_000_000
"""FAT's; taken for every time that is a whole number of seconds."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A regular file as `stat` tells of it; nanoseconds of Unix time, bytes."""

    real_path: str
    """Absolute, every link resolved: a Hugging Face cache has many names for one blob."""
    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int
    """Of the last change of anything, its name or mode included: no proof of other bytes."""

    def same_bytes(self, other: FileFacts) -> bool:
        """Nothing says that the bytes differ, whatever the file was named meanwhile."""
        return (self.size, self.mtime_ns, self.inode) == (other.size, other.mtime_ns, other.inode)


def step_ns(mtime_ns: int) -> int:
    """How long after `mtime_ns` another write may leave the very same time."""
    return COARSE_STEP_NS if mtime_ns % 1_000_000_000 == 0 else FINE_STEP_NS


def settles_in_ns(mtime_ns: int, now_ns: int) -> int:
    """How long to wait before reading, so that every later write shows; 0: read now.

    A time further ahead than its step is none that a write would leave today, and needs no wait.
    """
    step = step_ns(mtime_ns)
    return mtime_ns + step - now_ns if abs(now_ns - mtime_ns) < step else 0


def is_settled(mtime_ns: int, read_from_ns: int) -> bool:
    """Whether a write after `read_from_ns` would have left another time than `mtime_ns`."""
    return settles_in_ns(mtime_ns, read_from_ns) == 0
