"""Which nodes a host asks to be its workers for a model larger than itself. Pure; sizes are bytes.

Rules, numbered as in the code:

1. A node may be a worker if nothing bars it (a client, draining, no engine), if its engine speaks
   the RPC protocol of the host's (the engine takes no other), and if one of its memories has room
   for a layer and for what lies beside it. Every other one is told with its reason.
2. The fewest workers that fit are chosen, `MAX_WORKERS` at most: each one more is a hop for every
   token, and one more that can be lost.
3. Of as many, those with the lowest round trips, added up, in steps of `RTT_STEP_S` so that noise
   does not change plans; one that is not known counts as a second.
4. Then those with the highest bandwidth, in doublings, added up; unknown is lowest.
5. Then those that lend most, then names.
6. In the row they stand by name, whatever their round trips are just now: so the next load finds on
   each worker the tensors it was sent before. Without accelerators of the host the output layer is
   the last worker's, and the one that loses the fewest layers to it comes last.

What is guaranteed: sets of each size are looked at best first (3-5) and the first one that fits is
taken. If all layers are alike it is the best one of the smallest size, as long as `MAX_LOOKS` sets
are enough and `MAX_FITS` of them worth counting: near ones are roomy, or there are a dozen
candidates. Beyond that the roomiest decide whether their number is enough, and are exchanged one by
one for better ones while it still fits: the number is still the smallest, round trips are low, but
maybe not the lowest. Where layers differ, another order of the workers in the row might fit when
none of those tried does: that may cost a worker more, where memories are filled to the last layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Final

from meshd.election.fit import Budget, Estimate, SplitFit, WorkerMemory, split_fit
from meshd.election.fit.splitting import own_spaces, spaces
from meshd.ids import NodeId
from meshd.sizes import format_size
from meshd.view import Lendable

MAX_WORKERS: Final = 8
"""Half of what the engine takes (`GGML_RPC_MAX_SERVERS` is 16)."""
MAX_FITS: Final = 64
"""Counts for one number of workers."""
MAX_ODD_FITS: Final = 16
"""Counts for a number of workers of which the roomiest are not enough."""
MAX_LOOKS: Final = 1000
"""Sets of one number of workers."""
RTT_STEP_S: Final = 0.0002
UNKNOWN_RTT_S: Final = 1.0
MAX_TOLD: Final = 8
"""Nodes named in one sentence."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that might be a worker, as the host knows it."""

    node: NodeId
    name: str
    lends: tuple[Lendable, ...]
    rtt_s: float | None = None
    bytes_per_s: float | None = None
    """Of the way to it."""
    rpc_protocol: str | None = None
    """Of its engine."""
    barred: str | None = None
    """Why it may lend nothing, in words."""


def choose_workers(
    estimate: Estimate,
    own: Sequence[Budget],
    free: Mapping[str, int] | None,
    candidates: Sequence[Candidate],
    *,
    rpc_protocol: str | None,
) -> SplitFit:
    """The best plan for a host with `own` memories and an engine of this RPC protocol. If there is
    none, what lacks with the roomiest workers there are. `free`: as of `split_fit`."""
    barred = {c.name: why for c in candidates if (why := _barred(estimate, c, rpc_protocol))}
    workers = [_Worker.of(estimate, c) for c in candidates if c.name not in barred]  # 1
    search = _Search(estimate, own, free, workers)
    found = next(filter(None, map(search.best, range(1, MAX_WORKERS + 1))), None)  # 2
    if found is None:
        found = split_fit(estimate, own, free, [w.memory for w in search.roomiest(MAX_WORKERS)])
    return replace(found, excluded=MappingProxyType(barred))


def unsplittable(found: SplitFit, candidates: Sequence[Candidate]) -> str:
    """What a model that fits on no node waits for, if its split does not fit either: how much lacks
    in all, and what each of these nodes could give."""
    told = [_gift(candidate, found.excluded) for candidate in candidates[:MAX_TOLD]]
    if len(candidates) > MAX_TOLD:
        told.append(f"{len(candidates) - MAX_TOLD} more nodes")
    nodes = ", ".join(told) if told else "there is no other node"
    return f"{format_size(found.missing)} short even if it is split: {nodes}"


def _gift(candidate: Candidate, excluded: Mapping[str, str]) -> str:
    name = candidate.name
    if (why := excluded.get(name)) is not None:
        return f"{name} lends nothing ({why})"
    return f"{name} lends {format_size(sum(lend.free_bytes for lend in candidate.lends))}"


def _barred(estimate: Estimate, candidate: Candidate, rpc_protocol: str | None) -> str | None:
    """Why it may not be a worker (1)."""
    if candidate.barred is not None:
        return candidate.barred
    if rpc_protocol is None:
        return "the host's engine has no RPC"
    if candidate.rpc_protocol is None:
        return "its engine has no RPC server"
    if candidate.rpc_protocol != rpc_protocol:
        return f"RPC protocol {candidate.rpc_protocol}, not {rpc_protocol}"
    if not spaces(estimate, _memory(candidate), several=False):
        most = max((lend.free_bytes for lend in candidate.lends), default=0)
        return f"{format_size(most)} free at most, too little for one layer"
    return None


def _memory(candidate: Candidate) -> WorkerMemory:
    return WorkerMemory(candidate.node, candidate.name, candidate.lends)


