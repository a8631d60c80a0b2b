"""Replicas by demand: slow to follow, slower to give up."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.scaling import HOLD_DOWN_S, HOLD_UP_S, Scale, due, initial, scaled

SLOTS = 4
TICK_S = 5.0


def follow(scale: Scale, load: float, start: float, end: float, *, most: int = 8) -> Scale:
    """Look every few seconds, from `start` up to and including `end`."""
    now = start
    while now <= end:
        scale = scaled(scale, load, SLOTS, now, most=most)
        now += TICK_S
    return scale


def test_a_need_that_holds_brings_hosts() -> None:
    scale = follow(initial(), 6.0, 0.0, HOLD_UP_S - TICK_S)
    assert scale.replicas == 1
    assert due(scale) == HOLD_UP_S
    scale = scaled(scale, 6.0, SLOTS, HOLD_UP_S, most=8)
    assert scale == Scale(2)
    assert due(scale) is None


def test_a_burst_brings_none() -> None:
    scale = follow(initial(), 30.0, 0.0, HOLD_UP_S - TICK_S)
    scale = scaled(scale, 1.0, SLOTS, HOLD_UP_S, most=8)
    assert scale == Scale(1)
    assert follow(scale, 30.0, 40.0, 40.0 + HOLD_UP_S - TICK_S).replicas == 1


def test_only_as_many_come_as_were_needed_all_the_time() -> None:
    scale = follow(initial(), 6.0, 0.0, 10.0)
    scale = follow(scale, 30.0, 15.0, HOLD_UP_S)
    assert scale.replicas == 2


def test_hosts_that_are_spare_for_long_go() -> None:
    scale = follow(initial(3), 1.0, 0.0, HOLD_DOWN_S - TICK_S)
    assert scale.replicas == 3
    assert due(scale) == HOLD_DOWN_S
    assert scaled(scale, 1.0, SLOTS, HOLD_DOWN_S, most=8) == Scale(1)


def test_as_many_stay_as_were_needed_at_any_time() -> None:
    scale = follow(initial(4), 1.0, 0.0, 100.0)
    scale = follow(scale, 3.5, 105.0, 110.0)
    assert follow(scale, 1.0, 115.0, HOLD_DOWN_S).replicas == 2


def test_between_the_shares_nothing_changes() -> None:
    scale = follow(initial(2), 3.0, 0.0, 2000.0)
    assert scale == Scale(2)
    assert follow(scale, 6.4, 2000.0, 4000.0) == Scale(2)


def test_from_up_to_down_the_wait_begins_anew() -> None:
    scale = follow(initial(2), 9.0, 0.0, 20.0)
    scale = scaled(scale, 0.0, SLOTS, 25.0, most=8)
    assert scale == Scale(2, candidate=1, since=25.0)
    assert scaled(scale, 9.0, SLOTS, 320.0, most=8) == Scale(2, candidate=3, since=320.0)


def test_never_more_than_there_are_nodes() -> None:
    scale = follow(initial(), 1000.0, 0.0, HOLD_UP_S, most=3)
    assert scale.replicas == 3
    assert scaled(scale, 1000.0, SLOTS, 40.0, most=2) == Scale(2)
    assert scaled(scale, 1000.0, SLOTS, 40.0, most=0) == Scale(1)


def test_without_slots_nothing_is_known() -> None:
    scale = scaled(Scale(2, candidate=3, since=0.0), 50.0, 0, 100.0, most=8)
    assert scale == Scale(2)


@pytest.mark.parametrize(("load", "replicas"), [(3.2, 1), (3.3, 2), (6.4, 2), (6.5, 3)])
def test_four_fifths_of_the_slots_are_full(load: float, replicas: int) -> None:
    assert follow(initial(), load, 0.0, HOLD_UP_S).replicas == replicas


@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60)), min_size=1, max_size=20),
    st.integers(1, 6),
)
def test_changes_are_as_far_apart_as_their_waits(
    phases: list[tuple[float, int]], replicas: int
) -> None:
    scale, now = initial(replicas), 0.0
    changes: list[tuple[float, int]] = [(0.0, replicas)]
    for load, ticks in phases:
        for _ in range(ticks):
            scale = scaled(scale, load, SLOTS, now, most=6)
            assert 1 <= scale.replicas <= 6
            if scale.replicas != changes[-1][1]:
                changes.append((now, scale.replicas))
            now += TICK_S
    for (before, old), (after, new) in pairwise(changes):
        assert after - before >= (HOLD_UP_S if new > old else HOLD_DOWN_S)


@given(st.floats(0, 30))
def test_a_load_that_stays_ends_in_a_number_that_stays(load: float) -> None:
    up, down = follow(initial(1), load, 0.0, 400.0), follow(initial(8), load, 0.0, 400.0)
    for scale in (up, down):
        assert follow(scale, load, 400.0, 1500.0) == scale
    assert up.replicas <= down.replicas
