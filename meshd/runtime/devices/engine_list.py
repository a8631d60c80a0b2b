"""Reads what `llama-server --list-devices` prints.

The list (common/arg.cpp of llama.cpp) is `  NAME: DESCRIPTION (TOTAL MiB, FREE MiB free)` a line,
`  (none)` if only the CPU is there; the CPU itself is never listed. Before it, the CUDA and ROCm
backends may say `  Device 0: NAME, compute capability 9.0, VMM: yes, …` or
`  Device 0: NAME, gfx1100 (0x1100), VMM: no, …`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import ascii_letters

MIB = 1 << 20

_DEVICE = re.compile(
    r"^\s+(?P<name>[A-Za-z]+\d*): (?P<description>.+) "
    r"\((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)\s*$",
    re.MULTILINE,
)
_CAPABILITY = re.compile(
    r"^\s+Device (?P<index>\d+): .+?, (?:compute capability (?P<cuda>\d+\.\d+)|(?P<gfx>gfx\w+))",
    re.MULTILINE,
)
_COMPLAINT = re.compile(r"^.*(?:\bfail|\berror\b|no devices? found|\bno .*device).*$", re.I | re.M)
_BACKENDS = {
    "cuda": "cuda",
    "rocm": "rocm",
    "hip": "rocm",
    "vulkan": "vulkan",
    "metal": "metal",
    "mtl": "metal",
    "cpu": "cpu",
    "blas": "cpu",
}


@dataclass(frozen=True, slots=True)
class EngineDevice:
    name: str
    """`CUDA0`, as `--device` takes it."""
    backend: str
    """`cuda`, `rocm`, `vulkan`, `metal`, `cpu`; of others the engine's own word in lower case."""
    description: str
    total_bytes: int
    free_bytes: int
    capability: str | None = None
    """`9.0`, `gfx1100`; None if it was not said."""


@dataclass(frozen=True, slots=True)
class EngineList:
    """What one engine's own binary lists."""

    built_for: str
    """The backend it was built for."""
    devices: tuple[EngineDevice, ...]
    complaints: tuple[str, ...] = ()
    """Lines that say why something is not in the list, or why there is no list."""


def parse_list(text: str, built_for: str) -> EngineList:
    """Read both outputs of `--list-devices`. What is not understood is left out."""
    capabilities = {m["index"]: m["cuda"] or m["gfx"] for m in _CAPABILITY.finditer(text)}
    devices = tuple(_device(match, capabilities) for match in _DEVICE.finditer(text))
    named = {match[0].strip() for match in _DEVICE.finditer(text)}
    said = (match[0].strip() for match in _COMPLAINT.finditer(text))
    return EngineList(built_for, devices, tuple(line for line in said if line not in named))


def backend_of(name: str) -> str:
    """The backend of a device by the engine's name for it: `CUDA0` is `cuda`, `ROCm1` is `rocm`."""
    word = name.rstrip("0123456789").lower()
    return _BACKENDS.get(word, word)


def _device(match: re.Match[str], capabilities: dict[str, str]) -> EngineDevice:
    backend = backend_of(match["name"])
    number = match["name"].lstrip(ascii_letters)
    return EngineDevice(
        name=match["name"],
        backend=backend,
        description=match["description"],
        total_bytes=int(match["total"]) * MIB,
        free_bytes=int(match["free"]) * MIB,
        capability=capabilities.get(number) if backend in ("cuda", "rocm") else None,
    )
