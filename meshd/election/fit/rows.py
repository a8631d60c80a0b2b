"""Layers of a model in a row of memories, on a host and on its workers. Pure; sizes are bytes.

Rules, numbered as in the code; the engine's are those of build 0c1e570 (`load_tensors`,
`llama_context`):

1. Layers lie in a row: the first ones in the host's main memory if it has no accelerators, then
   those of the workers in the order given, then those of the host's accelerators. The output layer
   lies at the end of the row, never in the host's main memory.
2. A host without accelerators keeps no layer itself if workers' accelerators alone hold them all:
   a layer on a CPU is slower by far.
3. A memory takes part if it has room for any one layer and for what lies beside it, and holds at
   least one then. If more could take part than there are layers, or than the engine has places
   for, the roomiest do, and those that hold what 1 and 6 say.
4. Memories come in groups of about the same speed (`speeds.py`), and are filled group by group, the
   fastest one first: the first groups that hold all layers are taken, however few, and the others
   are left out. In the last one that is taken shares are in proportion to the room for layers: each
   memory is filled to the same part of it, the smallest one at which all layers are placed. Those
   before it are full, but for less than a layer in each. If need be all groups are taken: so a row
   is found if the memories hold the layers at all.
5. Every memory that takes part has a buffer for computing. If several devices hold all layers the
   engine works on several batches at once, for RPC devices claim events and asynchronous work as
   accelerators do: each buffer is the larger one. One device alone is tried where that is too much.
6. The embedding, the logits and prompts kept for later lie in the host's main memory; the projector
   on the first of the host's accelerators in the row, else in its main memory, never on a worker:
   the engine has to be told so (`--mmproj-device`, `--no-mmproj-offload`).
7. In a worker's main memory its RPC server takes `WORKER_MARGIN` besides.
8. Of every memory `KEPT_FREE` or a `KEPT_SHARE` of what is free stays free, whichever is more:
   estimates are off by some percent, and while it loads a worker holds one tensor twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Final

from meshd.election.fit.budget import MIB, Budget
from meshd.election.fit.estimate import Estimate
from meshd.election.fit.speeds import ranks
from meshd.ids import NodeId
from meshd.view import Lendable

WORKER_MARGIN: Final = 64 * MIB
"""An RPC server that computes on the CPU was seen with 24 MiB more than its buffers after prompts
of 3000 tokens; what a batch is converted to for a product grows with the widest row: 15 MiB for
one of 14,336 elements."""
KEPT_FREE: Final = 64 * MIB
KEPT_SHARE: Final = 0.03
MAX_DEVICES: Final = 15
"""The engine computes on 16 at most (`GGML_SCHED_MAX_BACKENDS`), and the CPU is one of them."""
STEPS: Final = 1024
"""How finely memories are filled alike."""


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """What one worker would lend."""

    node: NodeId
    name: str
    lends: tuple[Lendable, ...]


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What the host has itself."""

    main: str
    """The device that stands for main memory."""
    free: Mapping[str, int]
    """By device."""
    accelerators: tuple[str, ...]
    speeds: Mapping[str, int | None]
    """Bytes per second, by device; None if not known."""

    @classmethod
    def of(cls, own: Sequence[Budget], free: Mapping[str, int] | None) -> HostMemory | None:
        """None if no main memory is known. `free`: what no lease has; None if there are none."""
        main = next((budget.device for budget in own if budget.host), None)
        if main is None:
            return None
        room = {b.device: b.usable if free is None else free.get(b.device, 0) for b in own}
        speeds = {budget.device: budget.bytes_per_s for budget in own}
        return cls(main, room, tuple(b.device for b in own if b.accelerator), speeds)

    @property
    def places(self) -> list[Place]:
        """Where its layers may lie: on its accelerators, or in its main memory if it has none."""
        fast = bool(self.accelerators)
        return [
            Place(device, None, fast, self.free[device], bytes_per_s=self.speeds[device])
            for device in self.accelerators or (self.main,)
        ]


