"""Whose turn it is to claim, and who lets it pass, with literal times."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from meshd.election.ranking import ranked
from meshd.election.turns import LAST_S, PASSED_S, TURN_S, Turns
from meshd.election.words import Standing
from meshd.ids import NodeId
from meshd.view import Deployment, Suits
from tests.election.words import FAILED, M, bid, claim, node, record

PASSED_AT = LAST_S + TURN_S
"""When who was first since 0 is passed over."""


def awaited(
    turns: Turns,
    others: Iterable[Standing],
    now: float,
    *,
    headroom: int = 0,
    places: int = 1,
    deployment: Deployment | None = None,
) -> float | None:
    """By a node that bids with `headroom`."""
    deployment = deployment or record()
    own = ranked(node("own", bid(headroom, deployment.version)), deployment)
    assert own is not None
    return turns.awaited(deployment, own, {n.node: n for n in others}, places, now)


def test_2_who_lets_its_turn_pass_is_passed_over_for_a_while() -> None:
    turns, others = Turns(), [node("a", bid(9))]
    assert awaited(turns, others, 0.0) == LAST_S
    assert awaited(turns, others, LAST_S) == PASSED_AT
    assert awaited(turns, others, PASSED_AT - 0.1) == PASSED_AT
    assert awaited(turns, others, PASSED_AT) is None
    assert turns.passed(M, {n.node: n for n in others}) == ("a",)
    assert awaited(turns, others, PASSED_AT + PASSED_S - 0.1) is None
    again = PASSED_AT + PASSED_S
    assert awaited(turns, others, again) == again + LAST_S


def test_2_then_it_is_the_turn_of_the_next() -> None:
    """Of many who wait, one comes to find that it is its own."""
    a, b, c = (node(name, bid(headroom)) for name, headroom in (("a", 9), ("b", 8), ("c", 7)))
    second, third = Turns(), Turns()
    for now in (0.0, LAST_S):
        assert awaited(second, [c, a], now, headroom=8) is not None
        assert awaited(third, [b, a], now, headroom=7) is not None
    assert awaited(second, [c, a], PASSED_AT, headroom=8) is None
    assert awaited(third, [b, a], PASSED_AT, headroom=7) == PASSED_AT + TURN_S
    assert awaited(third, [b, a], PASSED_AT + TURN_S, headroom=7) is None


def test_1_only_the_first_of_the_ranking_are_timed() -> None:
    turns, b = Turns(), node("b", bid(8))
    for now in (0.0, LAST_S, PASSED_AT - 1.0):
        awaited(turns, [b], now)
    first = [b, node("a", bid(9))]
    assert awaited(turns, first, PASSED_AT) == PASSED_AT + TURN_S
    assert turns.passed(M, {n.node: n for n in first}) == ()


def test_1_as_many_are_timed_as_there_are_places() -> None:
    turns, others = Turns(), [node("a", bid(9)), node("b", bid(8)), node("c", bid(7))]
    assert awaited(turns, others[:1], 0.0, places=2) is None
    for now in (0.0, LAST_S):
        awaited(turns, others, now, places=2)
    assert awaited(turns, others, PASSED_AT, places=2) is None
    assert turns.passed(M, {n.node: n for n in others}) == ("a", "b")


def test_3_who_has_to_make_room_is_waited_for() -> None:
    turns = Turns()
    others = {NodeId("a"): node("a", bid(9, suits=Suits.SWAP))}
    own = ranked(node("own", bid(0, suits=Suits.SWAP)), record())
    now: float | None = 0.0
    for _ in range(10):
        assert now is not None
        now = turns.awaited(record(), own, others, 1, now)
    assert turns.passed(M, others) == ()


@pytest.mark.parametrize(
    "meanwhile",
    [
        [node("a", bid(9), claim(1, FAILED))],
        [node("a", bid(9, suits=Suits.NO)), node("b", bid(5))],
        [node("b", bid(5))],
    ],
)
def test_4_who_was_not_first_for_a_moment_has_its_turn_anew(meanwhile: list[Standing]) -> None:
    turns, others = Turns(), [node("a", bid(9)), node("b", bid(5))]
    for now in (0.0, LAST_S, 5.0):
        awaited(turns, others, now)
    awaited(turns, meanwhile, 6.0)
    found = awaited(turns, others, PASSED_AT)
    assert found is not None
    assert found > PASSED_AT
    assert turns.passed(M, {n.node: n for n in others}) == ()


def test_4_a_new_version_of_the_record_makes_it_forgotten() -> None:
    turns = Turns()
    for now in (0.0, LAST_S, PASSED_AT):
        awaited(turns, [node("a", bid(9))], now)
    again = awaited(turns, [node("a", bid(9, 2))], PASSED_AT, deployment=record(2))
    assert again == PASSED_AT + LAST_S


@pytest.mark.parametrize("end", [[node("a", bid(9), claim(1))], []])
def test_4_a_claim_or_a_death_makes_it_forgotten(end: list[Standing]) -> None:
    turns = Turns()
    for now in (0.0, LAST_S, PASSED_AT):
        awaited(turns, [node("a", bid(9))], now)
    assert awaited(turns, end, 20.0) is None
    assert awaited(turns, [node("a", bid(9))], 21.0) == 21.0 + LAST_S


def test_4_a_gap_that_was_filled_begins_anew() -> None:
    turns, others = Turns(), [node("a", bid(9))]
    for now in (0.0, LAST_S):
        awaited(turns, others, now)
    turns.over(M)
    assert awaited(turns, others, PASSED_AT) == PASSED_AT + LAST_S


def test_who_drains_waits_for_anybody_who_may_come() -> None:
    turns = Turns()
    others = {NodeId(name): node(name, bid(headroom)) for name, headroom in (("a", 1), ("b", 0))}
    times = []
    now: float | None = 0.0
    while now is not None:
        times.append(now)
        now = turns.awaited(record(), None, others, 1, now)
    assert times == [0.0, LAST_S, PASSED_AT, PASSED_AT + TURN_S]
