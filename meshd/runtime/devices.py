"""Devices of this machine, as far as they can be told without an engine."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from meshd.view import DeviceView

log = logging.getLogger(__name__)


def read_devices(nvml: Any = None, *, proc: Path = Path("/proc")) -> tuple[DeviceView, ...]:
    """NVIDIA devices (if there is a driver), then the CPU. Blocking. Nothing is raised.

    `nvml`: the module `pynvml`; None imports it. That a device is listed here does not mean that
    the engine can use it.
    """
    return (*_nvidia(nvml, proc), _cpu(proc))


def _nvidia(nvml: Any, proc: Path) -> list[DeviceView]:
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # no driver, another driver, no library: all normal
        log.debug("no NVIDIA devices: %s", error)
        return []
    try:
        return [_nvidia_device(nvml, index, proc) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        log.warning("NVIDIA devices cannot be read: %s", error)
        return []
    finally:
        nvml.nvmlShutdown()


def _nvidia_device(nvml: Any, index: int, proc: Path) -> DeviceView:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free, unified = int(memory.total), int(memory.free), False
    except nvml.NVMLError_NotSupported:
        # GB10, Jetson: the device uses the machine's memory, and the driver does not count it.
        total, free = _memory(proc)
        unified = True
    return DeviceView(
        name=name.decode() if isinstance(name, bytes) else str(name),
        backend="cuda",
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        memory_total_bytes=total,
        memory_free_bytes=free,
        unified=unified,
        compute_capability=f"{major}.{minor}",
    )


def _cpu(proc: Path) -> DeviceView:
    total, free = _memory(proc)
    return DeviceView(
        name=_cpu_name(proc),
        backend="cpu",
        uuid=None,
        memory_total_bytes=total,
        memory_free_bytes=free,
        unified=True,
        compute_capability=None,
    )


def _memory(proc: Path) -> tuple[int, int]:
    """(total, available) bytes, no more than this process's cgroup allows (cgroup v2)."""
    fields: dict[str, int] = {}
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields[key] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0, 0
    total, free = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    limit, used = _cgroup(proc)
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - used))
    return total, free


def _cgroup(proc: Path, root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """(memory.max, memory.current) of this process; None without a limit."""
    try:
        line = next(
            x for x in (proc / "self/cgroup").read_text().splitlines() if x.startswith("0::")
        )
        group = root / line[3:].lstrip("/")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, StopIteration, ValueError):
        return None, 0
    return (None if limit == "max" else int(limit)), used


def _cpu_name(proc: Path) -> str:
    try:
        for line in (proc / "cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine() or "CPU"
