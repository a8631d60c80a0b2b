"""What a node offers: the fit, whom it would put to sleep for it, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.fit import HOST, Fit, SplitFit
from meshd.election.ledger import Holder
from meshd.election.offering import (
    NOBODY_LENDS,
    SWAP_IDLE_S,
    UNKNOWN_SIZE,
    MemoryFit,
    NodeFacts,
    Use,
    barred,
    coarse,
    offers,
    speed_figure,
)
from meshd.election.words import Offer
from meshd.ids import ModelId
from meshd.view import Deployment, Part, SplitPlan, Suits
from tests.election.records import NODES

M, A, B, C = (ModelId(name) for name in "mabc")
NOW = 1000.0
IDLE, RECENT = Use(busy=False, last_at=0.0), Use(busy=False, last_at=NOW - 1)
BUSY = Use(busy=True, last_at=0.0)


def deployment(model: ModelId = M) -> Deployment:
    return Deployment(model, "owner/repo", 3, NODES[0])


def needing(**needs: int) -> MemoryFit:
    """A fit that needs just that, on just these devices."""

    def fit(_: Deployment, free: Mapping[str, int]) -> Fit | None:
        needed = sum(needs.values())
        missing = sum(max(0, need - free.get(device, 0)) for device, need in needs.items())
        if missing:
            return Fit(False, f"{missing} short", needed=needed, missing=missing)
        left = sum(free[device] - need for device, need in needs.items())
        words = f"takes {needed}"
        return Fit(True, words, MappingProxyType(needs), needed=needed, headroom=left)

    return fit


def one(node: NodeFacts, fit: MemoryFit, *, bar: str | None = None) -> Offer:
    (offer,) = offers([deployment()], node, fit, NOW, bar=bar)
    return offer


def test_a_model_that_fits() -> None:
    node = NodeFacts({"gpu": 160, "host": 1000}, {A: {"gpu": 40}}, weights={M})
    offer = one(node, needing(gpu=80))
    bid = offer.bid
    assert (bid.model, bid.version, bid.suits, bid.weights) == (M, 3, Suits.YES, True)
    assert (bid.needs_bytes, bid.free_bytes, bid.reason) == (80, 120, "takes 80")
    assert bid.headroom == 4
    assert offer.memory == {"gpu": 80}
    assert offer.victims == ()


@pytest.mark.parametrize(
    ("layers", "beside", "accelerated"),
    [({}, 0, False), ({"gpu": 4}, 0, True), ({"gpu": 3}, 1, False)],
)
def test_a_bid_says_whether_all_layers_lie_on_accelerators(
    layers: Mapping[str, int], beside: int, accelerated: bool
) -> None:
    found = Fit(True, "fits", {"gpu": 1}, layers, beside, needed=1)
    assert one(NodeFacts({"gpu": 160}), lambda *_: found).bid.accelerated is accelerated


def test_headroom_is_that_of_the_fullest_device() -> None:
    node = NodeFacts({"gpu": 160, "host": 1600})
    assert one(node, needing(gpu=150, host=10)).bid.headroom == 1
    assert one(node, needing(gpu=160, host=10)).bid.headroom == 0
    assert one(node, needing(host=1)).bid.headroom == 15


def test_what_does_not_fit_says_what_is_missing() -> None:
    offer = one(NodeFacts({"gpu": 100}), needing(gpu=130))
    assert (offer.bid.suits, offer.bid.reason) == (Suits.NO, "30 short")
    assert (offer.bid.needs_bytes, offer.bid.free_bytes) == (130, 100)
    assert offer.memory == {}


def test_what_is_hosted_here_is_counted_as_if_it_were_not() -> None:
    offer = one(NodeFacts({"gpu": 100}, {M: {"gpu": 80}}), needing(gpu=80))
    assert (offer.bid.suits, offer.bid.free_bytes) == (Suits.YES, 100)


def test_overcommitted_devices_have_nothing_free() -> None:
    node = NodeFacts({"gpu": 100, "host": 10}, {A: {"gpu": 120, "lost": 5}})
    assert one(node, needing(gpu=1)).bid.reason == "1 short"
    assert one(node, needing(lost=1)).bid.suits is Suits.NO
    assert one(node, needing(host=10)).bid.suits is Suits.YES


def test_a_model_of_unknown_size_is_not_offered() -> None:
    offer = one(NodeFacts({"gpu": 100}), lambda _, __: None)
    assert (offer.bid.suits, offer.bid.reason) == (Suits.NO, UNKNOWN_SIZE)


def test_what_nobody_is_to_serve_gets_no_offer() -> None:
    table = [
        replace(deployment(A), removed=True),
        replace(deployment(B), asleep=True),
        deployment(C),
    ]
    made = offers(table, NodeFacts({"gpu": 100}), needing(gpu=1), NOW)
    assert [offer.bid.model for offer in made] == [C]


def test_a_node_that_is_barred_says_why() -> None:
    offer = one(NodeFacts({"gpu": 100}), needing(gpu=1), bar="no engine is proved")
    assert (offer.bid.suits, offer.bid.reason) == (Suits.NO, "no engine is proved")
    assert offer.memory == {}


def test_why_a_node_is_barred() -> None:
    assert barred(client=False, draining=False, engine_problem=None) is None
    assert barred(client=False, draining=False, engine_problem="no engine") == "no engine"
    draining = barred(client=False, draining=True, engine_problem="no engine")
    assert draining is not None
    assert "draining" in draining
    assert barred(client=True, draining=True, engine_problem=None) == "a client node hosts nothing"


# -- swaps ----------------------------------------------------------------------------------------


def swapping(uses: Mapping[ModelId, Use], **sizes: int) -> NodeFacts:
    leases: dict[Holder, dict[str, int]] = {ModelId(n): {"gpu": s} for n, s in sizes.items()}
    return NodeFacts({"gpu": 100}, leases, uses)


def test_an_idle_model_would_be_put_to_sleep() -> None:
    offer = one(swapping({A: IDLE}, a=60), needing(gpu=80))
    assert (offer.bid.suits, offer.victims) == (Suits.SWAP, (A,))
    assert offer.memory == {"gpu": 80}
    assert offer.bid.free_bytes == 100
    assert offer.bid.reason == "40 short; it would fit if `a`, unused now, slept: takes 80"


@pytest.mark.parametrize("use", [BUSY, RECENT, replace(IDLE, last_at=NOW - SWAP_IDLE_S + 0.1)])
def test_neither_busy_models_nor_those_just_used(use: Use) -> None:
    offer = one(swapping({A: use}, a=60), needing(gpu=80))
    assert (offer.bid.suits, offer.victims, offer.bid.reason) == (Suits.NO, (), "40 short")


def test_a_model_that_is_still_loading_is_no_victim() -> None:
    assert one(swapping({}, a=60), needing(gpu=80)).bid.suits is Suits.NO


def test_the_longest_unused_goes_first_and_no_more_than_needed() -> None:
    uses = {A: replace(IDLE, last_at=30.0), B: replace(IDLE, last_at=10.0), C: IDLE}
    assert one(swapping(uses, a=30, b=30, c=30), needing(gpu=60)).victims == (C, B)


def test_who_frees_nothing_that_is_needed_is_spared() -> None:
    uses = {A: replace(IDLE, last_at=30.0), C: IDLE}
    assert one(swapping(uses, a=90, c=5), needing(gpu=80)).victims == (A,)


def test_of_two_that_could_be_spared_it_is_the_one_used_last() -> None:
    uses = {A: replace(IDLE, last_at=30.0), B: replace(IDLE, last_at=20.0), C: IDLE}
    assert one(swapping(uses, a=60, b=20, c=10), needing(gpu=75)).victims == (C, A)


def test_a_model_unused_for_just_as_long_as_it_takes_is_a_victim() -> None:
    use = replace(IDLE, last_at=NOW - SWAP_IDLE_S)
    assert one(swapping({A: use}, a=60), needing(gpu=80)).victims == (A,)


def test_not_even_if_all_slept() -> None:
    offer = one(swapping({A: IDLE}, a=60, b=30), needing(gpu=80))
    assert (offer.bid.suits, offer.victims) == (Suits.NO, ())
    assert offer.bid.reason == "70 short; not even if everything that is unused here slept"


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.booleans(), st.integers(0, 5)), min_size=1, max_size=5
    ),
    st.integers(1, 110),
)
def test_victims_are_idle_enough_and_none_too_many(
    models: list[tuple[int, bool, int]], need: int
) -> None:
    names = [ModelId(f"v{n}") for n in range(len(models))]
    sizes = {name: size for name, (size, _, _) in zip(names, models, strict=True)}
    leases: dict[Holder, dict[str, int]] = {name: {"gpu": s} for name, s in sizes.items()}
    uses = {
        name: Use(busy=busy, last_at=float(at))
        for name, (_, busy, at) in zip(names, models, strict=True)
    }
    free = 100 - sum(size for size, _, _ in models)
    idle = [name for name in names if not uses[name].busy]
    offer = one(NodeFacts({"gpu": 100}, leases, uses), needing(gpu=need))

    def room(asleep: tuple[ModelId, ...]) -> int:
        kept = sum(size["gpu"] for name, size in leases.items() if name not in asleep)
        return max(0, 100 - kept)

    possible = room(tuple(idle)) >= need
    expected = Suits.YES if max(0, free) >= need else Suits.SWAP if possible else Suits.NO
    assert offer.bid.suits is expected
    assert set(offer.victims) <= set(idle)
    if expected is Suits.SWAP:
        assert room(offer.victims) >= need
        fewer = combinations(offer.victims, len(offer.victims) - 1)
        assert all(room(some) < need for some in fewer)


# -- splits ---------------------------------------------------------------------------------------

PLAN = SplitPlan((Part(NODES[1], "b", (("gpu", 60),), (4,), 0, False, 0.6),), (("gpu", 3),))
SPLIT = SplitFit(True, "60 with b", PLAN, {"gpu": 40}, needed=100, headroom=33)


def split_or_not(
    node: NodeFacts, fit: MemoryFit, found: SplitFit | None, *, forced: bool = False
) -> Offer:
    def split(_: Deployment, free: Mapping[str, int]) -> SplitFit | None:
        asked.append(dict(free))
        return found

    asked: list[Mapping[str, int]] = []
    wish = replace(deployment(), split=forced)
    (offer,) = offers([wish], node, fit, NOW, split=split)
    assert bool(asked) is (offer.bid.suits in (Suits.SPLIT, Suits.NO)), "asked only if it counts"
    return offer


def test_6_what_fits_here_is_not_split() -> None:
    offer = split_or_not(NodeFacts({"gpu": 100}), needing(gpu=100), SPLIT)
    assert (offer.bid.suits, offer.plan, offer.bid.workers) == (Suits.YES, None, 0)


def test_6_what_fits_if_others_sleep_is_not_split() -> None:
    offer = split_or_not(swapping({A: IDLE}, a=60), needing(gpu=80), SPLIT)
    assert (offer.bid.suits, offer.plan, offer.victims) == (Suits.SWAP, None, (A,))


def test_6_what_does_not_fit_is_offered_with_others_memory() -> None:
    offer = split_or_not(NodeFacts({"gpu": 80}), needing(gpu=100), SPLIT)
    bid = offer.bid
    assert (bid.suits, bid.workers, bid.reason) == (Suits.SPLIT, 1, "60 with b")
    assert (offer.plan, offer.memory, offer.victims) == (PLAN, {"gpu": 40}, ())
    assert (bid.needs_bytes, bid.free_bytes) == (100, coarse(133))
    assert bid.headroom == 8, "of this node's part"


def test_6_a_split_counts_with_what_is_free_now() -> None:
    seen = []

    def split(_: Deployment, free: Mapping[str, int]) -> SplitFit:
        seen.append(dict(free))
        return SPLIT

    node = NodeFacts({"gpu": 80}, {M: {"gpu": 40}, A: {"gpu": 15}})
    offers([deployment()], node, needing(gpu=100), NOW, split=split)
    assert seen == [{"gpu": 65}], "the model's own lease is as good as free"


@pytest.mark.parametrize(
    ("plan", "accelerated"),
    [
        (PLAN, True),
        (replace(PLAN, beside=2), False),
        (replace(PLAN, parts=(replace(PLAN.parts[0], memory=((HOST, 60),)),)), False),
        (replace(PLAN, parts=(replace(PLAN.parts[0], memory=(("gpu", 9), (HOST, 9))),)), False),
    ],
)
def test_6_a_split_is_accelerated_if_all_layers_lie_on_accelerators(
    plan: SplitPlan, accelerated: bool
) -> None:
    found = replace(SPLIT, plan=plan)
    offer = split_or_not(NodeFacts({"gpu": 80}), needing(gpu=100), found)
    assert offer.bid.accelerated is accelerated


def test_6_a_split_that_is_wanted_is_made_though_it_fits_here() -> None:
    offer = split_or_not(NodeFacts({"gpu": 200}), needing(gpu=100), SPLIT, forced=True)
    assert (offer.bid.suits, offer.plan) == (Suits.SPLIT, PLAN)
    assert offer.bid.headroom == 12


def test_6_a_split_that_is_wanted_and_cannot_be_is_no_bid() -> None:
    node, fit = NodeFacts({"gpu": 200}), needing(gpu=100)
    short = SplitFit(False, "5 short even if it is split: b lends 2", needed=100, missing=5)
    for found, words in ((None, NOBODY_LENDS), (short, short.words)):
        offer = split_or_not(node, fit, found, forced=True)
        assert (offer.bid.suits, offer.bid.reason, offer.plan) == (Suits.NO, words, None)


def test_6_what_does_not_fit_even_so_says_what_lacks_here_and_in_all() -> None:
    short = SplitFit(False, "10 B short even if it is split: b lends 20 B", needed=100, missing=10)
    offer = split_or_not(NodeFacts({"gpu": 70}), needing(gpu=100), short)
    assert (offer.bid.suits, offer.plan, offer.memory) == (Suits.NO, None, {})
    assert offer.bid.reason == f"needs 100 B, 70 B free here; {short.words}"
    assert (offer.bid.needs_bytes, offer.bid.free_bytes) == (100, coarse(70))


def test_6_without_other_nodes_only_this_one_is_spoken_of() -> None:
    offer = split_or_not(NodeFacts({"gpu": 70}), needing(gpu=100), None)
    assert (offer.bid.suits, offer.bid.reason) == (Suits.NO, "30 short")


def test_6_a_size_that_is_not_known_cannot_be_split() -> None:
    (offer,) = offers(
        [replace(deployment(), split=True)],
        NodeFacts({"gpu": 100}),
        lambda _, __: None,
        NOW,
        split=lambda _, __: pytest.fail("asked for a split"),
    )
    assert offer.bid.reason == UNKNOWN_SIZE


# -- coarse figures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens_per_s", "figure"), [(None, 0), (0.0, 0), (0.3, 1), (1.0, 1), (64.0, 6), (250.0, 8)]
)
def test_speed_is_a_power_of_two(tokens_per_s: float | None, figure: int) -> None:
    assert speed_figure(tokens_per_s) == figure
    node = NodeFacts({"gpu": 9}, tokens_per_s=tokens_per_s)
    assert one(node, needing(gpu=1)).bid.speed == figure


@pytest.mark.parametrize(("busy", "slots", "load"), [(0, 4, 0), (1, 4, 4), (4, 4, 15), (9, 0, 0)])
def test_load_is_in_sixteenths(busy: int, slots: int, load: int) -> None:
    node = NodeFacts({"gpu": 9}, busy_slots=busy, slots=slots)
    assert one(node, needing(gpu=1)).bid.load == load


@given(st.integers(0, 1 << 50))
def test_coarse_sizes_are_a_little_below_the_truth(size: int) -> None:
    assert size * 15 / 16 <= coarse(size) <= size
    assert coarse(coarse(size)) == coarse(size)


def test_free_memory_that_moves_a_little_is_told_the_same() -> None:
    told = {one(NodeFacts({"gpu": 1000 + n}), needing(gpu=5)).bid.free_bytes for n in range(20)}
    assert told == {992}


def test_free_memory_is_never_told_below_what_fits() -> None:
    bid = one(NodeFacts({"gpu": 999}), needing(gpu=998)).bid
    assert (bid.needs_bytes, bid.free_bytes) == (998, 998)
