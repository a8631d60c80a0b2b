"""What lies where when a host has workers, by hand-made figures; the engine's own are in
tests/engine. Layers are so large that what stays free of each memory is small beside them."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.election.fit import HOST, Budget, Estimate, LayerNeed, SplitFit, WorkerMemory, split_fit
from meshd.election.fit.rows import KEPT_FREE, MAX_DEVICES, WORKER_MARGIN, within
from meshd.ids import NodeId
from meshd.view import Lendable, SplitPlan

GB = 10**9
NEED = Estimate(
    layers=(LayerNeed(9 * GB, GB),) * 12,
    output=3 * GB,
    output_copy=0,
    embedding=2 * GB,
    compute=GB,
    masks=GB // 10,
    row=GB // 10,
    logits=GB // 10,
    projector=0,
    prompts=0,
    context=4096,
    slots=1,
)
LARGE_BUFFER = GB + 6 * GB // 10
"""Of one of several devices that hold all layers."""
HELD = 2 * GB + GB // 10
"""In the host's main memory, beside what it computes with."""


def main(usable: int) -> Budget:
    return Budget(HOST, usable, host=True, accelerator=False)


def gpu(number: int, usable: int, *, host: bool = False) -> Budget:
    return Budget(f"CUDA{number}", usable, host=host, accelerator=True)


def worker(name: str, *free: int, accelerators: bool = False) -> WorkerMemory:
    names = [f"CUDA{number}" for number in range(len(free))] if accelerators else [HOST]
    lends = (Lendable(n, size, accelerators) for n, size in zip(names, free, strict=True))
    return WorkerMemory(NodeId(name), name, tuple(lends))


def planned(found: SplitFit) -> SplitPlan:
    assert found.plan is not None, found.words
    return found.plan


def test_the_first_layers_stay_with_a_host_without_accelerators() -> None:
    found = split_fit(NEED, [main(50 * GB)], None, [worker("b", 50 * GB), worker("c", 100 * GB)])
    plan = planned(found)
    assert (plan.beside, plan.gpu_layers, plan.tensor_split) == (3, 10, (3, 7))
    b, c = plan.parts
    assert (b.name, b.first_layer, b.layers, b.output) == ("b", 3, (3,), False)
    assert (c.name, c.first_layer, c.layers, c.output) == ("c", 6, (6,), True)
    assert b.memory == ((HOST, 30 * GB + GB + WORKER_MARGIN),)
    assert c.memory == ((HOST, 60 * GB + GB + 3 * GB + WORKER_MARGIN),)
    assert (b.share, c.share) == (3 / 12, 6 / 12)
    assert dict(found.memory) == {HOST: 30 * GB + GB + HELD}
    assert found.needed == found.memory[HOST] + b.bytes + c.bytes
    assert found.headroom == 200 * GB - found.needed
    assert (found.fits, found.missing) == (True, 0)
    assert found.words == (
        "takes 33.1 GB of 50.0 GB on CPU (3 layers) and 31.1 GB on b (3 layers) "
        "and 64.1 GB on c (6 layers) (weights 113 GB, cache 12.0 GB for 1 × 4096 tokens, "
        "computing 1.0 GB)"
    )


