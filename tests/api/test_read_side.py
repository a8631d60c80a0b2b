from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from meshd.api.events import QUEUE_LIMIT, EventHub, changes
from meshd.api.listener import find_holder, open_listeners
from meshd.errors import AddressInUse, BadConfig, ModelNotFound
from meshd.ids import NodeId
from meshd.view import ModelState, NodeState, View, WorkerShare
from tests.api.conftest import Starter
from tests.api.scripted import CHAT, Answer, Api, model_view, request


async def get(api: Api, path: str, method: str = "GET") -> Answer:
    client = await api.connect()
    await client.send(request(b"", path, method=method))
    return await client.answer(to_head=method == "HEAD")


async def test_models_are_openais_list_and_more(api: Api) -> None:
    answer = await get(api, "/v1/models")
    (entry,) = answer.json()["data"]
    assert answer.json()["object"] == "list"
    assert (entry["id"], entry["object"], entry["owned_by"]) == ("m", "model", "meshd")
    assert entry["meshd"] == {
        "state": "ready",
        "digest": None,
        "context_length": None,
        "capabilities": [],
        "nodes": ["node1"],
    }
    assert (await get(api, "/v1/models/m")).json() == entry
    missing = await get(api, "/v1/models/n")
    assert (missing.status, missing.code) == (404, "model_not_found")


async def test_a_model_id_may_contain_slashes(api: Api) -> None:
    api.publish(model_view(name="owner/repo:Q4"))
    assert (await get(api, "/v1/models/owner/repo:Q4")).json()["id"] == "owner/repo:Q4"


async def test_status_has_the_documented_shape(api: Api) -> None:
    status = (await get(api, "/mesh/status")).json()
    assert set(status) == {
        *("node", "mesh", "runtime", "devices", "peers", "models", "deployments", "cache")
    }
    assert set(status["node"]) == {
        *("id", "name", "version", "role", "state", "uptime_s", "listen", "peer_listen")
    }
    assert set(status["mesh"]) == {"id", "name", "members", "alive", "state", "reason"}
    (model,) = status["models"]
    assert {"id", "ref", "digest", "state", "reason", "progress", "hosts"} <= set(model)
    (host,) = model["hosts"]
    assert set(host) == {
        *("node", "node_id", "epoch", "state", "context_length", "slots", "slots_free", "plan"),
        *("memory", "offloaded"),
    }
    assert host["plan"] == {
        "kind": "solo",
        "workers": [{"node": "node1", "share": 1.0, "bytes": 1000}],
    }
    assert api.server.status()["models"] == status["models"]
    assert (await get(api, "/mesh/peers")).json() == []


async def test_status_and_answers_name_who_lends_memory_for_a_model(api: Api) -> None:
    solo = model_view(api.target())
    workers = (WorkerShare(NodeId("b" * 52), "beta", 0.25, 400),)
    api.publish(replace(solo, hosts=(replace(solo.hosts[0], workers=workers),)))
    (model,) = (await get(api, "/mesh/status")).json()["models"]
    assert model["hosts"][0]["plan"] == {
        "kind": "split",
        "workers": [{"node": "beta", "share": 0.25, "bytes": 400}],
    }
    answer = await api.ask(request(CHAT, "/v1/chat/completions"))
    assert answer.headers["x-meshd-route"] == "local; workers=beta:0.25"


async def test_a_plan_is_asked_for_by_reference(start_api: Starter) -> None:
    def plan(ref: str) -> dict[str, Any]:
        if ref == "owner/repo:Q4":
            return {"model": ref, "nodes": [{"node": "node1", "suits": "yes"}]}
        raise ModelNotFound(f"`{ref}` is not known")

    api = await start_api(plan=plan)
    answer = await get(api, "/mesh/plan?model=owner/repo%3AQ4")
    assert answer.json() == plan("owner/repo:Q4")
    missing = await get(api, "/mesh/plan?model=x")
    assert (missing.status, missing.code) == (404, "model_not_found")
    for query in ("", "?model=", "?ref=x"):
        bad = await get(api, f"/mesh/plan{query}")
        assert (bad.status, bad.json()["error"]["param"]) == (400, "model")


async def test_without_a_source_there_are_no_plans(api: Api) -> None:
    answer = await get(api, "/mesh/plan?model=m")
    assert (answer.status, answer.code) == (404, "not_found")


