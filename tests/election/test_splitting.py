"""Which nodes become workers, against every choice there is where there are few nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.fit import (
    HOST,
    Budget,
    Estimate,
    LayerNeed,
    SplitFit,
    WorkerMemory,
    split_fit,
)
from meshd.election.splitting import (
    MAX_LOOKS,
    MAX_TOLD,
    MAX_WORKERS,
    RTT_STEP_S,
    Candidate,
    choose_workers,
    unsplittable,
)
from meshd.ids import NodeId
from meshd.view import Lendable

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
RPC = "7.0.0"
OWN = (Budget(HOST, 35 * GB, host=True, accelerator=False),)
"""Three layers."""


def node(name: str, free: int, rtt_s: float | None = 0.001, **more: object) -> Candidate:
    lends = (Lendable(HOST, free * GB, accelerator=False),)
    made = Candidate(NodeId(name), name, lends, rtt_s, rpc_protocol=RPC)
    return replace(made, **more)  # type: ignore[arg-type]


def chosen(candidates: Sequence[Candidate], own: Sequence[Budget] = OWN) -> SplitFit:
    return choose_workers(NEED, own, None, candidates, rpc_protocol=RPC)


def names(found: SplitFit) -> set[str]:
    assert found.plan is not None, found.words
    return {part.name for part in found.plan.parts}


def test_one_worker_is_better_than_two_near_ones() -> None:
    found = chosen([node("b", 60, 0.0001), node("c", 60, 0.0001), node("d", 120, 0.2)])
    assert names(found) == {"d"}
    assert not found.excluded


def test_near_ones_are_better_than_roomy_ones() -> None:
    candidates = [node("far", 300, 0.02), node("b", 70, 0.001), node("c", 70, 0.001)]
    assert names(chosen(candidates)) == {"far"}
    candidates = [node("far", 90, 0.02), node("b", 70, 0.001), node("c", 70, 0.001)]
    assert names(chosen(candidates)) == {"b", "c"}
    candidates = [node("new", 90, None), node("b", 50, 0.9), node("c", 70, 0.001)]
    assert names(chosen(candidates)) == {"b", "c"}


def test_noise_in_round_trips_does_not_decide_but_bandwidth_does() -> None:
    slow = node("b", 120, 0.001, bytes_per_s=1e8)
    fast = node("c", 120, 0.001 + RTT_STEP_S / 4, bytes_per_s=1e9)
    assert names(chosen([slow, fast])) == {"c"}
    assert names(chosen([slow, replace(fast, rtt_s=0.001 + RTT_STEP_S)])) == {"b"}
    assert names(chosen([replace(slow, bytes_per_s=None), slow, fast])) == {"c"}


def test_then_memory_and_names_decide() -> None:
    assert names(chosen([node("b", 120), node("c", 130)])) == {"c"}
    assert names(chosen([node("c", 120), node("b", 120)])) == {"b"}


def test_round_trips_do_not_move_workers_in_the_row() -> None:
    rows = [
        [part.name for part in found.plan.parts]
        for near in "bcd"
        for own in (OWN, (Budget("GPU", 35 * GB, host=False, accelerator=True), *OWN))
        if (found := chosen([node(n, 45, 0.001 * (1 + (n != near))) for n in "bcd"], own)).plan
    ]
    assert rows == [rows[0], rows[1]] * 3
    assert rows[1] == sorted(rows[1])


def test_the_output_layer_comes_where_it_costs_no_layer() -> None:
    # 3 layers on the host; b would lose a layer to the output, c does not
    found = chosen([node("c", 58, 0.001), node("b", 45, 0.002)])
    assert found.plan is not None
    assert [part.name for part in found.plan.parts] == ["b", "c"]


def test_who_may_not_be_a_worker_is_told_why() -> None:
    found = chosen(
        [
            node("b", 120),
            node("client", 0, barred="a client node hosts nothing"),
            node("old", 300, rpc_protocol="6.1.0"),
            node("none", 300, rpc_protocol=None),
            node("small", 9),
            node("empty", 0, lends=()),
        ]
    )
    assert names(found) == {"b"}
    assert dict(found.excluded) == {
        "client": "a client node hosts nothing",
        "old": "RPC protocol 6.1.0, not 7.0.0",
        "none": "its engine has no RPC server",
        "small": "9.0 GB free at most, too little for one layer",
        "empty": "0 B free at most, too little for one layer",
    }
    found = choose_workers(NEED, OWN, None, [node("b", 300)], rpc_protocol=None)
    assert dict(found.excluded) == {"b": "the host's engine has no RPC"}


def test_what_is_waited_for_is_told() -> None:
    candidates = [node("b", 30), node("c", 300, rpc_protocol="6.1.0")]
    found = chosen(candidates)
    assert (found.fits, found.plan) == (False, None)
    assert unsplittable(found, candidates) == (
        "64.1 GB short even if it is split: b lends 30.0 GB, "
        "c lends nothing (RPC protocol 6.1.0, not 7.0.0)"
    )
    assert unsplittable(chosen([]), []).endswith(
        "short even if it is split: there is no other node"
    )
    many = [node(f"n{number}", 1) for number in range(MAX_TOLD + 3)]
    assert unsplittable(chosen(many), many).endswith("n7 lends nothing (1.0 GB free at most, "
    "too little for one layer), 3 more nodes")  # fmt: skip


def test_accelerators_of_the_host_are_used() -> None:
    own = (Budget("CUDA0", 60 * GB, host=False, accelerator=True), OWN[0])
    found = chosen([node("b", 60, 0.01), node("c", 90, 0.02)], own)
    assert found.plan is not None
    assert (names(found), found.plan.own) == ({"c"}, (("CUDA0", 5),))


def test_leases_of_the_host_count() -> None:
    found = choose_workers(NEED, OWN, {HOST: 5 * GB}, [node("b", 120)], rpc_protocol=RPC)
    assert not found.fits


def test_many_nodes_are_judged_quickly() -> None:
    mesh = [node(f"n{n:03}", 18 + n % 9, 0.0001 * (n % 37)) for n in range(300)]
    began = time.process_time()
    found = chosen(mesh)
    assert found.plan is not None
    assert len(found.plan.parts) == 5
    assert not chosen([replace(n, lends=n.lends[:0]) for n in mesh]).fits
    tight = [node(f"n{n:03}", 14 + n % 4, 0.0001 * (n % 37)) for n in range(300)]
    assert not chosen(tight).fits
    assert time.process_time() - began < 2


def test_among_too_many_nodes_the_roomiest_are_exchanged_for_nearer_ones() -> None:
    small = [node(f"n{n:02}", 15, 0.001) for n in range(60)]  # more pairs than are looked at
    roomy = [node(f"r{rtt}", free, rtt / 10) for rtt, free in enumerate((62, 70, 80, 82), start=5)]
    assert len(list(combinations(small, 2))) > MAX_LOOKS
    assert names(chosen([*small, *roomy])) == {"r5", "r6"}


def test_no_more_workers_than_the_limit() -> None:
    need = replace(NEED, layers=NEED.layers * 2)
    mesh = [node(f"n{n}", 33) for n in range(20)]
    found = choose_workers(need, OWN, None, mesh, rpc_protocol=RPC)
    assert found.plan is not None
    assert len(found.plan.parts) == MAX_WORKERS
    assert not choose_workers(need, OWN, None, mesh[: MAX_WORKERS - 1], rpc_protocol=RPC).fits


# -- against all choices ---------------------------------------------------------------------------

PACES = st.none() | st.sampled_from((20, 50, 300))
NODES = st.lists(
    st.tuples(st.integers(5, 70), st.integers(0, 5), st.integers(0, 60), PACES, PACES),
    min_size=1,
    max_size=4,
)
"""Memory, steps of the round trip, memory of a second device, how fast both are."""


def merits(candidates: Sequence[Candidate]) -> int:
    return sum(round((c.rtt_s or 0) / RTT_STEP_S) for c in candidates)


def by_trying(need: Estimate, own: Sequence[Budget], all_: Sequence[Candidate]) -> tuple[int, int]:
    """(workers, round trips) of the best choice of all, in any order; (0, 0) if there is none."""
    for count in range(1, len(all_) + 1):
        fitting = []
        for some in combinations(all_, count):
            for order in permutations(WorkerMemory(c.node, c.name, c.lends) for c in some):
                plan = split_fit(need, own, None, order).plan
                if plan is not None and len(plan.parts) == count:
                    fitting.append(merits(some))
        if fitting:
            return count, min(fitting)
    return 0, 0


@pytest.mark.parametrize("ram", [4, 15, 40])
@given(NODES, st.integers(3, 14), st.booleans(), PACES)
def test_no_choice_is_better(
    ram: int,
    nodes: list[tuple[int, int, int, int | None, int | None]],
    layers: int,
    fast: bool,
    pace: int | None,
) -> None:
    need = replace(NEED, layers=NEED.layers[:1] * layers)
    own = [Budget(HOST, ram * GB, host=True, accelerator=False, bytes_per_s=pace)]
    candidates = []
    for number, (size, steps, second, *paces) in enumerate(nodes):
        sizes = [size, second] if fast else [size]
        lends = [
            Lendable(f"D{n}", s * GB, fast, speed)
            for n, (s, speed) in enumerate(zip(sizes, paces, strict=False))
        ]
        candidates.append(node(f"n{number}", 0, steps * RTT_STEP_S, lends=tuple(lends)))
    found = choose_workers(need, own, None, candidates, rpc_protocol=RPC)
    count, rtt = by_trying(need, own, candidates)
    if found.plan is None:
        assert count == 0
    else:
        assert len(found.plan.parts) == count
        workers = {part.node for part in found.plan.parts}
        assert merits([c for c in candidates if c.node in workers]) == rtt


@given(
    st.lists(st.tuples(st.integers(30, 120), st.integers(0, 5)), min_size=1, max_size=4),
    st.lists(st.integers(3, 12), min_size=2, max_size=14),
)
def test_uneven_layers_waste_at_most_the_room_of_two_on_each_node(
    nodes: list[tuple[int, int]], layers: list[int]
) -> None:
    need = replace(NEED, layers=tuple(LayerNeed(size * GB, 0) for size in layers))
    own = [Budget(HOST, 4 * GB, host=True, accelerator=False)]
    candidates = [node(f"n{n}", size, s * RTT_STEP_S) for n, (size, s) in enumerate(nodes)]
    found = choose_workers(need, own, None, candidates, rpc_protocol=RPC)
    if found.plan is not None:
        assert len(found.plan.parts) >= by_trying(need, own, candidates)[0]
    smaller = [node(f"n{n}", size - 2 * max(layers)) for n, (size, _) in enumerate(nodes)]
    count, _ = by_trying(need, own, smaller)
    if count:
        assert found.plan is not None
        assert len(found.plan.parts) <= count
