"""Bids, claims and demand in adverts: what goes out comes in again, bounded, and the claims to the
last."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from meshd.ids import InstanceId, ModelId, NodeId
from meshd.peers.advert_size import MAX_BODY_BYTES
from meshd.peers.adverts import Advert, AdvertBook, describe, told_of
from meshd.peers.picture import Standing, picture
from meshd.peers.placement import (
    MAX_BIDS,
    MAX_CLAIMS,
    MAX_DEMAND,
    MAX_LOAD,
    MAX_REASON_CHARS,
    AdvertBid,
    AdvertClaim,
    AdvertLendable,
    Placement,
    bids_to_wire,
    claims_to_wire,
    demand_to_wire,
    lends_to_wire,
)
from meshd.view import (
    Bid,
    Claim,
    ClaimState,
    HostView,
    Lendable,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerState,
    Role,
    Suits,
    Target,
    View,
    WorkerShare,
)

A, B = NodeId("a" * 52), NodeId("b" * 52)
M = ModelId("m")
BID = Bid(M, 7, Suits.YES, "fits", True, 4 << 30, 16 << 30, 12, 6, 1)
CLAIM = Claim(M, 3, ClaimState.READY, 1 << 47, "weights on disk")
LENDS = (Lendable("CUDA0", 7 << 30, True, 4_900_000_000_000), Lendable("CPU", 0, False))
DEMAND = ((M, 2.5), (ModelId("n"), 0.25))

names = st.text(min_size=1, max_size=256).map(ModelId)
counters = st.integers(0, (1 << 53) - 1)
sixteenths = st.integers(0, 15)
workers = st.builds(
    WorkerShare, st.sampled_from((A, B)), st.text("bcB7._-", max_size=67).map("w".__add__),
    st.integers(0, 10_000).map(lambda share: share / 10_000), counters,
)  # fmt: skip
reasons = st.text(max_size=MAX_REASON_CHARS)
bids = st.builds(
    Bid, names, counters, st.sampled_from(Suits), reasons, st.booleans(), counters, counters,
    sixteenths, st.integers(0, 63), sixteenths, st.booleans(), st.integers(0, 16),
)  # fmt: skip
claims = st.builds(
    Claim, names, counters, st.sampled_from(ClaimState), counters, reasons,
    st.none() | st.integers(1, 300).map(float), st.lists(workers, max_size=16).map(tuple),
)  # fmt: skip
lendables = st.builds(
    Lendable, st.text(min_size=1, max_size=256), counters, st.booleans(),
    st.none() | st.integers(1, (1 << 53) - 1),
)  # fmt: skip

CLAIMED = {"model": "m", "epoch": 1, "state": "ready", "score": 1}
WORKER = {"node": B, "name": "two-bbbb", "share": 0.5, "bytes": 1}
BAD_WORKERS = [
    *(WORKER | {"name": name} for name in ("", "a b", "a,b:1", "a\r\nx: y", "\u0107", "n" * 129)),
    *(WORKER | {"share": share} for share in (-0.1, 1.1, float("nan"))),
    WORKER | {"node": "b"},
    WORKER | {"bytes": -1},
]
"""Names of workers stand in headers of answers."""
BAD_SPEEDS = (0, -1, 1 << 53, 1.5e9, "60GB", True, float("inf"))


def view(*, models: int = 0, idle: int = 0, **said: Any) -> View:
    node = NodeView(A, "one", "0.1", "member", NodeState.READY, 0.0, "127.0.0.1:9337", None)
    served = {
        name: ModelView(
            name,
            "r" * 500,
            ModelState.READY,
            hosts=(HostView("one", A, 1, ModelState.READY, 512, 2, 2),),
            targets=(Target(name, "one", InstanceId(f"~{name}"), "/run/x", 2),),
        )
        for name in (ModelId(f"served{n}") for n in range(models))
    }
    others = {
        name: ModelView(name, "r" * 500, ModelState.ABSENT, "w" * 500)
        for name in (ModelId(f"idle{n}") for n in range(idle))
    }
    return View(node=node, local=others | served, **said)


def told(body: dict[str, Any], role: Role = Role.MEMBER) -> Placement:
    """What it says of models as another node's view shows it."""
    book = AdvertBook()
    advert = Advert.model_validate(orjson.loads(orjson.dumps({**body, "role": role.value})))
    assert book.put(A, 1, advert, {})
    _, (peer,) = picture({A: Standing(PeerState.ALIVE, ())}, book, {}, B, "two")
    return Placement(peer.bids, peer.claims, peer.demand, peer.lends)


