"""The client's side: one protocol, two lanes.

*Slow lane*: aiohttp parses and calls `Dispatch`. It serves everything.
*Fast lane*: as long as a connection has sent nothing but plain requests for the relay (see
request_reader.py), they are read here and become exchanges at once; aiohttp never sees their bytes
and no task is made. The first request that is not plain is handed to aiohttp as it came, and the
connection stays with aiohttp for good. Nothing of aiohttp is touched but by subclassing
`RequestHandler` and calling its protocol methods.

Bytes that arrive while a fast exchange is under way wait here, at most 64 KiB before reading stops.

A connection may be another node's (`peer`), which was authenticated before: no key and no names are
asked for, it counts as no client, and there is nothing for it but the relay.
"""

from __future__ import annotations

import asyncio
import logging
from enum import IntEnum
from typing import TYPE_CHECKING, cast

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse
from aiohttp.web_server import Server

from meshd.api.exchange import Exchange
from meshd.api.request_reader import RequestReader, Verdict
from meshd.api.responses import InternalError, error_body, error_bytes, error_headers
from meshd.errors import InvalidRequest, MeshdError, RequestTimeout, TooManyConnections

if TYPE_CHECKING:
    from meshd.api.front import Front

log = logging.getLogger(__name__)

MAX_AHEAD_BYTES = 64 * 1024
"""Pipelined bytes that are kept before reading from the client stops."""
MAX_HEAD_BYTES = 64 * 1024
"""Of a request in the slow lane; aiohttp alone bounds lines and their number, and so 1 MiB."""
REJECTED_LINGER_S = 1.0
MAX_REJECTED = 64
"""Refused connections that are given time to read why; further ones are just closed."""
LINGER_S = 1.0
"""How long the rest of a refused body is read, so that the client sees the answer."""
PEER_IDLE_S = 90.0
"""A silent connection of another node is closed after this; longer than nodes keep theirs."""
NEVER_S = 10_000_000.0
"""aiohttp's own keep-alive timer is out of the way: the sweeper closes idle connections."""


class Phase(IntEnum):
    NEW = 0
    HEAD = 1
    BODY = 2
    BUSY = 3
    IDLE = 4
    REJECTED = 5


