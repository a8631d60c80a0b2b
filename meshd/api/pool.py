"""Kept-alive connections to one engine.

llama-server closes a connection that was idle for 5 s; ours are given up before that, so that a
request seldom meets one that is just being closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from meshd.api.upstream import DechunkingUpstream, Receiver, Upstream
from meshd.kernel import Clock

IDLE_LIMIT_S: Final = 3.5
CONNECT_TIMEOUT_S: Final = 5.0


class Pool:
    """Connections to one engine, last used first."""

    def __init__(
        self,
        socket_path: str,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        clock: Clock,
    ) -> None:
        self._path = socket_path
        self._spawn = spawn
        self._clock = clock
        self._idle: list[Upstream] = []
        self._closed = False

    def try_take(self) -> Upstream | None:
        """An idle connection that the engine has not closed, as far as can be told."""
        idle = self._idle
        while idle:
            upstream = idle.pop()
            transport = upstream.transport
            if transport is None or transport.is_closing():
                continue
            if self._clock.now() - upstream.idle_since < IDLE_LIMIT_S:
                return upstream
            transport.close()
        return None

    def connect(self, receiver: Receiver, *, dechunks: bool = False) -> None:
        """Open a connection; `receiver` hears `connected` or `connect_failed`, later."""
        self._spawn(self._connect(receiver, DechunkingUpstream if dechunks else Upstream))

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
        while self._idle and now - self._idle[0].idle_since >= IDLE_LIMIT_S:
            self._idle.pop(0).discard()

    def close(self) -> None:
        """Close idle connections; those in use close when their exchange is over."""
        self._closed = True
        while self._idle:
            self._idle.pop().discard()

    async def _connect(self, receiver: Receiver, kind: type[Upstream]) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, upstream = await loop.create_unix_connection(lambda: kind(self), self._path)
        except TimeoutError:
            receiver.connect_failed(f"no connection to the engine within {CONNECT_TIMEOUT_S} s")
        except OSError as error:
            receiver.connect_failed(f"the engine cannot be reached: {error.strerror or error}")
        else:
            receiver.connected(upstream)
