"""Asks NVIDIA's driver whether a process of ours computes on its devices.

In a container the driver names processes by the host's pids, or names none: then what counts is
what appeared on the devices since before the process was started, and the words say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meshd.runtime.devices import Reading, take_reading

INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO (include/linux/proc_ns.h), where pids are those the driver sees."""
CONTEXT_BYTES = 64 << 20
"""Device memory a CUDA context takes at the very least; it is some hundreds of MiB."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all NVIDIA devices at one moment."""

    pids: Mapping[int, int] = field(default_factory=dict)
    """Device memory of each process the driver names; 0 where it does not tell."""
    used_bytes: int = 0
    """Of all devices that have memory of their own."""


def read_usage() -> Usage | None:
    """None if there is no driver that answers. Blocking."""
    return usage_in(take_reading())


def usage_in(reading: Reading) -> Usage | None:
    driver = reading.driver_of("cuda")
    gpus = [gpu for gpu in reading.gpus if gpu.view.backend == "cuda"]
    if driver is None or driver.version is None or not gpus:
        return None
    pids = {p.pid: p.used_bytes or 0 for gpu in gpus for p in gpu.processes or ()}
    own = [gpu.view for gpu in gpus if not gpu.view.unified and not gpu.divided]
    return Usage(pids, sum(v.memory_total_bytes - v.memory_free_bytes for v in own))


def sees(before: Usage | None, now: Usage | None, pid: int, *, own_pids: bool) -> tuple[bool, str]:
    """Whether process `pid`, started after `before`, is on a device, and in which words. Pure.

    `own_pids`: whether the driver's pids are ours.
    """
    if now is None:
        return False, "the NVIDIA driver does not answer"
    if pid in now.pids:
        return True, f"pid {pid} uses {now.pids[pid] >> 20} MiB"
    named = ", ".join(str(other) for other in sorted(now.pids)[:8]) or "no process"
    if own_pids or before is None:
        return False, f"it names {named}"
    fresh = sorted(set(now.pids) - set(before.pids))
    grown = now.used_bytes - before.used_bytes
    if fresh:
        used = now.pids[fresh[0]] >> 20
        return True, f"in this container its pids are the host's; pid {fresh[0]} is new: {used} MiB"
    if grown >= CONTEXT_BYTES:
        return (
            True,
            f"it names no process in this container; memory in use rose by {grown >> 20} MiB",
        )
    return False, f"it names {named}, and memory in use rose by {grown >> 20} MiB"


def pids_are_ours(proc: Path = Path("/proc")) -> bool:
    """Whether this process counts pids as the driver does."""
    try:
        return str((proc / "self" / "ns" / "pid").readlink()) == INITIAL_PID_NAMESPACE
    except OSError:
        return True