@dataclass(frozen=True, slots=True)
class Place:
    """A memory layers may lie in."""

    device: str
    worker: WorkerMemory | None
    """None is the host."""
    accelerator: bool
    free: int
    besides: int = 0
    """What lies in it beside layers."""
    bytes_per_s: int | None = None
    rank: int = 0
    """Number of its group (4)."""

    @property
    def space(self) -> int:
        """For layers; below zero if the rest does not fit."""
        return within(self.free) - self.besides

    def with_more(self, size: int) -> Place:
        return replace(self, besides=self.besides + size)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to use memories."""

    lent: Sequence[Place]
    own: Sequence[Place] = ()
    """The host's accelerators."""
    beside: Place | None = None
    """The host's main memory, if layers lie in it."""
    several: bool = True
    """Several devices hold all layers."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of it."""

    places: tuple[Place, ...]
    """The first one is the host's main memory if layers are beside."""
    layers: tuple[int, ...]
    """In each of them; empty if it does not fit."""
    held: int
    """In the host's main memory, if that is not in the row."""
    needed: int
    """On all nodes together."""
    missing: int
    """Bytes that lack, at least; 0 if it fits."""


def within(free: int) -> int:
    """How much of a memory may be used (8)."""
    return max(0, free - max(KEPT_FREE, round(free * KEPT_SHARE)))


def lent(worker: WorkerMemory) -> list[Place]:
    """The memories of a worker, with what they hold whichever layers they get (7)."""
    return [
        Place(
            lend.device,
            worker,
            lend.accelerator,
            lend.free_bytes,
            0 if lend.accelerator else WORKER_MARGIN,
            lend.bytes_per_s,
        )
        for lend in worker.lends
    ]


def rows(estimate: Estimate, host: HostMemory, workers: Sequence[WorkerMemory]) -> Iterator[Row]:
    """What comes of each way to use these memories, best first."""
    sizes = [layer.total for layer in estimate.layers]
    return (_laid(estimate, sizes, host, way) for way in _ways(host, workers, max(sizes)))


def _ways(host: HostMemory, workers: Sequence[WorkerMemory], largest: int) -> Iterator[Way]:
    """For the first group, the first two, and so on to all (4). `largest`: of the layers."""
    places = [place for worker in workers for place in lent(worker) if place.space >= largest]  # 3
    places, own = _ranked(places, host.places)
    for rank in range(max((place.rank for place in (*places, *own)), default=0) + 1):
        lends = [place for place in places if place.rank <= rank]
        mine = [place for place in own if place.rank <= rank]
        if host.accelerators:
            yield Way(lends, mine)
        else:  # 2: main memories come after all accelerators
            if mine:
                yield Way(lends, beside=mine[0], several=False)
            yield Way(lends)
        for place in lends:  # 5
            if place.rank == rank:
                yield Way([place], several=False)


def _ranked(lends: Sequence[Place], own: Sequence[Place]) -> tuple[list[Place], list[Place]]:
    """The same places with their groups."""
    places = (*lends, *own)
    numbers = ranks([(place.accelerator, place.bytes_per_s) for place in places])
    found = [replace(place, rank=rank) for place, rank in zip(places, numbers, strict=True)]
    return found[: len(lends)], found[len(lends) :]


