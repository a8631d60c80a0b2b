"""How much of a node's memory models may have. Pure; sizes are bytes.

Rules, numbered as in the code:

1. Accelerators count if the engine lists them and nothing is wrong with them. A node without one
   runs models in its main memory, under the name `HOST`.
2. An accelerator whose memory is the machine's (GB10, Apple) stands for both: what would lie in
   main memory is counted on it, and no more of it than main memory has. If its driver does not tell
   how fast that memory is, it is as fast as the machine's.
3. Usable is what is free now, with what this node's engines hold, less a margin.
4. A limit (`--max-vram`) holds for all devices that models lie on together; each may have its share
   in proportion to what is usable of it. Main memory beside accelerators is not limited by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from meshd.view import DeviceView

HOST: Final = "CPU"
"""Main memory, as the engine calls it."""
CPU_BACKEND: Final = "cpu"
MIB: Final = 1 << 20
ACCELERATOR_MARGIN: Final = 1024 * MIB
"""On each accelerator, for what the engine does not count among its buffers: the driver's context,
the libraries' kernels and their scratch memory. As much as the engine leaves when it is left to fit
a model itself (`--fit-target`)."""
HOST_MARGIN: Final = 512 * MIB
"""For the daemon, and for what an engine does not count among its buffers: 90 MiB with a vocabulary
of 150,000 tokens, after a dozen prompts."""
HOST_SHARE: Final = 32
"""One such part of main memory is left to everything else that runs on the machine."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Of one memory models can lie in."""

    device: str
    """As the engine calls it."""
    usable: int
    """What models may have in all, those that are there included."""
    host: bool
    """What an engine keeps in main memory counts here."""
    accelerator: bool
    bytes_per_s: int | None = None
    """How fast its device reads it; None if that is not known."""


def budgets(
    devices: Sequence[DeviceView],
    *,
    held: Mapping[str, int] = MappingProxyType({}),
    limit: int | None = None,
) -> tuple[Budget, ...]:
    """The memories of a node, accelerators first; empty if it has none that is known.

    `held`: what this node's engines hold that is missing from the free memory in `devices`
    (`MemoryParts.private`), by device as the engine calls it. `limit`: of rule 4.
    """
    machine = next((d for d in devices if d.backend == CPU_BACKEND), None)
    main = None
    if machine is not None:
        usable, speed = _usable_main(machine, held), machine.memory_bytes_per_s
        main = Budget(HOST, usable, host=True, accelerator=False, bytes_per_s=speed)
    found = [
        _accelerator(device, held, main)
        for device in devices
        if device.backend != CPU_BACKEND and device.engine_name and device.problem is None  # 1
    ]
    if main is not None and not any(budget.host for budget in found):
        found.append(main)
    return tuple(found if limit is None else _limited(found, limit))


def _accelerator(device: DeviceView, held: Mapping[str, int], main: Budget | None) -> Budget:
    assert device.engine_name is not None
    margin = ACCELERATOR_MARGIN
    own = held.get(device.engine_name, 0)
    usable = max(0, min(device.memory_free_bytes + own, device.memory_total_bytes) - margin)  # 3
    speed = device.memory_bytes_per_s
    if device.unified and main is not None:  # 2
        usable = min(usable, main.usable + own)
        speed = main.bytes_per_s if speed is None else speed
    name, unified = device.engine_name, device.unified
    return Budget(name, usable, host=unified, accelerator=True, bytes_per_s=speed)


def _usable_main(machine: DeviceView, held: Mapping[str, int]) -> int:
    own = held.get(HOST, 0)
    margin = HOST_MARGIN + machine.memory_total_bytes // HOST_SHARE
    return max(0, min(machine.memory_free_bytes + own, machine.memory_total_bytes) - margin)  # 3


def _limited(found: Sequence[Budget], limit: int) -> list[Budget]:
    """Rule 4."""
    accelerators = any(budget.accelerator for budget in found)
    limited = [budget for budget in found if budget.accelerator == accelerators]
    whole = sum(budget.usable for budget in limited)
    return [
        replace(budget, usable=budget.usable * limit // whole)
        if budget in limited and whole > limit
        else budget
        for budget in found
    ]
