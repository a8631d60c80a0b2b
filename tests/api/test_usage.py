"""What is told of requests, and a model that is served because it was asked for."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from meshd.api.pool import ProtocolFactory
from meshd.ids import ModelId
from meshd.view import ModelState, ModelView
from tests.api.conftest import Starter
from tests.api.links import Links
from tests.api.scripted import (
    CHAT,
    SSE_HEAD,
    Api,
    EngineConnection,
    eventually,
    model_view,
    ok,
    peer_view,
    request,
    sse,
)

ABSENT = model_view(state=ModelState.ABSENT, reason="asleep")
WAITING = model_view(state=ModelState.WAITING, reason="nobody has the memory")


@dataclass
class Told:
    """A `Usage` that keeps what it hears. `becomes`: what a missing model is published as, with the
    next view only if `late`."""

    heard: list[tuple[str, str]] = field(default_factory=list)
    service_s: list[float] = field(default_factory=list)
    becomes: ModelState | None = None
    late: bool = False
    api: Api | None = None

    def asked(self, model: ModelId) -> None:
        self.heard.append(("asked", model))

    def answered(self, model: ModelId, service_s: float) -> None:
        self.heard.append(("answered", model))
        self.service_s.append(service_s)

    def began(self, model: ModelId) -> None:
        self.heard.append(("began", model))

    def ended(self, model: ModelId) -> None:
        self.heard.append(("ended", model))

    def missing(self, name: str) -> bool:
        self.heard.append(("missing", name))
        if self.becomes is None:
            return False
        assert self.api is not None
        if not self.late:
            self.api.publish(model_view(name=name, state=self.becomes, reason="on its way"))
        return True

    @property
    def counts(self) -> Counter[str]:
        return Counter(what for what, _ in self.heard)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def api(start_api: Starter, told: Told) -> Api:
    told.api = await start_api(usage=told)
    return told.api


async def test_a_request_from_asking_to_the_end(api: Api, told: Told) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        api.clock.ahead += 7.0
        await connection.say(ok())

    api.engine.script = script
    for _ in range(2):  # the second one over a connection that was kept
        assert (await api.ask(request(CHAT))).status == 200
    one = [(what, "m") for what in ("asked", "began", "answered", "ended")]
    assert told.heard == one * 2
    assert told.service_s == pytest.approx([7.0, 7.0], abs=1.0)


async def test_time_in_the_queue_is_no_service(api: Api, told: Told) -> None:
    go = asyncio.Event()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await go.wait()
        await connection.say(ok())

    api.engine.script = script
    api.ready(slots=1)
    clients = [await api.connect() for _ in range(2)]
    for client in clients:
        await client.send(request(CHAT))
    await eventually(lambda: api.server.inflight_total() == 2)
    await eventually(lambda: len(api.engine.requests) == 1)
    assert told.counts == {"asked": 2, "began": 1}
    api.clock.ahead += 50.0
    go.set()
    for client in clients:
        assert (await client.answer()).status == 200
    assert sorted(told.service_s) == pytest.approx([0.0, 50.0], abs=1.0)


async def test_each_began_has_one_ended_whatever_goes_wrong(api: Api, told: Told) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        connection.reset()

    api.engine.script = script
    assert (await api.ask(request(CHAT))).code == "upstream_failed"
    assert told.counts == {"asked": 1, "began": 2, "ended": 2}


async def test_a_client_that_leaves_kept_the_engine_busy_until_then(api: Api, told: Told) -> None:
    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(SSE_HEAD + sse("1"))
        await connection.reader.read()

    api.engine.script = script
    client = await api.connect()
    await client.send(request(CHAT))
    await client.until(b"\n\n\r\n")
    api.clock.ahead += 3.0
    client.close()
    await eventually(lambda: api.server.inflight_total() == 0)
    assert told.counts == {"asked": 1, "began": 1, "answered": 1, "ended": 1}
    assert told.service_s == pytest.approx([3.0], abs=1.0)


async def test_a_request_relayed_is_asked_here_and_worked_on_there(
    start_api: Starter, links: Links
) -> None:
    here, there = Told(), Told()
    host = await start_api(name="host", usage=there)
    entry = await start_api(name="entry", connect_remote=links.connect, usage=here)
    links.add_node(host)
    entry.publish()
    entry.publish_peers(peer_view("host", "i1"))
    assert (await entry.ask(request(CHAT))).status == 200
    await eventually(lambda: there.counts["ended"] == 1)
    assert here.heard == [("asked", "m"), ("answered", "m")]
    assert there.heard == [("began", "m"), ("ended", "m")]


async def test_what_the_host_says_it_queued_is_no_service(
    start_api: Starter, links: Links, told: Told
) -> None:
    host = await links.add_scripted("host")
    entry = await start_api(name="entry", connect_remote=links.connect, usage=told)

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        entry.clock.ahead += 9.0
        await connection.say(ok(extra=b"X-Meshd-Queue-Ms: 5000\r\n"))

    host.script = script
    entry.publish()
    entry.publish_peers(peer_view("host", "i1"))
    assert (await entry.ask(request(CHAT))).status == 200
    assert told.service_s == pytest.approx([4.0], abs=1.0)


async def test_a_client_that_leaves_before_the_next_engine_was_asked_is_not_answered(
    start_api: Starter, links: Links, told: Told
) -> None:
    entry = await start_api(name="entry", connect_remote=links.connect, usage=told)
    dialled = asyncio.Event()

    async def never(factory: ProtocolFactory) -> asyncio.Protocol:
        dialled.set()
        return await asyncio.Future()

    async def script(connection: EngineConnection, head: bytes, body: bytes) -> None:
        connection.reset()

    entry.engine.script = script
    links.add("b", never)
    entry.publish_peers(peer_view("b", "i-b", free=0))
    client = await entry.connect()
    await client.send(request(CHAT))
    await dialled.wait()
    client.close()
    await eventually(lambda: entry.server.inflight_total() == 0)
    assert told.counts == {"asked": 1, "began": 1, "ended": 1}


async def test_an_exact_name_counts_as_the_plain_one(api: Api, told: Told) -> None:
    ours = replace(model_view(api.target()), digest="sha256:" + "1" * 64)
    api.publish(ours)
    other = peer_view("b", "i-b")
    theirs = replace(other.models[0], digest="sha256:" + "2" * 64)
    api.publish_peers(replace(other, models=(theirs,)))
    assert (await api.ask(request({**CHAT, "model": "m@111111111111"}))).status == 200
    assert told.heard == [(what, "m") for what in ("asked", "began", "answered", "ended")]


# -- missing --------------------------------------------------------------------------------------


async def test_a_missing_model_that_stays_missing_is_404(api: Api, told: Told) -> None:
    answer = await api.ask(request({**CHAT, "model": "nobodys"}))
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert told.heard == [("missing", "nobodys")]


async def test_a_missing_model_may_be_on_its_way_by_then(api: Api, told: Told) -> None:
    told.becomes = ModelState.WAITING
    answer = await api.ask(request({**CHAT, "model": "new"}))
    assert (answer.status, answer.code) == (503, "model_loading")
    assert answer.headers["retry-after"]
    assert told.heard == [("missing", "new"), ("asked", "new")]
    assert (await api.ask(request({**CHAT, "model": "new"}))).code == "model_loading"
    assert told.counts == {"missing": 1, "asked": 2}


async def test_a_model_asleep_wakes_for_a_request_that_waits(api: Api, told: Told) -> None:
    api.publish(ABSENT)
    told.becomes = ModelState.LOADING
    client = await api.connect()
    await client.send(request(CHAT, "/v1/chat/completions", "X-Meshd-Wait-S: 30"))
    await eventually(lambda: told.counts["asked"] == 1)
    assert api.server.inflight_total() == 1
    api.ready()
    assert (await client.answer()).status == 200
    assert told.heard == [
        ("missing", "m"),
        *((what, "m") for what in ("asked", "began", "answered", "ended")),
    ]


async def test_a_request_that_begins_while_a_view_is_delivered_waits_for_the_next(
    api: Api, told: Told
) -> None:
    api.publish()
    told.becomes, told.late = ModelState.LOADING, True
    answer = await api.ask(request(CHAT))
    assert (answer.status, answer.code) == (503, "model_loading")
    client = await api.connect()
    await client.send(request(CHAT, "/v1/chat/completions", "X-Meshd-Wait-S: 30"))
    await eventually(lambda: told.counts["missing"] == 2)
    api.publish(model_view(state=ModelState.LOADING))
    api.ready()
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("model", [WAITING, model_view(state=ModelState.FAILED)])
async def test_a_model_that_is_wanted_already_is_not_missing(
    api: Api, told: Told, model: ModelView
) -> None:
    api.publish(model)
    assert (await api.ask(request(CHAT))).status == 503
    assert told.heard == [("asked", "m")]


async def test_other_nodes_requests_make_nothing_served(
    start_api: Starter, links: Links, told: Told
) -> None:
    told.becomes = ModelState.LOADING
    host = told.api = await start_api(name="host", usage=told)
    entry = await start_api(name="entry", connect_remote=links.connect)
    links.add_node(host)
    host.publish()
    entry.publish()
    entry.publish_peers(peer_view("host", "i1"))
    answer = await entry.ask(request(CHAT))
    assert (answer.status, answer.code) == (503, "model_loading")
    assert told.heard == []


async def test_a_node_that_shuts_down_tells_nothing(api: Api, told: Told) -> None:
    api.server.refuse_new()
    assert (await api.ask(request({**CHAT, "model": "new"}))).code == "node_draining"
    assert told.heard == []
