"""Asks NVIDIA's driver whether a process of ours computes on its devices.

In a container the driver names processes by the host's pids, or names none: then what counts is
what appeared on the devices since before the process was started, and the words say so.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """Of all devices together; 0 where the driver does not count memory."""


def read_usage(nvml: Any = None) -> Usage | None:
    """None if there is no driver to ask. `nvml`: the module `pynvml`; None imports it. Blocking."""
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no driver, another driver, no library
        return None
    pids: dict[int, int] = {}
    used = 0
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    pids[int(process.pid)] = int(process.usedGpuMemory or 0)
                used += int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    except nvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    return Usage(pids, used)


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
