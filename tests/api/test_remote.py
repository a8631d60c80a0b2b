"""Two nodes: a request that arrives at `entry` and is answered by the engine of `host`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

from meshd.api.connection import PEER_IDLE_S, Connection
from meshd.api.pool import REMOTE
from meshd.ids import InstanceId, ModelId, NodeId
from meshd.view import Claim, ClaimState, ModelState, NodeState, PeerState, WorkerShare
from tests.api.conftest import Starter
from tests.api.links import Links
from tests.api.scripted import (
    CHAT,
    SSE_HEAD,
    Answer,
    Api,
    EngineConnection,
    RawClient,
    eventually,
    model_view,
    ok,
    peer_view,
    request,
    sse,
)

STREAM = {**CHAT, "stream": True}


@dataclass
class Pair:
    entry: Api
    host: Api
    links: Links

    async def ask(self, *headers: str) -> Answer:
        return await self.entry.ask(request(CHAT, "/v1/chat/completions", *headers))

    @property
    def streams(self) -> list[Connection]:
        """The host's connections from other nodes."""
        front = self.host.server._front
        assert front is not None
        return list(front.peers)


@pytest.fixture(params=["pair", "tls"])
async def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def pair(start_api: Starter, links: Links) -> Pair:
    return await make_pair(start_api, links)


async def make_pair(
    start_api: Starter, links: Links, transport: str = "pair", **host_settings: object
) -> Pair:
    """`entry` has no engine; `host` has one, of instance `i1`."""
    host = await start_api(**{"name": "host", **host_settings})
    entry = await start_api(name="entry", connect_remote=links.connect)
    if transport == "tls":
        await links.add_tls_node(host)
    else:
        links.add_node(host)
    entry.publish()
    entry.publish_peers(peer_view("host", "i1"))
    return Pair(entry, host, links)


async def test_the_answer_is_the_hosts_byte_for_byte(
    start_api: Starter, links: Links, transport: str
) -> None:
    pair = await make_pair(start_api, links, transport)

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(ok(b'{ "a" :1}', b"Server: llama.cpp\r\nX-Own: y\r\n"))

    pair.host.engine.script = script
    answer = await pair.ask("X-Request-Id: mine-1")
    direct = await pair.host.ask(request(CHAT, "/v1/chat/completions", "X-Request-Id: mine-1"))
    assert (answer.status, answer.body) == (200, b'{ "a" :1}')
    assert answer.headers["x-meshd-node"] == "host"
    assert answer.headers["x-meshd-route"] == "remote"
    assert answer.headers["x-meshd-attempts"] == "1"
    assert answer.headers["x-request-id"] == "mine-1"
    assert direct.headers.pop("x-meshd-route") == "local"
    assert answer.headers.pop("x-meshd-route") == "remote"
    for headers in (answer.headers, direct.headers):
        assert int(headers.pop("x-meshd-queue-ms")) >= 0
    assert answer.headers == direct.headers
    for name in (b"x-request-id", b"x-meshd-node", b"x-meshd-attempts", b"x-meshd-queue-ms"):
        assert answer.raw.lower().count(name) == 1
    (first, _), _ = pair.host.engine.requests
    assert b"x-request-id: mine-1\r\n" in first


async def test_workers_that_lend_memory_for_an_engine_are_named(
    start_api: Starter, links: Links, transport: str
) -> None:
    """By the entry, as long as the engine is the one they lend it for."""
    pair = await make_pair(start_api, links, transport)
    shares = (
        WorkerShare(NodeId("b" * 52), "beta", 1 / 3, 1000),
        WorkerShare(NodeId("c" * 52), "c-cccc", 0.25, 900),
    )
    split = Claim(ModelId("m"), 1, ClaimState.READY, 0, workers=shares)
    pair.entry.publish_peers(replace(peer_view("host", "i1"), claims=(split,)))
    answer = await pair.ask()
    assert answer.headers["x-meshd-route"] == "remote; workers=beta:0.33,c-cccc:0.25"
    moved = replace(split, workers=shares[1:])
    pair.entry.publish_peers(replace(peer_view("host", "i1"), claims=(moved,)))
    assert (await pair.ask()).headers["x-meshd-route"] == "remote; workers=c-cccc:0.25"
    pair.entry.publish_peers(replace(peer_view("host", "i1"), claims=(replace(split, workers=()),)))
    assert (await pair.ask()).headers["x-meshd-route"] == "remote"


async def test_a_stream_is_passed_on_event_by_event(
    start_api: Starter, links: Links, transport: str
) -> None:
    pair = await make_pair(start_api, links, transport)
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await go.wait()
        await connection.say(sse("2") + b"0\r\n\r\n")

    pair.host.engine.script = script
    client = await pair.entry.connect()
    await client.send(request(STREAM))
    assert b"x-meshd-route: remote\r\n" in await client.until(b"\r\n\r\n")
    assert await client.until(b"\n\n\r\n") == sse("1")
    go.set()
    assert await client.until(b"0\r\n\r\n") == sse("2") + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [100_000, 3_000_000])
