"""All client connections: how they are made, what they share, when they end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from aiohttp.web_server import Server

from meshd.api.access import Access
from meshd.api.connection import Connection, Phase
from meshd.api.relay import Relay
from meshd.config import ApiSettings
from meshd.errors import InvalidRequest

MAX_WAIT_S = 3600.0
MAX_REQUEST_ID_BYTES = 128


class Front:
    """Makes connections, and knows them all."""

    def __init__(
        self,
        settings: ApiSettings,
        relay: Relay,
        access: Access,
        rng: random.Random,
        handler: Callable[[BaseRequest], Awaitable[StreamResponse]],
    ) -> None:
        self.settings = settings
        self.relay = relay
        self.access = access
        self.connections: set[Connection] = set()
        self.peers: set[Connection] = set()
        """Those of other nodes; how many there may be is limited where they come in."""
        self.rejected: set[Connection] = set()
        """Told that there are too many; they do not count as connections."""
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._server = Server(handler, handler_cancellation=True)

    def __call__(self) -> Connection:
        """The protocol factory."""
        return Connection(self, self._server, self._loop)

    def for_peer(self, peer: str) -> Connection:
        """The protocol of a connection of another node, called `peer`."""
        return Connection(self, self._server, self._loop, peer)

    def make_request_id(self) -> bytes:
        return b"req-%016x" % self._rng.getrandbits(64)

    def request_id(self, given: bytes | None) -> bytes:
        """The client's, if it is fit to be a header and a log field; else one made here."""
        if given and len(given) <= MAX_REQUEST_ID_BYTES and given.isascii() and b" " not in given:
            text = given.decode("ascii")
            if text.isprintable():
                return given
        return self.make_request_id()

    def wait_s(self, header: bytes | None) -> float:
        """How long a request waits for a model that loads. Raises InvalidRequest."""
        if header is None:
            return self.settings.wait_s
        try:
            seconds = float(header)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= MAX_WAIT_S:
            raise InvalidRequest(
                f"`x-meshd-wait-s` must be a number of seconds from 0 to {MAX_WAIT_S:.0f}",
                param="x-meshd-wait-s",
            )
        return seconds

    def sweep(self, now: float) -> None:
        """Once a second: connections that are too slow, or idle for too long."""
        for connection in self._all():
            connection.check_late(now)

    def close_idle(self) -> None:
        """Close what is between requests; what is not closes after its answer."""
        for connection in self._all():
            if connection.phase is not Phase.BUSY:
                connection.shut()

    def abort_all(self) -> None:
        for connection in self._all():
            connection.shut()

    async def close(self, timeout_s: float) -> None:
        """Ends aiohttp's task of every connection."""
        await self._server.shutdown(timeout_s)

    def _all(self) -> tuple[Connection, ...]:
        return (*self.connections, *self.peers, *self.rejected)
