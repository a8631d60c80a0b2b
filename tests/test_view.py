"""What a node makes of its own models and those of the others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.ids import InstanceId, ModelId, NodeId
from meshd.view import (
    Claim,
    ClaimState,
    HostView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerModel,
    PeerState,
    PeerView,
    Target,
    View,
    exact_name,
    union,
    with_local,
    with_peers,
    with_wanted,
)

M = ModelId("m")
NODE = NodeView(NodeId("self"), "here", "0", "member", NodeState.READY, 0.0, "127.0.0.1:1", None)


def own(
    *, state: ModelState = ModelState.READY, digest: str | None = None, reason: str | None = None
) -> Mapping[ModelId, ModelView]:
    targets: tuple[Target, ...] = ()
    if state is ModelState.READY:
        targets = (Target(M, "here", InstanceId("own"), "/run/own.sock", 4),)
    host = HostView("here", NodeId("self"), 1, state, 4096, 4, 4)
    return {M: ModelView(M, "ref", state, reason, digest=digest, hosts=(host,), targets=targets)}


def theirs(
    instance: str | None = "i",
    *,
    name: str = "m",
    state: ModelState = ModelState.READY,
    digest: str | None = None,
    slots: int = 4,
    slots_free: int = 4,
    reason: str | None = None,
) -> PeerModel:
    return PeerModel(
        ModelId(name),
        f"ref-{name}",
        state,
        digest=digest,
        reason=reason,
        instance=None if instance is None else InstanceId(instance),
        slots=slots,
        slots_free=slots_free,
    )


def peer(
    node: str,
    *models: PeerModel,
    state: PeerState = PeerState.ALIVE,
    draining: bool = False,
    claims: tuple[Claim, ...] = (),
) -> PeerView:
    return PeerView(
        NodeId(node), f"name-{node}", state, draining=draining, models=models, claims=claims
    )


def claim(state: ClaimState = ClaimState.READY, name: str = "m") -> Claim:
    return Claim(ModelId(name), 1, state, 0)


def waiting(reason: str = "nobody has the memory", name: str = "m") -> Mapping[ModelId, ModelView]:
    """`View.wanted` of one deployment."""
    return {ModelId(name): ModelView(ModelId(name), "wanted-ref", ModelState.WAITING, reason)}


def instances(models: Mapping[ModelId, ModelView], name: str = "m") -> list[str]:
    return [t.instance for t in models[ModelId(name)].targets]


def test_without_others_it_is_the_local_part_itself() -> None:
    local = own()
    assert union(local, ()) is local
    assert union(local, (peer("a", theirs(), state=PeerState.DEAD),)) is local


def test_a_model_of_another_node() -> None:
    models = union({}, (peer("a", theirs("ia", slots=8, slots_free=3, digest="d")),))
    (model,) = models.values()
    assert (model.id, model.ref, model.state, model.digest) == (M, "ref-m", ModelState.READY, "d")
    assert model.targets == (
        Target(M, "name-a", InstanceId("ia"), "", 8, False, NodeId("a"), slots_free=3),
    )
    (host,) = model.hosts
    assert (host.node, host.node_id, host.slots, host.slots_free) == ("name-a", "a", 8, 3)


def test_ours_comes_first_then_the_others_by_id_in_any_order() -> None:
    peers = (peer("b", theirs("ib")), peer("c", theirs("ic")), peer("a", theirs("ia")))
    for order in itertools.permutations(peers):
        models = union(own(), order)
        assert instances(models) == ["own", "ia", "ib", "ic"]
        assert [h.node_id for h in models[M].hosts] == ["self", "a", "b", "c"]
        assert models[M].ref == "ref"


@pytest.mark.parametrize("state", [PeerState.DEAD, PeerState.LEFT])
def test_1_the_dead_and_the_departed_count_for_nothing(state: PeerState) -> None:
    models = union({}, (peer("a", theirs("ia"), state=state), peer("b", theirs("ib"))))
    assert instances(models) == ["ib"]
    assert [h.node_id for h in models[M].hosts] == ["b"]


def test_1_a_draining_node_is_listed_and_not_asked() -> None:
    (model,) = union({}, (peer("a", theirs("ia"), draining=True),)).values()
    assert model.targets == ()
    assert model.state is ModelState.DRAINING
    assert [h.state for h in model.hosts] == [ModelState.DRAINING]


def test_1_a_draining_node_is_asked_for_what_it_claims_to_serve() -> None:
    models = (theirs("ia"), theirs("ib", name="n"))
    node = peer("a", *models, draining=True, claims=(claim(), claim(ClaimState.DRAINING, "n")))
    found = union({}, (node,))
    assert (instances(found, "m"), instances(found, "n")) == (["ia"], [])
    assert [found[ModelId(n)].state for n in "mn"] == [ModelState.READY, ModelState.DRAINING]
    assert [found[ModelId(n)].hosts[0].state for n in "mn"] == [
        ModelState.READY,
        ModelState.DRAINING,
    ]


@pytest.mark.parametrize("last", [(), (claim(ClaimState.DRAINING),), (claim(name="n"),)])
def test_1_the_end_of_a_draining_nodes_claim_is_noticed(last: tuple[Claim, ...]) -> None:
    serving = peer("a", theirs("ia"), draining=True, claims=(claim(),))
    view = with_peers(View(node=NODE), (serving,))
    assert instances(view.models) == ["ia"]
    view = with_peers(view, (peer("a", theirs("ia"), draining=True, claims=last),))
    assert instances(view.models) == []


def test_1_claims_of_a_node_that_does_not_drain_change_no_model() -> None:
    view = with_peers(View(node=NODE), (peer("a", theirs("ia"), claims=(claim(),)),))
    unclaimed = (peer("a", theirs("ia")),)
    assert with_peers(view, unclaimed).models is view.models
    assert with_peers(view, unclaimed).peers == unclaimed


def test_6_what_is_wanted_is_told_where_no_node_says_more() -> None:
    view = with_wanted(View(node=NODE), {**waiting(), **waiting("and this", "a")})
    assert list(view.models) == ["a", "m"]
    assert view.models[M] == waiting()[M]
    absent = with_local(view, own(state=ModelState.ABSENT, digest="d", reason="not loaded"))
    model = absent.models[M]
    assert (model.state, model.reason) == (ModelState.WAITING, "nobody has the memory")
    assert (model.digest, model.hosts, model.ref) == ("d", (), "wanted-ref")
    assert with_wanted(absent, {}).models == absent.local


@pytest.mark.parametrize(
    "state", [s for s in ModelState if s not in (ModelState.ABSENT, ModelState.READY)]
)
def test_6_a_nodes_own_word_stands(state: ModelState) -> None:
    view = with_wanted(View(node=NODE), waiting())
    ours = with_local(view, own(state=state, reason="so it is"))
    assert (ours.models[M].state, ours.models[M].reason) == (state, "so it is")
    others = with_peers(view, (peer("a", theirs(None, state=state, reason="as they say")),))
    assert (others.models[M].state, others.models[M].reason) == (state, "as they say")
    assert instances(with_peers(ours, (peer("a", theirs("ia")),)).models) == ["ia"]


def test_6_what_is_wanted_does_not_depend_on_the_order_of_changes() -> None:
    peers = (peer("a", theirs("ia", name="n")),)
    one = with_wanted(with_peers(with_local(View(node=NODE), own()), peers), waiting(name="z"))
    other = with_local(with_peers(with_wanted(View(node=NODE), waiting(name="z")), peers), own())
    assert one == other
    assert list(one.models) == ["m", "n", "z"]
    assert with_wanted(one, waiting(name="z")).models is one.models


def test_1_draining_does_not_hide_that_loading_failed() -> None:
    failed = theirs(None, state=ModelState.FAILED, reason="no memory")
    (model,) = union({}, (peer("a", failed, draining=True),)).values()
    assert (model.state, model.reason) == (ModelState.FAILED, "no memory")
    assert [h.state for h in model.hosts] == [ModelState.FAILED]


X, Y = "sha256:" + "11" * 32, "sha256:" + "22" * 32
M_X, M_Y = exact_name(M, X), exact_name(M, Y)


def test_2_a_name_of_two_digests_serves_none_and_says_which_there_are() -> None:
    peers = (peer("a", theirs("ia", digest=X)), peer("b", theirs("ib", digest=Y)))
    models = union(own(digest=Y), peers)
    assert list(models) == [M, M_X, M_Y]
    plain = models[M]
    assert (plain.targets, plain.ambiguous, plain.digest) == ((), (M_X, M_Y), None)
    assert plain.reason == (
        "`m` means different weights on different nodes; say which: "
        "`m@111111111111` (name-a) or `m@222222222222` (here, name-b)"
    )
    assert instances(models, M_X) == ["ia"]
    assert instances(models, M_Y) == ["own", "ib"]
    assert (models[M_X].digest, models[M_Y].digest) == (X, Y)


def test_2_without_the_other_weights_the_name_is_good_again() -> None:
    view = with_peers(with_local(View(node=NODE), own(digest=Y)), (peer("a", theirs(digest=X)),))
    assert view.models[M].ambiguous
    models = with_peers(view, ()).models
    assert list(models) == [M]
    assert not models[M].ambiguous


def test_2_who_does_not_serve_its_weights_makes_no_name_ambiguous() -> None:
    fetching = theirs(None, state=ModelState.FETCHING, digest=X)
    models = union(own(digest=Y), (peer("a", fetching),))
    assert list(models) == [M]
    assert instances(models) == ["own"]
    assert [h.node_id for h in models[M].hosts] == ["self"]
    # and our own failure does not hide what others serve
    failed = own(state=ModelState.FAILED, reason="no memory", digest=Y)
    models = union(failed, (peer("a", theirs("ia", digest=X)),))
    assert (instances(models), models[M].digest) == (["ia"], X)


def test_2_weights_without_a_digest_go_with_those_that_have_one() -> None:
    peers = (peer("a", theirs("ia")), peer("b", theirs("ib", digest=X)))
    models = union(own(), peers)
    assert instances(models) == ["own", "ia", "ib"]
    assert models[M].digest == X


def test_3_nobody_can_pass_for_another_nodes_engine() -> None:
    peers = (
        peer("a", theirs("own"), theirs("i1", name="other")),
        peer("b", theirs("i1"), theirs("i2", name="other")),
    )
    models = union(own(), peers)
    assert instances(models) == ["own"]
    assert instances(models, "other") == ["i1", "i2"]
    assert [t.node_id for t in models[ModelId("other")].targets] == ["a", "b"]


def test_4_suspects_are_asked_only_when_nobody_else_can_be() -> None:
    suspect = peer("a", theirs("ia"), state=PeerState.SUSPECT)
    assert instances(union({}, (suspect,))) == ["ia"]
    assert instances(union({}, (suspect, peer("b", theirs("ib"))))) == ["ib"]
    assert instances(union(own(), (suspect,))) == ["own"]
    assert len(union(own(), (suspect,))[M].hosts) == 2


def test_5_the_most_hopeful_state_and_its_words() -> None:
    loading = theirs(None, state=ModelState.LOADING, reason="reading weights")
    models = union(own(state=ModelState.FAILED, reason="no memory"), (peer("a", loading),))
    assert (models[M].state, models[M].reason) == (ModelState.LOADING, "reading weights")
    models = union(own(state=ModelState.ABSENT, reason="not loaded"), (peer("a", theirs("ia")),))
    assert (models[M].state, models[M].reason) == (ModelState.READY, None)
    assert instances(models) == ["ia"]


def test_ready_without_an_engine_is_not_ready() -> None:
    for model in (theirs(None), theirs("i", slots=0)):
        (found,) = union({}, (peer("a", model),)).values()
        assert (found.state, found.targets) == (ModelState.DRAINING, ())


def test_a_model_that_is_nowhere_has_no_host() -> None:
    (model,) = union({}, (peer("a", theirs(None, state=ModelState.ABSENT)),)).values()
    assert (model.state, model.hosts) == (ModelState.ABSENT, ())


def test_models_are_in_the_order_of_their_names() -> None:
    peers = (peer("a", theirs("i1", name="z"), theirs("i2", name="b")),)
    assert list(union(own(), peers)) == ["b", "m", "z"]


def test_with_local_and_with_peers_keep_the_union_in_step() -> None:
    peers = (peer("a", theirs("ia")),)
    view = with_peers(with_local(View(node=NODE), own()), peers)
    assert instances(view.models) == ["own", "ia"]
    assert view.local == own()
    assert view.peers == peers
    assert with_local(with_peers(View(node=NODE), peers), own()) == view
    assert instances(with_local(view, {}).models) == ["ia"]
    assert with_peers(view, ()).models == own()


def test_what_did_not_change_stays_the_same_object() -> None:
    view = with_peers(View(node=NODE), (peer("a", theirs("ia")),))
    slower = PeerView(NodeId("a"), "name-a", PeerState.ALIVE, rtt_s=0.5, models=(theirs("ia"),))
    assert with_peers(view, (slower,)).models is view.models
    busier = peer("a", theirs("ia", slots_free=1))
    assert with_peers(view, (busier,)).models != view.models


# -- anything peers may say ------------------------------------------------------------------------

SOME_MODELS = st.builds(
    PeerModel,
    id=st.sampled_from([ModelId("m"), ModelId("n")]),
    ref=st.just("r"),
    state=st.sampled_from(ModelState),
    digest=st.sampled_from([None, "x", "y"]),
    instance=st.sampled_from([None, *(InstanceId(f"i{n}") for n in range(4))]),
    slots=st.integers(-1, 8),
    slots_free=st.integers(-1, 9),
)
SOME_PEERS = st.lists(
    st.builds(
        PeerView,
        id=st.sampled_from([NodeId(n) for n in "abcd"]),
        name=st.just("p"),
        state=st.sampled_from(PeerState),
        draining=st.booleans(),
        models=st.lists(SOME_MODELS, max_size=3).map(tuple),
        claims=st.lists(
            st.builds(claim, st.sampled_from(ClaimState), st.sampled_from("mn")), max_size=2
        ).map(tuple),
    ),
    max_size=4,
    unique_by=lambda p: p.id,
)


@given(peers=SOME_PEERS, ours=st.booleans(), data=st.data())
def test_whatever_peers_say(peers: list[PeerView], ours: bool, data: st.DataObject) -> None:
    local = MappingProxyType(own(digest="x") if ours else {})
    models = union(local, tuple(peers))
    shuffled = tuple(data.draw(st.permutations(peers)))
    assert union(local, shuffled) == models

    by_id = {p.id: p for p in peers}
    targets = [t for m in models.values() for t in m.targets]
    assert len({t.instance for t in targets}) == len(targets)
    for model in models.values():
        assert all(t.model in (model.id, model.id.partition("@")[0]) for t in model.targets)
        assert model.targets or model.state is not ModelState.READY
        suspect = [
            t.node_id is not None and by_id[t.node_id].state is PeerState.SUSPECT
            for t in model.targets
        ]
        assert all(suspect) or not any(suspect)
        for host in model.hosts:
            assert host.node_id == "self" or by_id[host.node_id].state in (
                PeerState.ALIVE,
                PeerState.SUSPECT,
            )
        assert not (model.ambiguous and model.targets)
        assert all(models[exact].targets or models[exact].hosts for exact in model.ambiguous)
    digest_of = {t.instance: m.digest for m in models.values() for t in m.targets}
    for target in targets:
        if target.local:
            continue
        assert target.node_id is not None
        source = by_id[target.node_id]
        ready = {c.model for c in source.claims if c.state is ClaimState.READY}
        assert not source.draining or target.model in ready
        assert target.slots > 0
        said = {m.digest for m in source.models if m.instance == target.instance}
        assert said & {None, digest_of[target.instance]}
    if ours:
        exact = exact_name(M, "x")
        ours_now = models[exact] if models[M].ambiguous else models[M]
        assert ours_now.targets[0] == local[M].targets[0]
        assert ours_now.digest == "x"
