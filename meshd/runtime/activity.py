"""What the kernel says a process does; progress that no log line tells of.

A process that maps gigabytes, or computes a long prompt, answers nobody and prints nothing, but it
reads, grows or burns time; a stopped or deadlocked one does not. The limits of `moved` are above
what answering our own probes costs.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")

NOTABLE_CPU_S = 0.05
NOTABLE_BYTES = 1024 * 1024
NOTABLE_FAULTS = 4


@dataclass(frozen=True, slots=True)
class Activity:
    cpu_s: float
    major_faults: int
    """Pages that had to come from a disk."""
    resident_bytes: int
    read_bytes: int
    """Read by calls or from disks; 0 where the kernel does not tell."""


def read_activity(pid: int) -> Activity | None:
    """None if there is no such process, or no /proc. Source: proc_pid_stat(5), proc_pid_io(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    major, user, system = (int(fields[i]) for i in (9, 11, 12))
    return Activity(
        cpu_s=(user + system) / _TICKS,
        major_faults=major,
        resident_bytes=int(fields[21]) * _PAGE,
        read_bytes=_read_bytes(pid),
    )


def moved(before: Activity, after: Activity) -> bool:
    """Whether a process did more between two readings, some second apart, than answer probes."""
    return (
        after.cpu_s - before.cpu_s >= NOTABLE_CPU_S
        or after.major_faults - before.major_faults >= NOTABLE_FAULTS
        or after.resident_bytes - before.resident_bytes >= NOTABLE_BYTES
        or after.read_bytes - before.read_bytes >= NOTABLE_BYTES
    )


def _read_bytes(pid: int) -> int:
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name in ("rchar", "read_bytes"):
                total += int(value)
    return total
