"""The client's side: both lanes, limits, access."""

from __future__ import annotations

import asyncio
import gzip
import logging

import pytest

from tests.api.conftest import Starter
from tests.api.scripted import (
    CHAT,
    GET_LIVEZ,
    Api,
    EngineConnection,
    RawClient,
    eventually,
    ok,
    request,
)


def chunked(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    return head + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


async def test_lanes_change_once_and_both_work(api: Api) -> None:
    client = await api.connect()
    for data in (request(CHAT), request(CHAT), GET_LIVEZ, request(CHAT), chunked(b'{"model":"m"}')):
        await client.send(data)
        assert (await client.answer()).status == 200
    (connection,) = tuple(api.server._front.connections)  # type: ignore[union-attr]
    assert connection._slow is True
    assert len(api.engine.requests) == 4


async def test_a_request_in_single_bytes(api: Api) -> None:
    client = await api.connect()
    for byte in request(CHAT):
        client.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await client.answer()).status == 200


async def test_pipelined_requests_are_answered_in_order(api: Api) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await asyncio.sleep(0.01 if b"first" in body else 0)
        await connection.say(ok(body))

    api.engine.script = script
    client = await api.connect()
    bodies: list[dict[str, object]] = [{"model": "m", "n": n} for n in ("first", "second", "third")]
    await client.send(b"".join(request(b) for b in bodies) + GET_LIVEZ + request(CHAT))
    assert [(await client.answer()).json() for _ in range(5)] == [
        *bodies,
        {"status": "alive"},
        CHAT,
    ]


async def test_pipelining_is_bounded(api: Api) -> None:
    hold = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await hold.wait()
        await connection.say(ok())

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    await eventually(lambda: api.server.inflight_total() == 1)
    one = request({"model": "m", "pad": "x" * 1000})
    client.writer.write(one * 5_000)
    (connection,) = tuple(api.server._front.connections)  # type: ignore[union-attr]
    await eventually(lambda: connection._held)
    assert len(connection._pending) < 1 << 20
    hold.set()
    for _ in range(5_001):
        assert (await client.answer()).status == 200


