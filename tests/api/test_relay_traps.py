"""What goes wrong between a proxy and its upstream; each trap once, over real sockets."""

from __future__ import annotations

import asyncio

import pytest

from meshd.ids import InstanceId
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

STREAM = {**CHAT, "stream": True}


async def test_bytes_are_relayed_untouched_with_our_headers(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(
            ok(b'{ "a" :1}', b"Keep-Alive: timeout=5\r\nX-Own: y\r\nx-request-id: theirs\r\n")
        )

    api.engine.script = script
    answer = await api.ask(request(CHAT, "/v1/chat/completions", "X-Request-Id: mine-1"))
    assert (answer.status, answer.body) == (200, b'{ "a" :1}')
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-meshd-node"] == "node1"
    assert answer.headers["x-meshd-route"] == "local"
    assert answer.headers["x-meshd-attempts"] == "1"
    assert answer.headers["x-meshd-queue-ms"] == "0"
    assert answer.headers["x-own"] == "y"
    assert "keep-alive" not in answer.headers
    assert answer.raw.lower().count(b"x-request-id") == 1


@pytest.mark.parametrize("slow", [False, True])
async def test_what_travels_to_the_engine(start_api: Starter, slow: bool) -> None:
    api = await start_api(api_key="secret-key")
    client = await api.connect()
    if slow:
        await client.send(GET_LIVEZ)
        await client.answer()
    headers = ("Authorization: Bearer secret-key", "Cookie: c", "Accept: a/b", "X-Api-Key: k")
    await client.send(request(CHAT, "/v1/messages?beta=true", *headers, "X-Request-Id: r"))
    assert (await client.answer()).status == 200
    head, body = api.engine.requests[0]
    assert head.startswith(b"POST /v1/messages?beta=true HTTP/1.1\r\n")
    assert b"secret" not in head
    assert b"cookie" not in head.lower()
    assert head.lower().count(b"host:") == 1
    assert b"x-request-id: r\r\n" in head
    assert b"accept: a/b\r\n" in head.lower()
    assert body == request(CHAT).partition(b"\r\n\r\n")[2]


async def test_every_event_is_passed_on_at_once(api: Api) -> None:
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await go.wait()
        await connection.say(sse("2") + b"0\r\n\r\n")

    api.engine.script = script
    client = await api.connect()
    await client.send(request(STREAM))
    head = await client.until(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    assert await client.until(b"\n\n\r\n") == sse("1")
    go.set()
    assert await client.until(b"0\r\n\r\n") == sse("2") + b"0\r\n\r\n"
    await client.send(request(CHAT))
    assert b"HTTP/1.1 200" in await client.until(b"\r\n\r\n")


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
async def test_what_follows_the_end_is_not_forwarded(
    api: Api, together: bool, chunked: bool
) -> None:
    smuggled = ok(b"smuggled")
    first = SSE_HEAD + sse("1") + b"0\r\n\r\n" if chunked else ok(b"first")
    seen = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        if together:
            await connection.say(first + smuggled)
        else:
            await connection.say(first)
            await seen.wait()
            await connection.say(smuggled)

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    if together:  # nothing of it had been sent yet, so there is still an honest answer
        answer = await client.answer()
        assert (answer.status, answer.code) == (502, "upstream_failed")
        return
    await client.until(b"\r\n0\r\n\r\n" if chunked else b"first")
    seen.set()
    await eventually(api.engine.connections[0].closed.is_set)
    await client.send(GET_LIVEZ)
    assert (await client.answer()).json() == {"status": "alive"}


@pytest.mark.parametrize("more", [b"\r\n", b"junk", ok(b"smuggled")])
async def test_what_comes_with_the_end_of_a_stream_is_not_forwarded(api: Api, more: bytes) -> None:
    begun = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await begun.wait()
        await connection.say(sse("2") + b"0\r\n\r\n" + more)

    api.engine.script = script
    client = await api.connect()
    await client.send(request(STREAM))
    await client.until(b"\r\n\r\n")
    assert await client.until(b"\n\n\r\n") == sse("1")
    begun.set()
    end = await client.until(b"\r\n0\r\n\r\n")
    assert b'"upstream_failed"' in end
    assert b"smuggled" not in end
    await client.send(GET_LIVEZ)
    assert (await client.answer()).json() == {"status": "alive"}


@pytest.mark.parametrize(
    "bad",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + ok(),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"no http at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
    ],
    ids=["1xx", "upgrade", "both framings", "two lengths", "coding", "garbage", "endless head"],
)
async def test_answers_that_are_refused(api: Api, bad: bytes) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(bad)

    api.engine.script = script
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (502, "upstream_failed")
    assert api.server.inflight_total() == 0


async def test_an_answer_without_length_ends_with_the_connection(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(b"HTTP/1.1 200 OK\r\n\r\nall there is")
        connection.writer.close()

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    head = await client.until(b"\r\n\r\n")
    assert b"connection: close\r\n" in head
    assert await client.rest() == b"all there is"


async def test_connections_are_reused_and_retired(api: Api) -> None:
    client = await api.connect()
    for _ in range(100):
        await client.send(request(CHAT))
        await client.answer()
    assert [c.requests for c in api.engine.connections] == [95, 5]


async def test_a_stale_connection_is_replaced_at_once(api: Api) -> None:
    async def hang_up(connection: EngineConnection, head: bytes, body: bytes) -> None:
        if connection.requests > 1:
            connection.reset()
            return
        await connection.say(ok())

    api.engine.script = hang_up
    client = await api.connect()
    for attempts in ("1", "2"):
        await client.send(request(CHAT))
        answer = await client.answer()
        assert (answer.status, answer.headers["x-meshd-attempts"]) == (200, attempts)


async def test_an_idle_connection_is_closed_before_the_engine_does(api: Api) -> None:
    await api.ask(request(CHAT))
    relay = api.server._relay
    pool = relay._pools[InstanceId("i1")]
    relay.sweep(relay.clock.now() + 3.6)
    assert not pool._idle
    await eventually(api.engine.connections[0].closed.is_set)


async def test_dead_before_the_first_byte_is_retried_once_then_502(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        connection.reset()

    api.engine.script = script
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (502, "upstream_failed")
    assert len(api.engine.requests) == 2
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_the_retry_goes_to_another_target(api: Api) -> None:
    nowhere = api.target("dead", path=api.engine.path.with_name("none.sock"), slots=100)
    api.publish(model_view(nowhere, api.target("i1", slots=1)))
    client = await api.connect()
    await client.send(request(CHAT))
    answer = await client.answer()
    assert (answer.status, answer.json()) == (200, {"served": True})


async def test_an_engine_that_is_not_there_is_502(api: Api) -> None:
    api.publish(model_view(api.target("x", path=api.engine.path.with_name("none.sock"))))
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (502, "upstream_failed")


async def test_a_503_is_tried_elsewhere(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
        await connection.say(busy if len(api.engine.requests) == 1 else ok())

    api.engine.script = script
    api.publish(model_view(api.target("i1"), api.target("i2")))
    assert (await api.ask(request(CHAT))).status == 200
    api.engine.requests.clear()
    api.ready()
    assert (await api.ask(request(CHAT))).status == 503  # the only one: its own words are relayed


async def test_death_between_two_events_is_an_error_event_and_a_clean_end(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        connection.reset()

    api.engine.script = script
    client = await api.connect()
    await client.send(request(STREAM))
    answer = await client.answer()
    first, second = answer.body.decode().strip().split("\n\n")
    assert first == "data: 1"
    assert second.startswith('data: {"error":{')
    assert '"upstream_failed"' in second
    await client.send(GET_LIVEZ)
    assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    "part",
    [SSE_HEAD + b"40\r\ndata: hal", SSE_HEAD + b"9\r\ndata: hal\r\n", SSE_HEAD + sse("1") + b"4"],
    ids=["in a chunk", "in an event", "in a chunk's head"],
)
async def test_death_in_the_middle_cuts_the_client_off(api: Api, part: bytes) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(part)
        await asyncio.sleep(0.02)  # let it be read by itself; correct either way
        connection.reset()

    api.engine.script = script
    client = await api.connect()
    await client.send(request(STREAM))
    await client.until(b"\r\n\r\n")
    rest = await client.rest()
    assert b"error" not in rest
    assert not rest.endswith(b"0\r\n\r\n")


async def test_a_short_body_cuts_the_client_off(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        connection.reset()

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    await client.until(b"\r\n\r\n")
    assert await client.rest() == b"12345"


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_frees_the_engine(api: Api, slow: bool, begun: bool) -> None:
    asked = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        asked.set()
        if begun:
            await connection.say(SSE_HEAD + sse("1"))
        await connection.reader.read()  # returns when our side is closed

    api.engine.script = script
    client = await api.connect()
    if slow:
        await client.send(GET_LIVEZ)
        await client.answer()
    await client.send(request(STREAM))
    await (client.until(b"\n\n\r\n") if begun else asked.wait())
    assert api.server.inflight(InstanceId("i1")) == 1
    client.close()
    await eventually(api.engine.connections[0].closed.is_set)
    await eventually(lambda: api.server.inflight_total() == 0)
    assert api.server.inflight(InstanceId("i1")) == 0


async def test_a_client_that_leaves_while_waiting_leaves_the_queue(api: Api) -> None:
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await go.wait()
        await connection.say(ok())

    api.engine.script = script
    api.ready(slots=1)
    first, second, third = [await api.connect() for _ in range(3)]
    await first.send(request(CHAT))
    await eventually(lambda: api.server.inflight_total() == 1)
    await second.send(request(CHAT))
    await eventually(lambda: api.server.inflight_total() == 2)
    await third.send(request(CHAT))
    await eventually(lambda: api.server.inflight_total() == 3)
    second.close()
    await eventually(lambda: api.server.inflight_total() == 2)
    go.set()
    assert (await first.answer()).status == 200
    answer = await third.answer()
    assert answer.status == 200
    assert int(answer.headers["x-meshd-queue-ms"]) >= 0
    assert len(api.engine.requests) == 2


async def test_no_first_byte_is_504(start_api: Starter) -> None:
    api = await start_api(first_byte_timeout_s=0.05)

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.reader.read()

    api.engine.script = script
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (504, "upstream_timeout")
    await eventually(api.engine.connections[0].closed.is_set)


async def test_back_pressure_reaches_the_engine(api: Api) -> None:
    total = 64 * 1024 * 1024
    sent = 0

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        nonlocal sent
        await connection.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            await connection.say(b"x" * 65_536)
            sent += 65_536

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    await client.until(b"\r\n\r\n")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    last = -1
    while last != sent:  # until nothing moves any more
        last = sent
        await asyncio.sleep(0.2)
    assert sent < total // 2
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert len(await client.reader.readexactly(total)) == total
    await client.send(GET_LIVEZ)
    assert (await client.answer()).status == 200


async def test_http_1_0_gets_plain_bytes_and_a_close(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await connection.say(sse("2") + b"0\r\n\r\n")

    api.engine.script = script
    client = await api.connect()
    await client.send(
        request(STREAM, "/v1/chat/completions", "Connection: keep-alive", version="1.0")
    )
    head = await client.until(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head
    assert await client.rest() == b"data: 1\n\ndata: 2\n\n"


async def test_head_of_a_relay_path_is_405(api: Api) -> None:
    client = await api.connect()
    await client.send(request(b"", method="HEAD"))
    answer = await client.answer(to_head=True)
    assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")