async def test_large_bodies_both_ways(
    start_api: Starter, links: Links, transport: str, size: int
) -> None:
    pair = await make_pair(start_api, links, transport)

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(ok(body))

    pair.host.engine.script = script
    data = request({"model": "m", "pad": "x" * size})
    for _ in range(2):  # the second one over the same stream
        answer = await pair.entry.ask(data)
        assert (answer.status, answer.body) == (200, data.partition(b"\r\n\r\n")[2])


async def test_http_1_0_across_a_hop(pair: Pair) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1") + b"0\r\n\r\n")

    pair.host.engine.script = script
    client = await pair.entry.connect()
    await client.send(request(STREAM, version="1.0"))
    assert b"transfer-encoding" not in await client.until(b"\r\n\r\n")
    assert await client.rest() == b"data: 1\n\n"


async def test_streams_are_kept_and_given_up(pair: Pair) -> None:
    for _ in range(3):
        assert (await pair.ask()).status == 200
    assert pair.links.dialled == ["host"]
    hold = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await hold.wait()
        await connection.say(ok())

    pair.host.engine.script = script
    pair.entry.publish_peers(peer_view("host", "i1", slots=8))
    asks = [asyncio.create_task(pair.ask()) for _ in range(8)]
    await eventually(lambda: len(pair.streams) == 8)
    hold.set()
    for ask in asks:
        assert (await ask).status == 200
    relay = pair.entry.server._relay
    now = pair.entry.clock.now()
    relay.sweep(now + REMOTE.spare_idle_s)
    await eventually(lambda: len(pair.streams) == REMOTE.kept)
    relay.sweep(now + REMOTE.idle_s - 1)
    assert len(relay._pools[InstanceId("i1")]._idle) == REMOTE.kept
    relay.sweep(now + REMOTE.idle_s + 1)
    await eventually(lambda: not pair.streams)


async def test_the_host_closes_a_forgotten_stream_later_than_clients(pair: Pair) -> None:
    await pair.ask()
    (stream,) = pair.streams
    stream.check_late(pair.host.clock.now() + pair.host.config.api.idle_timeout_s + 1)
    assert stream.transport is not None
    assert not stream.transport.is_closing()
    stream.check_late(pair.host.clock.now() + PEER_IDLE_S + 1)
    await eventually(lambda: not pair.streams)
    assert (await pair.ask()).headers["x-meshd-attempts"] == "1"  # noticed, not stumbled over
    assert REMOTE.idle_s < PEER_IDLE_S


# -- what another node may do ----------------------------------------------------------------------


