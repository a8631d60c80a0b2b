from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from meshd.api.breaker import Shut
from meshd.api.refusals import of_route
from meshd.api.route import Ambiguous, Broken, Failed, NotFound, NotReady, choose, route
from meshd.ids import InstanceId, ModelId, NodeId
from meshd.view import ModelState, ModelView, Target
from tests.api.scripted import model_view

RNG = random.Random(7)


def target(name: str, *, slots: int = 4, local: bool = True) -> Target:
    return Target(ModelId("m"), "node1", InstanceId(name), f"/run/{name}.sock", slots, local)


def remote(name: str, *, slots: int = 4, free: int = 4) -> Target:
    node = NodeId(f"node of {name}")
    return Target(ModelId("m"), node, InstanceId(name), "", slots, False, node, free)


def view(*models: ModelView) -> dict[ModelId, ModelView]:
    return {m.id: m for m in models}


def test_one_target() -> None:
    assert route("m", view(model_view(target("i"))), {}, RNG) == target("i")


def test_unknown_model_names_close_ones() -> None:
    models = view(model_view(name="qwen3-8b"), model_view(name="llama"))
    assert route("qwen3-8B", models, {}, RNG) == NotFound(("qwen3-8b",), True)
    error = of_route("qwen3-8B", NotFound(("qwen3-8b",), True))
    assert (error.status, error.code) == (404, "model_not_found")
    assert "`qwen3-8b`" in error.message


def test_a_model_is_never_answered_by_another() -> None:
    assert isinstance(route("other", view(model_view(target("i"))), {}, RNG), NotFound)


def test_a_name_of_several_weights_is_answered_by_none() -> None:
    several = replace(
        model_view(reason="say which: `m@1` or `m@2`"), ambiguous=(ModelId("m@1"), ModelId("m@2"))
    )
    outcome = route("m", view(several), {}, RNG)
    assert outcome == Ambiguous(ModelId("m"), "say which: `m@1` or `m@2`")
    error = of_route("m", outcome)
    assert (error.status, error.code, error.param) == (409, "model_ambiguous", "model")
    assert "`m@2`" in error.message


def test_an_exact_name_finds_those_weights_and_no_others() -> None:
    digest = "sha256:" + "ab" * 32
    models = view(replace(model_view(target("i")), digest=digest))
    assert route("m@abababababab", models, {}, RNG) == target("i")
    for other in ("m@abababababac", "m@ab", "m@", "n@abababababab", "m@" + "ab" * 32):
        assert isinstance(route(other, models, {}, RNG), NotFound)


def test_not_ready_says_what_it_waits_for() -> None:
    loading = model_view(state=ModelState.LOADING, reason="reading", progress=0.5, retry_after_s=3)
    expected = NotReady(ModelId("m"), ModelState.LOADING, "reading", 0.5, 3)
    assert route("m", view(loading), {}, RNG) == expected
    error = of_route("m", expected)
    assert error.status == 503
    assert error.detail == {"state": "loading", "progress": 0.5, "reason": "reading"}
    assert error.retry_after_s == 3


def test_failed_gives_the_reason() -> None:
    failed = model_view(state=ModelState.FAILED, reason="shard 3 is missing")
    outcome = route("m", view(failed), {}, RNG)
    assert outcome == Failed(ModelId("m"), "shard 3 is missing")
    assert "shard 3 is missing" in of_route("m", outcome).message


def test_a_target_is_used_whatever_the_state_says() -> None:
    draining = model_view(target("i"), state=ModelState.DRAINING)
    assert route("m", view(draining), {}, RNG) == target("i")


def test_the_less_busy_of_two_is_chosen_per_slot() -> None:
    small, large = target("small", slots=2), target("large", slots=8)
    counts = {InstanceId("small"): 1, InstanceId("large"): 3}
    assert choose((small, large), counts, RNG) is large


def test_a_free_slot_comes_before_none() -> None:
    full, free = target("full", slots=1), target("free", slots=8, local=False)
    counts = {InstanceId("full"): 1, InstanceId("free"): 7}
    assert choose((full, free), counts, RNG) is free


