"""The one port between nodes: by ALPN to whoever speaks that protocol.

A connection that asks for bulk is given away as it is, before TLS (`bulk/handover.py`): its bytes
are another process's. For every other one TLS comes first. Who may speak what is decided in one
place, `tls.may_speak`: without a certificate of the mesh nothing but joining is reached. A
connection that has not said what it wants within `FIRST_WORDS_S` is closed; at most `MAX_STRANGERS`
may be in that state, from the moment they are accepted.
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
from meshd.peers.links.client_hello import MAX_PREFIX, NeedMore, alpn_of
from meshd.peers.links.frames import JOIN_LIMIT
from meshd.peers.links.hello import refusal
from meshd.peers.protocol import ALPN_BULK, ALPN_CTL, ALPN_JOIN
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.tls import may_speak

log = logging.getLogger(__name__)

FIRST_WORDS_S: Final = 10.0
MAX_ARRIVING: Final = 512
"""Full-policy: the one that has been silent for longest is closed, so that many of them hold up
nobody who means it: a handshake takes milliseconds."""
MAX_STRANGERS: Final = 128
"""Full-policy: one more is closed at once. Members retry; a flood of strangers is shut out."""
BACKLOG: Final = 256
ACCEPT_AT_ONCE: Final = 64
"""Connections taken before the loop does something else."""
BREATHER_S: Final = 0.5
"""Pause in accepting when the process or the machine is out of descriptors or memory."""
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Stranger = Callable[[FrameChannel], Awaitable[None]]
Member = Callable[[FrameChannel, PeerCertificate], Awaitable[None]]
"""Serve one connection up to its end or its hand-over. They may raise MeshdError."""
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(frozen=True, slots=True)
class Speakers:
    """Who serves what. `authenticate` says whose certificate one is, or raises PeerRefused."""

    authenticate: Callable[[bytes], PeerCertificate]
    join: Stranger
    control: Member
    raw: Member
    bulk: Callable[[socket.socket], None] | None = None
    """Takes a connection over, and closes it: not a byte of it has been read. None: nobody does."""


class PeerListener:
    """Sockets are opened by `bind`, before there is a mesh; `start` serves with its certificate."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._sockets: list[socket.socket] = []
        self._accepting: set[socket.socket] = set()
        self._rests: set[asyncio.TimerHandle] = set()
        self._arriving: dict[asyncio.Task[None], None] = {}
        """Oldest first."""
        self._strangers: set[asyncio.Task[None]] = set()
        self._context: ssl.SSLContext | None = None
        self._speakers: Speakers | None = None
        self._spawn: Spawn | None = None

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

    async def start(self, context: ssl.SSLContext, speakers: Speakers, spawn: Spawn) -> None:
        self._context, self._speakers, self._spawn = context, speakers, spawn
        for listener in self._sockets:
            listener.listen(BACKLOG)
            self._accept_from(listener)

    def stop(self) -> None:
        """Serve no more; the port stays open for another `start`."""
        loop = asyncio.get_running_loop() if self._accepting else None
        for listener in self._accepting:
            assert loop is not None
            loop.remove_reader(listener.fileno())
        self._accepting.clear()
        for timer in self._rests:
            timer.cancel()
        self._rests.clear()
        for task in (*self._arriving, *self._strangers):
            task.cancel()

    def close(self) -> None:
        self.stop()
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()

    # -- accepting --------------------------------------------------------------------------------

    def _accept_from(self, listener: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)
        self._accepting.add(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._rest(listener, error)
                    return
                continue  # it was gone before it was taken
            connection.setblocking(False)
            self._arrived(connection)

    def _rest(self, listener: socket.socket, error: OSError) -> None:
        """The connection stays in the queue, so that its reader would be called without end."""
        log.warning("the peer port takes nobody for %.1f s: %s", BREATHER_S, error.strerror)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.fileno())
        self._accepting.discard(listener)

        def again() -> None:
            self._rests.discard(timer)
            self._accept_from(listener)

        timer = loop.call_later(BREATHER_S, again)
        self._rests.add(timer)

    def _arrived(self, connection: socket.socket) -> None:
        assert self._spawn is not None, "connections come after `start`"
        if len(self._arriving) >= MAX_ARRIVING:
            oldest = next(iter(self._arriving))
            del self._arriving[oldest]
            oldest.cancel()
        arrival = _Arrival(connection)
        task = self._spawn(self._serve(arrival))
        self._arriving[task] = None

        def served(task: asyncio.Task[None]) -> None:
            self._arriving.pop(task, None)
            self._strangers.discard(task)
            arrival.close()

        task.add_done_callback(served)

    # -- one connection ---------------------------------------------------------------------------

    async def _serve(self, arrival: _Arrival) -> None:
        channel = FrameChannel(JOIN_LIMIT)
        try:
            async with asyncio.timeout(FIRST_WORDS_S):
                if not await self._given_away(arrival):
                    await self._secure(arrival, channel)
                    self._heard_of(channel)
                    await self._speak(channel)
        except TimeoutError:
            log.debug("%s said nothing in time", channel.origin)
            channel.abort()
        except PeerUnreachable as error:
            log.debug("%s: %s", channel.origin, error.message)
        except MeshdError as error:
            # DEBUG: at a higher level any stranger could flood the log.
            log.debug("%s refused: %s", channel.origin, error.message)
            channel.close()
        except asyncio.CancelledError:
            channel.abort()
            raise

    async def _given_away(self, arrival: _Arrival) -> bool:
        """Whether the connection asked for bulk and is somebody else's now."""
        speakers = self._speakers
        assert speakers is not None, "connections come after `start`"
        if speakers.bulk is None or await arrival.offered() != (ALPN_BULK,):
            return False
        speakers.bulk(arrival.take())
        return True

    async def _secure(self, arrival: _Arrival, channel: FrameChannel) -> None:
        """TLS, up to the end of its handshake. Raises PeerUnreachable."""
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: channel,
                arrival.take(),
                ssl=self._context,
                ssl_handshake_timeout=FIRST_WORDS_S,
                ssl_shutdown_timeout=1.0,
            )
        except OSError as error:
            raise PeerUnreachable(f"no TLS: {error}") from None

    def _heard_of(self, channel: FrameChannel) -> None:
        """It has come through TLS. Raises PeerUnreachable if there are too many that have."""
        task = asyncio.current_task()
        assert task is not None
        self._arriving.pop(task, None)
        if len(self._strangers) >= MAX_STRANGERS:
            channel.abort()
            raise PeerUnreachable("too many that have not said what they want")
        self._strangers.add(task)

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


class _Arrival:
    """A connection from which nothing has been read; closed at the end unless it was taken."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection: socket.socket | None = connection

    def take(self) -> socket.socket:
        connection, self._connection = self._connection, None
        assert connection is not None, "a connection is taken once"
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def offered(self) -> tuple[str, ...]:
        """The protocols the client offers by ALPN, its bytes left where they are; empty also if
        it speaks no TLS. The caller bounds the time."""
        connection = self._connection
        assert connection is not None
        total = 1
        try:
            while True:
                await _readable(connection)
                prefix = connection.recv(MAX_PREFIX, socket.MSG_PEEK)
                found = alpn_of(prefix)
                if not isinstance(found, NeedMore) or len(prefix) < total:
                    return found if isinstance(found, tuple) else ()
                # What is there already would wake the loop again and again.
                total = found.total
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, total)
        except OSError:
            return ()  # for whoever reads next to find
        finally:
            if total > 1:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def is_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection.fileno(), is_readable)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


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
