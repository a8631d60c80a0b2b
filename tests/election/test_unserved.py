"""How deployments look that no node works on, in words."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from meshd.election.unserved import ASLEEP, NAMED, Unserved, unserved
from meshd.election.words import Standing
from meshd.ids import ModelId
from meshd.view import Deployment, ModelState, ModelView, Suits
from tests.election.words import DRAINING, FAILED, PREPARING, READY, M, bid, claim, node, record

OTHER = ModelId("qwen")
WAITS, FAILS = ModelState.WAITING, ModelState.FAILED


def look(
    *nodes: Standing,
    deployment: Deployment | None = None,
    failed: ModelView | None = None,
    demand: int | None = None,
) -> tuple[ModelState, str | None]:
    found = shown(*nodes, deployment=deployment, failed=failed, demand=demand)
    return found.state, found.reason


def shown(
    *nodes: Standing,
    deployment: Deployment | None = None,
    failed: ModelView | None = None,
    demand: int | None = None,
) -> ModelView:
    wish = deployment or record()
    wanted = {} if demand is None else {M: demand}
    (found,) = unserved([wish], nodes, wanted, {} if failed is None else {M: failed}).values()
    assert (found.id, found.ref) == (wish.model, wish.ref)
    return found


def test_what_was_removed_is_not_shown() -> None:
    assert unserved([record(removed=True)], [node("a", bid())], {}, {}) == {}


def test_what_sleeps_is_absent_whoever_could() -> None:
    assert look(node("a", bid()), deployment=record(asleep=True)) == (ModelState.ABSENT, ASLEEP)


def test_it_waits_for_whose_turn_it_is() -> None:
    assert look(node("a", bid(3)), node("b", bid(5))) == (WAITS, "b is to host it")


def test_it_waits_for_those_who_claim_it() -> None:
    claiming = node("a", bid(), claim(2, PREPARING)), node("b", bid(9), claim(1, READY))
    assert look(*claiming) == (WAITS, "b, a is to host it")


def test_it_waits_for_one_who_could_though_another_failed() -> None:
    failed = node("a", bid(9), claim(3, FAILED, reason="out of memory"))
    assert look(failed, node("b", bid(1))) == (WAITS, "b is to host it")


def test_nobody_hosts_models() -> None:
    nobody = "no node of this mesh hosts models"
    assert look(node("a", hosts=False), node("b", hosts=False)) == (WAITS, nobody)


def test_a_node_alone_says_why_without_its_name() -> None:
    short = bid(suits=Suits.NO, reason="needs 8 GiB, 4 GiB free")
    assert look(node("a", short)) == (WAITS, "needs 8 GiB, 4 GiB free")


def test_every_node_says_why_by_name() -> None:
    nodes = (
        node("c", draining=True),
        node("b", bid(suits=Suits.NO, reason="too large")),
        node("a"),
        node("d", hosts=False),
    )
    said = "a: has not said whether it could; b: too large; c: draining"
    assert look(*nodes) == (WAITS, said)


def test_one_that_is_pinned_waits_for_its_node() -> None:
    pinned = record(host=node("b").node)
    said = "a: pinned to another node; b: too large"
    nodes = node("a", bid()), node("b", bid(suits=Suits.NO, reason="too large"))
    assert look(*nodes, deployment=pinned) == (WAITS, said)


def test_many_nodes_are_not_all_named() -> None:
    nodes = [node(f"n{i}", bid(suits=Suits.NO, reason="no")) for i in range(NAMED + 3)]
    reason = look(*nodes)[1] or ""
    assert reason.startswith("n0: no; n1: no; ")
    assert reason.endswith("; n6: no; and 3 more")


def test_it_failed_where_all_who_could_have_tried() -> None:
    first = replace(claim(3, FAILED, reason="out of memory"), retry_in_s=30.0)
    second = replace(claim(4, FAILED, reason="no such file"), retry_in_s=10.0)
    nodes = (
        node("b", bid(), second),
        node("a", bid(), first),
        node("c", bid(suits=Suits.NO, reason="too large")),
    )
    found = shown(*nodes)
    assert (found.state, found.reason) == (FAILS, "a: out of memory; b: no such file")
    assert found.retry_after_s == 10.0


def test_what_this_node_saw_is_shown_of_the_reference_it_tried() -> None:
    failing = node("a", bid(), claim(3, FAILED, reason="out of memory"))
    seen = ModelView(
        M, record().ref, FAILS, digest="sha256:1", created_at=5, capabilities=("chat",),
        evidence=("last line",),
    )  # fmt: skip
    found = shown(failing, failed=seen)
    assert (found.reason, found.evidence, found.digest) == (
        "out of memory",
        ("last line",),
        "sha256:1",
    )
    assert (found.created_at, found.capabilities, found.retry_after_s) == (5, ("chat",), None)
    other = shown(failing, failed=replace(seen, ref="org/other"))
    assert (other.evidence, other.digest) == ((), None)


def test_one_who_gives_it_up_is_said_to() -> None:
    assert look(node("a", bid(), claim(3, DRAINING, reason="unloaded"))) == (
        WAITS,
        "draining: unloaded",
    )


def test_each_model_has_its_own_words() -> None:
    found = unserved(
        [record(), record(model=OTHER, asleep=True)], [node("a", bid(), claim(1))], {}, {}
    )
    assert [(m, v.state) for m, v in found.items()] == [(M, WAITS), (OTHER, ModelState.ABSENT)]


WORDS = st.lists(
    st.one_of(
        st.builds(bid, st.integers(0, 3), suits=st.sampled_from(Suits), reason=st.just("no")),
        st.builds(claim, st.integers(1, 3), st.sampled_from([READY, PREPARING, FAILED])),
    ),
    max_size=2,
)
MESH = st.lists(WORDS, min_size=1, max_size=3).map(
    lambda said: tuple(node(f"n{i}", *words) for i, words in enumerate(said))
)
RECORDS = st.lists(st.booleans(), min_size=1, max_size=2).map(
    lambda sleeps: tuple(
        record(model=m, asleep=s) for m, s in zip((M, OTHER), sleeps, strict=False)
    )
)
FAILURES: st.SearchStrategy[dict[ModelId, ModelView]] = st.just({}) | st.just(
    {M: ModelView(M, "org/llama", FAILS, evidence=("last line",))}
)


@given(st.lists(st.tuples(RECORDS, MESH, st.just({}) | st.just({M: 2}), FAILURES), max_size=6))
def test_who_looks_again_and_again_sees_what_who_looks_once_does(
    looks: list[
        tuple[
            tuple[Deployment, ...],
            tuple[Standing, ...],
            dict[ModelId, int],
            dict[ModelId, ModelView],
        ]
    ],
) -> None:
    often = Unserved()
    for look in looks:
        assert often.look(*look) == unserved(*look)
