"""The one port between nodes: TLS first, then by ALPN to whoever speaks that protocol.

Who may speak what is decided in one place, `tls.may_speak`: without a certificate of the mesh
nothing but joining is reached. A connection that has not said what it wants within `FIRST_WORDS_S`
is closed; at most `MAX_STRANGERS` may be in that state.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from meshd.errors import AddressInUse, BadConfig, MeshdError, PeerRefused, PeerUnreachable
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.frames import JOIN_LIMIT
from meshd.peers.links.hello import refusal
from meshd.peers.protocol import ALPN_CTL, ALPN_JOIN
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.tls import may_speak

log = logging.getLogger(__name__)

FIRST_WORDS_S: Final = 10.0
MAX_STRANGERS: Final = 128
"""Full-policy: one more is closed at once. Members retry; a flood of strangers is shut out."""
BACKLOG: Final = 256

Stranger = Callable[[FrameChannel], Awaitable[None]]
Member = Callable[[FrameChannel, PeerCertificate], Awaitable[None]]
"""Serve one connection up to its end or its hand-over. They may raise MeshdError."""


@dataclass(frozen=True, slots=True)
class Speakers:
    """Who serves what. `authenticate` says whose certificate one is, or raises PeerRefused."""

    authenticate: Callable[[bytes], PeerCertificate]
    join: Stranger
    control: Member
    raw: Member


class PeerListener:
    """Sockets are opened by `bind`, before there is a mesh; `start` serves with its certificate."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._strangers: set[asyncio.Task[None]] = set()
        self._speakers: Speakers | None = None

    def bind(self) -> int:
        """Open the port and say which it is. Raises AddressInUse, BadConfig."""
        for family, address in _resolve(self._host, self._port):
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                listener.setblocking(False)
                listener.bind(address)
            except OSError as error:
                listener.close()
                self.close()
                raise _cannot_bind(self._host, self._port, error) from None
            self._sockets.append(listener)
        return int(self._sockets[0].getsockname()[1])

    async def start(
        self,
        context: ssl.SSLContext,
        speakers: Speakers,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._speakers = speakers
        loop = asyncio.get_running_loop()

        def arrive() -> FrameChannel:
            return _Arrival(lambda channel: self._arrived(channel, spawn))

        for listener in self._sockets:
            # A duplicate: closing the server of a mesh that was left keeps the port.
            server = await loop.create_server(
                arrive,
                sock=listener.dup(),
                backlog=BACKLOG,
                ssl=context,
                ssl_handshake_timeout=FIRST_WORDS_S,
                ssl_shutdown_timeout=1.0,
            )
            self._servers.append(server)

    def stop(self) -> None:
        """Serve no more; the port stays open for another `start`."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for task in tuple(self._strangers):
            task.cancel()

    def close(self) -> None:
        self.stop()
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()

    # -- one connection ---------------------------------------------------------------------------

    def _arrived(
        self,
        channel: FrameChannel,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        if len(self._strangers) >= MAX_STRANGERS:
            channel.abort()
            return
        task = spawn(self._serve(channel))
        self._strangers.add(task)
        task.add_done_callback(self._strangers.discard)

    async def _speak(self, channel: FrameChannel) -> None:
        speakers, certificate = self._speakers, None
        assert speakers is not None, "connections come after `start`"
        if channel.certificate is not None and channel.alpn != ALPN_JOIN:
            try:
                certificate = speakers.authenticate(channel.certificate)
            except PeerRefused as error:
                channel.send(refusal(error))
                raise
        if not may_speak(channel.alpn, certificate):
            raise PeerRefused(f"no certificate of this mesh for {channel.alpn}", reason="stranger")
        if certificate is None:
            await speakers.join(channel)
        elif channel.alpn == ALPN_CTL:
            await speakers.control(channel, certificate)
        else:
            await speakers.raw(channel, certificate)

    async def _serve(self, channel: FrameChannel) -> None:
        origin = channel.origin
        try:
            async with asyncio.timeout(FIRST_WORDS_S):
                await self._speak(channel)
        except TimeoutError:
            log.debug("%s said nothing in time", origin)
            channel.abort()
        except PeerUnreachable as error:
            log.debug("%s: %s", origin, error.message)
        except MeshdError as error:
            # DEBUG: at a higher level any stranger could flood the log.
            log.debug("%s refused: %s", origin, error.message)
            channel.close()
        except asyncio.CancelledError:
            channel.abort()
            raise


class _Arrival(FrameChannel):
    """A channel that says when TLS is through."""

    def __init__(self, arrived: Callable[[FrameChannel], None]) -> None:
        super().__init__(JOIN_LIMIT)
        self._arrived_here = arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._arrived_here(self)


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    if host in ("", "*"):
        host = "::"
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as error:
        raise BadConfig(
            f"`peer_listen` {host}:{port}: {error.strerror or error}; give an address of this "
            "machine, or 0.0.0.0 for all",
            param="peer_listen",
        ) from None
    return [(family, address) for family, _, _, _, address in found[:4]]


def _cannot_bind(host: str, port: int, error: OSError) -> MeshdError:
    if error.errno == errno.EADDRINUSE:
        return AddressInUse(
            f"the peer port {host}:{port} is taken, perhaps by another meshd; give this node "
            "another one with --peer-listen HOST:PORT"
        )
    return BadConfig(
        f"`peer_listen` {host}:{port} cannot be opened: {error.strerror}", param="peer_listen"
    )