@given(bids)
def test_a_bid_comes_out_as_it_went_in(bid: Bid) -> None:
    (wire,) = orjson.loads(orjson.dumps(bids_to_wire([bid])))
    assert AdvertBid.model_validate(wire).to_view() == bid


@given(claims)
def test_a_claim_comes_out_as_it_went_in(claim: Claim) -> None:
    (wire,) = orjson.loads(orjson.dumps(claims_to_wire([claim])))
    assert AdvertClaim.model_validate(wire).to_view() == claim


@given(lendables)
def test_what_is_lent_comes_out_as_it_went_in(lend: Lendable) -> None:
    (wire,) = orjson.loads(orjson.dumps(lends_to_wire([lend])))
    assert AdvertLendable.model_validate(wire).to_view() == lend


def test_older_nodes_do_not_tell_how_fast_their_memory_is() -> None:
    wire = {"device": "CUDA0", "free_bytes": 7, "accelerator": True}
    assert AdvertLendable.model_validate(wire).to_view() == Lendable("CUDA0", 7, True, None)


def test_a_worker_may_have_the_longest_name_there_is_with_a_suffix() -> None:
    advert = describe(view(), "one", Role.MEMBER)
    worker = WORKER | {"name": "n" * 63 + "-bbbb"}
    read = Advert.model_validate({**advert, "claims": [CLAIMED | {"workers": [worker]}]})
    assert read.claims[0].workers[0].to_view().name == worker["name"]


def test_other_nodes_see_them() -> None:
    said = view(bids=(BID,), claims=(CLAIM,), demand=DEMAND, lends=LENDS)
    body = describe(said, "one", Role.MEMBER)
    assert told(body) == Placement((BID,), (CLAIM,), DEMAND, LENDS)


def test_what_says_the_same_is_the_same_advert() -> None:
    """Order and decimals are no news."""
    other = replace(BID, model=ModelId("n"))
    failed = Claim(M, 3, ClaimState.FAILED, 5, "out of memory", 10.0)
    one = describe(view(bids=(BID, other), claims=(failed,)), "one", Role.MEMBER)
    again = replace(failed, retry_in_s=9.6)
    assert describe(view(bids=(other, BID), claims=(again,)), "one", Role.MEMBER) == one


def test_what_an_advert_is_made_of_is_all_that_it_reads() -> None:
    """Whatever of a view is not among it may change without changing the advert."""
    said = view(models=1, bids=(BID,), claims=(CLAIM,), demand=DEMAND, lends=LENDS)
    nothing = dict.fromkeys(View.__dataclass_fields__, None)
    kept = ("node", "runtime", "devices", "local", "weights", "bids", "claims", "demand", "lends")
    rest: Any = SimpleNamespace(**nothing | {name: getattr(said, name) for name in kept})
    rest.node = SimpleNamespace(version=said.node.version, state=said.node.state)
    assert describe(rest, "one", Role.MEMBER) == describe(said, "one", Role.MEMBER)
    assert told_of(rest) == told_of(said)
    assert len(told_of(said)) == len(kept) - 1 + len(vars(rest.node))


def test_a_client_neither_says_them_nor_is_believed() -> None:
    said = view(bids=(BID,), claims=(CLAIM,), lends=LENDS)
    assert not {"bids", "claims", "lends"} & describe(said, "one", Role.CLIENT).keys()
    assert told(describe(said, "one", Role.MEMBER), Role.CLIENT) == Placement()


def test_a_client_s_clients_count() -> None:
    said = view(bids=(BID,), claims=(CLAIM,), demand=DEMAND)
    assert told(describe(said, "one", Role.CLIENT), Role.CLIENT) == Placement(demand=DEMAND)
    assert told(describe(said, "one", Role.MEMBER), Role.CLIENT) == Placement(demand=DEMAND)


