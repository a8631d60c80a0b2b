"""Streams between the nodes of a test: over socket pairs, or over TLS as between real nodes."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.api.pool import ProtocolFactory
from meshd.errors import PeerUnreachable
from meshd.peers.links.channel import FrameChannel
from meshd.view import Target
from tests.api.scripted import Api, Engine

Dial: TypeAlias = Callable[[ProtocolFactory], Awaitable[asyncio.Protocol]]

MAX_FRAME_BYTES = 4096


class Links:
    """`connect` is an API's `connect_remote`. Nodes are known by name."""

    def __init__(self, directory: Path) -> None:
        self.dialled: list[str] = []
        """Name of the node of every attempt to connect."""
        self._directory = directory
        self._dials: dict[str, Dial] = {}
        self._listeners: list[asyncio.Server] = []
        self._welcomes: set[asyncio.Task[None]] = set()
        self._engines: list[Engine] = []

    async def connect(self, target: Target, factory: ProtocolFactory) -> asyncio.Protocol:
        self.dialled.append(target.node)
        dial = self._dials.get(target.node)
        if dial is None:
            raise PeerUnreachable(f"nobody answers at {target.node}")
        return await dial(factory)

    def add(self, name: str, dial: Dial) -> None:
        self._dials[name] = dial

    def cut(self, name: str) -> None:
        """No further connection to `name`."""
        del self._dials[name]

    def add_node(self, api: Api, *, caller: str = "entry") -> None:
        """`api`'s relay, for a node called `caller`."""

        async def dial(factory: ProtocolFactory) -> asyncio.Protocol:
            loop = asyncio.get_running_loop()
            relay = api.server.peer_protocol(caller)
            near, far = socket.socketpair()
            await loop.connect_accepted_socket(lambda: relay, far)
            _, protocol = await loop.create_connection(factory, sock=near)
            return protocol

        self._dials[api.config.name] = dial

    async def add_scripted(self, name: str) -> Engine:
        """A node whose relay says exactly what it is told to."""
        engine = Engine(self._directory / f"{name}.sock")
        await engine.start()
        self._engines.append(engine)

        async def dial(factory: ProtocolFactory) -> asyncio.Protocol:
            loop = asyncio.get_running_loop()
            _, protocol = await loop.create_unix_connection(factory, str(engine.path))
            return protocol

        self._dials[name] = dial
        return engine

    async def add_tls_node(self, api: Api, *, caller: str = "entry") -> None:
        """As `add_node`, over TLS 1.3: a frame each way, and then the stream changes hands."""
        server_side, client_side = _contexts(self._directory)
        loop = asyncio.get_running_loop()

        async def welcome(channel: FrameChannel) -> None:
            async with asyncio.timeout(5):
                await channel.read()
            channel.send({"status": "ok"})
            channel.detach(api.server.peer_protocol(caller))

        class Accepting(FrameChannel):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                task = asyncio.create_task(welcome(self))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        tasks = self._welcomes
        listener = await loop.create_server(
            lambda: Accepting(MAX_FRAME_BYTES), "127.0.0.1", 0, ssl=server_side
        )
        self._listeners.append(listener)
        port = listener.sockets[0].getsockname()[1]

        async def dial(factory: ProtocolFactory) -> asyncio.Protocol:
            _, channel = await loop.create_connection(
                lambda: FrameChannel(MAX_FRAME_BYTES), "127.0.0.1", port, ssl=client_side
            )
            channel.send({"service": "api"})
            await channel.read()
            protocol = factory()
            channel.detach(protocol)
            return protocol

        self._dials[api.config.name] = dial

    async def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for engine in self._engines:
            await engine.stop()
        if self._welcomes:
            await asyncio.wait(self._welcomes)


def _contexts(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, None)
    )
    path = directory / "node.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    return server, client
