"""What NVIDIA's driver says, through NVML."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from meshd.runtime.devices.cpu import Memory
from meshd.runtime.devices.reading import Driver, Gpu, GpuProcess
from meshd.sizes import two_digits
from meshd.view import DeviceView

T = TypeVar("T")

_WHY_NO_DRIVER = {
    "NVMLError_LibraryNotFound": "no NVIDIA driver is installed (libnvidia-ml.so.1 is not here)",
    "NVMLError_DriverNotLoaded": (
        "the NVIDIA kernel module is not loaded; `sudo modprobe nvidia` loads it, `sudo dmesg` "
        "says why it cannot be (not built for this kernel, refused by Secure Boot)"
    ),
    "NVMLError_LibRmVersionMismatch": (
        "driver/library version mismatch: the driver was updated while its older kernel module "
        "stayed loaded; reboot, or end what uses the GPUs and reload the module (`sudo rmmod "
        "nvidia_uvm nvidia_drm nvidia_modeset nvidia; sudo modprobe nvidia`)"
    ),
    "NVMLError_NoPermission": (
        "this user may not use the NVIDIA driver; see the owner and mode of /dev/nvidia* and the "
        "DeviceAllow of the service"
    ),
}
_CONTAINER = (
    "the NVIDIA kernel module is loaded, but libnvidia-ml.so.1 is not here; a container gets it "
    "when it is started with `--gpus all` (NVIDIA Container Toolkit)"
)
_TEGRA = "the NVIDIA driver of this Jetson cannot list its GPU; the engine is asked alone"
_WHY_NOT_USABLE = {
    "NVMLError_GpuIsLost": (
        "the GPU fell off the bus (NVML: GPU is lost); `sudo dmesg | grep -i xid` says why, a "
        "reboot brings it back"
    ),
    "NVMLError_ResetRequired": (
        "the GPU must be reset before it works again; end what uses it, then `sudo nvidia-smi "
        "--gpu-reset`, or reboot"
    ),
    "NVMLError_NoPermission": "this user may not use the GPU; see the mode of /dev/nvidia*",
}
_DIVIDED = "MIG is on: models run on its instances, which are listed as devices of their own"
_EMPTY = "MIG is on and there is no instance; `sudo nvidia-smi mig -cgi … -C` makes one"


def read_nvidia(nvml: Any, memory: Memory, proc: Path) -> tuple[Driver, tuple[Gpu, ...]]:
    """The driver and its GPUs in its own order (by PCI address). Blocking; nothing is raised.

    `nvml`: the module `pynvml`, None imports it; `memory`: of the machine, for GPUs that share it.
    A GPU that cannot be read is there with its problem, and with what could be read of it.
    """
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError:
        return Driver("NVIDIA", None, "NVML cannot be asked: nvidia-ml-py is not installed"), ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _without_driver(error, proc), ()
    try:
        version = _text(nvml.nvmlSystemGetDriverVersion())
        count = nvml.nvmlDeviceGetCount()
        reader = _Reader(nvml, version, memory, proc)
        gpus = tuple(gpu for index in range(count) for gpu in reader.read(index))
        problem = None if count else "the NVIDIA driver is loaded and lists no GPU"
        return Driver("NVIDIA", version, problem), gpus
    except nvml.NVMLError as error:
        return _without_driver(error, proc), ()
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


class _Reader:
    def __init__(self, nvml: Any, version: str, memory: Memory, proc: Path) -> None:
        self._nvml = nvml
        self._version = version
        self._memory = memory
        self._proc = proc

    def read(self, index: int) -> list[Gpu]:
        """The GPU, then its MIG instances."""
        nvml = self._nvml
        name, uuid = f"NVIDIA GPU {index}", None
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = _text(nvml.nvmlDeviceGetName(handle))
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            capability = self._capability(handle)
            instances = list(self._instances(handle))
            divided = bool(instances) or self._mig_is_on(handle)
            problem = None if not divided else _DIVIDED if instances else _EMPTY
            found = [self._gpu(handle, index, name, uuid, capability, problem, divided=divided)]
            for number, instance in enumerate(instances):
                own_name = _text(nvml.nvmlDeviceGetName(instance))
                # Older drivers give an instance the name of its GPU.
                own_name = own_name if own_name != name else f"{name} MIG {number}"
                own_uuid = _text(nvml.nvmlDeviceGetUUID(instance))
                found.append(
                    self._gpu(instance, index, own_name, own_uuid, capability, parent=uuid)
                )
        except nvml.NVMLError as error:
            return [self._unreadable(name, uuid, index, error)]
        return found

    def _gpu(
        self,
        handle: Any,
        index: int,
        name: str,
        uuid: str,
        capability: str | None,
        problem: str | None = None,
        *,
        parent: str | None = None,
        divided: bool = False,
    ) -> Gpu:
        nvml = self._nvml
        # GB10, Jetson: the GPU uses the machine's memory, and the driver does not count it (N/A).
        counted = self._if_told(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        own = (int(counted.total), int(counted.free)) if counted is not None else (0, 0)
        unified = own[0] == 0
        total, free = self._memory if unified else own
        view = DeviceView(
            name=name,
            backend="cuda",
            uuid=uuid,
            memory_total_bytes=total,
            memory_free_bytes=free,
            unified=unified,
            compute_capability=capability,
            driver=self._version,
            problem=problem,
            # Of a MIG instance it is a part that the driver does not tell.
            memory_bytes_per_s=None if parent else self._memory_speed(handle),
        )
        return Gpu(view, index, self._processes(handle), parent, divided)

    def _capability(self, handle: Any) -> str | None:
        found = self._if_told(lambda: self._nvml.nvmlDeviceGetCudaComputeCapability(handle))
        return None if found is None else f"{found[0]}.{found[1]}"

    def _memory_speed(self, handle: Any) -> int | None:
        """Bytes per second: the width of the bus, twice a tick at the highest clock."""
        nvml = self._nvml
        bits = self._if_told(lambda: nvml.nvmlDeviceGetMemoryBusWidth(handle)) or 0
        mhz = self._if_told(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
        return two_digits(bits / 8 * 2 * (mhz or 0) * 1e6) or None

    def _mig_is_on(self, handle: Any) -> bool:
        mode = self._if_told(lambda: self._nvml.nvmlDeviceGetMigMode(handle))
        return mode is not None and mode[0] == self._nvml.NVML_DEVICE_MIG_ENABLE

    def _instances(self, handle: Any) -> Iterator[Any]:
        if not self._mig_is_on(handle):
            return
        nvml = self._nvml
        slots = self._if_told(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0
        for slot in range(slots):
            instance = self._if_told(
                partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot)
            )
            if instance is not None:
                yield instance

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        nvml = self._nvml
        computing = self._if_told(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        drawing = self._if_told(lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses(handle))
        if computing is None and drawing is None:
            return None
        used: dict[int, int | None] = {}
        for process in (*(drawing or ()), *(computing or ())):  # a process can be in both
            told = process.usedGpuMemory
            used[int(process.pid)] = None if told is None else int(told)
        return tuple(
            GpuProcess(pid, count, _name_of(pid, self._proc)) for pid, count in sorted(used.items())
        )

    def _if_told(self, ask: Callable[[], T]) -> T | None:
        """None where this GPU, this driver or this user has no answer; lost GPUs still raise."""
        nvml = self._nvml
        try:
            return ask()
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_InvalidArgument,  # drivers of old, asked about MIG
            nvml.NVMLError_NotFound,  # an empty slot of MIG; most are
        ):
            return None

    def _unreadable(self, name: str, uuid: str | None, index: int, error: Exception) -> Gpu:
        words = _WHY_NOT_USABLE.get(type(error).__name__, f"NVML cannot read the GPU: {error}")
        view = DeviceView(
            name=name,
            backend="cuda",
            uuid=uuid,
            memory_total_bytes=0,
            memory_free_bytes=0,
            unified=False,
            compute_capability=None,
            driver=self._version,
            problem=words,
        )
        return Gpu(view, index)


def _without_driver(error: Exception, proc: Path) -> Driver:
    """Why NVML does not answer, in words that say what to do."""
    kind = type(error).__name__
    loaded = _loaded_module(proc)
    words = _WHY_NO_DRIVER.get(kind, f"the NVIDIA driver does not answer: {error}")
    blind = False
    if kind == "NVMLError_LibraryNotFound":
        blind = _is_tegra(proc)
        words = _TEGRA if blind else _CONTAINER if loaded else words
    return Driver("NVIDIA", loaded, words, blind)


def _loaded_module(proc: Path) -> str | None:
    """Of the kernel module: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue …`."""
    try:
        words = (proc / "driver" / "nvidia" / "version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)


def _is_tegra(proc: Path) -> bool:
    try:
        return b"nvidia,tegra" in (proc / "device-tree" / "compatible").read_bytes()
    except OSError:
        return False


def _name_of(pid: int, proc: Path) -> str | None:
    try:
        return (proc / str(pid) / "comm").read_text(errors="replace").strip() or None
    except OSError:
        return None


def _text(value: bytes | str) -> str:
    """Older releases of the binding return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
