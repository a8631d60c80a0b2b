"""Kept-alive connections to one engine, here or on another node.

llama-server closes a connection that was idle for 5 s, and one that served 100 requests; ours are
given up before that, so that a request seldom meets one that is just being closed. A stream to
another node costs a handshake, and its far end is an API like ours (`connection.PEER_IDLE_S`): a
few are kept for a minute, and what a burst opened beyond those for seconds, because a node lets in
only so many streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from meshd.api.upstream import DechunkingUpstream, Receiver, Upstream
from meshd.errors import MeshdError, PeerUnreachable
from meshd.kernel import Clock
from meshd.view import Target

CONNECT_TIMEOUT_S: Final = 5.0

ProtocolFactory: TypeAlias = Callable[[], asyncio.Protocol]
ConnectRemote: TypeAlias = Callable[[Target, ProtocolFactory], Awaitable[asyncio.Protocol]]
"""Opens an authenticated stream to the node of a remote target, for that instance; hands the
transport to the protocol that the factory makes, and returns that. Raises OSError or MeshdError."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long connections of one kind are of use."""

    idle_s: float
    requests: int
    kept: int
    """Idle ones beyond this many are given up after `spare_idle_s` already."""
    spare_idle_s: float


LOCAL: Final = Lifetime(idle_s=3.5, requests=95, kept=1_000_000, spare_idle_s=3.5)
REMOTE: Final = Lifetime(idle_s=60.0, requests=1_000_000, kept=4, spare_idle_s=5.0)


class Pool:
    """Connections to one target, last used first. `connect_remote`: None where there is no mesh."""

    def __init__(
        self,
        target: Target,
        connect_remote: ConnectRemote | None,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        clock: Clock,
    ) -> None:
        self.who = "the engine" if target.local else f"node `{target.node}`"
        """What the other side is called in messages."""
        self.lifetime = LOCAL if target.local else REMOTE
        self._target = target
        self._connect_remote = connect_remote
        self._spawn = spawn
        self._clock = clock
        self._idle: list[Upstream] = []
        self._closed = False

    def try_take(self) -> Upstream | None:
        """An idle connection that the other side has not closed, as far as can be told."""
        idle = self._idle
        while idle:
            upstream = idle.pop()
            transport = upstream.transport
            if transport is None or transport.is_closing():
                continue
            if self._clock.now() - upstream.idle_since < self.lifetime.idle_s:
                return upstream
            transport.close()
        return None

    def connect(self, receiver: Receiver, ticket: int, *, dechunks: bool = False) -> None:
        """Open a connection; `receiver` hears `connected` or `connect_failed`, later, with
        `ticket`, by which it knows whether that is still what it waits for."""
        self._spawn(self._connect(receiver, ticket, DechunkingUpstream if dechunks else Upstream))

    def put_back(self, upstream: Upstream) -> None:
        if self._closed:
            upstream.discard()
            return
        upstream.idle_since = self._clock.now()
        self._idle.append(upstream)

    def forget(self, upstream: Upstream) -> None:
        if upstream in self._idle:
            self._idle.remove(upstream)

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long. The oldest are in front."""
        idle, life = self._idle, self.lifetime
        while idle:
            limit_s = life.idle_s if len(idle) <= life.kept else life.spare_idle_s
            if now - idle[0].idle_since < limit_s:
                return
            idle.pop(0).discard()

    def close(self) -> None:
        """Close idle connections; those in use close when their exchange is over."""
        self._closed = True
        while self._idle:
            self._idle.pop().discard()

    async def _connect(self, receiver: Receiver, ticket: int, kind: type[Upstream]) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                upstream = await self._open(kind)
        except TimeoutError:
            reason = f"no connection to {self.who} within {CONNECT_TIMEOUT_S:g} s"
            receiver.connect_failed(reason, ticket)
        except OSError as error:
            reason = f"{self.who} cannot be reached: {error.strerror or error}"
            receiver.connect_failed(reason, ticket)
        except MeshdError as error:
            receiver.connect_failed(f"{self.who} cannot be reached: {error.message}", ticket)
        else:
            receiver.connected(upstream, ticket)

    async def _open(self, kind: type[Upstream]) -> Upstream:
        if self._target.local:
            loop = asyncio.get_running_loop()
            path = self._target.socket_path
            _, upstream = await loop.create_unix_connection(lambda: kind(self), path)
            return upstream
        if self._connect_remote is None:
            raise PeerUnreachable("this node has no links to others")
        return cast("Upstream", await self._connect_remote(self._target, lambda: kind(self)))
