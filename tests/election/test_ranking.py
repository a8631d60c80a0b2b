"""The ranking: its order, who is in it, and that every node comes to the same one."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.ranking import (
    all_have_bid,
    behind,
    comes_next,
    first_ranked,
    merit,
    not_ranked,
    rank,
    ranked,
    score,
)
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Bid, Suits
from tests.election.words import FAILED, READY, M, bid, claim, node, record

BIDS = st.builds(
    Bid,
    model=st.just(M),
    version=st.integers(0, 2),
    suits=st.sampled_from(Suits),
    weights=st.booleans(),
    headroom=st.integers(-3, 20),
    speed=st.integers(-3, 99),
    load=st.integers(-3, 20),
    accelerated=st.booleans(),
    workers=st.integers(-3, 20),
)


@pytest.mark.parametrize(
    ("better", "worse", "words"),
    [
        (bid(0, weights=False), bid(15, suits=Suits.SWAP), "would have to unload idle models"),
        (bid(0), bid(15, suits=Suits.SPLIT, workers=1), "would need memory of another node"),
        (
            bid(0, suits=Suits.SWAP),
            bid(15, suits=Suits.SPLIT, workers=2),
            "would need memory of 2 other nodes",
        ),
        (
            bid(0, weights=False, suits=Suits.SPLIT, workers=1),
            bid(15, suits=Suits.SPLIT, workers=2),
            "would need memory of 2 other nodes",
        ),
        (
            replace(bid(0, weights=False), accelerated=True),
            bid(15),
            "not all of its layers would lie on accelerators",
        ),
        (bid(0), bid(15, weights=False), "would have to fetch the weights"),
        (bid(9, speed=0), bid(8, speed=9), "8/16 of its memory left over, not 9/16"),
        (bid(speed=7, load=9), bid(speed=5), "about 32 tokens/s, not 128"),
        (bid(load=1), bid(load=2), "2/16 of its slots busy, not 1/16"),
    ],
)
def test_the_order_of_bids(better: Bid, worse: Bid, words: str) -> None:
    assert score(M, NodeId("a"), better) > score(M, NodeId("b"), worse)
    assert score(M, NodeId("b"), better) > score(M, NodeId("a"), worse)
    assert behind(better, worse) == words


def test_equal_bids_are_decided_by_a_lot_that_differs_by_model() -> None:
    nodes = [NodeId(f"n{i}") for i in range(8)]
    firsts = {max(nodes, key=lambda n: score(ModelId(f"m{i}"), n, bid())) for i in range(100)}
    assert firsts == set(nodes)
    assert behind(bid(), bid()) == "equal; the lot decided"


def test_the_lot_is_the_same_in_every_process() -> None:
    assert score(M, NodeId("n1"), bid()) & 0xFFFFFFFF == 622009124


@given(BIDS)
def test_a_score_survives_json(any_bid: Bid) -> None:
    assert 0 <= score(M, NodeId("a"), any_bid) < 1 << 53
    assert merit(any_bid)


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (node("a", bid(), hosts=False), "a client hosts nothing"),
        (node("a", bid(), draining=True), "draining"),
        (node("a", bid(), claim(3, READY)), "ready"),
        (node("a", bid(), claim(3, FAILED, reason="no memory")), "failed: no memory"),
        (node("a"), "has not said whether it could"),
        (node("a", bid(version=1)), "has not said whether it could"),
        (node("a", bid(version=2, suits=Suits.NO, reason="needs 9 GB")), "needs 9 GB"),
        (node("a", bid(version=2)), None),
        (node("a", bid(version=3)), None),
    ],
)
def test_who_is_not_ranked_and_why(candidate: Standing, why: str | None) -> None:
    deployment = record(2)
    assert not_ranked(candidate, deployment) == why
    assert (ranked(candidate, deployment) is None) == (why is not None)


def test_a_pin_leaves_one_candidate() -> None:
    deployment = record(host=NodeId("b"))
    nodes = [node("a", bid(15)), node("b", bid(1))]
    assert [r.node.name for r in rank(deployment, nodes)] == ["b"]
    assert not_ranked(nodes[0], deployment) == "pinned to another node"


def test_a_swap_never_comes_next_while_somebody_says_yes() -> None:
    swap, yes = node("a", bid(suits=Suits.SWAP)), node("b", bid())
    own = ranked(swap, record())
    assert own is not None
    assert not comes_next(record(), own, [yes], places=2)
    assert comes_next(record(), own, [node("b", bid(), claim(1))], places=1)


def test_a_split_never_comes_next_while_somebody_could_host_it_alone() -> None:
    split = node("a", bid(suits=Suits.SPLIT, workers=1))
    own = ranked(split, record())
    assert own is not None
    for alone in (Suits.YES, Suits.SWAP):
        assert not comes_next(record(), own, [node("b", bid(suits=alone))], places=2)
    assert comes_next(record(), own, [node("b", bid(suits=Suits.SPLIT, workers=2))], places=1)


@given(st.lists(BIDS, min_size=1, max_size=8), st.integers(1, 4), st.randoms())
def test_all_nodes_agree_whose_turn_it_is(bids: list[Bid], places: int, chance: Random) -> None:
    """In whatever order they see each other, exactly the first of the ranking find it is theirs."""
    nodes = [node(f"n{i}", one) for i, one in enumerate(bids)]
    ranking = rank(record(), nodes)
    chance.shuffle(nodes)
    assert rank(record(), nodes) == ranking
    assert first_ranked(record(), nodes, places) == ranking[:places]
    turns = {
        of.node.node
        for of in ranking
        if comes_next(record(), of, [n for n in nodes if n is not of.node], places)
    }
    first = [r for r in ranking if r.bid.suits is ranking[0].bid.suits]
    assert turns == {r.node.node for r in first[:places]}


def test_bids_are_awaited_of_those_only_that_may_host() -> None:
    silent = [node("a", hosts=False), node("b", draining=True), node("c", bid())]
    assert all_have_bid(record(), silent)
    assert not all_have_bid(record(), [*silent, node("d")])
    assert not all_have_bid(record(2), [node("c", bid(version=1))])
