"""A machine with NVIDIA GPUs as `pynvml` shows it: a script instead of a driver, the binding's own
exceptions and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pynvml

GIB = 1 << 30
MIB = 1 << 20
LEAST_VALUE = 32
"""Of a bus in bits, of a clock in MHz."""

T = TypeVar("T")


@dataclass
class Part:
    """A GPU or a MIG instance. A value that is a number of an error is raised where it is asked."""

    name: str = "NVIDIA H200"
    uuid: str = "GPU-6f0b5f3e-0d2c-4a77-9f1e-3f4bb4a1c001"
    memory: tuple[int, int] | int = (143_771 * MIB, 143_164 * MIB)
    """(total, free) bytes."""
    capability: tuple[int, int] | int = (9, 0)
    computing: list[tuple[int, int | None]] | int = field(default_factory=list)
    """(pid, bytes)"""
    drawing: list[tuple[int, int | None]] | int = field(default_factory=list)
    bus_bits: int = 6144
    memory_mhz: int = 3201
    """Either is a number of an error below `LEAST_VALUE`, which no GPU is."""
    mig: bool | int = pynvml.NVML_ERROR_NOT_SUPPORTED
    instances: dict[int, Part] = field(default_factory=dict)
    """By slot of seven."""
    handle: int | None = None
    """An error of its handle."""


def told(value: Any, answer: Callable[[Any], T]) -> T:
    if isinstance(value, int) and not isinstance(value, bool):
        raise pynvml.NVMLError(value)
    return answer(value)


def above_errors(value: int) -> int:
    if value < LEAST_VALUE:
        raise pynvml.NVMLError(value)
    return value


class FakeNvml:
    """`init`: an error of nvmlInit; `count`: one of nvmlDeviceGetCount."""

    def __init__(
        self,
        *gpus: Part,
        init: int | None = None,
        count: int | None = None,
        driver: str = "580.95.05",
    ) -> None:
        self.gpus = gpus
        self.calls: list[str] = []
        self._init = init
        self._count = count
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        """Exceptions and constants are those of the real module."""
        if name.startswith(("NVMLError", "NVML_")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:  # noqa: N802 (its name)
        if self._init is not None:
            raise pynvml.NVMLError(self._init)
        self.calls.append("init")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.calls.append("shutdown")

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return self._driver.encode()

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self._count is not None:
            raise pynvml.NVMLError(self._count)
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Part:  # noqa: N802
        gpu = self.gpus[index]
        if gpu.handle is not None:
            raise pynvml.NVMLError(gpu.handle)
        return gpu

    def nvmlDeviceGetName(self, part: Part) -> str:  # noqa: N802
        return part.name

    def nvmlDeviceGetUUID(self, part: Part) -> str:  # noqa: N802
        return part.uuid

    def nvmlDeviceGetCudaComputeCapability(self, part: Part) -> tuple[int, int]:  # noqa: N802
        return told(part.capability, lambda pair: (pair[0], pair[1]))

    def nvmlDeviceGetMemoryInfo(self, part: Part) -> SimpleNamespace:  # noqa: N802
        return told(part.memory, lambda pair: SimpleNamespace(total=pair[0], free=pair[1]))

    def nvmlDeviceGetMemoryBusWidth(self, part: Part) -> int:  # noqa: N802
        return above_errors(part.bus_bits)

    def nvmlDeviceGetMaxClockInfo(self, part: Part, kind: int) -> int:  # noqa: N802
        assert kind == pynvml.NVML_CLOCK_MEM
        return above_errors(part.memory_mhz)

    def nvmlDeviceGetComputeRunningProcesses(self, part: Part) -> list[Any]:  # noqa: N802
        return told(part.computing, processes)

    def nvmlDeviceGetGraphicsRunningProcesses(self, part: Part) -> list[Any]:  # noqa: N802
        return told(part.drawing, processes)

    def nvmlDeviceGetMigMode(self, part: Part) -> list[int]:  # noqa: N802
        return told(part.mig, lambda on: [int(on), int(on)])

    def nvmlDeviceGetMaxMigDeviceCount(self, part: Part) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, part: Part, slot: int) -> Part:  # noqa: N802
        if slot not in part.instances:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return part.instances[slot]


def processes(pairs: list[tuple[int, int | None]]) -> list[Any]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in pairs]
