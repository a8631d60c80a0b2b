from __future__ import annotations

import pytest

from bench.figures import Goal, Rounds, goals_table, show, table
from bench.measure import Placement, placements


def one(
    direct: float, nginx: float, meshd: float, **more: float
) -> dict[str, dict[str, dict[str, float]]]:
    values = {"direct": direct, "nginx": nginx, "meshd": meshd}
    return {name: {"pinned": {"p50_us": value, **more}} for name, value in values.items()}


DRIFTING = Rounds([one(10, 20, 40), one(20, 30, 40), one(30, 50, 90)])
"""meshd adds 30, 20, 60 to direct; nginx 10, 10, 20: ratios 3, 2, 3."""


def test_what_is_added_is_taken_within_each_round() -> None:
    assert DRIFTING.added("meshd", "pinned", "p50_us") == 30
    # The difference of the medians would be 20.
    assert DRIFTING.value("meshd", "pinned", "p50_us") == 40


def test_ratio_of_what_is_added() -> None:
    assert DRIFTING.added_ratio("meshd", "nginx", "pinned", "p50_us") == 3


def test_ratio_is_the_median_of_ratios() -> None:
    assert DRIFTING.ratio("meshd", "nginx", "pinned", "p50_us") == pytest.approx(1.8)


def test_divisor_lost_in_noise_is_no_good_news() -> None:
    noise = Rounds([one(10, 9, 12)])
    assert noise.added_ratio("meshd", "nginx", "pinned", "p50_us") == float("inf")


def test_front_that_was_not_measured_has_no_figures() -> None:
    assert DRIFTING.added("litellm", "pinned", "p50_us") is None
    assert DRIFTING.ratio("meshd", "litellm", "pinned", "p50_us") is None
    assert DRIFTING.total("litellm", "pinned", "p50_us") is None
    assert Rounds([]).value("meshd", "pinned", "p50_us") is None


def test_counts_beyond_directs_own_do_not_cancel_across_rounds() -> None:
    rounds = Rounds([one(5, 0, 0), one(0, 0, 3)])
    assert rounds.beyond("meshd", "pinned", "p50_us") == 3
    assert rounds.total("meshd", "pinned", "p50_us") == 3


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("x", 5.0, 5), "reached"),
        (Goal("x", 5.1, 5), "not reached"),
        (Goal("x", 0.25, 0.25, at_least=True), "reached"),
        (Goal("x", 0.24, 0.25, at_least=True), "not reached"),
        (Goal("x", None, 5), "not measured"),
        (Goal("x", float("inf"), 5), "not reached"),
        (Goal("x", float("nan"), 5), "not reached"),
    ],
)
def test_verdicts(goal: Goal, verdict: str) -> None:
    assert goal.verdict == verdict


def test_tables_are_markdown() -> None:
    text = table(["what", "n"], [["a", "1"], ["long name", "1,000"]])
    assert text.splitlines() == [
        "| what      |     n |",
        "|-----------|------:|",
        "| a         |     1 |",
        "| long name | 1,000 |",
    ]


def test_goal_with_its_figure_and_limit() -> None:
    last = goals_table([Goal("memory", 71.5, 80, unit=" MB")]).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "memory",
        "71.50 MB",
        "≤ 80 MB",
        "reached",
    ]


def test_missing_value_is_a_dash() -> None:
    assert show(None) == "–"
    assert show(1234.56, 1) == "1,234.6"


@pytest.mark.parametrize(
    ("cores", "apart"),
    [
        ({0}, ({0}, {0}, {0})),
        ({0, 1}, ({1}, {0}, {0})),
        ({2, 5, 7}, ({7}, {2}, {5})),
    ],
)
def test_proxy_has_a_core_of_its_own_where_there_are_two(
    cores: set[int], apart: tuple[set[int], set[int], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    found = placements()
    assert found["apart"] == Placement(*map(frozenset, apart))
    assert len({found["pinned"].proxy, found["pinned"].client, found["pinned"].engine}) == 1
    assert found["unpinned"].proxy == cores
