"""One look at the devices of a machine, as data."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.view import DeviceView


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU."""

    pid: int
    """As the driver counts them: of the host, where this is a container."""
    used_bytes: int | None
    """None where the driver does not tell (unified memory, MIG without rights)."""
    name: str | None
    """None if it is gone, or not visible from here."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a part of one that is used as a device of its own (MIG)."""

    view: DeviceView
    index: int | None = None
    """Position in the driver's own order; None of what the driver does not list."""
    processes: tuple[GpuProcess, ...] | None = None
    """None where the driver does not tell."""
    parent: str | None = None
    """uuid of the GPU this MIG instance is a part of."""
    divided: bool = False
    """MIG is on: its instances can be used, it cannot."""


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver that was asked, whether or not it answered."""

    vendor: str
    """`NVIDIA` or `AMD`."""
    version: str | None
    problem: str | None
    """Why it lists nothing, or what stands in the way of its devices; None if nothing does."""
    blind: bool = False
    """It cannot list the GPUs of this kind of machine although they work (Jetson)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What drivers, bus and kernel say at one time."""

    gpus: tuple[Gpu, ...]
    cpu: DeviceView
    drivers: tuple[Driver, ...]

    @property
    def devices(self) -> tuple[DeviceView, ...]:
        """GPUs in the order of their drivers, then the CPU."""
        return (*(gpu.view for gpu in self.gpus), self.cpu)

    def driver_of(self, backend: str) -> Driver | None:
        """The driver whose devices have this backend (`cuda`, `rocm`)."""
        vendor = {"cuda": "NVIDIA", "rocm": "AMD"}.get(backend)
        return next((driver for driver in self.drivers if driver.vendor == vendor), None)
