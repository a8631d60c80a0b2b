"""Whether a model fits on a node, and what would lie where. Pure; sizes are bytes.

Rules, numbered as in the code:

1. Without accelerators everything lies in main memory.
2. Else the fewest accelerators are taken that hold all layers, the roomiest first: each one more
   costs a buffer for computing and a hop for every token. A device holds a row of layers; those
   that share have their shares in proportion to their room.
3. With `spill`, if all together do not hold them, the first layers stay in main memory and every
   accelerator is filled; the engine computes those layers on the CPU.
4. The embedding, the logits and prompts kept for later lie in main memory; the projector on the
   first device; the output layer on the last one, where it needs a copy of the embedding if it is
   the same weights.
5. Each device that holds layers has a buffer for computing, a larger one if several hold them all.
   Main memory beside accelerators has one as well: for its own layers, or for what goes into each
   batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from meshd.election.fit.budget import Budget
from meshd.election.fit.estimate import Estimate
from meshd.sizes import format_size


@dataclass(frozen=True, slots=True)
class Fit:
    fits: bool
    words: str
    """Why, with figures; of both answers."""
    memory: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """What is to be leased, by device; empty if it does not fit."""
    layers: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Repeating layers each accelerator holds, in the order of devices: the engine's `--device`."""
    beside: int = 0
    """Repeating layers that stay in main memory although there are accelerators."""
    needed: int = 0
    """All of `memory`; if it does not fit, what is needed of the devices the words name."""
    headroom: int = 0
    """What would still be free of the devices it lies on."""
    missing: int = 0
    """Bytes that lack, at least; 0 if it fits."""

    @property
    def gpu_layers(self) -> int:
        """The engine's `--n-gpu-layers`: it counts the output layer as one."""
        return sum(self.layers.values()) + 1 if self.layers else 0

    @property
    def tensor_split(self) -> tuple[int, ...]:
        """The engine's `--tensor-split`: the output layer is one of the last device's."""
        if not self.layers:
            return ()
        *before, last = self.layers.values()
        return (*before, last + 1)


def fit(
    estimate: Estimate,
    budgets: Sequence[Budget],
    free: Mapping[str, int] | None = None,
    *,
    spill: bool = False,
) -> Fit:
    """Whether `estimate` fits into what is free of `budgets`.

    `free`: what no lease has, by device; None if there are no leases. `spill`: layers may stay in
    main memory beside accelerators. A node without a memory fits nothing.
    """
    room = {b.device: b.usable if free is None else free.get(b.device, 0) for b in budgets}
    accelerators = [budget.device for budget in budgets if budget.accelerator]
    host = next((budget.device for budget in budgets if budget.host), None)
    if not accelerators:  # 1
        if host is None:
            total = estimate.total
            return Fit(False, "no memory of this node is known", needed=total, missing=total)
        return _judged(estimate, {host: estimate.total}, {}, room)
    roomiest = sorted(accelerators, key=lambda name: -room[name])
    refused = _refused(estimate, _in_one(estimate, roomiest[0]), room, accelerators)
    for count in range(1, len(roomiest) + 1):  # 2
        chosen = [name for name in accelerators if name in roomiest[:count]]
        compute = estimate.compute_on_each(count)
        even = _shared_out(estimate, chosen, room, compute)
        for rows in (even, _filled(estimate, chosen, room, compute)):
            if _held(rows) == len(estimate.layers):
                found = _judged(estimate, *_laid(estimate, rows, host), room)
                if found.fits:
                    return found
                refused = found
    if not spill or host is None or host in accelerators:
        return refused
    rows = _filled(estimate, accelerators, room, estimate.compute)
    if _held(rows) == len(estimate.layers):  # 5: all of them would take the larger buffer
        rows = _filled(estimate, accelerators, room, estimate.compute_on_each(len(accelerators)))
    return _judged(estimate, *_laid(estimate, rows, host), room)


def parts_in_words(estimate: Estimate) -> str:
    """What a model needs memory for."""
    prompts = f", kept prompts {format_size(estimate.prompts)}" if estimate.prompts else ""
    return (
        f"weights {format_size(estimate.weights + estimate.projector)}, "
        f"cache {format_size(estimate.cache)} for {estimate.slots} × {estimate.context} tokens, "
        f"computing {format_size(estimate.compute)}{prompts}"
    )


Rows = Mapping[str, range]
"""Layers by accelerator, in order; those that are in none stay in main memory."""


def _held(rows: Rows) -> int:
    return sum(map(len, rows.values()))


