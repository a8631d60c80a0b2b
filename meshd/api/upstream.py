"""The engine's side of an exchange: raw HTTP/1.1, kept alive, over the unix socket of an engine
here or over a stream to the node of another one.

Bytes of an answer's body go on as they came. A parser watches them, to check the framing and to
find the end, and that is all it does (no `on_body`); only for clients of HTTP/1.0, which know no
chunks, `DechunkingUpstream` takes them apart.

What is refused rather than relayed: 1xx and Upgrade answers, heads over 64 KiB, broken framing,
and anything that follows the end of the message, which would be taken by the client for the answer
to its next request.

How long a connection lives, and what the other side is called in messages, is its pool's to say.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

if TYPE_CHECKING:
    from meshd.api.pool import Pool

MAX_HEAD_BYTES: Final = 64 * 1024
JOIN_BELOW_BYTES: Final = 64 * 1024
"""A request body smaller than this is copied behind its head, to be one write."""
MAX_QUEUE_DIGITS: Final = 10

_DROPPED: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"upgrade",
        # ours to say, not the engine's
        b"access-control-allow-origin",
        b"access-control-allow-credentials",
        b"x-request-id",
        b"x-meshd-node",
        b"x-meshd-route",
        b"x-meshd-attempts",
        b"x-meshd-queue-ms",
    )
)


class Receiver(Protocol):
    """What an exchange is told by its upstream connection; exactly one of `answer_ended` and
    `answer_broke` ends it, and the connection is no longer its own when they are called."""

    def connected(self, upstream: Upstream, ticket: int) -> None: ...

    def connect_failed(self, reason: str, ticket: int) -> None: ...

    def answer_began(self, upstream: Upstream, rest: bytes) -> None:
        """The head is there; `rest`: what came of the body with it."""

    def answer_went_on(self, data: bytes) -> None: ...

    def answer_ended(self) -> None: ...

    def answer_broke(self, upstream: Upstream, reason: str) -> None: ...


class Upstream(asyncio.Protocol):
    """One connection; serves one exchange at a time."""

    dechunks = False

    def __init__(self, pool: Pool) -> None:
        self.status = 0
        self.lines: list[bytes] = []
        """Header lines of the answer that may travel on, each with its CRLF."""
        self.chunked = False
        self.until_close = False
        self.event_stream = False
        self.queued_s = 0.0
        """What another node says that the request waited there."""
        self.reused = False
        """Whether this connection had served another exchange before the present one."""
        self.idle_since = 0.0
        self.transport: asyncio.Transport | None = None
        self._pool = pool
        self._receiver: Receiver | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._served = 0
        self._head = b""
        self._head_done = False
        self._began = 0
        self._complete = False
        self._in_chunk = False
        self._keep = False
        self._paused = False
        self._last = b""

    # -- for the exchange -------------------------------------------------------------------------

    def send(self, receiver: Receiver, head: bytes, body: bytes) -> None:
        transport = self.transport
        assert transport is not None
        self._receiver = receiver
        self.reused = self._served > 0
        self._served += 1
        self.lines = []
        self.chunked = self.until_close = self.event_stream = False
        self.queued_s = 0.0
        self._head = b""
        self._head_done = self._complete = self._in_chunk = False
        self._began = 0
        if len(body) < JOIN_BELOW_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def pause(self) -> None:
        if not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()

    def discard(self) -> None:
        """Close at once, telling nobody; the engine sees its client gone and frees the slot."""
        self._receiver = None
        if self.transport is not None:
            self.transport.abort()

    def give_up(self) -> None:
        """The answer that began is not wanted. Kept if all of it is here, else closed."""
        if self._complete:
            self._receiver = None
            self._end()
        else:
            self.discard()

    def set_aside(self) -> None:
        """Nobody needs this connection, which has sent nothing, any more; somebody may soon."""
        if self.dechunks:
            self.discard()
        elif self.transport is not None:
            self._pool.put_back(self)

    def at_event_boundary(self) -> bool:
        """Whether everything relayed so far ends with a whole event in a whole chunk."""
        if not (self.event_stream and self.chunked) or self._in_chunk or self.dechunks:
            return False
        return not self._last or self._last.endswith((b"\n\n\r\n", b"\r\n\r\n\r\n"))

    # -- asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transport has the methods but not the base class.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:  # nothing was asked: whatever this is, it is nobody's answer
            self._close()
        elif self._head_done:
            in_chunk = self._in_chunk
            if not self._watch(data):
                self._in_chunk = in_chunk  # where what was forwarded ends, not what was parsed
                self._break(f"the answer of {self._pool.who} is not valid HTTP")
                return
            self._last = data
            receiver.answer_went_on(data)
            if self._complete:
                self._end()
        else:
            self._read_head(receiver, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._pool.forget(self)
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        if self._head_done and self.until_close and exc is None:
            receiver.answer_ended()
        elif self._head_done or self._head:
            receiver.answer_broke(self, f"{self._pool.who} closed the connection in mid-answer")
        else:
            receiver.answer_broke(self, f"{self._pool.who} closed the connection without an answer")

    # -- httptools --------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._began += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:
            return  # a trailer
        lower = name.lower()
        if lower in _DROPPED:
            if lower == b"x-meshd-queue-ms" and value.isdigit() and len(value) < MAX_QUEUE_DIGITS:
                self.queued_s = int(value) / 1000
            return
        if lower == b"transfer-encoding":
            if value.strip().lower() != b"chunked":
                raise ValueError("a transfer coding nobody asked for")  # seen by `_watch`
            self.chunked = True
            if self.dechunks:
                return
        elif lower == b"content-type":
            self.event_stream = value.startswith(b"text/event-stream")
        self.lines.append(b"%b: %b\r\n" % (name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        self.status = parser.get_status_code()
        self._keep = parser.should_keep_alive()
        self._head_done = True

    def on_chunk_header(self) -> None:
        self._in_chunk = True

    def on_chunk_complete(self) -> None:
        self._in_chunk = False

    def on_message_complete(self) -> None:
        self._complete = True

    # -- steps ------------------------------------------------------------------------------------

    def _read_head(self, receiver: Receiver, data: bytes) -> None:
        if self._head:
            data = self._head + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._head = data
            if len(data) > MAX_HEAD_BYTES:
                self._break(f"the answer of {self._pool.who} has an endless head")
            return
        rest = data[end + 4 :]
        if not self._watch(data[: end + 4]) or not self._head_done:
            self._break(f"the answer of {self._pool.who} has a malformed head")
            return
        if self.status < 200 or self._parser.should_upgrade():
            self._break(f"{self._pool.who} answered {self.status}, which is not relayed")
            return
        if rest and not self._watch(rest):
            self._break(f"the answer of {self._pool.who} is not valid HTTP")
            return
        # Neither length nor chunks: the end of the connection is the end of the answer.
        self.until_close = not self._complete and not self.chunked and not self._has_length()
        self._last = rest
        receiver.answer_began(self, rest)
        if self._complete and self._receiver is receiver:
            self._end()

    def _has_length(self) -> bool:
        return any(line[:15].lower() == b"content-length:" for line in self.lines)

    def _watch(self, data: bytes) -> bool:
        """Whether `data` may go on: well-formed, and nothing in it behind the end."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return False
        if not self._complete:
            return True
        # The parser skips blank lines between messages, so one too many is looked for here.
        return self._began <= 1 and not (self.chunked and data.endswith(b"\n\r\n\r\n"))

    def _end(self) -> None:
        receiver, self._receiver = self._receiver, None
        self._last = b""
        worn = self._served >= self._pool.lifetime.requests
        if not self._keep or worn or self.dechunks or self._unsent():
            self._close()
        else:
            self.resume()
            self._pool.put_back(self)
        if receiver is not None:
            receiver.answer_ended()

    def _unsent(self) -> bool:
        """An answer that came before all of the request was sent."""
        return self.transport is None or self.transport.get_write_buffer_size() > 0

    def _break(self, reason: str) -> None:
        receiver = self._receiver
        self.discard()
        if receiver is not None:
            receiver.answer_broke(self, reason)

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class DechunkingUpstream(Upstream):
    """For a client of HTTP/1.0: chunks are taken apart, and the connection is used once."""

    dechunks = True

    def __init__(self, pool: Pool) -> None:
        self._bodies: list[bytes] = []
        super().__init__(pool)

    def on_body(self, body: bytes) -> None:
        self._bodies.append(body)

    def take_body(self) -> bytes:
        """The body's bytes in what was received last."""
        body = b"".join(self._bodies)
        self._bodies.clear()
        return body
