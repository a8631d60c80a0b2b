"""Fast memories before slow ones: by hand, and against every filling there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meshd.election.fit import HOST, Budget, LayerNeed, SplitFit, WorkerMemory, split_fit
from meshd.election.fit.rows import WORKER_MARGIN, within
from meshd.election.fit.speeds import Kind, ranks
from meshd.ids import NodeId
from meshd.view import Lendable
from tests.election.fit.test_splitting import GB, NEED, planned

TINY = (Budget(HOST, 4 * GB, host=True, accelerator=False),)
"""Of a host that keeps no layers."""
PLAIN = replace(NEED, layers=(LayerNeed(GB, 0),) * 12, output=0, masks=0, row=0)
"""Buffers for computing are the same on however many devices."""


def accelerator(*speeds: int | None) -> list[Kind]:
    return [(True, speed) for speed in speeds]


def processor(*speeds: int | None) -> list[Kind]:
    return [(False, speed) for speed in speeds]


# -- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memories", "found"),
    [
        (accelerator(4900, 4900), (0, 0)),
        (accelerator(1000, 4900, 2500), (1, 0, 0)),
        (accelerator(100, 51, 50, 26, 25, 24), (0, 0, 1, 1, 2, 2)),
        (accelerator(100) + processor(400), (0, 1)),
        (processor(40, 400) + accelerator(None), (2, 1, 0)),
        (accelerator(4900, 300, None), (0, 1, 1)),
        (processor(None, 60, 20, None), (1, 0, 1, 1)),
        (processor(None, None), (0, 0)),
        (processor(None) + accelerator(None, None), (1, 0, 0)),
        ([], ()),
    ],
)
def test_memories_of_about_the_same_speed_are_a_group(
    memories: list[Kind], found: tuple[int, ...]
) -> None:
    assert ranks(memories) == found


SPEEDS = st.none() | st.integers(1, 5000)
KINDS = st.lists(st.tuples(st.booleans(), SPEEDS), max_size=12)


@given(KINDS)
def test_groups_are_in_order(memories: list[Kind]) -> None:
    found = ranks(memories)
    assert set(found) == set(range(len(set(found))))
    for (fast, speed), rank in zip(memories, found, strict=True):
        known = [s for f, s in memories if f is fast and s is not None]
        if speed is None and known:
            assert rank == found[memories.index((fast, min(known)))]
        for (other_fast, other), behind in zip(memories, found, strict=True):
            if fast and not other_fast:
                assert rank < behind
            elif fast is other_fast and speed is not None and other is not None and speed > other:
                assert rank <= behind
                assert rank < behind or other * 2 > speed


@given(KINDS, st.integers(0, 5))
def test_groups_do_not_depend_on_slower_ones(memories: list[Kind], last: int) -> None:
    known = [memory for memory in memories if memory[1] is not None]
    found = ranks(known)
    kept = [memory for memory, rank in zip(known, found, strict=True) if rank <= last]
    assert ranks(kept) == tuple(rank for rank in found if rank <= last)


# -- rows -----------------------------------------------------------------------------------------


def worker(name: str, free: int, speed: int | None, *, fast: bool = False) -> WorkerMemory:
    lends = (Lendable("CUDA0" if fast else HOST, free, fast, speed),)
    return WorkerMemory(NodeId(name), name, lends)


def layers(found: SplitFit) -> dict[str, int]:
    plan = planned(found)
    return {part.name: sum(part.layers) for part in plan.parts} | dict(plan.own)


def test_the_fastest_is_filled_first() -> None:
    slow, quick = worker("b", 100 * GB, 30), worker("c", 100 * GB, 300)
    assert layers(split_fit(NEED, TINY, None, [slow, quick])) == {"b": 3, "c": 9}
    assert layers(split_fit(NEED, TINY, None, [quick, slow])) == {"c": 9, "b": 3}
    alike = worker("c", 100 * GB, 59)
    assert layers(split_fit(NEED, TINY, None, [slow, alike])) == {"b": 6, "c": 6}
    unknown = worker("c", 100 * GB, None)
    assert layers(split_fit(NEED, TINY, None, [slow, unknown])) == {"b": 6, "c": 6}


def test_a_memory_that_is_not_needed_is_left_out() -> None:
    slow, quick = worker("b", 200 * GB, 30), worker("c", 140 * GB, 300)
    found = split_fit(NEED, TINY, None, [slow, quick])
    assert layers(found) == {"c": 12}
    assert found.plan is not None
    assert (found.plan.parts[0].share, found.plan.parts[0].output) == (1, True)
    main = Budget(HOST, 90 * GB, host=True, accelerator=False, bytes_per_s=20)
    plan = planned(split_fit(NEED, [main], None, [quick]))
    assert (plan.beside, plan.tensor_split) == (0, (13,))
    plan = planned(split_fit(NEED, [replace(main, bytes_per_s=200)], None, [quick]))
    assert (plan.beside, plan.tensor_split) == (5, (8,))


def test_accelerators_of_a_host_are_no_exception() -> None:
    own = [
        Budget("CUDA0", 60 * GB, host=False, accelerator=True, bytes_per_s=300),
        Budget("CUDA1", 60 * GB, host=False, accelerator=True, bytes_per_s=4900),
        *TINY,
    ]
    far = worker("b", 60 * GB, 4900, fast=True)
    assert layers(split_fit(NEED, own, None, [far])) == {"b": 5, "CUDA0": 2, "CUDA1": 5}
    far = worker("b", 90 * GB, 4900, fast=True)
    assert layers(split_fit(NEED, own, None, [far])) == {"b": 8, "CUDA1": 4}


def test_main_memories_are_filled_after_accelerators_whatever_is_known() -> None:
    far = [worker("b", 80 * GB, 400), worker("c", 80 * GB, None, fast=True)]
    assert layers(split_fit(NEED, TINY, None, far)) == {"b": 5, "c": 7}
    far = [worker("b", 80 * GB, None), worker("c", 80 * GB, None, fast=True)]
    assert layers(split_fit(NEED, TINY, None, far)) == {"b": 5, "c": 7}


def test_a_split_that_is_forced_leaves_a_slow_worker_one_layer() -> None:
    own = [Budget("CUDA0", 200 * GB, host=False, accelerator=True, bytes_per_s=4900), *TINY]
    found = split_fit(NEED, own, None, [worker("b", 60 * GB, 300, fast=True)])
    assert layers(found) == {"b": 1, "CUDA0": 11}


# -- against all fillings -------------------------------------------------------------------------

ROOM = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from((10, 30, 100))), min_size=2, max_size=4
)
"""Layers that a worker's memory holds, and its speed."""


