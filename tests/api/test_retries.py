"""Another try elsewhere before the first byte, circuits, and nodes that die; scripted nodes."""

from __future__ import annotations

import asyncio

import pytest

from meshd.api.pool import ProtocolFactory
from meshd.errors import PeerRefused
from meshd.ids import InstanceId
from meshd.view import NodeState, PeerState
from tests.api.conftest import Starter
from tests.api.links import Links
from tests.api.scripted import (
    CHAT,
    SSE_HEAD,
    Answer,
    Api,
    Engine,
    EngineConnection,
    RawClient,
    Script,
    eventually,
    ok,
    peer_view,
    request,
    sse,
)

STREAM = {**CHAT, "stream": True}


def says(data: bytes, *, close: bool = False) -> Script:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(data)
        if close:
            connection.writer.close()

    return script


def status(code: int) -> Script:
    return says(b"HTTP/1.1 %d Said\r\nContent-Length: 4\r\n\r\n{%2d}" % (code, code % 100))


async def resets(connection: EngineConnection, head: bytes, body: bytes) -> None:
    connection.reset()


async def hangs(connection: EngineConnection, head: bytes, body: bytes) -> None:
    await connection.reader.read()  # until our side closes


async def begins_and_hangs(connection: EngineConnection, head: bytes, body: bytes) -> None:
    await connection.say(SSE_HEAD + sse("1"))
    await connection.reader.read()


class Mesh:
    """`entry`, which has no engine, and nodes that say what they are told to. `shown` puts some
    into the view: all free but the first, which is so free that it is asked first."""

    def __init__(self, entry: Api, links: Links) -> None:
        self.entry = entry
        self.links = links
        self.nodes: dict[str, Engine] = {}

    async def add(self, name: str, script: Script) -> Engine:
        engine = self.nodes[name] = await self.links.add_scripted(name)
        engine.script = script
        return engine

    def show(
        self,
        *names: str,
        states: dict[str, PeerState] | None = None,
        draining: frozenset[str] = frozenset(),
    ) -> None:
        """`names` in the order in which they shall be asked."""
        self.entry.publish_peers(
            *(
                peer_view(
                    name,
                    f"i-{name}",
                    slots=100,
                    free=99 - rank,
                    state=(states or {}).get(name, PeerState.ALIVE),
                    draining=name in draining,
                )
                for rank, name in enumerate(names)
            )
        )

    async def ask(self) -> Answer:
        return await self.entry.ask(request(CHAT))

    async def client(self, body: dict[str, object] = CHAT) -> RawClient:
        client = await self.entry.connect()
        await client.send(request(body))
        return client

    def asked(self, name: str) -> int:
        return len(self.nodes[name].requests)

    def retries(self) -> dict[str, int]:
        return self.entry.server._relay.traffic.retries


@pytest.fixture
async def mesh(start_api: Starter, links: Links) -> Mesh:
    entry = await start_api(name="entry", connect_remote=links.connect)
    entry.publish()
    return Mesh(entry, links)


# -- tries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (resets, "connection_lost"),
        (says(b"", close=True), "connection_lost"),
        (says(b"HTTP/1.1 200 OK\r\nContent-", close=True), "connection_lost"),
        (says(b"no http\r\n\r\n"), "connection_lost"),
        (status(429), "status_429"),
        (status(500), "status_500"),
        (status(502), "status_502"),
        (status(503), "status_503"),
        (status(504), "status_504"),
    ],
    ids=["reset", "empty", "part of a head", "garbage", "429", "500", "502", "503", "504"],
)
async def test_another_one_is_tried(mesh: Mesh, script: Script, reason: str) -> None:
    await mesh.add("a", script)
    await mesh.add("b", says(ok(b"fine")))
    mesh.show("a", "b")
    answer = await mesh.ask()
    assert (answer.status, answer.body) == (200, b"fine")
    assert answer.headers["x-meshd-node"] == "b"
    assert answer.headers["x-meshd-attempts"] == "2"
    assert (mesh.asked("a"), mesh.asked("b")) == (1, 1)
    assert mesh.retries() == {reason: 1}
    assert mesh.entry.server.inflight(InstanceId("i-a")) == 0


@pytest.mark.parametrize("known", [True, False])
async def test_a_node_that_cannot_be_reached_is_passed_over(mesh: Mesh, known: bool) -> None:
    if not known:  # else: nobody answers there

        async def refuse(factory: ProtocolFactory) -> asyncio.Protocol:
            raise ConnectionRefusedError(111, "Connection refused")

        mesh.links.add("a", refuse)
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    answer = await mesh.ask()
    assert (answer.status, answer.headers["x-meshd-attempts"]) == (200, "2")
    assert mesh.retries() == {"connect_failed": 1}


