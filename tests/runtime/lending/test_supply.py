"""Whether a worker fetches shards or waits for its host to send them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.runtime.lending.supply import (
    CLEARLY,
    LAN_BYTES_PER_S,
    SHORTEST_LIMIT_S,
    SLOW_BYTES_PER_S,
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
    # 5 GB at 110 MB/s, 2 s, and 5 GB at 150 MB/s; 10 GB at 110 MB/s
    assert choice.reason == "over 1 Gbit/s that takes some 81 s, its host's push 91 s"
    measured = choose(replace(TWO, push_bytes_per_s=20e6))
    assert measured.fetch
    assert measured.reason == "that takes some 285 s, its host's push 500 s"


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
    """Over lines so slow that nothing else counts."""
    ways = replace(TWO, pushed_bytes=workers * 5 * GB, pushed_to=workers, holders=holders)
    edge = round(gain * 5 * GB / CLEARLY)
    assert fetches(ways, missing_bytes=round(0.99 * edge), push_bytes_per_s=1e6)
    assert not fetches(ways, missing_bytes=round(1.01 * edge), push_bytes_per_s=1e6)


def test_of_a_model_in_one_file_all_of_it_would_come() -> None:
    """Two workers hold a third each: the push sends two thirds, each fetch brings three."""
    whole = replace(TWO, missing_bytes=15 * GB)
    assert not fetches(whole, holders=10)
    assert not fetches(whole, pushed_bytes=14 * GB, pushed_to=8), "even if they hold most of it"


def test_what_a_fetch_costs_beside_the_line_counts_too() -> None:
    """A push that is over in seconds is not worth it, on a fast line as with few bytes."""
    assert not fetches(replace(TWO, own_bytes=GB // 2, missing_bytes=GB // 2, pushed_bytes=GB))
    assert not fetches(push_bytes_per_s=1e9)
    assert fetches(push_bytes_per_s=50e6)


def test_over_lines_that_were_not_measured_it_must_not_lose_if_they_are_fast() -> None:
    """On a LAN it is about as fast here, and clearly faster on lines that are slower."""
    assert fetches()
    assert not fetches(push_bytes_per_s=LAN_BYTES_PER_S)
    assert fetches(push_bytes_per_s=SLOW_BYTES_PER_S)
    assert not fetches(missing_bytes=7 * GB), "on a LAN it would be slower"
    assert fetches(missing_bytes=7 * GB, push_bytes_per_s=SLOW_BYTES_PER_S)
    more = replace(TWO, pushed_bytes=15 * GB, pushed_to=3, holders=2)
    assert fetches(more, push_bytes_per_s=LAN_BYTES_PER_S), "with more of them it gains there too"


def test_only_what_is_missing_of_the_shards_is_counted() -> None:
    assert not fetches(missing_bytes=9 * GB)
    assert fetches(missing_bytes=2 * GB), "the rest was fetched before"


def test_measured_rates_go_before_guesses() -> None:
    assert not fetches(push_bytes_per_s=100e6, fetch_bytes_per_s=50e6)
    assert fetches(push_bytes_per_s=20e6, fetch_bytes_per_s=100e6, missing_bytes=15 * GB)
    # One alone says nothing against the other way, which goes over the same kind of lines.
    for rate in (1e6, 50e6):
        assert fetches(push_bytes_per_s=rate)
        assert fetches(fetch_bytes_per_s=rate)
        assert not fetches(push_bytes_per_s=rate, missing_bytes=15 * GB)
        assert not fetches(fetch_bytes_per_s=rate, missing_bytes=15 * GB)


def test_a_fetch_may_take_as_long_as_the_push_would_have() -> None:
    assert choose(replace(TWO, push_bytes_per_s=50e6)).limit_s == pytest.approx(200)
    assert choose(replace(TWO, fetch_bytes_per_s=50e6)).limit_s == pytest.approx(200)
    assert choose(TWO).limit_s == pytest.approx(10 * GB / SLOW_BYTES_PER_S)
    little = replace(TWO, missing_bytes=1000, own_bytes=GB, pushed_bytes=2 * GB)
    assert choose(replace(little, push_bytes_per_s=120e6)).limit_s == SHORTEST_LIMIT_S


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


@given(WAYS, st.floats(1, 100))
def test_the_slower_all_lines_are_the_more_a_fetch_spares(ways: Ways, factor: float) -> None:
    known = replace(ways, push_bytes_per_s=1e8, fetch_bytes_per_s=None)
    if choose(known).fetch:
        assert fetches(known, push_bytes_per_s=1e8 / factor)
