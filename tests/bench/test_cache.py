"""The arithmetic of bench.cache, and one small round of what needs no hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cache_calm
from bench.cache import hash_goals, hash_table, pull_goals, pull_table, verdict_goals
from bench.cache_hashing import Hashing, hash_rounds
from bench.cache_pulls import Pulling
from bench.cache_verdicts import Looks, look_at_sets


def hashing(sha256sum: float, openssl: float, meshd: float, two: float | None) -> Hashing:
    speeds = {"sha256sum": sha256sum, "openssl": openssl, "meshd": meshd}
    return Hashing(speeds if two is None else {**speeds, "meshd, 2 files": two}, {})


def test_hashing_is_compared_within_a_round() -> None:
    rounds = [hashing(200, 1000, 900, 1750), hashing(100, 500, 500, 1000)]
    of_best, scaling = hash_goals(rounds)
    assert of_best.value == pytest.approx(0.95)
    assert scaling.value == pytest.approx((1750 / 900 + 2) / 2)
    assert of_best.verdict == scaling.verdict == "reached"


def test_one_core_tells_nothing_of_scaling() -> None:
    assert hash_goals([hashing(200, 1000, 900, None)])[1].verdict == "not measured"
    assert "2 files" not in hash_table([hashing(200, 1000, 900, None)], 1 << 30)


def test_a_pull_is_compared_within_a_round() -> None:
    rounds = [
        Pulling({"hf": 2.0, "meshd": 1.8}, {"hf": 1, "meshd": 1}, {}),
        Pulling({"hf": 8.0, "meshd": 8.8}, {"hf": 1, "meshd": 1}, {}),
        Pulling({"hf": 4.0, "meshd": 4.0}, {"hf": 1, "meshd": 1}, {}),
    ]
    (goal,) = pull_goals(rounds)
    assert (goal.value, goal.verdict) == (1.0, "reached")
    assert "| meshd" in pull_table(rounds, 1 << 30)


def test_the_longest_look_counts() -> None:
    looks = [Looks(1, [1.0], [1.0], [1.0]), Looks(100, [50.0], [10.0, 30.0], [5.0, 6.0])]
    first, again = verdict_goals(looks)
    assert (first.value, first.verdict) == (30.0, "not reached")
    assert (again.value, again.verdict) == (6.0, "reached")


def test_sets_are_made_verified_and_looked_at(tmp_path: Path) -> None:
    for looks, count in zip(look_at_sets(tmp_path, 1, counts=(1, 3)), (1, 3), strict=True):
        assert looks.shards == count
        assert min(looks.unseen_ms + looks.first_ms + looks.again_ms) > 0


def test_hashers_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_calm, "ATTEMPT_PAUSE_S", 0.0)
    (one,) = hash_rounds(tmp_path, 1 << 24, 1, lambda _: None)
    assert min(one.mb_per_s.values()) > 0
    assert set(one.foreign) == set(one.mb_per_s)
    assert list(tmp_path.iterdir()) == []
