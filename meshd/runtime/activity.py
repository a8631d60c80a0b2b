"""What the kernel says a process does; progress that no log line tells of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Activity:
    cpu_s: float
    pages_touched: int
    """Page faults: a model that is mapped, not read, moves only these."""
    resident_bytes: int


def read_activity(pid: int) -> Activity | None:
    """None if there is no such process, or no /proc. Source: proc_pid_stat(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    minor, major, user, system = (int(fields[i]) for i in (7, 9, 11, 12))
    return Activity((user + system) / _TICKS, minor + major, int(fields[21]) * _PAGE)