def test_order_and_what_is_no_load_are_no_news_of_demand() -> None:
    again = (*reversed(DEMAND), (ModelId("idle"), 0.0))
    assert list(demand_to_wire(again).items()) == list(demand_to_wire(DEMAND).items())
    assert list(demand_to_wire(again)) == ["m", "n"]


def test_of_too_much_demand_the_greatest_stays_within_what_others_read() -> None:
    lots = [(ModelId(f"m{n}"), n + 1.0) for n in range(MAX_DEMAND)]
    extremes = [(ModelId("x" * 257), 9.0), (ModelId("x" * 256), 1e9)]
    wire = demand_to_wire([*lots, *extremes])
    assert len(wire) == MAX_DEMAND
    assert wire["x" * 256] == MAX_LOAD
    assert "x" * 257 not in wire
    assert "m0" not in wire
    Advert.model_validate({**describe(view(), "one", Role.MEMBER), "demand": wire})


def test_the_last_one_of_a_model_counts() -> None:
    body = describe(view(bids=(BID,), claims=(CLAIM,)), "one", Role.MEMBER)
    later = {**body["claims"][0], "epoch": 4}
    assert told({**body, "claims": [*body["claims"], later]}).claims == (replace(CLAIM, epoch=4),)


def test_they_go_with_the_advert_they_came_with() -> None:
    book = AdvertBook()
    body = describe(view(bids=(BID,), claims=(CLAIM,), demand=DEMAND), "one", Role.MEMBER)
    assert book.put(A, 1, Advert.model_validate(body), {})
    assert not book.put(A, 1, Advert.model_validate({**body, "bids": []}), {})
    assert book.placement(A) == Placement((BID,), (CLAIM,), DEMAND)
    assert book.put(A, 2, Advert.model_validate({**body, "bids": []}), {})
    assert book.placement(A) == Placement((), (CLAIM,), DEMAND)
    book.forget(A)
    assert book.placement(A) == Placement()


def test_of_too_many_the_ones_that_matter_most_stay() -> None:
    no = [replace(BID, model=ModelId(f"a{n}"), suits=Suits.NO) for n in range(MAX_BIDS)]
    kept = bids_to_wire([*no, replace(BID, suits=Suits.SWAP), BID])
    assert len(kept) == MAX_BIDS
    assert [bid["suits"] for bid in kept[:3]] == ["yes", "swap", "no"]
    lost = [Claim(ModelId(f"a{n}"), 1, ClaimState.FAILED, 0) for n in range(MAX_CLAIMS)]
    order = [ClaimState.DRAINING, ClaimState.PREPARING, ClaimState.READY]
    kept = claims_to_wire([*lost, *(replace(CLAIM, state=state) for state in order)])
    assert len(kept) == MAX_CLAIMS
    assert [claim["state"] for claim in kept[:4]] == ["ready", "preparing", "draining", "failed"]


def test_reasons_are_cut() -> None:
    (bid,) = bids_to_wire([replace(BID, reason="x" * 5000)])
    (claim,) = claims_to_wire([replace(CLAIM, reason="x" * 5000)])
    assert len(bid["reason"]) == len(claim["reason"]) == MAX_REASON_CHARS


def crowd(count: int, reason: str) -> dict[str, Any]:
    return {
        "bids": tuple(replace(BID, model=ModelId(f"m{n}"), reason=reason) for n in range(count)),
        "claims": tuple(
            replace(CLAIM, model=ModelId(f"m{n}"), reason=reason) for n in range(count)
        ),
    }


@pytest.mark.parametrize(
    ("count", "reason", "idle", "bids_kept"),
    [(40, "x" * 200, 100, 40), (100, "x" * 240, 100, 100), (256, "x" * 240, 100, 0)],
    ids=["idle models go", "reasons go", "bids go"],
)
def test_claims_and_what_is_served_stay_when_an_advert_is_too_large(
    count: int, reason: str, idle: int, bids_kept: int
) -> None:
    body = describe(view(models=5, idle=idle, **crowd(count, reason)), "one", Role.MEMBER)
    assert len(orjson.dumps(body)) <= MAX_BODY_BYTES
    assert len(body["claims"]) == count
    assert sum(model["instance"] is not None for model in body["models"]) == 5
    assert len(body["bids"]) >= bids_kept
    Advert.model_validate(body)


