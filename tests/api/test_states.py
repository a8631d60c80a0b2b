"""What clients get for a model that loads, failed, is full or unknown, and while a node stops."""

from __future__ import annotations

import asyncio

import pytest

from meshd.ids import InstanceId
from meshd.view import ModelState
from tests.api.conftest import Starter
from tests.api.scripted import (
    CHAT,
    GET_LIVEZ,
    SSE_HEAD,
    Api,
    EngineConnection,
    eventually,
    model_view,
    ok,
    request,
    sse,
)

LOADING = model_view(
    state=ModelState.LOADING, reason="reading weights", progress=0.25, retry_after_s=2.5
)


async def test_loading_is_503_with_progress(api: Api) -> None:
    api.publish(LOADING)
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (503, "model_loading")
    assert answer.headers["retry-after"] == "3"
    expected = {"state": "loading", "progress": 0.25, "reason": "reading weights"}
    assert answer.json()["error"]["meshd"] == expected
    assert answer.json()["error"]["type"] == "server_error"


async def test_failed_is_503_with_the_reason(api: Api) -> None:
    api.publish(model_view(state=ModelState.FAILED, reason="m-00003-of-00004.gguf is missing"))
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (503, "model_failed")
    assert "m-00003-of-00004.gguf" in answer.json()["error"]["message"]


async def test_unknown_is_404_with_close_names(api: Api) -> None:
    api.publish(model_view(api.target(), name="tiny-llama"))
    answer = await api.ask(request({"model": "tiny-lama"}))
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert "`tiny-llama`" in answer.json()["error"]["message"]


async def test_a_request_waits_for_loading_if_it_asks_to(api: Api) -> None:
    api.publish(LOADING)
    client = await api.connect()
    await client.send(request(CHAT, "/tokenize", "X-Meshd-Wait-S: 30"))
    await eventually(lambda: api.server.inflight_total() == 1)
    api.ready()
    answer = await client.answer()
    assert answer.status == 200


async def test_waiting_ends_with_the_time_asked_for(api: Api) -> None:
    api.publish(LOADING)
    answer = await api.ask(request(CHAT, "/tokenize", "X-Meshd-Wait-S: 0.05"))
    assert (answer.status, answer.code) == (503, "model_loading")


async def test_waiting_by_configuration_ends_with_the_failure(start_api: Starter) -> None:
    api = await start_api(wait_s=30.0)
    api.publish(LOADING)
    client = await api.connect()
    await client.send(request(CHAT))
    await eventually(lambda: api.server.inflight_total() == 1)
    api.publish(model_view(state=ModelState.FAILED, reason="out of memory"))
    answer = await client.answer()
    assert (answer.status, answer.code) == (503, "model_failed")
    assert "out of memory" in answer.json()["error"]["message"]


async def test_waiting_for_a_model_that_goes_is_404(start_api: Starter) -> None:
    api = await start_api(wait_s=30.0)
    api.publish(LOADING)
    client = await api.connect()
    await client.send(request(CHAT))
    await eventually(lambda: api.server.inflight_total() == 1)
    api.publish()
    assert (await client.answer()).code == "model_not_found"


async def test_slots_bound_what_the_engine_sees_and_the_queue_the_rest(start_api: Starter) -> None:
    api = await start_api(queue_per_model=1)
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await go.wait()
        await connection.say(ok())

    api.engine.script = script
    api.ready(slots=2)
    clients = [await api.connect() for _ in range(3)]
    for number, client in enumerate(clients):
        await client.send(request(CHAT))
        await eventually(lambda n=number: api.server.inflight_total() == n + 1)  # type: ignore[misc]
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (429, "queue_full")
    assert answer.headers["retry-after"] == "1"
    await eventually(lambda: len(api.engine.requests) == 2)
    answer = await api.ask(request(b"", "/mesh/models", method="GET"))
    assert answer.json()[0]["hosts"][0]["slots_free"] == 0
    go.set()
    for client in clients:
        assert (await client.answer()).status == 200
    assert len(api.engine.requests) == 3


async def test_ten_requests_on_four_slots_are_all_served(api: Api) -> None:
    answers = await asyncio.gather(*(api.ask(request(CHAT)) for _ in range(10)))
    assert [a.status for a in answers] == [200] * 10


async def test_a_node_that_shuts_down_refuses(api: Api) -> None:
    client = await api.connect()
    await client.send(request(CHAT))
    assert (await client.answer()).status == 200
    api.server.refuse_new()
    await client.send(request(CHAT))
    answer = await client.answer()
    assert (answer.status, answer.code) == (503, "node_draining")
    assert "shutting down" in answer.json()["error"]["message"]
    assert answer.headers["connection"] == "close"
    assert (await api.ask(request(b"", "/readyz", method="GET"))).status == 503
    assert (await api.ask(GET_LIVEZ)).status == 200


async def test_a_stop_waits_for_what_is_in_flight(api: Api) -> None:
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await go.wait()
        await connection.say(sse("2") + b"0\r\n\r\n")

    api.engine.script = script
    idle, busy = await api.connect(), await api.connect()
    await idle.send(GET_LIVEZ)
    await idle.answer()
    await busy.send(request(CHAT))
    await busy.until(b"\n\n\r\n")
    api.server.stopping.set()
    assert await idle.rest() == b""
    with pytest.raises(OSError, match=r"."):
        await asyncio.open_connection("127.0.0.1", api.port)
    go.set()
    assert await busy.until(b"0\r\n\r\n") == sse("2") + b"0\r\n\r\n"
    await api.finished()


async def test_hurry_ends_streams_with_an_error_event(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await connection.reader.read()

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    await client.until(b"\n\n\r\n")
    api.server.stopping.set()
    api.server.hurry()
    rest = await client.rest()
    assert b'"node_draining"' in rest
    assert rest.endswith(b"\r\n0\r\n\r\n")
    await api.finished()


async def test_drain_time_is_a_limit(start_api: Starter) -> None:
    api = await start_api(drain_s=0.05)

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.reader.read()

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    await eventually(lambda: len(api.engine.requests) == 1)
    api.server.stopping.set()
    assert (await client.answer()).code == "node_draining"
    await api.finished()


async def test_wait_idle_and_counts(api: Api) -> None:
    go = asyncio.Event()
    instance = InstanceId("i1")

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await go.wait()
        await connection.say(ok())

    api.engine.script = script
    assert api.server.last_request_at(instance) is None
    await api.server.wait_idle(instance)
    client = await api.connect()
    await client.send(request(CHAT))
    await eventually(lambda: api.server.inflight(instance) == 1)
    waiter = asyncio.create_task(api.server.wait_idle(instance))
    everything = asyncio.create_task(api.server.wait_all_idle())
    await asyncio.sleep(0)
    assert not waiter.done()
    go.set()
    await client.answer()
    async with asyncio.timeout(5):
        await waiter
        await everything
    assert api.server.inflight(instance) == 0
    assert api.server.last_request_at(instance) is not None


async def test_an_instance_that_goes_takes_its_idle_connections_along(api: Api) -> None:
    await api.ask(request(CHAT))
    api.publish(model_view(api.target("i2")))
    await eventually(api.engine.connections[0].closed.is_set)
    assert (await api.ask(request(CHAT))).status == 200
    assert len(api.engine.connections) == 2