def _laid(estimate: Estimate, sizes: Sequence[int], host: HostMemory, way: Way) -> Row:
    """`sizes`: of the layers."""
    devices = 2 if way.several else 1
    compute = estimate.compute_on_each(devices)  # 5
    held = estimate.embedding + estimate.logits + estimate.prompts  # 6
    held += estimate.compute if way.beside is not None else estimate.compute_beside(devices)
    before = [place.with_more(compute) for place in way.lent]
    own = [place.with_more(compute) for place in way.own]
    own = [place.with_more(held) if place.device == host.main else place for place in own]
    if way.beside is not None:  # 1
        before.insert(0, way.beside.with_more(held + estimate.projector))
    largest = max(sizes)
    row = [place for place in before if place.space >= largest]  # 3
    after = [place for place in own if place.space >= largest]
    row += _bearing(after[::-1], estimate.projector, largest)[::-1]  # 6
    output = estimate.output + estimate.output_copy
    row = _bearing(row, output, largest)  # 1
    row = _roomiest(row, min(MAX_DEVICES + (way.beside is not None), len(sizes)))  # 3
    mine = [place for place in row if place.worker is None]
    if any(place.device == host.main for place in mine):
        held = 0
    elif not mine:
        held += estimate.projector
    return _filled(sizes, way, row, output, held, max(0, held - within(host.free[host.main])))


def _filled(
    sizes: Sequence[int], way: Way, row: Sequence[Place], output: int, held: int, short: int
) -> Row:
    """The row with its layers, if it holds them. `short`: what the host's main memory lacks."""
    whole = sum(sizes) + (0 if row else output)
    lacks = max(0, whole - sum(place.space for place in row))
    layers: tuple[int, ...] = ()
    if not short and not lacks:
        if _as_counted(way, row):
            layers = _shares(sizes, row)  # 4
        if not layers:  # there is room, but in pieces: one layer at least finds no place
            lacks = min(sizes)
    needed = held + whole + sum(place.besides for place in row)
    return Row(tuple(row), layers, held, needed, short + lacks)


def _as_counted(way: Way, row: Sequence[Place]) -> bool:
    """Whether these are memories as the way was counted for, and some of them a worker's."""
    if way.beside is not None and row and row[0].worker is not None:
        return False
    if way.several and len(row) < 2:
        return False
    return any(place.worker is not None for place in row)


def _shares(sizes: Sequence[int], row: Sequence[Place]) -> tuple[int, ...]:
    """Layers of these sizes in each of these places, at least one, filled group by group (4); empty
    if they do not hold all. Each has space for any one layer, and there are no more than layers."""
    ends = list(accumulate(sizes, initial=0))
    last = len(ends) - 1
    group = STEPS * len(row)

    def filled(level: int) -> tuple[int, ...]:
        """With each group filled by as many as `STEPS`, one place after another: all at once they
        would take several layers more where one is left, and faster places would lose them."""
        cuts = [0]
        for number, place in enumerate(row):
            steps, ahead = divmod(min(max(level - place.rank * group, 0), group), len(row))
            part = steps + (number < ahead)
            most = bisect_right(ends, ends[cuts[-1]] + place.space * part // STEPS) - 1
            cuts.append(min(max(most, cuts[-1] + 1), last - (len(row) - 1 - number)))
        return tuple(end - start for start, end in pairwise(cuts)) if cuts[-1] == last else ()

    low, high = 0, group * (max(place.rank for place in row) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if filled(middle) else (middle, high)
    return filled(high)


def _bearing(places: Sequence[Place], size: int, layer: int) -> list[Place]:
    """`places` with `size` bytes more on the last one; those at the end that have no room for that
    and a layer are left out."""
    row = list(places)
    while row and row[-1].space < size + layer:
        row.pop()
    return [*row[:-1], row[-1].with_more(size)] if row else []


def _roomiest(row: Sequence[Place], most: int) -> list[Place]:
    """The `most` roomiest of a row, in their order. Whichever bears more than layers stays in it,
    and one of a worker; none do if that are more than `most`."""
    if len(row) <= most:
        return list(row)
    own = [number for number, place in enumerate(row) if place.worker is None]
    kept = {len(row) - 1, *own[:1]}
    numbers = sorted(range(len(row)), key=lambda number: -row[number].space)
    if row[-1].worker is None:
        kept.update([number for number in numbers if number not in own][:1])
    if len(kept) > most:
        return []
    chosen = [*kept, *(number for number in numbers if number not in kept)][:most]
    return [row[number] for number in sorted(chosen)]