async def raw_stream(pair: Pair) -> RawClient:
    """A stream to the host, to say on it what no meshd would."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader, lambda _reader, _writer: None)
    (target,) = pair.entry.board.current.models[ModelId("m")].targets
    await pair.links.connect(target, lambda: protocol)
    transport = protocol._transport  # type: ignore[attr-defined]
    writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
    stream = RawClient(reader, writer)
    pair.entry._clients.append(stream)
    return stream


@pytest.mark.parametrize(
    "data",
    [
        request(b"", "/mesh/status", method="GET"),
        request(b"", "/v1/models", method="GET"),
        request(b"", "/metrics", method="GET"),
        request(b"", "/livez", method="GET"),
        request(b"{}", "/v1/models"),
        request(b"", "/v1/chat/completions", method="GET"),
        request(
            b"", "/v1/chat/completions", "Access-Control-Request-Method: POST", method="OPTIONS"
        ),
        request(b"", "/v1/models", method="DELETE"),
    ],
)
async def test_there_is_nothing_but_the_relay_for_other_nodes(pair: Pair, data: bytes) -> None:
    stream = await raw_stream(pair)
    await stream.send(data)
    answer = await stream.answer()
    assert (answer.status, answer.code) == (404, "not_found")
    assert "access-control-allow-methods" not in answer.headers
    await stream.send(request(CHAT))
    assert (await stream.answer()).status == 200


@pytest.mark.parametrize("large", [False, True])
async def test_no_key_and_no_name_is_asked_of_another_node(
    start_api: Starter, links: Links, large: bool
) -> None:
    pair = await make_pair(start_api, links, api_key="secret-key", wait_s=30.0)
    stream = await raw_stream(pair)
    body = {**CHAT, "pad": "x" * 300_000} if large else CHAT
    odd = ("Origin: https://evil.example", "X-Meshd-Wait-S: nonsense")
    await stream.send(request(body, "/v1/chat/completions", *odd, host="meshd"))
    answer = await stream.answer()
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers
    pair.host.publish(model_view(state=ModelState.LOADING))
    await stream.send(request(body))
    assert (await stream.answer()).code == "model_loading"  # at once: the other node decides


async def test_other_nodes_are_no_clients(start_api: Starter, links: Links) -> None:
    pair = await make_pair(start_api, links, max_connections=8)
    streams = [await raw_stream(pair) for _ in range(10)]
    for stream in streams:
        await stream.send(request(CHAT))
        assert (await stream.answer()).status == 200
    clients = [await pair.host.connect() for _ in range(8)]
    for client in clients:
        await client.send(request(CHAT))
        assert (await client.answer()).status == 200
    assert {stream.origin for stream in pair.streams} == {"entry"}


@pytest.mark.parametrize("large", [False, True])
async def test_a_request_takes_one_hop_and_never_two(
    start_api: Starter, links: Links, large: bool
) -> None:
    """The host has only seen the model elsewhere; the entry still believes it is served there."""
    third = await start_api(name="third")
    links.add_node(third, caller="host")
    host = await start_api(name="host", connect_remote=links.connect)
    links.add_node(host)
    host.publish()
    host.publish_peers(peer_view("third", "i3"))
    assert (await host.ask(request(CHAT))).headers["x-meshd-node"] == "third"
    entry = await start_api(name="entry", connect_remote=links.connect)
    entry.publish()
    entry.publish_peers(peer_view("host", "i1"))
    links.dialled.clear()
    answer = await entry.ask(request({**CHAT, "pad": "x" * 300_000} if large else CHAT))
    assert (answer.status, answer.code) == (503, "model_loading")
    assert answer.headers["x-meshd-node"] == "host"
    assert answer.headers["retry-after"] == "1"
    assert links.dialled == ["host"]
    assert len(third.engine.requests) == 1


async def test_a_host_uses_its_own_engine_however_busy(start_api: Starter, links: Links) -> None:
    pair = await make_pair(start_api, links)
    pair.host.publish_peers(peer_view("other", "i9", slots=100, free=100))
    hold = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await hold.wait()
        await connection.say(ok())

    pair.host.engine.script = script
    asks = [asyncio.create_task(pair.ask()) for _ in range(4)]
    await eventually(lambda: len(pair.host.engine.requests) == 4)
    hold.set()
    for ask in asks:
        assert (await ask).headers["x-meshd-node"] == "host"


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_frees_the_engine_across_the_hop(
    start_api: Starter, links: Links, transport: str, begun: bool
) -> None:
    pair = await make_pair(start_api, links, transport)

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        if begun:
            await connection.say(SSE_HEAD + sse("1"))
        await connection.reader.read()

    pair.host.engine.script = script
    client = await pair.entry.connect()
    await client.send(request(STREAM))
    if begun:
        await client.until(b"\n\n\r\n")
    await eventually(lambda: len(pair.host.engine.requests) == 1)
    assert pair.host.server.own_slots_in_use() == {"m": 1}
    client.close()
    async with asyncio.timeout(1.0):
        await pair.host.engine.connections[0].closed.wait()
    await eventually(lambda: pair.host.server.inflight_total() == 0)
    await eventually(lambda: pair.entry.server.inflight_total() == 0)


async def test_a_stream_that_is_cut_between_events_ends_with_an_error(
    start_api: Starter, links: Links, transport: str
) -> None:
    pair = await make_pair(start_api, links, transport)

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await connection.reader.read()

    pair.host.engine.script = script
    client = await pair.entry.connect()
    await client.send(request(STREAM))
    await client.until(b"\n\n\r\n")
    (stream,) = pair.streams
    assert stream.transport is not None
    stream.transport.abort()
    end = await client.until(b"\r\n0\r\n\r\n")
    assert b'"upstream_failed"' in end
    assert b"node `host`" in end
    assert len(pair.host.engine.requests) == 1
    pair.host.engine.script = pair.host.engine._default
    await client.send(request(CHAT))
    assert b"HTTP/1.1 200" in await client.until(b"\r\n\r\n")


async def test_the_hosts_own_refusals_arrive_as_they_are(start_api: Starter, links: Links) -> None:
    pair = await make_pair(start_api, links, queue_per_model=0)
    hold = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await hold.wait()
        await connection.say(ok())

    pair.host.engine.script = script
    pair.host.ready(slots=1)
    pair.entry.publish_peers(peer_view("host", "i1", slots=2))
    first = asyncio.create_task(pair.ask())
    await eventually(lambda: len(pair.host.engine.requests) == 1)
    answer = await pair.ask("X-Request-Id: r-9")
    assert (answer.status, answer.code) == (429, "queue_full")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-meshd-node"] == "host"
    assert answer.headers["x-request-id"] == "r-9"
    assert answer.raw.lower().count(b"x-request-id") == 1
    hold.set()
    assert (await first).status == 200


async def test_a_host_that_shuts_down_refuses_and_finishes(
    start_api: Starter, links: Links
) -> None:
    pair = await make_pair(start_api, links)
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await go.wait()
        await connection.say(sse("2") + b"0\r\n\r\n")

    pair.host.engine.script = script
    busy = await pair.entry.connect()
    await busy.send(request(STREAM))
    await busy.until(b"\n\n\r\n")
    pair.host.server.refuse_new()
    answer = await pair.ask()
    assert (answer.status, answer.code) == (503, "node_draining")
    pair.host.server.stopping.set()
    go.set()
    assert await busy.until(b"0\r\n\r\n") == sse("2") + b"0\r\n\r\n"
    await pair.host.finished()
    assert (await pair.ask()).status in (502, 503)


async def test_idle_streams_end_when_the_host_begins_to_stop(pair: Pair) -> None:
    await pair.ask()
    await pair.ask()
    hold = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await hold.wait()
        await connection.say(ok())

    pair.host.engine.script = script
    client = await pair.host.connect()
    await client.send(request(CHAT))
    await eventually(lambda: pair.host.server.inflight_total() == 1)
    pair.host.server.stopping.set()
    relay = pair.entry.server._relay
    await eventually(lambda: not relay._pools[InstanceId("i1")]._idle)
    assert pair.host.server.inflight_total() == 1
    hold.set()
    assert (await client.answer()).status == 200
    await pair.host.finished()


# -- draining by hand ------------------------------------------------------------------------------


async def test_a_node_drained_by_hand_sends_its_clients_elsewhere_and_back(
    start_api: Starter, links: Links
) -> None:
    pair = await make_pair(start_api, links)
    pair.entry.ready()
    pair.entry.publish_peers(peer_view("host", "i2", free=0))

    async def node() -> str:
        return (await pair.ask()).headers["x-meshd-node"]

    assert await node() == "entry"
    pair.entry.drain_by_hand()
    assert [await node() for _ in range(3)] == ["host"] * 3
    assert (await pair.entry.ask(request(b"", "/readyz", method="GET"))).status == 503
    pair.entry.drain_by_hand(NodeState.READY)
    assert await node() == "entry"
    assert (await pair.entry.ask(request(b"", "/readyz", method="GET"))).status == 200


async def test_drained_by_hand_with_nobody_else(api: Api) -> None:
    client = await api.connect()
    api.drain_by_hand()
    await client.send(request(CHAT))
    answer = await client.answer()
    assert (answer.status, answer.code) == (503, "node_draining")
    assert "meshd undrain" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "5"
    api.drain_by_hand(NodeState.READY)
    await client.send(request(CHAT))  # the connection is as good as before
    assert (await client.answer()).status == 200


async def test_what_was_let_in_before_a_drain_by_hand_is_served(api: Api) -> None:
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await go.wait()
        await connection.say(ok())

    api.engine.script = script
    api.ready(slots=1)
    asks = [asyncio.create_task(api.ask(request(CHAT))) for _ in range(3)]
    await eventually(lambda: api.server.inflight_total() == 3)
    api.drain_by_hand()
    assert (await api.ask(request(CHAT))).code == "node_draining"
    go.set()
    assert [(await ask).status for ask in asks] == [200] * 3


async def test_a_host_drained_by_hand_takes_nothing_from_other_nodes(pair: Pair) -> None:
    pair.host.drain_by_hand()
    answer = await pair.ask()
    assert (answer.status, answer.code) == (503, "node_draining")
    assert answer.headers["x-meshd-node"] == "host"
    assert not pair.host.engine.requests
    pair.host.drain_by_hand(NodeState.READY)
    assert (await pair.ask()).status == 200


async def test_metrics_tell_here_from_elsewhere(pair: Pair) -> None:
    await pair.ask()
    pair.entry.publish_peers(peer_view("host", "i1"), peer_view("gone", state=PeerState.DEAD))
    text = (await pair.entry.ask(request(b"", "/metrics", method="GET"))).body.decode()
    assert 'meshd_peers{state="alive"} 1.0' in text
    assert 'meshd_peers{state="dead"} 1.0' in text
    assert 'meshd_requests_total{model="m",outcome="ok",route="remote"} 1.0' in text
    assert 'meshd_ttft_seconds_count{model="m",route="remote"} 1.0' in text
    assert 'meshd_request_seconds_count{model="m",route="remote"} 1.0' in text
    text = (await pair.host.ask(request(b"", "/metrics", method="GET"))).body.decode()
    assert 'meshd_requests_total{model="m",outcome="ok",route="local"} 1.0' in text
