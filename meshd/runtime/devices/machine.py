"""Asks everything there is to ask, in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshd.runtime.devices.amd import read_amd
from meshd.runtime.devices.bus import BusGpu, gpus_on_bus
from meshd.runtime.devices.cpu import read_cpu, read_memory
from meshd.runtime.devices.nvml import read_nvidia
from meshd.runtime.devices.reading import Driver, Gpu, Reading
from meshd.view import DeviceView

_BACKENDS = {"NVIDIA": "cuda", "AMD": "rocm"}


def take_reading(
    nvml: Any = None,
    *,
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    dev: Path = Path("/dev"),
) -> Reading:
    """What the drivers, the bus and the kernel say now. Blocking: milliseconds, or seconds where a
    GPU has to wake up. Nothing is raised.

    `nvml`: the module `pynvml`; None imports it. That a device is listed does not mean that the
    engine can use it. A GPU on the bus whose driver does not answer is listed with that problem.
    """
    memory = read_memory(proc, sys / "fs" / "cgroup")
    nvidia, nvidia_gpus = read_nvidia(nvml, memory, proc)
    amd, amd_gpus = read_amd(sys, dev, memory)
    on_bus = gpus_on_bus(sys)
    found: list[Gpu] = []
    drivers: list[Driver] = []
    for driver, gpus in ((nvidia, nvidia_gpus), (amd, amd_gpus)):
        drivers.append(driver)
        found += gpus or _driverless(driver, on_bus)
    return Reading(tuple(found), read_cpu(proc, memory), tuple(drivers))


def read_devices(
    nvml: Any = None, *, proc: Path = Path("/proc"), sys: Path = Path("/sys")
) -> tuple[DeviceView, ...]:
    """The devices of `take_reading`: GPUs first, the CPU last."""
    return take_reading(nvml, proc=proc, sys=sys).devices


def _driverless(driver: Driver, on_bus: tuple[BusGpu, ...]) -> list[Gpu]:
    """GPUs that are plugged in while their driver lists none."""
    if driver.problem is None:
        return []
    return [
        Gpu(
            DeviceView(
                name=f"{driver.vendor} GPU at {gpu.address}",
                backend=_BACKENDS[driver.vendor],
                uuid=None,
                memory_total_bytes=0,
                memory_free_bytes=0,
                unified=False,
                compute_capability=None,
                driver=driver.version,
                problem=_held_by_another(driver, gpu) + driver.problem,
            )
        )
        for gpu in on_bus
        if gpu.vendor == driver.vendor
    ]


def _held_by_another(driver: Driver, gpu: BusGpu) -> str:
    own = {"NVIDIA": "nvidia", "AMD": "amdgpu"}[driver.vendor]
    return "" if gpu.driver in (None, own) else f"it is bound to `{gpu.driver}`; "