def test_a_host_with_no_room_for_a_layer_still_hosts() -> None:
    found = split_fit(NEED, [main(5 * GB)], None, [worker("b", 80 * GB), worker("c", 80 * GB)])
    plan = planned(found)
    assert (plan.beside, plan.tensor_split) == (0, (6, 7))
    assert dict(found.memory) == {HOST: HELD + 4 * (GB // 5) + GB // 10}
    assert plan.parts[0].memory == ((HOST, 60 * GB + LARGE_BUFFER + WORKER_MARGIN),)


def test_one_worker_may_hold_all() -> None:
    found = split_fit(NEED, [main(5 * GB)], None, [worker("b", 140 * GB)])
    plan = planned(found)
    assert (plan.beside, plan.gpu_layers, plan.tensor_split) == (0, 13, (13,))
    assert dict(found.memory) == {HOST: HELD + GB // 5 + GB // 10}
    assert plan.parts[0].memory == ((HOST, 124 * GB + WORKER_MARGIN),)
    assert plan.parts[0].share == 1


def test_accelerators_of_workers_are_enough_for_a_host_without() -> None:
    workers = [worker("b", 90 * GB, 90 * GB, accelerators=True)]
    plan = planned(split_fit(NEED, [main(90 * GB)], None, workers))
    assert (plan.beside, plan.tensor_split) == (0, (6, 7))
    assert plan.parts[0].memory == (
        ("CUDA0", 60 * GB + LARGE_BUFFER),
        ("CUDA1", 63 * GB + LARGE_BUFFER),
    )
    workers = [worker("b", 50 * GB, 50 * GB, accelerators=True)]
    plan = planned(split_fit(NEED, [main(90 * GB)], None, workers))
    assert (plan.beside, plan.tensor_split) == (4, (4, 5))  # no more of them than has to be


def test_the_hosts_accelerators_come_last_and_bear_the_projector() -> None:
    need = replace(NEED, projector=4 * GB)
    own = [gpu(0, 40 * GB), gpu(1, 60 * GB), main(10 * GB)]
    found = split_fit(need, own, None, [worker("b", 60 * GB, accelerators=True)])
    plan = planned(found)
    assert plan.own == (("CUDA0", 3), ("CUDA1", 4))
    assert (plan.beside, plan.tensor_split, plan.parts[0].output) == (0, (5, 3, 5), False)
    assert found.memory["CUDA0"] == 30 * GB + LARGE_BUFFER + 4 * GB
    assert found.memory["CUDA1"] == 40 * GB + LARGE_BUFFER + 3 * GB
    assert found.memory[HOST] == HELD + 4 * (GB // 5) + GB // 10


def test_an_accelerator_without_room_is_left_out() -> None:
    need = replace(NEED, projector=4 * GB)
    own = [gpu(0, 14 * GB), gpu(1, 80 * GB), main(10 * GB)]  # a layer, but no projector
    found = split_fit(need, own, None, [worker("b", 80 * GB, accelerators=True)])
    assert planned(found).own == (("CUDA1", 6),)
    assert "CUDA0" not in found.memory
    own = [gpu(0, 14 * GB), main(10 * GB)]  # a layer, but no output layer
    found = split_fit(need, own, None, [worker("b", 150 * GB, accelerators=True)])
    assert (planned(found).own, planned(found).tensor_split) == ((), (13,))
    assert dict(found.memory) == {HOST: HELD + GB // 5 + GB // 10 + 4 * GB}


def test_unified_memory_is_counted_once() -> None:
    own = [gpu(0, 70 * GB, host=True)]
    found = split_fit(NEED, own, None, [worker("b", 90 * GB, accelerators=True)])
    ((_, layers),) = planned(found).own
    held = HELD + 4 * (GB // 5) + GB // 10
    assert dict(found.memory) == {"CUDA0": layers * 10 * GB + 3 * GB + LARGE_BUFFER + held}
    short = split_fit(NEED, [gpu(0, 2 * GB, host=True)], None, [worker("b", 190 * GB)])
    assert not short.fits


def test_the_output_goes_where_there_is_room_for_it() -> None:
    workers = [worker("b", 130 * GB), worker("c", 13 * GB)]  # c: a layer, but no output layer
    plan = planned(split_fit(NEED, [main(5 * GB)], None, workers))
    assert [part.name for part in plan.parts] == ["b"]
    workers.reverse()
    plan = planned(split_fit(NEED, [main(5 * GB)], None, workers))
    assert [(part.name, part.layers, part.output) for part in plan.parts] == [
        ("c", (1,), False),
        ("b", (11,), True),
    ]


def test_one_batch_at_a_time_is_tried_where_several_are_too_much() -> None:
    need = replace(NEED, masks=3 * GB)
    own = [main(7 * GB)]  # for no layer
    workers = [worker("b", 131 * GB, 12 * GB, accelerators=True)]
    plan = planned(split_fit(need, own, None, workers))
    assert plan.parts[0].memory == (("CUDA0", 124 * GB),)


def test_no_more_memories_than_layers_or_the_engine_takes() -> None:
    many = [worker(f"w{n:02}", (20 + n) * GB) for n in range(20)]
    plan = planned(split_fit(replace(NEED, layers=NEED.layers * 2), [main(5 * GB)], None, many))
    assert [part.name for part in plan.parts] == [f"w{n:02}" for n in range(5, 20)]
    assert len(plan.tensor_split) == MAX_DEVICES
    plan = planned(split_fit(replace(NEED, layers=NEED.layers[:2]), [main(5 * GB)], None, many))
    assert [part.name for part in plan.parts] == ["w18", "w19"]


def test_what_lacks_is_said() -> None:
    found = split_fit(NEED, [main(5 * GB)], None, [worker("b", 60 * GB)])
    assert (found.fits, found.plan, dict(found.memory)) == (False, None, {})
    have = within(60 * GB) - GB - WORKER_MARGIN
    assert found.missing == 120 * GB + 3 * GB - have
    assert found.words.endswith("GB short")
    assert "of this node and 1 worker (weights 113 GB" in found.words
    host = split_fit(NEED, [main(2 * GB)], None, [worker("b", 300 * GB)])
    assert (host.fits, host.missing) == (False, HELD + GB // 5 + GB // 10 - within(2 * GB))


@pytest.mark.parametrize("workers", [[], [worker("b", GB)]])
def test_a_host_alone_is_no_split(workers: list[WorkerMemory]) -> None:
    assert not split_fit(NEED, [main(500 * GB)], None, workers).fits
    assert not split_fit(NEED, [gpu(0, 500 * GB), main(500 * GB)], None, workers).fits
    assert split_fit(NEED, [], None, workers).words == "no memory of this node is known"


def test_what_is_leased_is_not_free() -> None:
    workers = [worker("b", 100 * GB)]
    assert planned(split_fit(NEED, [main(90 * GB)], None, workers)).beside
    assert not split_fit(NEED, [main(90 * GB)], {HOST: 5 * GB}, workers).fits
    assert not split_fit(NEED, [main(90 * GB)], {}, workers).fits


def test_what_bears_more_than_layers_stays_among_the_roomiest() -> None:
    need = replace(NEED, layers=NEED.layers[:3], projector=GB)
    own = [gpu(0, 15 * GB), *(gpu(n, 40 * GB) for n in range(1, 4)), gpu(4, 16 * GB), main(9 * GB)]
    found = split_fit(need, own, None, [worker("b", 14 * GB), worker("c", 13 * GB)])
    plan = planned(found)
    assert [part.name for part in plan.parts] == ["b"]
    assert plan.own == (("CUDA0", 1), ("CUDA4", 1))
    two = replace(need, layers=need.layers[:2])
    found = split_fit(two, own, None, [worker("b", 14 * GB)])
    assert not found.fits


# -- properties ------------------------------------------------------------------------------------

SIZES = st.integers(1, 60)
LAYERS = st.lists(st.integers(2, 12), min_size=1, max_size=14)
MORE_LAYERS = st.lists(st.integers(2, 12), min_size=3, max_size=14)
CARDS = st.lists(SIZES, max_size=3)
PACES = st.lists(st.none() | st.sampled_from((20, 50, 300)), min_size=1, max_size=5)
"""Bytes per second of memories, in turn."""
LENT = st.lists(st.tuples(st.booleans(), st.lists(SIZES, min_size=1, max_size=2)), max_size=4)


def made(
    layers: list[int],
    cards: list[int],
    ram: int,
    lent: list[tuple[bool, list[int]]],
    paces: list[int | None],
) -> tuple[Estimate, list[Budget], list[WorkerMemory]]:
    pace = cycle(paces)
    need = replace(
        NEED, layers=tuple(LayerNeed(size * GB, 0) for size in layers), projector=GB // 2
    )
    own = [*(gpu(n, size * GB) for n, size in enumerate(cards)), main(ram * GB)]
    workers = [
        worker(f"w{n}", *(s * GB for s in (sizes if fast else sizes[:1])), accelerators=fast)
        for n, (fast, sizes) in enumerate(lent)
    ]
    own = [replace(budget, bytes_per_s=next(pace)) for budget in own]
    workers = [
        replace(w, lends=tuple(replace(lend, bytes_per_s=next(pace)) for lend in w.lends))
        for w in workers
    ]
    return need, own, workers


@given(LAYERS, CARDS, SIZES, LENT, PACES)
def test_a_plan_is_whole_and_within_every_memory(
    layers: list[int],
    cards: list[int],
    ram: int,
    lent: list[tuple[bool, list[int]]],
    paces: list[int | None],
) -> None:
    need, own, workers = made(layers, cards, ram, lent, paces)
    found = split_fit(need, own, None, workers)
    assert found.fits == (found.plan is not None) == (found.missing == 0)
    if found.plan is None:
        return
    plan = found.plan
    assert sum(plan.tensor_split) + plan.beside == len(layers) + 1
    assert min((*(n for part in plan.parts for n in part.layers), *(n for _, n in plan.own))) >= 1
    usable = {b.device: b.usable for b in own}
    for device, size in found.memory.items():
        assert size <= usable[device] - KEPT_FREE
    start = plan.beside
    by_node = {w.node: w for w in workers}
    for part in plan.parts:
        assert part.first_layer == start
        start += sum(part.layers)
        free = {lend.device: lend.free_bytes for lend in by_node[part.node].lends}
        assert all(size <= free[device] - KEPT_FREE for device, size in part.memory)
        assert len(part.memory) == len(part.layers)
    nodes = [part.node for part in plan.parts]
    assert nodes == [w.node for w in workers if w.node in nodes]
    outputs = [part.output for part in plan.parts]
    assert outputs == [False] * (len(outputs) - 1) + [not plan.own]
    weights = sum(layers) * GB + need.output + need.embedding + need.projector + need.logits
    assert found.needed >= weights + need.compute * (len(plan.tensor_split) + (plan.beside > 0))
    assert not (cards and plan.beside)


@example([2, 2, 2], [4, 8], 4, [(True, [4])], [None], 0, 1)
@given(MORE_LAYERS, CARDS, SIZES, LENT, PACES, st.integers(0, 3), st.integers(1, 30))
def test_more_memory_never_hurts(
    layers: list[int],
    cards: list[int],
    ram: int,
    lent: list[tuple[bool, list[int]]],
    paces: list[int | None],
    which: int,
    more: int,
) -> None:
    need, own, workers = made(layers, cards, ram, lent, paces)
    if not split_fit(need, own, None, workers).fits:
        return
    larger = [size + more * (n == which) for n, size in enumerate(cards)]
    roomier = [
        (fast, [s + more * (n == which) for s in sizes]) for n, (fast, sizes) in enumerate(lent)
    ]
    for better in (
        made(layers, cards, ram + more, lent, paces),
        made(layers, larger, ram, lent, paces),
        made(layers, cards, ram, roomier, paces),
    ):
        need, own, workers = better
        assert split_fit(need, own, None, workers).fits


@given(LAYERS, CARDS, SIZES, LENT, PACES)
def test_how_fast_memories_are_decides_where_layers_lie_and_not_whether(
    layers: list[int],
    cards: list[int],
    ram: int,
    lent: list[tuple[bool, list[int]]],
    paces: list[int | None],
) -> None:
    need, own, workers = made(layers, cards, ram, lent, paces)
    _, blind_own, blind = made(layers, cards, ram, lent, [None])
    fits = split_fit(need, own, None, workers).fits
    assert fits == split_fit(need, blind_own, None, blind).fits


@given(st.integers(2, 40), st.lists(st.integers(45, 90), min_size=1, max_size=5))
def test_shares_follow_room(layers: int, lent: list[int]) -> None:
    need = replace(NEED, layers=(LayerNeed(GB, 0),) * layers, output=0)
    workers = [worker(f"w{n}", size * GB) for n, size in enumerate(lent)]
    plan = planned(split_fit(need, [main(4 * GB)], None, workers))
    parts = {part.name: sum(part.layers) for part in plan.parts}
    room = sum(lent)
    if len(parts) == len(lent) < layers:
        for size, name in zip(lent, parts, strict=True):
            assert parts[name] == pytest.approx(layers * size / room, abs=len(lent) + 1)
