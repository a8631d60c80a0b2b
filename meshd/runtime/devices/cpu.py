"""The CPU, and the memory this process may use of the machine's."""

from __future__ import annotations

import platform
from pathlib import Path, PurePosixPath

from meshd.view import DeviceView

Memory = tuple[int, int]
"""(total, available) bytes."""


def read_cpu(proc: Path, memory: Memory) -> DeviceView:
    """The CPU as a device with `memory`. Nothing is raised."""
    total, free = memory
    return DeviceView(
        name=_cpu_name(proc),
        backend="cpu",
        uuid=None,
        memory_total_bytes=total,
        memory_free_bytes=free,
        unified=True,
        compute_capability=None,
    )


def read_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """(total, available) bytes of this machine, no more than the cgroups (v2) of this process
    allow; (0, 0) where the kernel does not tell. Blocking; nothing is raised."""
    fields: dict[str, int] = {}
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields[key] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0, 0
    total, free = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    for limit, used in _cgroup_limits(proc, cgroups):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _cgroup_limits(proc: Path, cgroups: Path) -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be given back) of each group this process is in, inmost
    first; groups without a limit are left out. A limit may stand on any level (systemd slices)."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    limits = []
    for name in (PurePosixPath(own), *PurePosixPath(own).parents):
        group = cgroups / name
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit == "max":
                continue
            used = int((group / "memory.current").read_text())
            limits.append((int(limit), max(0, used - _page_cache(group))))
        except (OSError, ValueError):
            continue
    return limits


def _page_cache(group: Path) -> int:
    """Bytes of files in memory: weights that were mapped once count as used, but make room."""
    total = 0
    for line in (group / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key in ("active_file", "inactive_file"):
            total += int(value)
    return total


def _cpu_name(proc: Path) -> str:
    try:
        for line in (proc / "cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"