def test_local_wins_ties() -> None:
    remote, local = target("remote", local=False), target("local")
    assert choose((remote, local), {}, RNG) is local


def test_the_broken_one_is_avoided_if_there_is_another() -> None:
    one, two = target("one"), target("two")
    avoid = frozenset((InstanceId("one"),))
    assert choose((one, two), {InstanceId("two"): 3}, RNG, avoid) is two
    assert route("m", view(model_view(one)), {}, RNG, avoid) == one


def test_many_targets_share_the_load() -> None:
    targets = tuple(target(f"i{n}", slots=1000) for n in range(4))
    counts: Counter[InstanceId] = Counter()
    rng = random.Random(1)
    for _ in range(400):
        counts[choose(targets, counts, rng).instance] += 1
    assert max(counts.values()) - min(counts.values()) <= 10


def test_a_model_nobody_loads_is_not_promised_for_later() -> None:
    absent = ModelView(
        id=ModelId("m"), ref="m", state=ModelState.ABSENT, reason="not loaded; `meshd load m`"
    )
    outcome = route("m", {ModelId("m"): absent}, {}, RNG)
    assert outcome == NotFound((), True, "not loaded; `meshd load m`")
    error = of_route("m", outcome)
    assert (error.status, error.code) == (404, "model_not_found")
    assert "`meshd load m`" in error.message


@pytest.mark.parametrize(
    ("own", "free", "ours", "winner"),
    [
        (0, 4, 0, "here"),  # a tie
        (1, 4, 0, "there"),
        (1, 3, 0, "here"),  # a tie again
        (2, 2, 0, "here"),
        (3, 2, 0, "there"),
        (4, 1, 0, "there"),  # a free slot before none
        (4, 0, 0, "here"),
        (5, 0, 0, "there"),  # both full: the one with less
        (2, 4, 3, "here"),  # what was reported is older than what we sent since
        (3, 3, 2, "there"),
        (0, -3, 0, "here"),
        (1, 99, 0, "there"),
    ],
)
def test_here_or_there(own: int, free: int, ours: int, winner: str) -> None:
    here, there = target("here"), remote("there", free=free)
    counts = {InstanceId("here"): own, InstanceId("there"): ours}
    for pair in ((here, there), (there, here)):
        assert choose(pair, counts, RNG).instance == winner


def test_chance_decides_between_equals_elsewhere() -> None:
    pair = (remote("one"), remote("two"))
    rng = random.Random(3)
    counts = Counter(choose(pair, {}, rng).instance for _ in range(200))
    assert min(counts["one"], counts["two"]) > 60  # type: ignore[index]


def shut(after_s: float, *, answers: bool = False) -> Shut:
    return Shut(after_s, answers, f"broke, {after_s}")


def test_open_circuits_are_left_out() -> None:
    one, two, three = remote("one"), remote("two"), remote("three")
    models = view(model_view(one, two, three))
    broken = {InstanceId("one"): shut(1.0), InstanceId("three"): shut(2.0, answers=True)}
    for _ in range(20):
        assert route("m", models, {InstanceId("two"): 99}, RNG, frozenset(), broken) is two


def test_what_answers_with_errors_is_better_than_nothing() -> None:
    one, two = remote("one"), remote("two")
    broken = {InstanceId("one"): shut(1.0), InstanceId("two"): shut(2.0, answers=True)}
    assert route("m", view(model_view(one, two)), {}, RNG, frozenset(), broken) is two
    alone = {InstanceId("two"): shut(2.0, answers=True)}
    assert route("m", view(model_view(two)), {}, RNG, frozenset(), alone) is two


def test_with_nothing_but_broken_engines_it_fails_fast_and_says_when() -> None:
    models = view(model_view(remote("one"), remote("two")))
    broken = {InstanceId("one"): shut(5.0), InstanceId("two"): shut(2.0)}
    outcome = route("m", models, {}, RNG, frozenset(), broken)
    assert outcome == Broken(ModelId("m"), "broke, 2.0", 2.0)
    error = of_route("m", outcome)
    assert (error.status, error.code, error.retry_after_s) == (502, "upstream_failed", 2.0)
    assert "broke, 2.0" in error.message
