"""Whether somebody keeps this machine's clock right, as the kernel knows it."""

from __future__ import annotations

import ctypes
import datetime as dt
import sys

_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised to a reliable server."""
_TIMEX_BYTES = 256
"""More than `struct timex` takes on any architecture (208 on 64 bits)."""


def is_clock_kept() -> bool | None:
    """Whether a time service steers the clock; None where the kernel does not tell.

    Asks adjtimex(2), changing nothing (`modes` is 0). Nothing is raised.
    """
    if not sys.platform.startswith("linux"):
        return None
    request = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        state: int = ctypes.CDLL(None).adjtimex(request)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def moment(at: float) -> str:
    """Unix time for people: `2026-11-25 04:25:09 UTC`."""
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