def test_claims_go_last_and_even_the_longest_names_fit() -> None:
    names = [f"{n:03d}" + "\1" * 253 for n in range(MAX_CLAIMS)]
    lots = tuple(replace(CLAIM, model=ModelId(name)) for name in names)
    body = describe(view(models=5, claims=lots), "one", Role.MEMBER)
    assert len(orjson.dumps(body)) <= MAX_BODY_BYTES
    assert body["models"] == []
    assert len(body["claims"]) >= 16


@pytest.mark.parametrize("role", Role)
def test_demand_makes_way_and_the_greatest_loads_go_last(role: Role) -> None:
    lots = tuple((ModelId(f"{n:03d}" + "\1" * 253), 1.0 + n) for n in range(MAX_DEMAND))
    body = describe(view(demand=lots, claims=(CLAIM,)), "one", role)
    assert len(orjson.dumps(body)) <= MAX_BODY_BYTES
    assert 0 < len(body["demand"]) < MAX_DEMAND
    assert min(body["demand"].values()) == 1.0 + MAX_DEMAND - len(body["demand"])
    assert ("claims" in body) == (role is Role.MEMBER)
    Advert.model_validate(body)


@pytest.mark.parametrize(
    "change",
    [
        {"bids": [{"model": "m", "version": 1}]},
        {"bids": [{"model": "", "version": 1, "suits": "yes"}]},
        {"bids": [{"model": "m" * 257, "version": 1, "suits": "yes"}]},
        {"bids": [{"model": "m", "version": 1 << 53, "suits": "yes"}]},
        {"bids": [{"model": "m", "version": -1, "suits": "yes"}]},
        {"bids": [{"model": "m", "version": 1, "suits": "perhaps"}]},
        {"bids": [{"model": "m", "version": 1, "suits": "yes", "headroom": 16}]},
        {"bids": [{"model": "m", "version": 1, "suits": "yes", "load": -1}]},
        {"bids": [{"model": "m", "version": 1, "suits": "yes", "speed": 64}]},
        {"bids": [{"model": "m", "version": 1, "suits": "yes", "free_bytes": 1.5}]},
        {"bids": [{"model": "m", "version": 1, "suits": "yes", "reason": "x" * 1025}]},
        {"bids": [{"model": "m", "version": 1, "suits": "yes"}] * (MAX_BIDS + 1)},
        {"claims": [{"model": "m", "epoch": 1, "state": "ready"}]},
        {"claims": [{"model": "m", "epoch": 1 << 53, "state": "ready", "score": 1}]},
        {"claims": [{"model": "m", "epoch": True, "state": "ready", "score": 1}]},
        {"claims": [{"model": "m", "epoch": 1, "state": "king", "score": 1}]},
        {"claims": [{"model": "m", "epoch": 1, "state": "failed", "score": 1, "retry_in_s": -1}]},
        {"claims": [{"model": "m", "epoch": 1, "state": "ready", "score": 1}] * (MAX_CLAIMS + 1)},
        *({"claims": [CLAIMED | {"workers": [worker]}]} for worker in BAD_WORKERS),
        *({"lends": [{"device": "CPU", "bytes_per_s": speed}]} for speed in BAD_SPEEDS),
        {"claims": [CLAIMED | {"workers": [WORKER] * 17}]},
        {"demand": [["m", 1.0]]},
        {"demand": {"": 1.0}},
        {"demand": {"m" * 257: 1.0}},
        {"demand": {"m": -0.5}},
        {"demand": {"m": 65_536.5}},
        {"demand": {"m": float("nan")}},
        {"demand": {"m": "1"}},
        {"demand": {"m": None}},
        {"demand": {f"m{n}": 1.0 for n in range(MAX_DEMAND + 1)}},
    ],
)
def test_malformed_ones_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Advert.model_validate({**describe(view(), "one", Role.MEMBER), **change})