async def test_a_large_body_goes_the_slow_way(api: Api) -> None:
    body = {"model": "m", "pad": "x" * 3_000_000}
    answer = await api.ask(request(body))
    assert answer.status == 200
    assert len(api.engine.requests[0][1]) > 3_000_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "JSON object"),
        (b"{}", "`model` is missing"),
        (b'{"model":7}', "`model` must be"),
        (b'{"model":""}', "`model` must be"),
        (b"", "not JSON"),
    ],
)
@pytest.mark.parametrize("slow", [False, True])
async def test_bad_bodies_are_400(api: Api, body: bytes, words: str, slow: bool) -> None:
    client = await api.connect()
    if slow:
        await client.send(GET_LIVEZ)
        await client.answer()
    await client.send(request(body, "/v1/chat/completions", "X-Request-Id: q"))
    answer = await client.answer()
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert words in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] == "q"
    await client.send(request(CHAT))
    assert (await client.answer()).status == 200  # the connection is as good as before


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        request(b"{}", "/tokenize", "Transfer-Encoding: chunked"),
    ],
)
async def test_what_is_not_http_is_400_and_does_not_flood_the_log(
    api: Api, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        client = await api.connect()
        await client.send(raw + b"\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, answer.code) == (400, "invalid_request")
        assert answer.headers["x-request-id"]
    assert not caplog.records


async def test_a_head_of_many_long_lines_is_refused(api: Api) -> None:
    client = await api.connect()
    await client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
    for number in range(20):
        await client.send(b"X-%d: %b\r\n" % (number, b"y" * 5_000))
    answer = await client.answer()
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert await client.rest() == b""
    await eventually(lambda: not api.server._front.connections)  # type: ignore[union-attr]


async def test_missing_and_double_host_are_400(api: Api) -> None:
    for hosts in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
        answer = await api.ask(b"GET /livez HTTP/1.1\r\n" + hosts + b"\r\n")
        assert (answer.status, answer.code) == (400, "invalid_request")


async def test_expect_100_continue(api: Api) -> None:
    client = await api.connect()
    raw = request(CHAT, "/v1/chat/completions", "Expect: 100-continue")
    head, _, body = raw.partition(b"\r\n\r\n")
    await client.send(head + b"\r\n\r\n")
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send(body)
    assert (await client.answer()).status == 200


async def test_other_expectations_are_417(api: Api) -> None:
    answer = await api.ask(request(CHAT, "/v1/chat/completions", "Expect: the-unexpected"))
    assert (answer.status, answer.code) == (417, "expectation_failed")


async def test_expect_is_refused_before_the_body(start_api: Starter) -> None:
    api = await start_api(max_body_bytes=2048)
    client = await api.connect()
    await client.send(
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4096\r\n"
        b"Expect: 100-continue\r\n\r\n"
    )
    assert (await client.answer()).status == 413


async def test_a_compressed_body_is_415(api: Api) -> None:
    packed = gzip.compress(b'{"model":"m"}')
    answer = await api.ask(request(packed, "/tokenize", "Content-Encoding: gzip"))
    assert (answer.status, answer.code) == (415, "unsupported_encoding")


async def test_too_large_is_413_declared_or_not(start_api: Starter) -> None:
    api = await start_api(max_body_bytes=2048)
    client = await api.connect()
    await client.send(
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
    )
    declared = await client.answer()  # without one byte of the body
    assert (declared.status, declared.code) == (413, "request_too_large")
    answer = await api.ask(chunked(b"x" * 4096))
    assert (answer.status, answer.code) == (413, "request_too_large")


async def test_a_slow_head_is_408_and_silence_is_closed(start_api: Starter) -> None:
    api = await start_api(head_timeout_s=0.1)
    silent, slow, slower = [await api.connect() for _ in range(3)]
    await slow.send(b"POST /tok")
    await slower.send(b"GET /liv")
    for client in (slow, slower):
        answer = await client.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
    assert await silent.rest() == b""


@pytest.mark.parametrize("slow", [False, True])
async def test_a_slow_body_is_408(start_api: Starter, slow: bool) -> None:
    api = await start_api(body_timeout_s=0.1)
    client = await api.connect()
    if slow:
        await client.send(GET_LIVEZ)
        await client.answer()
    await client.send(request(CHAT)[:-1])
    answer = await client.answer()
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert await client.rest() == b""


@pytest.mark.parametrize("data", [request(CHAT), GET_LIVEZ])
async def test_an_idle_connection_is_closed(start_api: Starter, data: bytes) -> None:
    api = await start_api(idle_timeout_s=0.1)
    client = await api.connect()
    await client.send(data)
    assert (await client.answer()).status == 200
    assert await client.rest() == b""


async def test_one_connection_too_many_is_503(start_api: Starter) -> None:
    api = await start_api(max_connections=8)
    good = [await api.connect() for _ in range(8)]
    for client in good:
        await client.send(GET_LIVEZ)
        assert (await client.answer()).status == 200
    one_more = await api.connect()
    await one_more.send(request(CHAT))
    answer = await one_more.answer()
    assert (answer.status, answer.code) == (503, "too_many_connections")
    assert answer.headers["retry-after"] == "1"
    assert await one_more.rest() == b""
    good[0].close()
    one_more.close()

    async def served() -> bool:
        return (await api.ask(GET_LIVEZ)).status == 200

    async with asyncio.timeout(5):
        while not await served():  # noqa: ASYNC110  (polled from outside)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("slow", [False, True])
async def test_the_api_key(start_api: Starter, slow: bool) -> None:
    api = await start_api(api_key="secret-key")
    client = await api.connect()
    if slow:
        await client.send(GET_LIVEZ)  # open without a key
        assert (await client.answer()).status == 200
    await client.send(request(CHAT))
    answer = await client.answer()
    assert (answer.status, answer.code) == (401, "unauthorized")
    await client.send(request(CHAT, "/tokenize", "Authorization: Bearer secret-key"))
    assert (await client.answer()).status == 200
    await client.send(request(CHAT, "/tokenize", "X-Api-Key: secret-key"))
    assert (await client.answer()).status == 200
    await client.send(request(b"", "/v1/models", method="GET"))
    assert (await client.answer()).status == 401


@pytest.mark.parametrize("path", ["/tokenize", "/nothing"])
async def test_a_foreign_host_name_is_403(api: Api, path: str) -> None:
    answer = await api.ask(request(CHAT, path, host="evil.example"))
    assert (answer.status, answer.code) == (403, "host_not_allowed")


async def test_origins(start_api: Starter) -> None:
    api = await start_api(allowed_origins=("https://app.example",))
    answer = await api.ask(request(CHAT, "/tokenize", "Origin: https://evil.example"))
    assert (answer.status, answer.code) == (403, "host_not_allowed")
    answer = await api.ask(request(CHAT, "/tokenize", "Origin: http://localhost"))
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers
    for path, body, status in (("/tokenize", b'{"model":"m"}', 200), ("/tokenize", b"", 400)):
        answer = await api.ask(request(body, path, "Origin: https://app.example"))
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
    preflight = (
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: %b\r\n"
        b"Access-Control-Request-Method: POST\r\n\r\n"
    )
    answer = await api.ask(preflight % b"https://app.example")
    assert answer.status == 204
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert (await api.ask(preflight % b"https://evil.example")).status == 403


async def test_wrong_method_and_unknown_path(api: Api) -> None:
    answer = await api.ask(request(b"", "/v1/chat/completions", method="GET"))
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST, OPTIONS"
    answer = await api.ask(request(b"{}", "/v1/models"))
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
    answer = await api.ask(request(b"{}", "/v1/chat/completion"))
    assert (answer.status, answer.code) == (404, "not_found")
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


async def test_a_bad_wait_header_is_400(api: Api) -> None:
    for value in ("soon", "-1", "nan", "1e9"):
        answer = await api.ask(request(CHAT, "/tokenize", f"X-Meshd-Wait-S: {value}"))
        assert (answer.status, answer.code) == (400, "invalid_request")


async def test_an_odd_request_id_is_replaced(api: Api) -> None:
    for given in ("x" * 200, "a b", "caf\xe9"):
        raw = request(CHAT, "/tokenize", "X-Request-Id: GIVEN")
        answer = await api.ask(raw.replace(b"GIVEN", given.encode("latin-1")))
        assert answer.headers["x-request-id"].startswith("req-")


async def test_connection_close_is_honoured(api: Api) -> None:
    client: RawClient = await api.connect()
    await client.send(request(CHAT, "/tokenize", "Connection: close"))
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.rest() == b""
