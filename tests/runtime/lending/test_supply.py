"""Whether a worker fetches shards or waits for its host to send them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.runtime.lending.supply import (
    CLEARLY,
    SHORTEST_LIMIT_S,
    SLOW_BYTES_PER_S,
    WORTHWHILE_BYTES,
    Ways,
    choose,
)

GB = 10**9
TWO = Ways(
    missing_bytes=5 * GB,
    own_bytes=5 * GB,
    kept_bytes=0,
    pushed_bytes=10 * GB,
    pushed_to=2,
    holders=1,
    push_bytes_per_s=None,
    fetch_bytes_per_s=None,
)
"""Two workers of 5 GB each, in whole shards; the host and one more node have them."""

SIZES = st.integers(0, 1 << 45)
RATES = st.none() | st.floats(1e3, 1e11)
WAYS = st.builds(
    Ways,
    missing_bytes=SIZES,
    own_bytes=SIZES,
    kept_bytes=SIZES,
    pushed_bytes=SIZES,
    pushed_to=st.integers(0, 64),
    holders=st.integers(0, 100),
    push_bytes_per_s=RATES,
    fetch_bytes_per_s=RATES,
)


def fetches(ways: Ways = TWO, **changes: float | None) -> bool:
    return choose(replace(ways, **changes)).fetch  # type: ignore[arg-type]


def test_two_workers_fetch_from_two_uplinks_in_half_of_the_time() -> None:
    choice = choose(TWO)
    assert choice.fetch
    assert choice.reason == "that takes 0.50 of the time of the host's push"


def test_what_is_not_to_be_fetched_at_all() -> None:
    assert choose(replace(TWO, missing_bytes=0)).reason == "they are here"
    assert choose(replace(TWO, holders=0)).reason == "no other node holds them"
    assert "kept" in choose(replace(TWO, kept_bytes=5 * GB)).reason


def test_one_worker_is_no_faster_over_its_own_line() -> None:
    """However many hold the shards: they come in over one line, as what the host sends does."""
    alone = replace(TWO, pushed_bytes=5 * GB, pushed_to=1)
    assert not fetches(alone, holders=1)
    assert not fetches(alone, holders=50)
    # But if its host is on a slow line, and the others were found not to be:
    assert fetches(alone, push_bytes_per_s=10e6, fetch_bytes_per_s=100e6)


@pytest.mark.parametrize(
    ("workers", "holders", "gain"),
    [(2, 1, 2), (3, 1, 2), (3, 2, 3), (8, 1, 2), (8, 3, 4), (4, 9, 4)],
)
def test_the_gain_is_that_of_the_uplinks_up_to_one_a_worker(
    workers: int, holders: int, gain: int
) -> None:
    ways = replace(TWO, pushed_bytes=workers * 5 * GB, pushed_to=workers, holders=holders)
    assert choose(ways).reason == f"that takes {1 / gain:.2f} of the time of the host's push"


def test_of_a_model_in_one_file_all_of_it_would_come() -> None:
    """Two workers hold a third each: the push sends two thirds, each fetch brings three."""
    whole = replace(TWO, missing_bytes=15 * GB)
    assert not fetches(whole, holders=10)
    assert not fetches(whole, pushed_bytes=14 * GB, pushed_to=8), "even if they hold most of it"


def test_it_has_to_be_clearly_faster() -> None:
    limit = round(10 * GB / CLEARLY)
    assert fetches(missing_bytes=limit - 1000)
    assert not fetches(missing_bytes=limit + 1000)


def test_a_small_gain_does_not_pay_for_the_start() -> None:
    small = replace(TWO, own_bytes=WORTHWHILE_BYTES, missing_bytes=WORTHWHILE_BYTES)
    assert fetches(small, pushed_bytes=2 * WORTHWHILE_BYTES)
    assert not fetches(small, pushed_bytes=2 * WORTHWHILE_BYTES - 1)


def test_only_what_is_missing_of_the_shards_is_counted() -> None:
    assert not fetches(missing_bytes=9 * GB)
    assert fetches(missing_bytes=2 * GB), "the rest was fetched before"


def test_measured_rates_go_before_guesses() -> None:
    assert not fetches(push_bytes_per_s=1e9, fetch_bytes_per_s=100e6)
    assert fetches(push_bytes_per_s=100e6, fetch_bytes_per_s=1e9, missing_bytes=15 * GB)
    # One alone says nothing against the other way, which goes over the same kind of lines.
    for rate in (1e6, 1e9):
        assert fetches(push_bytes_per_s=rate)
        assert fetches(fetch_bytes_per_s=rate)
        assert not fetches(push_bytes_per_s=rate, missing_bytes=15 * GB)
        assert not fetches(fetch_bytes_per_s=rate, missing_bytes=15 * GB)


def test_a_fetch_may_take_as_long_as_the_push_would_have() -> None:
    assert choose(replace(TWO, push_bytes_per_s=100e6)).limit_s == pytest.approx(100)
    assert choose(replace(TWO, fetch_bytes_per_s=50e6)).limit_s == pytest.approx(200)
    assert choose(TWO).limit_s == pytest.approx(10 * GB / SLOW_BYTES_PER_S)
    assert choose(replace(TWO, push_bytes_per_s=10e9)).limit_s == SHORTEST_LIMIT_S


def test_a_host_that_counts_less_than_it_asks_for_is_not_believed() -> None:
    assert choose(replace(TWO, pushed_bytes=0, pushed_to=0)) == choose(
        replace(TWO, pushed_bytes=5 * GB, pushed_to=1)
    )


@given(WAYS)
def test_whatever_is_said_the_answer_is_sound(ways: Ways) -> None:
    choice = choose(ways)
    assert choice.reason
    if not choice.fetch:
        assert choice.limit_s == 0
        return
    assert ways.missing_bytes > 0
    assert ways.holders > 0
    assert ways.kept_bytes < ways.own_bytes
    assert math.isfinite(choice.limit_s)
    assert choice.limit_s >= SHORTEST_LIMIT_S
    # Less to fetch, or more to push, is never a reason against it.
    assert fetches(ways, missing_bytes=(ways.missing_bytes + 1) // 2)
    assert fetches(ways, pushed_bytes=2 * ways.pushed_bytes + 1)
    if ways.fetch_bytes_per_s is None:
        assert fetches(ways, holders=ways.holders + 1)


@given(WAYS)
def test_without_measurements_it_does_not_matter_how_fast_lines_are(ways: Ways) -> None:
    guessed = replace(ways, push_bytes_per_s=None, fetch_bytes_per_s=None)
    alike = replace(guessed, push_bytes_per_s=1e6)
    assert choose(guessed).fetch == choose(alike).fetch
