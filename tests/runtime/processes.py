"""Whether processes that nobody here is the parent of are gone."""

from __future__ import annotations

import psutil


def ended(pid: int) -> bool:
    """A zombie has ended too: only its new parent, init, has not looked yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
