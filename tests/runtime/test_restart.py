"""The budget of restarts."""

from __future__ import annotations

from meshd.runtime.restart import RestartBudget


def test_waits_double_until_the_budget_is_spent() -> None:
    budget = RestartBudget(4, 600.0)
    assert [budget.try_take(float(t)) for t in range(5)] == [0.5, 1.0, 2.0, 4.0, None]
    budget.refill()
    assert budget.try_take(6.0) == 0.5


def test_what_is_older_than_the_window_counts_no_more() -> None:
    budget = RestartBudget(1, 10.0)
    assert budget.try_take(0.0) == 0.5
    assert budget.try_take(9.9) is None
    assert budget.try_take(10.0) == 0.5


def test_no_wait_is_longer_than_half_a_minute() -> None:
    budget = RestartBudget(5000, 600.0)
    waits = [budget.try_take(0.0) for _ in range(5000)]
    assert waits[5:8] == [16.0, 30.0, 30.0]
    assert waits[-1] == 30.0


def test_a_budget_of_none() -> None:
    assert RestartBudget(0, 600.0).try_take(0.0) is None
