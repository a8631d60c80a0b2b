"""A node that drains and hands its models over: served while claimed, then refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.ids import ModelId, NodeId
from meshd.view import (
    Claim,
    ClaimState,
    Deployment,
    ModelState,
    NodeState,
    with_wanted,
)
from tests.api.conftest import Starter
from tests.api.links import Links
from tests.api.scripted import CHAT, Api, model_view, peer_view, request
from tests.api.test_remote import Pair, make_pair

M = ModelId("m")
WANTED = {M: model_view(state=ModelState.WAITING, reason="nobody else has the memory")}


@pytest.fixture
async def pair(start_api: Starter, links: Links) -> Pair:
    return await make_pair(start_api, links)


def claim(api: Api, *states: ClaimState) -> None:
    """Publish what `api`'s node claims of `m`."""
    claims = tuple(Claim(M, 1, state, 0) for state in states)
    api.board.publish(replace(api.board.current, claims=claims))


def deploy(api: Api, *, removed: bool = False) -> None:
    deployment = Deployment(M, "m", 1, NodeId("x"), removed=removed)
    view = with_wanted(api.board.current, {} if removed else WANTED)
    api.board.publish(replace(view, deployments=(deployment,)))


async def said(api: Api, *headers: str) -> tuple[int, str]:
    answer = await api.ask(request(CHAT, "/v1/chat/completions", *headers))
    return answer.status, "" if answer.status == 200 else answer.code


async def shown(api: Api) -> str:
    (model,) = (await api.ask(request(b"", "/mesh/models", method="GET"))).json()
    assert [h["state"] for h in model["hosts"]] == [model["state"]]
    return str(model["state"])


@pytest.mark.parametrize("last", [(), (ClaimState.DRAINING,), (ClaimState.FAILED,)])
async def test_new_requests_are_served_until_the_claim_ends(
    api: Api, last: tuple[ClaimState, ...]
) -> None:
    claim(api, ClaimState.READY)
    api.drain_by_hand()
    assert await said(api) == (200, "")
    assert await shown(api) == "ready"
    claim(api, *last)
    assert await said(api) == (503, "node_draining")
    assert await shown(api) == "draining"
    api.drain_by_hand(NodeState.READY)
    assert await said(api) == (200, "")


async def test_a_claim_of_another_model_keeps_nothing(api: Api) -> None:
    api.board.publish(
        replace(api.board.current, claims=(Claim(ModelId("n"), 1, ClaimState.READY, 0),))
    )
    api.drain_by_hand()
    assert await said(api) == (503, "node_draining")


async def test_other_nodes_are_served_until_the_claim_ends(pair: Pair) -> None:
    claim(pair.host, ClaimState.READY)
    pair.host.drain_by_hand()
    assert await said(pair.entry) == (200, "")
    claim(pair.host, ClaimState.DRAINING)
    assert await said(pair.entry) == (503, "node_draining")
    assert len(pair.host.engine.requests) == 1


async def test_clients_go_elsewhere_once_the_claim_ends(pair: Pair) -> None:
    entry = pair.entry
    entry.ready()
    entry.publish_peers(peer_view("host", "i2", free=0))
    claim(entry, ClaimState.READY)
    entry.drain_by_hand()
    assert (await pair.ask()).headers["x-meshd-node"] == "entry"
    claim(entry)
    assert (await pair.ask()).headers["x-meshd-node"] == "host"


async def test_an_engine_that_went_with_the_claim_is_still_told_as_draining(pair: Pair) -> None:
    for api in (pair.host, pair.entry):
        deploy(api)
    pair.host.drain_by_hand()
    pair.host.publish()
    assert await said(pair.host) == (503, "node_draining")
    assert await said(pair.entry) == (503, "node_draining")
    assert await said(pair.host, "X-Meshd-Wait-S: 0.05") == (503, "node_draining")
    pair.host.drain_by_hand(NodeState.READY)
    assert await said(pair.host) == (503, "model_loading")
    assert await said(pair.entry) == (503, "model_loading")


async def test_a_model_on_its_way_elsewhere_is_waited_for(api: Api) -> None:
    deploy(api)
    api.publish()
    api.drain_by_hand()
    other = peer_view("b", "i-b")
    (model,) = other.models
    loading = replace(model, state=ModelState.LOADING, instance=None)
    api.publish_peers(replace(other, models=(loading,)))
    assert await said(api) == (503, "model_loading")
    drained = replace(other, draining=True)
    api.publish_peers(drained)
    assert await said(api) == (503, "node_draining")


async def test_other_nodes_are_told_of_the_draining_whoever_else_is_coming(pair: Pair) -> None:
    pair.host.drain_by_hand()
    pair.host.publish()
    (model,) = peer_view("b", "i-b").models
    loading = replace(model, state=ModelState.LOADING, instance=None)
    pair.host.publish_peers(replace(peer_view("b"), models=(loading,)))
    assert await said(pair.host) == (503, "model_loading")
    assert await said(pair.entry) == (503, "node_draining")


async def test_what_nobody_should_serve_is_not_the_drainings_fault(api: Api) -> None:
    deploy(api, removed=True)
    api.publish()
    api.drain_by_hand()
    assert await said(api) == (404, "model_not_found")
    api.publish(model_view(state=ModelState.FAILED, reason="no memory"))
    assert await said(api) == (503, "model_failed")