@pytest.mark.parametrize("code", [200, 400, 404, 413, 501])
async def test_an_answer_that_is_one_is_relayed(mesh: Mesh, code: int) -> None:
    await mesh.add("a", status(code))
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    assert (await mesh.ask()).status == code
    assert mesh.asked("b") == 0


async def test_a_refusal_costs_no_stream(mesh: Mesh) -> None:
    await mesh.add("a", status(503))
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    for _ in range(3):
        assert (await mesh.ask()).status == 200
    assert mesh.asked("a") == 3
    assert mesh.links.dialled == ["a", "b"]


async def test_a_refusal_that_is_not_all_there_is_cut_off(mesh: Mesh) -> None:
    half = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\n{"
    await mesh.add("a", says(half))
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    assert (await mesh.ask()).status == 200
    async with asyncio.timeout(5):
        await mesh.nodes["a"].connections[0].closed.wait()


async def test_the_last_one_is_relayed_as_it_is(mesh: Mesh) -> None:
    await mesh.add("a", status(500))
    await mesh.add("b", status(503))
    mesh.show("a", "b")
    answer = await mesh.ask()
    assert (answer.status, answer.body) == (503, b"{ 3}")
    assert answer.headers["x-meshd-node"] == "b"
    mesh.show("a")
    assert (await mesh.ask()).status == 500


@pytest.mark.parametrize("script", [status(503), resets])
async def test_no_more_than_two_further_tries(mesh: Mesh, script: Script) -> None:
    for name in "abcd":
        await mesh.add(name, script)
    mesh.show(*"abcd")
    answer = await mesh.ask()
    assert answer.status == (502 if script is resets else 503)
    assert sum(mesh.asked(name) for name in "abcd") == 3
    assert max(mesh.asked(name) for name in "abcd") == 1
    if script is resets:
        assert answer.code == "upstream_failed"
        assert answer.headers["retry-after"] == "1"
    else:
        assert answer.headers["x-meshd-attempts"] == "3"


async def test_the_only_one_is_tried_once_more(mesh: Mesh) -> None:
    await mesh.add("a", resets)
    mesh.show("a")
    answer = await mesh.ask()
    assert (answer.status, answer.code) == (502, "upstream_failed")
    assert "node `a` closed the connection" in answer.json()["error"]["message"]
    assert mesh.asked("a") == 2


async def test_never_after_the_first_byte(mesh: Mesh) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        connection.reset()

    await mesh.add("a", script)
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    client = await mesh.client(STREAM)
    answer = await client.answer()
    assert answer.headers["x-meshd-node"] == "a"
    assert b'"upstream_failed"' in answer.body
    assert mesh.asked("b") == 0


async def test_an_engine_here_is_left_for_one_elsewhere(mesh: Mesh) -> None:
    mesh.entry.engine.script = resets
    await mesh.add("b", says(ok()))
    mesh.entry.ready()
    mesh.show("b")
    answer = await mesh.ask()
    assert (answer.status, answer.headers["x-meshd-route"]) == (200, "remote")
    assert len(mesh.entry.engine.requests) == 1


async def test_and_the_other_way_round(mesh: Mesh) -> None:
    await mesh.add("b", status(502))
    mesh.entry.ready()
    mesh.show("b")
    mesh.entry.drain_by_hand()
    answer = await mesh.ask()
    assert (answer.status, answer.headers["x-meshd-node"]) == (502, "b")
    mesh.entry.drain_by_hand(NodeState.READY)
    assert (await mesh.ask()).headers["x-meshd-route"] == "local"


async def test_all_tries_share_one_deadline(mesh: Mesh) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        mesh.entry.clock.ahead += mesh.entry.config.api.first_byte_timeout_s + 1
        connection.reset()

    await mesh.add("a", script)
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    answer = await mesh.ask()
    assert (answer.status, answer.code) == (504, "upstream_timeout")
    assert mesh.asked("b") == 0


async def test_a_target_that_goes_while_it_is_dialled_is_no_502(mesh: Mesh) -> None:
    dialling, give_up = asyncio.Event(), asyncio.Event()

    async def dial(factory: ProtocolFactory) -> asyncio.Protocol:
        dialling.set()
        await give_up.wait()
        raise PeerRefused("no such instance here", reason="instance")

    mesh.links.add("a", dial)
    mesh.show("a")
    client = await mesh.client()
    await dialling.wait()
    mesh.entry.publish_peers(peer_view("a", "i-a", draining=True))
    give_up.set()
    answer = await client.answer()
    assert (answer.status, answer.code) == (503, "model_loading")


# -- circuits --------------------------------------------------------------------------------------


async def test_a_node_out_of_reach_is_not_dialled_for_every_request(mesh: Mesh) -> None:
    mesh.show("a")
    first = await mesh.ask()
    assert (first.status, first.code) == (502, "upstream_failed")
    assert "nobody answers at a" in first.json()["error"]["message"]
    assert first.headers["retry-after"] == "1"
    for _ in range(3):
        answer = await mesh.ask()
        assert (answer.status, answer.code) == (502, "upstream_failed")
        assert "nobody answers at a" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
    assert mesh.links.dialled == ["a"]
    mesh.entry.clock.ahead += 1.0
    await mesh.ask()
    assert mesh.links.dialled == ["a", "a"]
    assert (await mesh.ask()).headers["retry-after"] == "2"
    await mesh.add("a", says(ok()))
    mesh.entry.clock.ahead += 2.0
    assert [(await mesh.ask()).status for _ in range(3)] == [200] * 3


async def test_half_open_lets_one_request_through(mesh: Mesh) -> None:
    mesh.show("a")
    await mesh.ask()
    await mesh.add("a", hangs)
    mesh.entry.clock.ahead += 1.0
    probe = await mesh.client()
    await eventually(lambda: mesh.asked("a") == 1)
    assert (await mesh.ask()).status == 502
    assert mesh.asked("a") == 1
    probe.close()  # without an outcome: the next one may go
    mesh.nodes["a"].script = says(ok())
    await eventually(lambda: mesh.entry.server.inflight_total() == 0)
    assert (await mesh.ask()).status == 200


async def test_a_probe_that_left_its_node_makes_room_for_the_next(mesh: Mesh) -> None:
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    await mesh.ask()
    await mesh.add("a", hangs)
    mesh.entry.clock.ahead += 1.0
    client = await mesh.client()
    await eventually(lambda: mesh.asked("a") == 1)
    breakers, instance = mesh.entry.server._relay.breakers, InstanceId("i-a")
    assert instance in breakers.shut(mesh.entry.clock.now())
    mesh.show("a", "b", states={"a": PeerState.SUSPECT})
    assert (await client.answer()).headers["x-meshd-node"] == "b"
    assert instance not in breakers.shut(mesh.entry.clock.now())


async def test_three_broken_answers_open_and_others_are_asked_instead(mesh: Mesh) -> None:
    await mesh.add("a", resets)
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    for _ in range(6):
        assert (await mesh.ask()).status == 200
    assert mesh.asked("a") == 3


async def test_no_answer_in_time_counts_as_broken(start_api: Starter, links: Links) -> None:
    entry = await start_api(name="entry", connect_remote=links.connect, first_byte_timeout_s=0.05)
    entry.publish()
    mesh = Mesh(entry, links)
    await mesh.add("a", hangs)
    mesh.show("a")
    assert [(await mesh.ask()).status for _ in range(4)] == [504, 504, 504, 502]


async def test_errors_open_but_what_answers_is_better_than_nothing(mesh: Mesh) -> None:
    await mesh.add("a", status(500))
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    for _ in range(6):
        assert (await mesh.ask()).status == 200
    assert mesh.asked("a") == 3
    mesh.show("a")
    assert [(await mesh.ask()).status for _ in range(3)] == [500] * 3


@pytest.mark.parametrize("code", [503, 429])
async def test_full_loading_and_draining_are_no_faults(mesh: Mesh, code: int) -> None:
    await mesh.add("a", status(code))
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    for _ in range(6):
        assert (await mesh.ask()).status == 200
    assert mesh.asked("a") == 6


async def test_circuits_tell_membership_nothing(mesh: Mesh) -> None:
    mesh.show("a")
    before = mesh.entry.board.current
    for _ in range(5):
        await mesh.ask()
    assert mesh.entry.board.current is before


# -- nodes that go ---------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [False, True])
async def test_a_request_that_waits_at_a_dead_node_goes_elsewhere(
    mesh: Mesh, removed: bool
) -> None:
    await mesh.add("a", hangs)
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    client = await mesh.client()
    await eventually(lambda: mesh.asked("a") == 1)
    mesh.show(*(("b",) if removed else ("a", "b")), states={"a": PeerState.DEAD})
    answer = await client.answer()
    assert (answer.status, answer.headers["x-meshd-node"]) == (200, "b")
    assert mesh.retries() == {"node_lost": 1}
    await mesh.nodes["a"].connections[0].closed.wait()


async def test_a_dead_node_without_another_is_no_waiting_for_ever(mesh: Mesh) -> None:
    await mesh.add("a", hangs)
    mesh.show("a")
    client = await mesh.client()
    await eventually(lambda: mesh.asked("a") == 1)
    mesh.show("a", states={"a": PeerState.DEAD})
    answer = await client.answer()
    assert (answer.status, answer.code) == (502, "upstream_failed")
    assert "node `a` is dead" in answer.json()["error"]["message"]


async def test_an_answer_from_a_dead_node_ends_at_once(mesh: Mesh) -> None:
    await mesh.add("a", begins_and_hangs)
    mesh.show("a")
    client = await mesh.client(STREAM)
    await client.until(b"\n\n\r\n")
    mesh.show("a", states={"a": PeerState.DEAD})
    end = await client.until(b"\r\n0\r\n\r\n")
    assert b'"upstream_failed"' in end
    assert b"is dead" in end


async def test_a_suspect_is_left_if_there_is_another(mesh: Mesh) -> None:
    await mesh.add("a", hangs)
    mesh.show("a")
    client = await mesh.client()
    await eventually(lambda: mesh.asked("a") == 1)
    mesh.show("a", states={"a": PeerState.SUSPECT})  # nobody else: wait
    await mesh.add("b", says(ok()))
    assert mesh.entry.server.inflight(InstanceId("i-a")) == 1
    mesh.show("a", "b")  # alive again
    assert mesh.entry.server.inflight(InstanceId("i-a")) == 1
    mesh.show("a", "b", states={"a": PeerState.SUSPECT})
    assert (await client.answer()).headers["x-meshd-node"] == "b"


async def test_an_answer_from_a_suspect_goes_on(mesh: Mesh) -> None:
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await go.wait()
        await connection.say(sse("2") + b"0\r\n\r\n")

    await mesh.add("a", script)
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    client = await mesh.client(STREAM)
    await client.until(b"\n\n\r\n")
    for state in (PeerState.SUSPECT, PeerState.ALIVE, PeerState.LEFT):
        mesh.show("a", "b", states={"a": state})
    go.set()
    assert await client.until(b"0\r\n\r\n") == sse("2") + b"0\r\n\r\n"


@pytest.mark.parametrize("gone", [False, True])
async def test_a_node_that_drains_or_unloads_finishes_what_it_has(mesh: Mesh, gone: bool) -> None:
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await go.wait()
        await connection.say(ok(b"late"))

    await mesh.add("a", script)
    await mesh.add("b", says(ok()))
    mesh.show("a", "b")
    client = await mesh.client()
    await eventually(lambda: mesh.asked("a") == 1)
    if gone:
        mesh.entry.publish_peers(peer_view("a"), peer_view("b", "i-b"))
    else:
        mesh.show("a", "b", draining=frozenset("a"))
    assert (await mesh.ask()).headers["x-meshd-node"] == "b"
    go.set()
    answer = await client.answer()
    assert (answer.body, answer.headers["x-meshd-node"]) == (b"late", "a")


@pytest.mark.parametrize("pooled", [False, True])
async def test_a_stream_that_opens_too_late_is_nobodys(mesh: Mesh, pooled: bool) -> None:
    dialling, go = asyncio.Event(), asyncio.Event()
    engine = await mesh.add("a", says(ok(b"from a")))

    async def slow_dial(factory: ProtocolFactory) -> asyncio.Protocol:
        dialling.set()
        await go.wait()
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_unix_connection(factory, str(engine.path))
        return protocol

    mesh.links.add("a", slow_dial)
    await mesh.add("b", says(ok()))
    if pooled:
        mesh.show("b")
        await mesh.ask()
    mesh.nodes["b"].script = hangs
    before = mesh.asked("b")
    mesh.show("a", "b")
    client = await mesh.client()
    await dialling.wait()
    mesh.show("a", "b", states={"a": PeerState.SUSPECT})
    await eventually(lambda: mesh.asked("b") == before + 1)
    mesh.show("a", "b")
    go.set()
    await eventually(lambda: len(engine.connections) == 1)
    relay = mesh.entry.server._relay
    await eventually(lambda: len(relay._pools[InstanceId("i-a")]._idle) == 1)
    assert mesh.asked("a") == 0
    mesh.nodes["b"].script = resets
    mesh.nodes["b"].connections[0].reset()
    assert (await client.answer()).status == 502  # it has been at both
    dialled = list(mesh.links.dialled)
    assert (await mesh.ask()).body == b"from a"  # over the stream that was set aside
    assert mesh.links.dialled == dialled