async def test_health(api: Api) -> None:
    assert (await get(api, "/livez")).status == 200
    assert (await get(api, "/readyz")).status == 200
    node = replace(api.board.current.node, state=NodeState.STARTING)
    api.board.publish(replace(api.board.current, node=node))
    assert (await get(api, "/livez")).status == 200
    assert (await get(api, "/readyz")).status == 503


async def test_head_works_where_get_does(api: Api) -> None:
    for path in ("/livez", "/v1/models", "/mesh/status", "/mesh/events", "/"):
        assert (await get(api, path, "HEAD")).status == 200


async def test_metrics_count_what_happened(api: Api) -> None:
    await api.ask(request(CHAT))
    await api.ask(request({"model": "unknown-name"}))
    text = (await get(api, "/metrics")).body.decode()
    assert 'meshd_requests_total{model="m",outcome="ok",route="local"} 1.0' in text
    assert 'outcome="model_not_found",route="none"} 1.0' in text
    assert "unknown-name" not in text
    assert 'meshd_ttft_seconds_count{model="m",route="local"} 1.0' in text
    assert 'meshd_model_state{model="m",state="ready"} 1.0' in text
    assert 'meshd_inflight{model="m"} 0.0' in text
    assert "meshd_event_loop_lag_seconds " in text
    assert 'meshd_relay_bytes_total{direction="out"}' in text


async def test_the_console_is_strict(api: Api) -> None:
    answer = await get(api, "/")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert b"innerHTML" not in answer.body
    assert b"http-equiv" not in answer.body
    assert b" src=" not in answer.body


async def test_events_tell_changes(api: Api) -> None:
    client = await api.connect()
    await client.send(request(b"", "/mesh/events", method="GET"))
    assert b"text/event-stream" in await client.until(b"\r\n\r\n")
    await client.until(b": meshd\n\n")
    api.publish(model_view(state=ModelState.LOADING, reason="reading", progress=0.5))
    data = (await client.until(b"\n\n")).partition(b"data: ")[2]
    event = orjson.loads(data)
    assert event.pop("at") > 0
    assert event == {
        "type": "model",
        "model": "m",
        "state": "loading",
        "previous": "ready",
        "reason": "reading",
        "progress": 0.5,
        "fetch": None,
    }


def test_changes_between_views(api: Api) -> None:
    base = api.board.current
    assert changes(base, base) == []
    gone = replace(base, models={})
    assert changes(base, gone) == [{"type": "model_removed", "model": "m", "previous": "ready"}]
    draining = replace(base, node=replace(base.node, state=NodeState.DRAINING))
    assert [e["type"] for e in changes(base, draining)] == ["node"]


async def test_a_subscriber_that_does_not_read_is_dropped_and_told(api: Api) -> None:
    import asyncio

    view = api.board.current
    hub = EventHub(view, lambda: 1.0)
    queue: asyncio.Queue[dict[str, object]] = asyncio.Queue(QUEUE_LIMIT)
    hub._subscribers.add(queue)
    other: View = replace(view, models={})
    for number in range(QUEUE_LIMIT + 5):
        hub.apply(other if number % 2 == 0 else view)
    assert queue not in hub._subscribers
    assert queue.qsize() == QUEUE_LIMIT
    events = [queue.get_nowait() for _ in range(QUEUE_LIMIT)]
    assert events[-1]["type"] == "dropped"


def test_a_taken_port_names_its_holder() -> None:
    (taken,) = open_listeners("127.0.0.1", 0)
    try:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=rf"127\.0\.0\.1:{port} is taken by .*\(pid \d+\)"):
            open_listeners("127.0.0.1", port)
    finally:
        taken.close()


def test_an_address_of_another_machine() -> None:
    with pytest.raises(BadConfig, match=r"192\.0\.2\.1"):
        open_listeners("192.0.2.1", 0)


def test_localhost_shares_one_port() -> None:
    listeners = open_listeners("localhost", 0)
    try:
        assert len({s.getsockname()[1] for s in listeners}) == 1
        assert all(s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for s in listeners)
    finally:
        for listener in listeners:
            listener.close()


def test_a_holder_that_cannot_be_seen(tmp_path: Path) -> None:
    assert find_holder(1, tmp_path) is None
