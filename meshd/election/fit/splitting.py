"""Whether a model fits on a host and its workers together, as a plan. Pure; sizes are bytes.

The rules of what lies where are in `rows.py`. A worker none of whose memories takes part is left
out of the plan. More memory never makes a plan fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from meshd.election.fit.budget import Budget
from meshd.election.fit.estimate import Estimate
from meshd.election.fit.placing import parts_in_words
from meshd.election.fit.rows import HostMemory, Row, WorkerMemory, lent, rows, within
from meshd.sizes import format_size
from meshd.view import Part, SplitPlan


@dataclass(frozen=True, slots=True)
class SplitFit:
    """Whether a model fits on a host and its workers."""

    fits: bool
    words: str
    """Why, with figures; of both answers."""
    plan: SplitPlan | None = None
    """None if it does not fit."""
    memory: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """What is to be leased on the host, by device; empty if it does not fit."""
    needed: int = 0
    """On all nodes together."""
    headroom: int = 0
    """What would still be free of the memories it lies in, on all nodes."""
    missing: int = 0
    """Bytes that lack, at least; 0 if it fits."""
    excluded: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Nodes that may not be workers, by name, with the reason."""


def split_fit(
    estimate: Estimate,
    own: Sequence[Budget],
    free: Mapping[str, int] | None,
    workers: Sequence[WorkerMemory],
) -> SplitFit:
    """Whether `estimate` fits into what is free of the host's `own` budgets and of what `workers`
    lend. The plan keeps their order.

    `free`: what no lease has of the host's memories, by device; None if there are no leases.
    """
    host = HostMemory.of(own, free)
    if host is None:
        total = estimate.total
        return SplitFit(False, "no memory of this node is known", needed=total, missing=total)
    least: Row | None = None
    for row in rows(estimate, host, workers):
        if row.layers:
            return _planned(estimate, host, row, workers)
        if least is None or row.missing < least.missing:
            least = row
    assert least is not None, "there is at least one way"
    return _refused(estimate, least, len(workers))


def spaces(estimate: Estimate, worker: WorkerMemory, *, several: bool) -> tuple[int, ...]:
    """What is left for layers in each memory of a worker that can take part. `several`: as if
    several devices held all layers."""
    compute = estimate.compute_on_each(2 if several else 1)
    largest = max(layer.total for layer in estimate.layers)
    found = (place.space - compute for place in lent(worker))
    return tuple(space for space in found if space >= largest)


def own_spaces(
    estimate: Estimate, own: Sequence[Budget], free: Mapping[str, int] | None
) -> tuple[int, ...]:
    """What is left for layers in the host's memories that may take part, at most."""
    host = HostMemory.of(own, free)
    if host is None:
        return ()
    if host.accelerators:
        found = [within(host.free[device]) - estimate.compute for device in host.accelerators]
    else:
        held = estimate.embedding + estimate.logits + estimate.prompts + estimate.projector
        found = [within(host.free[host.main]) - held - estimate.compute]
    return tuple(max(0, space) for space in found)


def _planned(
    estimate: Estimate, host: HostMemory, row: Row, workers: Sequence[WorkerMemory]
) -> SplitFit:
    layers = dict(zip(row.places, row.layers, strict=True))
    chosen = [worker for worker in workers if any(place.worker == worker for place in layers)]
    parts = tuple(_part(estimate, row, worker) for worker in chosen)
    mine = [place for place in layers if place.worker is None]
    own = tuple((place.device, layers[place]) for place in mine if place.accelerator)
    beside = sum(layers[place] for place in mine if not place.accelerator)
    plan = SplitPlan(parts, own, beside)
    memory = {host.main: row.held} | _sizes(estimate, row, None)
    needed = sum(memory.values()) + sum(part.bytes for part in parts)
    room = sum(host.free[device] for device in memory)
    room += sum(place.free for place in layers if place.worker is not None)
    return SplitFit(
        True,
        _taken(estimate, host, plan, memory),
        plan,
        MappingProxyType(memory),
        needed=needed,
        headroom=room - needed,
    )


def _sizes(estimate: Estimate, row: Row, worker: WorkerMemory | None) -> dict[str, int]:
    """Bytes by device, of what lies in the row on one node; None is the host."""
    found, start = {}, 0
    for place, count in zip(row.places, row.layers, strict=True):
        if place.worker == worker:
            layers = estimate.layers[start : start + count]
            found[place.device] = place.besides + sum(layer.total for layer in layers)
        start += count
    return found


def _part(estimate: Estimate, row: Row, worker: WorkerMemory) -> Part:
    numbers = [n for n, place in enumerate(row.places) if place.worker == worker]
    first, end = sum(row.layers[: numbers[0]]), sum(row.layers[: numbers[-1] + 1])
    whole = sum(layer.total for layer in estimate.layers)
    return Part(
        node=worker.node,
        name=worker.name,
        memory=tuple(_sizes(estimate, row, worker).items()),
        layers=tuple(row.layers[number] for number in numbers),
        first_layer=first,
        output=numbers[-1] == len(row.places) - 1,
        share=sum(layer.total for layer in estimate.layers[first:end]) / whole,
    )


def _taken(estimate: Estimate, host: HostMemory, plan: SplitPlan, memory: Mapping[str, int]) -> str:
    layers = dict(plan.own) | ({host.main: plan.beside} if plan.beside else {})
    places = [
        f"{format_size(size)} of {format_size(host.free[device])} on {device}"
        + (f" ({_layers(layers[device])})" if device in layers else "")
        for device, size in memory.items()
    ]
    places += [
        f"{format_size(part.bytes)} on {part.name} ({_layers(sum(part.layers))})"
        for part in plan.parts
    ]
    return f"takes {' and '.join(places)} ({parts_in_words(estimate)})"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _refused(estimate: Estimate, row: Row, workers: int) -> SplitFit:
    nodes = "1 worker" if workers == 1 else f"{workers} workers"
    return SplitFit(
        False,
        f"needs {format_size(row.needed)} of this node and {nodes} ({parts_in_words(estimate)}): "
        f"{format_size(row.missing)} short",
        needed=row.needed,
        missing=row.missing,
    )
