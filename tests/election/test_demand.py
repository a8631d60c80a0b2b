"""Demand: rates that decay, loads that are told, models nobody uses."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election import demand as demand_module
from meshd.election.demand import FAINT_LOAD, HALF_LIFE_S, MAX_LOAD, TOLD_CHANGE, DecayedSum, Demand
from meshd.ids import ModelId
from tests.election.records import NODES

M, N = ModelId("m"), ModelId("n")
HERE, THERE, ELSEWHERE = NODES


def steady(demand: Demand, model: ModelId, every_s: float, until: float, service_s: float) -> None:
    """Requests at an even pace from 0 on, each answered at once."""
    for number in range(int(until / every_s) + 1):
        demand.asked(model, number * every_s)
        demand.answered(model, service_s, number * every_s)


# -- rates ----------------------------------------------------------------------------------------


def test_half_is_left_after_the_half_life() -> None:
    total = DecayedSum()
    total.add(8.0, 100.0)
    assert total.read(100.0) == 8.0
    assert total.read(100.0 + HALF_LIFE_S) == pytest.approx(4.0)
    assert total.read(100.0 + 3 * HALF_LIFE_S) == pytest.approx(1.0)
    assert total.read(1e9) == 0.0


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 600)), min_size=1, max_size=10),
    st.lists(st.floats(0, 600), max_size=5),
)
def test_decay_is_exact_however_often_it_is_read(
    events: list[tuple[float, float]], reads: list[float]
) -> None:
    total = DecayedSum()
    ordered = sorted(events, key=lambda event: event[1])
    for amount, at in ordered:
        total.add(amount, at)
        for later in reads:
            total.read(at + later)
    exact = sum(amount * 0.5 ** ((1000 - at) / HALF_LIFE_S) for amount, at in ordered)
    assert total.read(1000.0) == pytest.approx(exact, abs=1e-12)


def test_a_steady_rate_is_found() -> None:
    demand = Demand()
    steady(demand, M, 0.5, 900.0, 3.0)
    assert demand.rate(M, 900.0) == pytest.approx(2.0, rel=0.02)
    assert demand.service_s(M, 900.0) == pytest.approx(3.0)
    assert demand.load(M, 900.0) == pytest.approx(6.0, rel=0.02)
    assert demand.rate(N, 900.0) == 0.0


def test_the_service_time_is_that_of_recent_requests() -> None:
    demand = Demand()
    steady(demand, M, 1.0, 60.0, 1.0)
    for second in range(400, 460):
        demand.asked(M, float(second))
        demand.answered(M, 5.0, float(second))
    found = demand.service_s(M, 460.0)
    assert found is not None
    assert 4.8 < found < 5.0
    assert demand.service_s(M, 1000.0) == pytest.approx(found)
    assert demand.service_s(M, 1e6) is None


def test_before_the_first_answer_there_is_no_load() -> None:
    demand = Demand()
    demand.asked(M, 0.0)
    assert demand.service_s(M, 0.0) is None
    assert demand.load(M, 0.0) == 0.0
    demand.answered(N, 1.0, 0.0)
    assert demand.service_s(N, 0.0) is None


def test_what_is_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand_module, "MAX_MODELS", 2)
    demand = Demand()
    for name, times in (("a", 3), ("b", 1), ("c", 2)):
        for _ in range(times):
            demand.asked(ModelId(name), 0.0)
    assert [demand.rate(ModelId(name), 0.0) > 0 for name in "abc"] == [True, False, True]
    demand.hear(THERE, {ModelId("a"): 1.0, ModelId("b"): 3.0, ModelId("c"): 2.0})
    assert [demand.load(ModelId(name), 0.0) for name in "abc"] == [0.0, 3.0, 2.0]


# -- what nodes tell each other -------------------------------------------------------------------


def test_the_loads_of_all_nodes_add_up() -> None:
    demand = Demand()
    steady(demand, M, 1.0, 900.0, 2.0)
    demand.hear(THERE, {M: 3.0, N: 1.0})
    demand.hear(ELSEWHERE, {M: 0.5})
    assert demand.load(M, 900.0) == pytest.approx(5.5, rel=0.02)
    demand.hear(THERE, {M: 1.0})
    assert demand.load(M, 900.0) == pytest.approx(3.5, rel=0.02)
    assert demand.load(N, 900.0) == 0.0
    demand.keep_only([ELSEWHERE])
    assert demand.load(M, 900.0) == pytest.approx(2.5, rel=0.02)


def test_what_is_no_load_counts_as_none() -> None:
    demand = Demand()
    demand.hear(THERE, {M: float("nan"), N: -3.0})
    assert (demand.load(M, 0.0), demand.load(N, 0.0)) == (0.0, 0.0)
    demand.hear(THERE, {M: float("inf")})
    assert demand.load(M, 0.0) == MAX_LOAD


def test_a_load_that_moves_a_little_is_told_the_same() -> None:
    demand = Demand()
    draw = random.Random(5)
    told = set()
    now = 0.0
    for number in range(4000):
        now += draw.expovariate(2.0)
        demand.asked(M, now)
        demand.answered(M, 2.0, now)
        if number > 1000:
            told.add(demand.tell(now)[M])
    assert len(told) <= 3
    assert all(2.8 < load < 5.2 for load in told)


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 20)), max_size=40))
def test_what_is_told_is_near_the_truth(steps: list[tuple[float, float]]) -> None:
    demand = Demand()
    now = 0.0
    for passed, service_s in steps:
        now += passed
        demand.asked(M, now)
        demand.answered(M, service_s, now)
        load, told = demand.load(M, now), demand.tell(now).get(M, 0.0)
        if load < FAINT_LOAD:
            assert told == 0.0
        else:
            assert abs(load - told) <= max(TOLD_CHANGE * told, 0.06 * load)


def test_a_faint_load_is_told_as_none() -> None:
    demand = Demand()
    demand.asked(M, 0.0)
    demand.answered(M, 5.0, 0.0)
    assert demand.tell(0.0) == {M: 0.058}
    assert demand.tell(10 * HALF_LIFE_S) == {}


# -- engines of this node -------------------------------------------------------------------------


def test_an_engine_is_busy_while_a_request_is_in_it() -> None:
    demand = Demand()
    assert not demand.busy(M)
    assert demand.last_at(M) is None
    demand.began(M, 1.0)
    demand.began(M, 2.0)
    demand.ended(M, 3.0)
    assert demand.busy(M)
    demand.ended(M, 4.0)
    assert not demand.busy(M)
    assert demand.last_at(M) == 4.0
    demand.ended(N, 4.0)
    assert not demand.busy(N)


def test_a_model_without_work_for_long_is_idle() -> None:
    demand = Demand()
    demand.became_ready(M, 0.0)
    demand.began(N, 10.0)
    assert demand.idle(99.9, 100.0) == ()
    assert demand.idle(500.0, 100.0) == (M,)
    demand.ended(N, 20.0)
    assert demand.idle(500.0, 100.0) == (M, N)
    demand.became_ready(N, 15.0)
    assert demand.last_at(N) == 20.0
    demand.stopped(M)
    assert demand.idle(500.0, 100.0) == (N,)


def test_a_model_others_ask_for_is_not_idle() -> None:
    demand = Demand()
    demand.became_ready(M, 0.0)
    demand.hear(THERE, {M: 0.5})
    assert demand.idle(500.0, 100.0) == ()
    demand.keep_only([])
    assert demand.idle(500.0, 100.0) == (M,)
    demand.asked(M, 500.0)
    demand.answered(M, 9.0, 500.0)
    assert demand.idle(500.0, 100.0) == ()


def test_an_engine_that_stopped_worked_on_nothing() -> None:
    demand = Demand()
    demand.began(M, 0.0)
    demand.stopped(M)
    demand.ended(M, 1.0)
    assert not demand.busy(M)
    assert demand.last_at(M) is None
