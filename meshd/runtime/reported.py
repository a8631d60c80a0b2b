"""Reads what an engine says of the memory it took, out of its log. Pure.

The lines are llama-server's, from verbosity 4 on (build 0c1e570):

    load_tensors: offloaded 5/5 layers to GPU
    load_tensors:   CPU_Mapped model buffer size =     4.85 MiB
    llama_kv_cache:        CPU KV buffer size =    16.00 MiB
    llama_memory_recurrent:        CPU RS buffer size =     0.89 MiB
    llama_context:        CPU  output buffer size =     0.00 MiB
    sched_reserve:        CPU compute buffer size =     8.51 MiB

A buffer has the name of its type: `CUDA0` is memory of that device, `CPU_Mapped` pages of the file,
`CPU_REPACK` weights in another order, `CUDA_Host` main memory the device can read, and
`RPC0[10.0.0.7:5000]` the first device of the RPC server at that address. The engine may
load twice, once to measure: the last load counts. Caches of several kinds add up; a buffer for
computing that is reserved again replaces the one before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from meshd.view.shape import MemoryParts

MIB: Final = 1 << 20
HOST: Final = "CPU"
RPC: Final = "RPC"
"""What the names of an RPC server's devices begin with."""
VERBOSITY: Final = 4
"""What of llama.cpp tells of layers and buffers is on no lower level since 0.5."""

_LOADS = "loading model tensors"
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_BUFFER = re.compile(
    r"(?P<function>\w+):\s+(?P<buffer>\S+)\s+(?P<kind>model|KV|RS|output|compute) buffer size ="
    r"\s+(?P<mib>\d+(?:\.\d+)?) MiB"
)
_NAME = re.compile(r"(?P<device>.+?)(?P<kind>_Mapped|_Host|_REPACK|_AMX|_HBM|_KLEIDIAI|_Split)?")


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What one engine took; bytes, as exact as its log (a hundredth of a MiB)."""

    devices: Mapping[str, MemoryParts]
    """As the engine calls them; main memory is `CPU`."""
    offloaded: tuple[int, int] | None = None
    """Layers on accelerators, of all (the output layer counts as one)."""

    @property
    def total(self) -> int:
        return sum(parts.total for parts in self.devices.values())

    @property
    def own(self) -> MemoryReport:
        """What of it lies on this machine. Nothing is said of the layers on accelerators if some
        lie elsewhere: to an engine each device of an RPC server is one."""
        here = {name: parts for name, parts in self.devices.items() if not name.startswith(RPC)}
        return self if len(here) == len(self.devices) else MemoryReport(MappingProxyType(here))


@dataclass(slots=True)
class MemoryHeard:
    """Listens to an engine line by line."""

    offloaded: tuple[int, int] | None = None
    _sizes: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """MiB, by what said it, buffer and kind."""

    def line(self, line: str) -> None:
        if "buffer size" in line:
            self._buffer(line)
        elif _LOADS in line:
            self._sizes.clear()
            self.offloaded = None
        elif match := _OFFLOADED.search(line):
            self.offloaded = (int(match[1]), int(match[2]))

    def _buffer(self, line: str) -> None:
        match = _BUFFER.search(line)
        if match is None:
            return
        key = (match["function"], match["buffer"], match["kind"])
        before = self._sizes.get(key, 0.0) if match["kind"] in ("KV", "RS") else 0.0
        self._sizes[key] = before + float(match["mib"])

    @property
    def model_buffers(self) -> tuple[tuple[str, float], ...]:
        """(name, MiB) of each buffer of weights, in the order they were named."""
        return tuple(
            (buffer, mib) for (_, buffer, kind), mib in self._sizes.items() if kind == "model"
        )

    def report(self) -> MemoryReport | None:
        """None before the engine said how much it computes with, the last thing it takes."""
        if not any(kind == "compute" for _, _, kind in self._sizes):
            return None
        names = dict.fromkeys(_device(buffer) for _, buffer, _ in self._sizes)
        return MemoryReport(
            MappingProxyType({name: self._parts(name) for name in names}), self.offloaded
        )

    def _parts(self, device: str) -> MemoryParts:
        sizes = [
            (buffer, kind, round(mib * MIB))
            for (_, buffer, kind), mib in self._sizes.items()
            if _device(buffer) == device
        ]
        models = [(buffer, size) for buffer, kind, size in sizes if kind == "model"]
        mapped = sum(size for buffer, size in models if buffer.endswith("_Mapped"))
        copied = sum(size for buffer, size in models if not buffer.endswith("_Mapped"))
        # Weights in another order were copied out of the mapping, whose range still covers them.
        mapped = max(0, mapped - copied)
        return MemoryParts(
            weights=copied + mapped,
            mapped=mapped,
            cache=sum(size for _, kind, size in sizes if kind in ("KV", "RS")),
            compute=sum(size for _, kind, size in sizes if kind == "compute"),
            output=sum(size for _, kind, size in sizes if kind == "output"),
        )


def read_report(lines: Iterable[str]) -> MemoryReport | None:
    """What these lines of a log say; None if the engine did not get that far."""
    heard = MemoryHeard()
    for line in lines:
        heard.line(line)
    return heard.report()


def _device(buffer: str) -> str:
    match = _NAME.fullmatch(buffer)
    if match is None or match["kind"] == "_Host":
        return HOST
    return match["device"]