def _in_one(estimate: Estimate, device: str) -> int:
    """What would lie on accelerators if there were one that is large enough."""
    memory, _ = _laid(estimate, {device: range(len(estimate.layers))}, None)
    return memory[device]


def _shared_out(
    estimate: Estimate, devices: Sequence[str], room: Mapping[str, int], compute: int
) -> Rows:
    """All layers in proportion to the room for them; none where that is too little."""
    rooms = [_for_layers(estimate, devices, n, room) - compute for n in range(len(devices))]
    whole = sum(layer.total for layer in estimate.layers)
    if min(rooms) < 0 or whole > sum(rooms):
        return {}
    rows: dict[str, range] = {}
    start, laid, share = 0, 0, 0
    for device, space in zip(devices, rooms, strict=True):
        share += space
        end = start if device != devices[-1] else len(estimate.layers)
        while end < len(estimate.layers):
            middle = laid + estimate.layers[end].total / 2
            if middle * sum(rooms) > whole * share:
                break
            laid += estimate.layers[end].total
            end += 1
        rows[device] = range(start, end)
        start = end
    return rows


def _filled(
    estimate: Estimate, devices: Sequence[str], room: Mapping[str, int], compute: int
) -> Rows:
    """As many layers as there is room for, the last ones, the last device first. A device without
    room for what may lie beside layers gets none."""
    beside = compute + estimate.projector + estimate.output + estimate.output_copy
    roomy = [device for device in devices if room[device] > beside]
    rows: dict[str, range] = {}
    end = len(estimate.layers)
    for number in reversed(range(len(roomy))):
        space = _for_layers(estimate, roomy, number, room) - compute
        start = end
        while start > 0 and estimate.layers[start - 1].total <= space:
            space -= estimate.layers[start - 1].total
            start -= 1
        rows[roomy[number]] = range(start, end)
        end = start
    return dict(reversed(rows.items()))


def _for_layers(
    estimate: Estimate, devices: Sequence[str], number: int, room: Mapping[str, int]
) -> int:
    """What is left for layers and for computing on one of `devices`; below zero if the rest does
    not fit (4)."""
    space = room[devices[number]]
    if number == 0:
        space -= estimate.projector
    if number == len(devices) - 1:
        space -= estimate.output + estimate.output_copy
    return space


def _laid(
    estimate: Estimate, rows: Rows, host: str | None
) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes by device, layers by accelerator) of these rows (4, 5)."""
    memory: Counter[str] = Counter()
    used = [device for device, row in rows.items() if row]
    kept = len(estimate.layers) - _held(rows)
    compute = estimate.compute if kept else estimate.compute_on_each(len(used))
    for device in used:
        memory[device] += compute + sum(estimate.layers[n].total for n in rows[device])
    if used:
        memory[used[0]] += estimate.projector
        memory[used[-1]] += estimate.output + estimate.output_copy
    if host is not None:
        memory[host] += estimate.embedding + estimate.logits + estimate.prompts
        memory[host] += sum(layer.total for layer in estimate.layers[:kept])
        memory[host] += estimate.compute if kept else estimate.compute_beside(len(used))
        if not used:
            memory[host] += estimate.output + estimate.projector
    return dict(memory), {device: len(row) for device, row in rows.items() if row}


def _judged(
    estimate: Estimate,
    memory: Mapping[str, int],
    layers: Mapping[str, int],
    room: Mapping[str, int],
) -> Fit:
    short = {device: need for device, need in memory.items() if need > room[device]}
    if short:
        return _refused(estimate, sum(short.values()), room, tuple(short))
    places = " and ".join(
        f"{format_size(need)} of {format_size(room[device])} on {device}"
        for device, need in memory.items()
    )
    kept = len(estimate.layers) - sum(layers.values())
    beside = f"; {kept} of {len(estimate.layers)} layers on the CPU" if layers and kept else ""
    return Fit(
        True,
        f"takes {places}{beside} ({parts_in_words(estimate)})",
        MappingProxyType(dict(memory)),
        MappingProxyType(dict(layers)),
        kept if layers else 0,
        needed=sum(memory.values()),
        headroom=sum(room[device] - need for device, need in memory.items()),
    )


def _refused(
    estimate: Estimate, needed: int, room: Mapping[str, int], devices: Sequence[str]
) -> Fit:
    """`needed`: of `devices`."""
    free = sum(room[device] for device in devices)
    missing = max(1, needed - free)
    return Fit(
        False,
        f"needs {format_size(needed)} on {' and '.join(devices)} ({parts_in_words(estimate)}), "
        f"{format_size(free)} free: {format_size(missing)} short",
        needed=needed,
        missing=missing,
    )