@dataclass(frozen=True, slots=True)
class _Worker:
    memory: WorkerMemory
    merit: tuple[int, int, int]
    """Round trip, bandwidth, memory (3-5): less is better, and those of a set add up."""
    rooms: tuple[int, ...]
    """For layers, at most."""

    @classmethod
    def of(cls, estimate: Estimate, candidate: Candidate) -> _Worker:
        rtt_s = UNKNOWN_RTT_S if candidate.rtt_s is None else candidate.rtt_s
        speed = 0 if candidate.bytes_per_s is None else round(candidate.bytes_per_s).bit_length()
        memory = _memory(candidate)
        lends = sum(lend.free_bytes for lend in candidate.lends)
        rooms = spaces(estimate, memory, several=False)
        return cls(memory, (round(rtt_s / RTT_STEP_S), -speed, -lends), rooms)


class _Search:
    """For the best set of workers of each size."""

    def __init__(
        self,
        estimate: Estimate,
        own: Sequence[Budget],
        free: Mapping[str, int] | None,
        workers: Sequence[_Worker],
    ) -> None:
        self._estimate = estimate
        self._own = own
        self._free = free
        sizes = [layer.total for layer in estimate.layers]
        self._smallest, self._largest = min(sizes), max(sizes)
        self._output = estimate.output + estimate.output_copy
        self._whole = sum(sizes) + self._output
        self._rooms = own_spaces(estimate, own, free)
        self._workers = sorted(workers, key=lambda w: (w.merit, w.memory.name))
        self._left = 0
        """Counts that may still be made."""

    def roomiest(self, count: int) -> list[_Worker]:
        """Those that hold the most layers, best ones first."""

        def room(worker: _Worker) -> tuple[int, int]:
            return sum(room // self._largest for room in worker.rooms), sum(worker.rooms)

        chosen = sorted(self._workers, key=room, reverse=True)[:count]
        return sorted(chosen, key=self._workers.index)

    def best(self, count: int) -> SplitFit | None:
        """With `count` workers; None if they are not enough."""
        if count > len(self._workers) or not self._may_fit(self.roomiest(count)):
            return None
        self._left = MAX_FITS
        roomiest = self._fit(self.roomiest(count))
        if roomiest is None:
            self._left = MAX_ODD_FITS
        for chosen in islice(_best_first(self._workers, count), MAX_LOOKS):
            if self._left <= 0:
                break
            if self._may_fit(chosen) and (found := self._fit(chosen)) is not None:
                return found
        return None if roomiest is None else self._exchanged(self.roomiest(count), roomiest)

    def _exchanged(self, chosen: list[_Worker], fits: SplitFit) -> SplitFit:
        """With each of `chosen`, which fit, in exchange for a better one, if that fits as well."""
        self._left = MAX_FITS
        for worker in reversed(chosen):
            for other in self._workers[: self._workers.index(worker)]:
                others = [*(w for w in chosen if w is not worker), other]
                if other in chosen or self._left <= 0 or not self._may_fit(others):
                    continue
                if (found := self._fit(others)) is not None:
                    chosen, fits = others, found
                    break
        return fits

    def _may_fit(self, chosen: Sequence[_Worker]) -> bool:
        """Whether it is worth counting: False is certain."""
        rooms = [*self._rooms, *(room for worker in chosen for room in worker.rooms)]
        layers = sum(room // self._smallest for room in rooms)
        return sum(rooms) >= self._whole and layers >= len(self._estimate.layers)

    def _fit(self, chosen: Sequence[_Worker]) -> SplitFit | None:
        for workers in self._orders(chosen):
            self._left -= 1
            found = split_fit(self._estimate, self._own, self._free, workers)
            if found.fits:
                return found
        return None

    def _orders(self, chosen: Sequence[_Worker]) -> list[list[WorkerMemory]]:
        """Worth trying (6): which one loses least may depend on how many devices there will be."""
        row = sorted((worker.memory for worker in chosen), key=lambda memory: memory.name)
        if any(budget.accelerator for budget in self._own):
            return [row]
        ends = dict.fromkeys(
            max(row, key=lambda memory: self._left_at_the_end(memory, several))
            for several in (True, False)
        )
        return [[*(memory for memory in row if memory != last), last] for last in ends]

    def _left_at_the_end(self, memory: WorkerMemory, several: bool) -> tuple[int, int]:
        """Layers a worker gains if it holds the output layer, at most 0, and its room."""
        rooms = spaces(self._estimate, memory, several=several)
        if not rooms or rooms[-1] < self._largest + self._output:
            return -len(self._estimate.layers), 0
        lost = rooms[-1] // self._largest - (rooms[-1] - self._output) // self._largest
        return -lost, rooms[-1]


def _best_first(workers: Sequence[_Worker], count: int) -> Iterator[list[_Worker]]:
    """All sets of `count` of these, which are in order of merit; the set with the best sum first.

    From a set come those in which one member is exchanged for the next one: no better than it.
    """

    def merit(members: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(sum, zip(*(workers[member].merit for member in members), strict=True)))

    first = tuple(range(count))
    waiting, seen = [(merit(first), first)], {first}
    while waiting:
        _, members = heapq.heappop(waiting)
        yield [workers[member] for member in members]
        for place, member in enumerate(members):
            following = (*members[:place], member + 1, *members[place + 1 :])
            if member + 1 < len(workers) and member + 1 not in members and following not in seen:
                seen.add(following)
                heapq.heappush(waiting, (merit(following), following))
