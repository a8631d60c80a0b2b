"""GPUs the PCI bus knows of, whether or not a driver does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_DISPLAY = "0x03"
"""PCI base class of display controllers; data-centre GPUs are 0x0302 (3D), some 0x12 (next)."""
_ACCELERATOR = "0x12"


@dataclass(frozen=True, slots=True)
class BusGpu:
    address: str
    """`0000:01:00.0`"""
    vendor: str
    """`NVIDIA` or `AMD`."""
    driver: str | None
    """The kernel driver that holds it; None if none does."""


def gpus_on_bus(sys: Path = Path("/sys")) -> tuple[BusGpu, ...]:
    """NVIDIA and AMD GPUs by address; empty where there is no PCI bus. Nothing is raised."""
    found = []
    try:
        slots = sorted((sys / "bus" / "pci" / "devices").iterdir())
    except OSError:
        return ()
    for slot in slots:
        try:
            vendor = _VENDORS.get((slot / "vendor").read_text().strip())
            kind = (slot / "class").read_text().strip()
        except OSError:
            continue  # unplugged between listing and reading
        if vendor is None or not kind.startswith((_DISPLAY, _ACCELERATOR)):
            continue
        bound = slot / "driver"
        found.append(BusGpu(slot.name, vendor, bound.resolve().name if bound.exists() else None))
    return tuple(found)
