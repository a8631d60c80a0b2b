"""How much disk the Hugging Face cache takes. Blocking, bounded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from meshd.config import hub_cache_dir
from meshd.view import CacheView

MAX_ENTRIES = 200_000
"""A cache with more files is not walked to its end; its size is then a lower bound."""


def read_usage(directory: Path | None = None) -> CacheView:
    """Bytes in the hub's cache (files, not the links to them) and free on its disk."""
    path = directory or hub_cache_dir()
    return CacheView(
        path=str(path),
        used_bytes=_bytes_below(path),
        budget_bytes=None,
        free_bytes=shutil.disk_usage(_existing(path)).free,
    )


def _bytes_below(path: Path) -> int:
    total = entries = 0
    waiting = [str(path)]
    while waiting and entries < MAX_ENTRIES:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # removed meanwhile, or not ours to read
    return total


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
