"""Whom to dial and when, with literal times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshd.ids import NodeId
from meshd.kernel.machine import Tick
from meshd.peers.links.dialing import (
    CALL_PAUSE_S,
    MAX_CALLS,
    MAX_SEEDS,
    RETRY_MAX_S,
    Called,
    Dial,
    DialFailed,
    Dialing,
    DialSucceeded,
    Event,
    LinkCame,
    LinkWent,
    NobodyListens,
    Proposed,
)

A, B = NodeId("a" * 52), NodeId("b" * 52)


def test_a_seed_is_dialled_at_once_and_again_with_growing_pauses() -> None:
    dialing = Dialing()
    assert dialing.handle(Proposed("h:1"), 0.0) == [Dial("h:1", None)]
    assert dialing.due() is None
    now, pauses = 0.0, []
    for _ in range(8):
        assert dialing.handle(DialFailed("h:1"), now) == []
        due = dialing.due()
        assert due is not None
        pauses.append(due - now)
        assert dialing.handle(Tick(), due - 0.01) == []
        assert dialing.handle(Tick(), due) == [Dial("h:1", None)]
        now = due
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_seed_that_answered_rests_until_its_link_is_gone() -> None:
    dialing = Dialing()
    dialing.handle(Proposed("h:1"), 0.0)
    dialing.handle(DialSucceeded("h:1", A), 1.0)
    assert dialing.due() is None
    assert dialing.handle(Proposed("h:1"), 2.0) == []
    assert dialing.handle(LinkWent(A), 3.0) == []
    assert dialing.due() == 3.5
    assert dialing.handle(Tick(), 3.5) == [Dial("h:1", None)]


def test_while_others_are_reachable_a_dead_seed_waits_long() -> None:
    dialing = Dialing()
    dialing.handle(LinkCame(B), 0.0)
    dialing.handle(Proposed("h:1"), 0.0)
    dialing.handle(DialFailed("h:1"), 0.0)
    assert dialing.due() == RETRY_MAX_S


def test_a_seed_that_is_ourselves_is_forgotten() -> None:
    dialing = Dialing()
    dialing.handle(Proposed("h:1"), 0.0)
    dialing.handle(DialFailed("h:1", for_good=True), 0.0)
    assert dialing.seeds == ()
    assert dialing.due() is None


def test_a_call_tries_address_after_address_once() -> None:
    dialing = Dialing()
    assert dialing.handle(Called(A, ("h:1", "h:2")), 0.0) == [Dial("h:1", A)]
    assert dialing.handle(Called(A, ("h:1", "h:2")), 0.1) == []
    assert dialing.handle(DialFailed("h:1"), 0.2) == [Dial("h:2", A)]
    assert dialing.handle(DialFailed("h:2"), 0.3) == []
    assert dialing.handle(Called(A, ("h:1",)), 0.3 + CALL_PAUSE_S / 2) == []
    assert dialing.handle(Called(A, ("h:1",)), 0.3 + CALL_PAUSE_S) == [Dial("h:1", A)]


def test_nobody_listens_only_where_every_address_says_so() -> None:
    dialing = Dialing()
    dialing.handle(Called(A, ("h:1", "h:2")), 0.0)
    assert dialing.handle(DialFailed("h:1"), 0.1) == [Dial("h:2", A)]  # no answer
    assert dialing.handle(DialFailed("h:2", refused=True), 0.2) == []
    dialing.handle(Called(A, ("h:1", "h:2")), 1.0)
    assert dialing.handle(DialFailed("h:1", refused=True), 1.1) == [Dial("h:2", A)]
    assert dialing.handle(DialFailed("h:2", refused=True), 1.2) == [NobodyListens(A)]
    dialing.handle(Called(A, ("h:1",)), 2.0)
    assert dialing.handle(DialFailed("h:1"), 2.1) == []


def test_a_seed_that_refuses_says_nothing_of_a_node() -> None:
    dialing = Dialing()
    dialing.handle(Proposed("h:1"), 0.0)
    assert dialing.handle(DialFailed("h:1", refused=True), 0.1) == []


def test_a_node_with_a_link_is_not_called() -> None:
    dialing = Dialing()
    dialing.handle(LinkCame(A), 0.0)
    assert dialing.handle(Called(A, ("h:1",)), 0.0) == []
    dialing.handle(LinkWent(A), 1.0)
    assert dialing.handle(Called(A, ("h:1",)), 1.0) == [Dial("h:1", A)]


def test_a_link_that_came_ends_a_call() -> None:
    dialing = Dialing()
    dialing.handle(Called(A, ("h:1", "h:2")), 0.0)
    dialing.handle(LinkCame(A), 0.1)
    assert dialing.handle(DialFailed("h:1"), 0.2) == []


def test_calls_go_before_seeds_and_never_two_dials_to_one_address() -> None:
    dialing = Dialing(parallel=1)
    assert dialing.handle(Proposed("h:1"), 0.0) == [Dial("h:1", None)]
    assert dialing.handle(Proposed("h:2"), 0.0) == []
    assert dialing.handle(Called(A, ("h:1", "h:3")), 0.0) == []
    assert dialing.handle(DialFailed("h:1"), 1.0) == [Dial("h:1", A)]
    assert dialing.handle(DialFailed("h:1"), 2.0) == [Dial("h:3", A)]
    assert dialing.handle(DialFailed("h:3"), 3.0) == [Dial("h:1", None)]


def test_proposals_push_out_proposals_but_not_what_was_asked_for() -> None:
    dialing = Dialing(parallel=1)
    dialing.handle(Proposed("asked:1", asked=True), 0.0)
    for number in range(MAX_SEEDS + 10):
        dialing.handle(Proposed(f"lan{number}:1"), 0.0)
    assert len(dialing.seeds) == MAX_SEEDS
    assert "asked:1" in dialing.seeds
    assert f"lan{MAX_SEEDS + 9}:1" in dialing.seeds


def test_all_seeds_asked_for_is_full() -> None:
    dialing = Dialing(parallel=1)
    for number in range(MAX_SEEDS + 1):
        dialing.handle(Proposed(f"h{number}:1", asked=True), 0.0)
    assert len(dialing.seeds) == MAX_SEEDS


nodes = st.sampled_from([NodeId(c * 52) for c in "abc"])
places = st.sampled_from([f"h:{n}" for n in range(1, 7)])
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Proposed, places, st.booleans()),
    st.builds(Called, nodes, st.lists(places, max_size=3).map(tuple)),
    st.builds(LinkCame, nodes),
    st.builds(LinkWent, nodes),
    st.just(Tick()),
)


@given(st.lists(st.tuples(events, st.floats(0, 40), st.booleans(), nodes), max_size=60))
def test_any_order_keeps_to_the_bounds(steps: list[tuple[Event, float, bool, NodeId]]) -> None:
    """Every dial ends in one outcome; at most `parallel` run, one an address."""
    dialing, now = Dialing(parallel=2), 0.0
    running: list[Dial] = []
    for event, pause_s, succeeds, node in steps:
        now += pause_s
        orders = list(dialing.handle(event, now))
        if running and pause_s > 1:
            done = running.pop(0)
            ended: Event = (
                DialSucceeded(done.address, done.expected or node)
                if succeeds
                else DialFailed(done.address)
            )
            orders += dialing.handle(ended, now)
        running += [order for order in orders if isinstance(order, Dial)]
        assert len(running) <= 2
        assert len({d.address for d in running}) == len(running)
        due = dialing.due()
        assert due is None or not running or len(running) < 2 or due >= 0
    assert len(dialing._calls) <= MAX_CALLS
