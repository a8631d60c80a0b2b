"""Names that mean different weights on different nodes, and the exact names of those weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.ids import InstanceId, ModelId
from meshd.view import PeerView, exact_name
from tests.api.conftest import Starter
from tests.api.links import Links
from tests.api.scripted import Api, model_view, peer_view, request

OURS, THEIRS = "sha256:" + "11" * 32, "sha256:" + "22" * 32
M = ModelId("m")


def chat(model: str) -> bytes:
    return request({"model": model, "messages": []})


def other_node(digest: str) -> PeerView:
    peer = peer_view("host", "i1")
    return replace(peer, models=tuple(replace(m, digest=digest) for m in peer.models))


@pytest.fixture
async def entry(start_api: Starter, links: Links) -> Api:
    """A node with an engine of its own for `m`, beside one with other weights of that name."""
    host = await start_api(name="host")
    host.publish(replace(model_view(host.target(instance="i1")), digest=THEIRS))
    entry = await start_api(name="entry", connect_remote=links.connect)
    links.add_node(host)
    entry.publish(replace(model_view(entry.target(instance="own")), digest=OURS))
    entry.publish_peers(other_node(THEIRS))
    return entry


async def test_the_plain_name_is_refused_with_the_exact_ones(entry: Api) -> None:
    answer = await entry.ask(chat("m"))
    assert answer.status == 409
    error = answer.json()["error"]
    assert error["code"] == "model_ambiguous"
    assert "`m@111111111111` (entry)" in error["message"]
    assert "`m@222222222222` (host)" in error["message"]


async def test_an_exact_name_reaches_those_weights(entry: Api) -> None:
    for digest, node, route in ((OURS, "entry", "local"), (THEIRS, "host", "remote")):
        answer = await entry.ask(chat(exact_name(M, digest)))
        assert answer.status == 200
        assert (answer.headers["x-meshd-node"], answer.headers["x-meshd-route"]) == (node, route)


async def test_all_three_are_listed(entry: Api) -> None:
    answer = await entry.ask(request(b"", "/v1/models", method="GET"))
    listed = {m["id"]: m["meshd"]["state"] for m in answer.json()["data"]}
    assert listed == {"m": "failed", "m@111111111111": "ready", "m@222222222222": "ready"}


async def test_the_host_serves_the_plain_name_to_a_node_that_sees_no_conflict(
    start_api: Starter, links: Links
) -> None:
    host = await start_api(name="host")
    host.publish(replace(model_view(host.target(instance="i1")), digest=THEIRS))
    third = replace(other_node(OURS), name="third")
    third = replace(
        third, models=tuple(replace(m, instance=InstanceId("i3")) for m in third.models)
    )
    host.publish_peers(third)
    assert host.board.current.models[M].ambiguous
    entry = await start_api(name="entry", connect_remote=links.connect)
    links.add_node(host)
    entry.publish()
    entry.publish_peers(other_node(THEIRS))
    for name in ("m", exact_name(M, THEIRS)):
        answer = await entry.ask(chat(name))
        assert (answer.status, answer.headers["x-meshd-node"]) == (200, "host")
    assert (await entry.ask(chat(exact_name(M, OURS)))).status == 404
