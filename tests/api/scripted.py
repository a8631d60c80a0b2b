"""An API server on a free port, in front of an engine that says exactly what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from meshd.api import ApiServer
from meshd.api.pool import ConnectRemote
from meshd.api.usage import Usage
from meshd.config import Config
from meshd.ids import InstanceId, ModelId, NodeId
from meshd.kernel import Board, MonotonicClock
from meshd.view import (
    HostView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerModel,
    PeerState,
    PeerView,
    Target,
    View,
    with_local,
    with_peers,
)

DEADLINE_S = 10.0

Script = Callable[["EngineConnection", bytes, bytes], Awaitable[None]]


def ok(body: bytes = b"{}", extra: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b"
        % (len(body), extra, body)
    )


SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def sse(text: str) -> bytes:
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


async def eventually(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Until `condition` holds; fails after `deadline_s`."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  (polled from outside)
            await asyncio.sleep(0.005)


@dataclass
class EngineConnection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    def reset(self) -> None:
        self.writer.transport.abort()


class Engine:
    """A scripted upstream on a unix socket. `script(connection, head, body)` answers a request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections: list[EngineConnection] = []
        self.script: Script = self._default
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=1 << 26)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for connection in self.connections:
            connection.writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await connection.writer.wait_closed()

    @staticmethod
    async def _default(connection: EngineConnection, head: bytes, body: bytes) -> None:
        await connection.say(ok(b'{"served":true}'))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = EngineConnection(reader, writer)
        self.connections.append(connection)
        try:
            while not writer.transport.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                connection.requests += 1
                self.requests.append((head, body))
                await self.script(connection, head, body)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            connection.closed.set()
            writer.transport.abort()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])


class RawClient:
    """A client's connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.readuntil(end)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()

    async def answer(self, *, to_head: bool = False) -> Answer:
        async with asyncio.timeout(DEADLINE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
            lines = raw.decode("latin-1").split("\r\n")
            status = int(lines[0].split()[1])
            headers = {}
            for line in lines[1:-2]:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = b""
            if to_head or status == 204:
                pass
            elif headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            return Answer(status, headers, body, raw)

    def close(self) -> None:
        self.writer.transport.abort()


def request(
    body: bytes | dict[str, Any],
    path: str = "/v1/chat/completions",
    *headers: str,
    method: str = "POST",
    host: str = "localhost",
    version: str = "1.1",
) -> bytes:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}", *headers]
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
GET_LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def model_view(
    *targets: Target,
    name: str = "m",
    state: ModelState = ModelState.READY,
    reason: str | None = None,
    progress: float | None = None,
    retry_after_s: float | None = None,
) -> ModelView:
    hosts = tuple(
        HostView(t.node, NodeId(t.node[-1] * 52), 1, ModelState.READY, 4096, t.slots, t.slots, 1000)
        for t in targets
    )
    return ModelView(
        id=ModelId(name),
        ref=name,
        state=state,
        reason=reason,
        progress=progress,
        retry_after_s=retry_after_s,
        hosts=hosts,
        targets=targets,
    )


def peer_view(
    name: str,
    *instances: str,
    state: PeerState = PeerState.ALIVE,
    draining: bool = False,
    slots: int = 4,
    free: int = 4,
    model: str = "m",
) -> PeerView:
    """The node `name` as others see it, with a ready engine of `model` per instance."""
    models = tuple(
        PeerModel(
            ModelId(model),
            model,
            ModelState.READY,
            context_length=4096,
            bytes_on_disk=1000,
            instance=InstanceId(instance),
            epoch=1,
            slots=slots,
            slots_free=free,
        )
        for instance in instances
    )
    return PeerView(NodeId(name[-1] * 52), name, state, draining=draining, models=models)


class ShiftedClock(MonotonicClock):
    """The real clock, and `ahead` seconds more."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


class Api:
    """The server under test, its board and its engine."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        connect_remote: ConnectRemote | None = None,
        usage: Usage | None = None,
        plan: Callable[[str], dict[str, Any]] | None = None,
    ) -> None:
        node_id = NodeId(config.name[-1] * 52)
        node = NodeView(
            node_id, config.name, "0", "member", NodeState.READY, 0.0, "127.0.0.1:0", None
        )
        self.config = config
        self.engine = engine
        self.clock = ShiftedClock()
        self.board = Board(View(node=node))
        self.server = ApiServer(
            config,
            self.board,
            clock=self.clock,
            rng=random.Random(1),
            connect_remote=connect_remote,
            usage=usage,
            plan=plan,
            sweep_interval_s=0.02,
        )
        self.port = 0
        self._clients: list[RawClient] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        _, self.port = self.server.bind()
        self._task = asyncio.create_task(self.server.run())
        await self.server.ready.wait()

    async def stop(self, *, hurry: bool = True) -> None:
        for client in self._clients:
            client.close()
        self.server.stopping.set()
        if hurry:
            self.server.hurry()
        await self.finished()

    async def finished(self) -> None:
        if self._task is not None:
            async with asyncio.timeout(DEADLINE_S):
                await self._task
            self._task = None

    def target(self, instance: str = "i1", *, slots: int = 4, path: Path | None = None) -> Target:
        where = str(path or self.engine.path)
        return Target(ModelId("m"), self.config.name, InstanceId(instance), where, slots)

    def publish(self, *models: ModelView) -> None:
        table = MappingProxyType({m.id: m for m in models})
        self.board.publish(with_local(self.board.current, table))

    def publish_peers(self, *peers: PeerView) -> None:
        self.board.publish(with_peers(self.board.current, peers))

    def drain_by_hand(self, state: NodeState = NodeState.DRAINING) -> None:
        view = self.board.current
        self.board.publish(replace(view, node=replace(view.node, state=state)))

    def ready(self, slots: int = 4) -> None:
        self.publish(model_view(self.target(slots=slots)))

    async def connect(self) -> RawClient:
        client = RawClient(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 26))
        self._clients.append(client)
        return client

    async def ask(self, data: bytes) -> Answer:
        client = await self.connect()
        await client.send(data)
        return await client.answer()
