"""Devices of this machine, as far as they can be told without an engine."""

from __future__ import annotations

import contextlib
import importlib
import logging
import platform
from pathlib import Path, PurePosixPath
from typing import Any

from meshd.view import DeviceView

log = logging.getLogger(__name__)

Memory = tuple[int, int]
"""(total, available) bytes."""


def read_devices(nvml: Any = None, *, proc: Path = Path("/proc")) -> tuple[DeviceView, ...]:
    """NVIDIA devices (if there is a driver), then the CPU. Blocking. Nothing is raised.

    `nvml`: the module `pynvml`; None imports it. That a device is listed here does not mean that
    the engine can use it.
    """
    return (*_nvidia(nvml, proc), _cpu(proc))


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


def _nvidia(nvml: Any, proc: Path) -> list[DeviceView]:
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # no driver, another driver, no library: all normal
        log.debug("no NVIDIA devices: %s", error)
        return []
    found = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                found.append(_nvidia_device(nvml, index, proc))
            except nvml.NVMLError as error:  # one that fell off the bus does not hide the others
                log.warning("NVIDIA device %d cannot be read: %s", index, error)
    except nvml.NVMLError as error:
        log.warning("NVIDIA devices cannot be counted: %s", error)
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    return found


def _nvidia_device(nvml: Any, index: int, proc: Path) -> DeviceView:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = f"{major}.{minor}"
    except nvml.NVMLError_NotSupported:
        capability = None
    total = free = 0
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    # GB10, Jetson: the device uses the machine's memory, and the driver does not count it.
    unified = total == 0
    if unified:
        total, free = read_memory(proc)
    return DeviceView(
        name=name.decode() if isinstance(name, bytes) else str(name),
        backend="cuda",
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        memory_total_bytes=total,
        memory_free_bytes=free,
        unified=unified,
        compute_capability=capability,
    )


def _cpu(proc: Path) -> DeviceView:
    total, free = read_memory(proc)
    return DeviceView(
        name=_cpu_name(proc),
        backend="cpu",
        uuid=None,
        memory_total_bytes=total,
        memory_free_bytes=free,
        unified=True,
        compute_capability=None,
    )


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
