"""Rates that follow, and waits that grow and end."""

from __future__ import annotations

import pytest

from meshd.cache.transfer.pace import MAX_FAILURES, Backoff, Rate


def test_a_steady_rate_is_seen_at_once_and_kept() -> None:
    rate = Rate(0.0)
    assert rate.eta_s(100) is None
    for n in range(1, 20):
        rate.observe(250, n / 4)
        assert rate.bytes_per_s == pytest.approx(1000)
    assert rate.eta_s(5000) == pytest.approx(5)


def test_a_rate_follows_a_change_within_seconds() -> None:
    rate = Rate(0.0)
    for n in range(1, 40):
        rate.observe(250, n / 4)
    for n in range(40, 80):
        rate.observe(0, n / 4)
    assert rate.bytes_per_s < 150


def test_no_time_is_no_rate() -> None:
    rate = Rate(1.0)
    rate.observe(10, 1.0)
    assert rate.bytes_per_s == 0


def test_waits_grow_and_end() -> None:
    backoff = Backoff(lambda: 0.5)
    now, waits = 0.0, []
    while backoff.failed(now):
        waits.append(backoff.retry_at - now)
        now = backoff.retry_at
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert len(waits) == MAX_FAILURES - 1


def test_several_workers_failing_together_count_once() -> None:
    backoff = Backoff(lambda: 0.5)
    for _ in range(20):
        assert backoff.failed(0.0)
    assert backoff.retry_at == 0.5


def test_success_starts_the_count_anew() -> None:
    backoff = Backoff(lambda: 0.5)
    now = 0.0
    for _ in range(20):
        assert backoff.failed(now)
        now = backoff.retry_at
        backoff.worked()


def test_what_the_hub_asks_for_is_waited_and_no_more_than_a_minute() -> None:
    backoff = Backoff(lambda: 0.5)
    assert backoff.failed(0.0, 20.0)
    assert backoff.retry_at == 20.0
    assert not backoff.failed(20.0, 600.0)