class Connection(RequestHandler):
    """A client's connection. See the module's docstring."""

    __slots__ = (
        "_answered",
        "_exchange",
        "_front",
        "_head_bytes",
        "_head_tail",
        "_held",
        "_known",
        "_pending",
        "_processing",
        "_reader",
        "_slow",
        "origin",
        "peer",
        "phase",
        "since",
    )

    def __init__(
        self,
        front: Front,
        server: Server,
        loop: asyncio.AbstractEventLoop,
        peer: str | None = None,
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=NEVER_S,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            lingering_time=LINGER_S,
            max_line_size=8190,
            max_field_size=16_384,
        )
        self.phase = Phase.NEW
        self.since = front.relay.clock.now()
        """When the phase began, monotonic."""
        self.peer = peer
        """Name of the node at the other end; None: a client."""
        self.origin = ""
        """Whose turn its requests count as."""
        self._front = front
        self._known = False
        """Whether aiohttp was told of this connection."""
        self._slow = False
        self._head_bytes = 0
        self._head_tail: bytes | None = None
        self._pending = b""
        self._held = False
        self._processing = False
        self._reader: RequestReader | None = None
        self._exchange: Exchange | None = None
        self._answered: asyncio.Future[None] | None = None

    # -- asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        front = self._front
        if self.peer is not None:
            front.peers.add(self)
            self.origin = self.peer
        elif len(front.connections) >= front.settings.max_connections:
            self._reject(transport)
            return
        else:
            front.connections.add(self)
            name = transport.get_extra_info("peername")
            self.origin = str(name[0]) if isinstance(name, tuple) and name else "local"
        self._known = True
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._front.connections.discard(self)
        self._front.peers.discard(self)
        self._front.rejected.discard(self)
        self._pending = b""
        self._reader = None
        exchange = self._exchange
        if exchange is not None:
            exchange.client_gone()
        if self._known:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.phase is Phase.REJECTED:
            return
        if self._slow:
            if self.phase is Phase.IDLE:
                self._enter(Phase.HEAD)
                self._head_tail, self._head_bytes = b"", 0
            self._feed_slow(data)
        else:
            self._pending = self._pending + data if self._pending else data
            if self._exchange is None:
                self._process()
            elif len(self._pending) > MAX_AHEAD_BYTES and not self._held:
                self._hold()

    def eof_received(self) -> None:
        if self._known:
            super().eof_received()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.resume()
        elif self._pending:
            self._process()

    # -- fast lane --------------------------------------------------------------------------------

    def _process(self) -> None:
        """Turn what is pending into exchanges, one after the other."""
        if self._processing:
            return
        self._processing = True
        try:
            while self._pending and self._exchange is None and not self._slow:
                if self.writing_paused or not self._read_one():
                    break
        finally:
            self._processing = False
        if self._held and len(self._pending) <= MAX_AHEAD_BYTES:
            self._let_go()

    def _read_one(self) -> bool:
        """Whether a request was taken off `_pending`."""
        reader = self._reader
        if reader is None:
            reader = self._reader = RequestReader()
        verdict = reader.read(self._pending)
        if verdict is Verdict.COMPLETE:
            self._pending = self._pending[reader.total :]
            self._begin(reader)
            reader.next()
            return True
        if verdict is Verdict.UNUSUAL:
            self._go_slow()
        elif reader.head_bytes:
            if self.phase is not Phase.BODY:
                self._enter(Phase.BODY)
        elif self.phase is Phase.IDLE:
            self._enter(Phase.HEAD)
        elif self.phase is Phase.NEW:
            self.phase = Phase.HEAD  # the time for the first head runs from the connection's start
        return False

    def _begin(self, reader: RequestReader) -> None:
        front = self._front
        request_id = front.request_id(reader.request_id)
        self.phase = Phase.BUSY
        wait_s = 0.0  # another node waits by itself, where it can also go elsewhere
        try:
            if self.peer is None:
                assert reader.host is not None
                front.access.check_host(reader.host)
                front.access.check_key(reader.authorization, reader.api_key)
                wait_s = front.wait_s(reader.wait_s)
        except MeshdError as error:
            self._answer(error_bytes(error, request_id.decode(), keep_alive=True))
            self._enter(Phase.IDLE)
            return
        self._exchange = exchange = Exchange(
            front.relay,
            self,
            path=reader.path,
            needs_slot=reader.needs_slot,
            body=reader.body,
            forward=b"".join(reader.forward),
            request_id=request_id,
            origin=self.origin,
            wait_s=wait_s,
            from_peer=self.peer is not None,
        )
        exchange.start()

    def exchange_done(self, exchange: Exchange) -> None:
        """Of either lane; called by the exchange, once."""
        self._exchange = None
        answered, self._answered = self._answered, None
        if answered is not None:
            if not answered.done():
                answered.set_result(None)
        elif not exchange.keep_alive:
            self.shut()
        else:
            self._enter(Phase.IDLE)
            if self._pending or self._held:
                self._process()

    def _go_slow(self) -> None:
        self._slow = True
        self._reader = None
        raw, self._pending = self._pending, b""
        if self._held:
            self._let_go()
        self._enter(Phase.HEAD)
        self._head_tail, self._head_bytes = b"", 0
        self._feed_slow(raw)

    def _hold(self) -> None:
        if self.transport is not None:
            self._held = True
            self.transport.pause_reading()

    def _let_go(self) -> None:
        self._held = False
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    # -- slow lane --------------------------------------------------------------------------------

    def _feed_slow(self, data: bytes) -> None:
        if self._head_tail is not None:
            window = self._head_tail + data
            if b"\r\n\r\n" in window:
                self._head_tail = None
            else:
                self._head_tail = window[-3:]
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._refuse_head()
                    return
        super().data_received(data)

    def _refuse_head(self) -> None:
        self._enter(Phase.REJECTED)  # reads on for a moment without looking, so that this is seen
        error = InvalidRequest(f"the request head is over the limit of {MAX_HEAD_BYTES} bytes")
        self._answer(error_bytes(error, self._front.make_request_id().decode(), keep_alive=False))
        if self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()

    async def run_exchange(self, exchange: Exchange) -> None:
        """Relay `exchange`, whose bytes go straight to the transport; returns when it is over."""
        answered = self._loop.create_future()
        self._answered = answered
        self._exchange = exchange
        exchange.start()
        try:
            await answered
        except asyncio.CancelledError:
            exchange.client_gone()
            raise

    def enter_request(self) -> None:
        self._enter(Phase.BUSY)

    def leave_request(self) -> None:
        self._enter(Phase.IDLE)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """aiohttp's hook for what its parser refused and for bugs of a handler."""
        request_id = self._front.make_request_id().decode()
        error: MeshdError
        if isinstance(exc, HttpProcessingError):
            # One line at DEBUG: at a higher level any client could flood the log.
            log.debug("%s: %s is not HTTP: %s", request_id, self.origin, exc.message)
            error = InvalidRequest(f"not a valid HTTP request: {exc.message.splitlines()[0]}")
        else:
            log.error("%s: a bug in the API", request_id, exc_info=exc)
            error = InternalError("meshd failed to answer; its log has the details")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun")
        answer = Response(
            status=error.status,
            body=error_body(error),
            content_type="application/json",
            headers=error_headers(error, request_id),
        )
        answer.force_close()
        return answer

    # -- limits -----------------------------------------------------------------------------------

    def check_late(self, now: float) -> None:
        settings, silent_s = self._front.settings, now - self.since
        idle_limit_s = settings.idle_timeout_s if self.peer is None else PEER_IDLE_S
        match self.phase:
            case Phase.NEW if silent_s >= settings.head_timeout_s:
                self.shut()
            case Phase.HEAD if silent_s >= settings.head_timeout_s:
                self._too_slow("the request head was not complete", settings.head_timeout_s)
            case Phase.BODY if silent_s >= settings.body_timeout_s:
                self._too_slow("the request body was not complete", settings.body_timeout_s)
            case Phase.IDLE if silent_s >= idle_limit_s:
                self.shut()
            case Phase.REJECTED if silent_s >= REJECTED_LINGER_S:
                self.shut()

    def shut(self) -> None:
        """Close when what was written is out."""
        if self.transport is not None:
            self.transport.close()

    def _too_slow(self, what: str, limit_s: float) -> None:
        error = RequestTimeout(f"{what} within {limit_s:g} s")
        self._answer(error_bytes(error, self._front.make_request_id().decode(), keep_alive=False))
        self.shut()

    def _reject(self, transport: asyncio.BaseTransport) -> None:
        """One connection too many. aiohttp hears nothing of it."""
        transport = cast("asyncio.Transport", transport)
        front = self._front
        limit = front.settings.max_connections
        self._enter(Phase.REJECTED)
        if len(front.rejected) >= MAX_REJECTED:
            transport.abort()
            return
        self.transport = transport
        front.rejected.add(self)
        error = TooManyConnections(
            f"this node serves at most {limit} connections (`api.max_connections`)",
            retry_after_s=1.0,
        )
        self._answer(error_bytes(error, front.make_request_id().decode(), keep_alive=False))
        # Half-closed, and what arrives is ignored for a moment: closing over unread bytes would
        # reset the connection, and the client would not see why.
        if transport.can_write_eof():
            transport.write_eof()

    def _answer(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = self._front.relay.clock.now()