def lenders(rooms: Sequence[tuple[int, int]]) -> list[WorkerMemory]:
    """With half a layer to spare."""
    beside = NEED.compute + WORKER_MARGIN + GB // 2
    return [
        worker(f"w{number}", round((room * GB + beside) / 0.97), speed)
        for number, (room, speed) in enumerate(rooms)
    ]


def fillings(rooms: Sequence[tuple[int, int]], count: int) -> Iterator[float]:
    """The time of each way to lay `count` layers, whatever in each memory, where a memory without
    any is slower than all that have some."""
    for counts in product(*(range(room + 1) for room, _ in rooms)):
        held = list(zip(counts, (speed for _, speed in rooms), strict=True))
        slowest = min((speed for n, speed in held if n), default=0)
        if sum(counts) == count and all(n or speed < slowest for n, speed in held):
            yield sum(n / speed for n, speed in held)


@given(ROOM, st.integers(4, 16))
def test_no_filling_by_groups_is_faster(rooms: list[tuple[int, int]], count: int) -> None:
    workers = lenders(rooms)
    for (room, _), lender in zip(rooms, workers, strict=True):
        space = within(lender.lends[0].free_bytes) - NEED.compute - WORKER_MARGIN
        assert space // GB == room
    found = split_fit(replace(PLAIN, layers=PLAIN.layers[:1] * count), TINY, None, workers)
    times = list(fillings(rooms, count))
    assert found.fits == (sum(room for room, _ in rooms) >= count)
    if found.fits:
        speeds = {lender.name: speed for lender, (_, speed) in zip(workers, rooms, strict=True)}
        time = sum(n / speeds[name] for name, n in layers(found).items())
        assert time == pytest.approx(min(times))


@given(
    st.lists(st.tuples(st.integers(5, 200), st.integers(1, 3000)), min_size=1, max_size=6),
    st.integers(20, 200),
    st.booleans(),
)
def test_no_row_is_slower_than_one_in_proportion(
    rooms: list[tuple[int, int]], count: int, fast: bool
) -> None:
    need = replace(PLAIN, layers=(LayerNeed(GB // 2, 0),) * count)
    workers = [
        worker(f"w{n}", free * GB, speed, fast=fast) for n, (free, speed) in enumerate(rooms)
    ]
    blind = [replace(w, lends=(replace(w.lends[0], bytes_per_s=None),)) for w in workers]
    before, now = (split_fit(need, TINY, None, some) for some in (blind, workers))
    assert before.fits == now.fits
    assume(now.fits)
    speeds = {w.name: speed for w, (_, speed) in zip(workers, rooms, strict=True)}
    held = layers(now)
    last = min(speeds[name] for name in held)
    layer_each = sum(1 / speeds[name] for name in held if speeds[name] < 4 * last)
    assert time_of(held, speeds) <= time_of(layers(before), speeds) + layer_each


@given(st.lists(st.integers(20, 200), min_size=1, max_size=6), st.integers(20, 200), st.data())
def test_memories_of_one_speed_are_as_if_none_were_known(
    rooms: list[int], count: int, data: st.DataObject
) -> None:
    need = replace(PLAIN, layers=(LayerNeed(GB // 2, 0),) * count)
    pace = st.none() | st.integers(51, 100)
    workers = [worker(f"w{n}", free * GB, None) for n, free in enumerate(rooms)]
    alike = [worker(f"w{n}", free * GB, data.draw(pace)) for n, free in enumerate(rooms)]
    assert split_fit(need, TINY, None, alike).plan == split_fit(need, TINY, None, workers).plan


def time_of(held: dict[str, int], speeds: dict[str, int]) -> float:
    """For a token, in layers over speed."""
    return sum(count / speeds[name] for name, count in held.items())
