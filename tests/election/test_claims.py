"""Which claims stand, and what follows for epochs."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.claims import (
    contenders,
    outranked_epoch,
    ready_elsewhere,
    standing,
    wanted_replicas,
)
from meshd.ids import NodeId
from meshd.view import Claim, ClaimState
from tests.election.words import DRAINING, FAILED, PREPARING, READY, M, claim, node, record


@pytest.mark.parametrize(
    ("stands", "gives_up"),
    [
        (claim(1, READY), claim(9, PREPARING, score=99)),
        (claim(2, READY), claim(1, READY, score=99)),
        (claim(2, PREPARING), claim(1, PREPARING, score=99)),
        (claim(2, PREPARING, score=5), claim(2, PREPARING, score=4)),
    ],
)
def test_the_order_of_claims(stands: Claim, gives_up: Claim) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        nodes = [node(one, gives_up), node(other, stands)]
        assert [c.node.name for c in contenders(record(), nodes)] == [other, one]


def test_the_node_id_decides_between_equal_claims() -> None:
    found = contenders(record(), [node("a", claim(1)), node("b", claim(1))])
    assert [c.node.name for c in found] == ["b", "a"]


def test_who_may_not_host_failed_or_drains_does_not_contend() -> None:
    nodes = [
        node("a", claim(1), draining=True),
        node("b", claim(1), hosts=False),
        node("c", claim(1, FAILED)),
        node("d", claim(1, DRAINING)),
        node("e"),
    ]
    assert contenders(record(), nodes) == ()
    assert contenders(record(host=NodeId("x")), [node("f", claim(1))]) == ()


def test_how_many_are_wanted() -> None:
    assert wanted_replicas(record(replicas=3), {M: 9}) == 3
    assert wanted_replicas(record(replicas=None), {M: 2}) == 2
    assert wanted_replicas(record(replicas=None), {}) == 1
    assert wanted_replicas(record(replicas=0), {}) == 1
    assert wanted_replicas(record(replicas=3, host=NodeId("a")), {}) == 1
    assert wanted_replicas(record(asleep=True), {}) == 0
    assert wanted_replicas(record(removed=True), {}) == 0


def test_5_only_claims_that_do_not_stand_call_for_a_higher_epoch() -> None:
    nodes = [node("a", claim(1)), node("b", claim(2)), node("c", claim(7, DRAINING))]
    found = contenders(record(replicas=2), nodes)
    assert outranked_epoch(M, nodes, found[:2]) == 7
    assert outranked_epoch(M, nodes[:2], found[:2]) is None
    assert ready_elsewhere(found, NodeId("a")) == 1


def test_5_who_failed_is_no_rival() -> None:
    nodes = [node("a", claim(1)), node("b", claim(9, FAILED)), node("c", claim(2, DRAINING))]
    found = contenders(record(), nodes)
    assert outranked_epoch(M, nodes, found) == 2


def test_4_who_may_host_no_longer_stands_in_while_it_serves_and_too_few_contend() -> None:
    nodes = [
        node("a", claim(9, PREPARING), draining=True),
        node("b", claim(3), draining=True),
        node("c", claim(4), draining=True),
        node("d", claim(1, PREPARING)),
    ]
    found = contenders(record(), nodes)
    names = [[c.node.name for c in standing(record(), nodes, found, n)] for n in (0, 1, 2, 3, 4)]
    assert names == [[], ["d"], ["d", "c"], ["d", "c", "b"], ["d", "c", "b"]]


CLAIMS = st.builds(claim, st.integers(1, 4), st.sampled_from(ClaimState), st.integers(0, 2))


@given(st.lists(CLAIMS, max_size=6), st.integers(1, 3), st.randoms())
def test_all_nodes_agree_which_claims_stand(
    claims: list[Claim], wanted: int, chance: Random
) -> None:
    nodes = [node(f"n{i}", one) for i, one in enumerate(claims)]
    found = contenders(record(), nodes)
    chance.shuffle(nodes)
    assert contenders(record(), nodes) == found
    ready = sum(c.claim.state is READY for c in found)
    standing_ready = sum(c.claim.state is READY for c in found[:wanted])
    assert standing_ready == min(ready, wanted)
