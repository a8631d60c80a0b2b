"""How much disk the Hugging Face cache takes. Blocking, bounded."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Final, NamedTuple

from meshd.config import hub_cache_dir
from meshd.sizes import parse_size_or_share
from meshd.view import CacheView

MAX_ENTRIES: Final = 200_000
"""A cache with more files is not walked to its end; its size is then a lower bound."""
PARTIAL_SUFFIX: Final = ".incomplete"


class DiskUsage(NamedTuple):
    total: int
    free: int


def read_usage(directory: Path | None = None, *, budget: str | None = None) -> CacheView:
    """Bytes in the hub's cache (files, not the links to them) and free on its disk.

    `budget`: `cache.budget` of the configuration; a share is one of the whole disk.
    """
    path = directory or hub_cache_dir()
    disk = disk_of(path)
    return CacheView(
        path=str(path),
        used_bytes=_bytes_below(path),
        budget_bytes=None if budget is None else parse_size_or_share(budget, disk.total),
        free_bytes=disk.free,
    )


def disk_of(path: Path) -> DiskUsage:
    """Bytes of the disk that `path` lies on, or would."""
    total, _, free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists()))
    return DiskUsage(total, free)


def disk_bytes(name: str, status: os.stat_result) -> int:
    """What a file of the cache takes on the disk; links take nothing.

    Partials have their full size from the start, and holes. For others the size is the better
    answer: some file systems count blocks only seconds after they were written.
    """
    if not stat.S_ISREG(status.st_mode):
        return 0
    if name.endswith(PARTIAL_SUFFIX):
        return min(status.st_size, status.st_blocks * 512)
    return status.st_size


def _bytes_below(path: Path) -> int:
    total = entries = 0
    waiting = [str(path)]
    counted: set[tuple[int, int]] = set()
    while waiting and entries < MAX_ENTRIES:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if status.st_nlink > 1:  # a file with several names is one file
                        if (status.st_dev, status.st_ino) in counted:
                            continue
                        counted.add((status.st_dev, status.st_ino))
                    total += disk_bytes(entry.name, status)
        except OSError:
            continue  # removed meanwhile, or not ours to read
    return total
