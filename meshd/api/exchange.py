"""One request's life, from its body to the last byte of its answer.

No task, no await: an exchange moves when it is called, by its client's connection, by admission,
by its upstream connection, or by the sweeper when it is late. Both lanes of connection.py use it.

NEW → WAITING (for admission) → SENT (no answer yet) → RELAYING → DONE, and from each straight to
DONE. What ends it, and what the client sees:

1. Refused before the engine was asked: the error of refusals.py.
2. The engine answered: its bytes.
3. The engine broke before its answer began: one more attempt, on another target if there is one;
   then 502. A kept connection that turns out to be dead is replaced at once and not counted.
   The engine may then run a request twice, which for inference costs time and nothing else.
4. The engine broke in mid-answer: if a stream stands between two events, one more event with the
   error and a clean end; otherwise the connection is cut, so that nobody takes a part for a whole.
5. No first byte in time: 504.
6. The client left: the upstream connection is closed at once, and the engine frees the slot.
"""

from __future__ import annotations

import asyncio
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from meshd.api import refusals
from meshd.api.admission import Refusal
from meshd.api.responses import (
    LAST_CHUNK,
    REASONS,
    chunk,
    connection_line,
    error_bytes,
    error_event,
)
from meshd.api.route import NotReady
from meshd.api.upstream import DechunkingUpstream, Upstream
from meshd.errors import InvalidRequest, MeshdError, UpstreamFailed, UpstreamTimeout
from meshd.ids import InstanceId
from meshd.view import Target

if TYPE_CHECKING:
    from meshd.api.relay import Relay

MAX_RETRIES = 1
RETRY_ELSEWHERE = frozenset((502, 503))
"""Statuses of an engine that another engine may not have."""


class State(IntEnum):
    NEW = 0
    WAITING = 1
    SENT = 2
    RELAYING = 3
    DONE = 4


class Client(Protocol):
    """The client's connection."""

    transport: asyncio.Transport | None

    @property
    def writing_paused(self) -> bool: ...

    def exchange_done(self, exchange: Exchange) -> None: ...


class Exchange:
    """See the module's docstring. Attributes down to `keep_alive` are set by the front."""

    __slots__ = (
        "_attempts",
        "_avoid",
        "_bytes_out",
        "_due_at",
        "_granted_at",
        "_retries",
        "_upstream",
        "arrived_at",
        "body",
        "client",
        "extra_lines",
        "forward",
        "http10",
        "keep_alive",
        "model",
        "needs_slot",
        "origin",
        "path",
        "relay",
        "request_id",
        "state",
        "stream",
        "target",
        "wait_s",
    )

    def __init__(
        self,
        relay: Relay,
        client: Client,
        *,
        path: bytes,
        needs_slot: bool,
        body: bytes,
        forward: bytes,
        request_id: bytes,
        origin: str,
        wait_s: float,
        keep_alive: bool = True,
        http10: bool = False,
        extra_lines: bytes = b"",
    ) -> None:
        self.relay = relay
        self.client = client
        self.path = path
        """Path and query, as sent to the engine."""
        self.needs_slot = needs_slot
        self.body = body
        self.forward = forward
        """Header lines of the request that travel on, each with its CRLF."""
        self.request_id = request_id
        self.origin = origin
        self.wait_s = wait_s
        self.keep_alive = keep_alive
        """Whether the client's connection may serve another request after this one."""
        self.http10 = http10
        self.extra_lines = extra_lines
        """Header lines for the answer (CORS)."""
        self.state = State.NEW
        self.model = ""
        self.stream = False
        self.target: Target | None = None
        self.arrived_at = 0.0
        self._granted_at = 0.0
        self._due_at = 0.0
        self._attempts = 0
        self._retries = 0
        self._avoid: frozenset[InstanceId] = frozenset()
        self._upstream: Upstream | None = None
        self._bytes_out = 0

    # -- called by the client's connection --------------------------------------------------------

    def start(self) -> None:
        """Read the envelope, route and admit. May end the exchange before it returns."""
        relay = self.relay
        self.arrived_at = relay.clock.now()
        relay.active.add(self)
        try:
            self._read_envelope()
        except MeshdError as error:
            self._refuse(error)
            return
        if relay.draining:
            self.keep_alive = False
            self._refuse(refusals.draining())
            return
        outcome = relay.route(self.model)
        if type(outcome) is Target or (type(outcome) is NotReady and self.wait_s > 0):
            self.state = State.WAITING
            relay.admit(self)
        else:
            assert not isinstance(outcome, Target)
            self._refuse(refusals.of_route(self.model, outcome))

    def client_gone(self) -> None:
        if self.state is State.DONE:
            return
        self._drop_upstream()
        self._finish("client_gone")

    def pause(self) -> None:
        """The client reads slower than the engine writes."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        if self._upstream is not None:
            self._upstream.resume()

    # -- called by admission ----------------------------------------------------------------------

    def granted(self) -> None:
        if self.state is State.DONE:
            return
        self._granted_at = now = self.relay.clock.now()
        self._due_at = now + self.relay.settings.first_byte_timeout_s
        self.state = State.SENT
        self._attempt()

    def refused(self, reason: Refusal) -> None:
        if self.state is State.DONE:
            return
        relay = self.relay
        outcome = relay.route(self.model)
        explained = reason in (Refusal.NOT_READY, Refusal.FAILED, Refusal.GONE)
        if explained and not isinstance(outcome, Target):
            self._refuse(refusals.of_route(self.model, outcome))
        else:
            waited_s = relay.clock.now() - self.arrived_at
            self._refuse(refusals.of_admission(self.model, reason, waited_s))

    # -- called by the sweeper and at the end of the node -----------------------------------------

    def check_late(self, now: float) -> None:
        if self.state is State.SENT and now >= self._due_at:
            limit_s = self.relay.settings.first_byte_timeout_s
            self.fail(
                UpstreamTimeout(
                    f"the engine of model `{self.model}` gave no answer within {limit_s:.0f} s"
                )
            )

    def fail(self, error: MeshdError) -> None:
        """End it now, whatever it is doing, as cleanly as what was sent allows."""
        if self.state is State.DONE:
            return
        upstream = self._upstream
        boundary = upstream is not None and upstream.at_event_boundary()
        self._drop_upstream()
        if self.state is not State.RELAYING:
            self._refuse(error)
        else:
            self._break_off(error, boundary)

    # -- called by the upstream connection --------------------------------------------------------

    def connected(self, upstream: Upstream) -> None:
        if self.state is not State.SENT or upstream.transport is None:
            if upstream.transport is not None:
                upstream.transport.close()
            if self.state is State.SENT:
                self._attempt_failed("the engine closed the connection at once")
            return
        self._send(upstream)

    def connect_failed(self, reason: str) -> None:
        if self.state is State.SENT:
            self._attempt_failed(reason)

    def answer_began(self, upstream: Upstream, rest: bytes) -> None:
        relay = self.relay
        if (
            upstream.status in RETRY_ELSEWHERE
            and self._retries < MAX_RETRIES
            and relay.has_other_target(self.model, self.target)
        ):
            upstream.discard()
            self._attempt_failed(f"the engine answered {upstream.status}")
            return
        self.state = State.RELAYING
        self.body = b""
        if upstream.until_close or (upstream.dechunks and upstream.chunked):
            self.keep_alive = False
        target = self.target
        assert target is not None
        relay.traffic.of(self.model, "local").ttft.observe(relay.clock.now() - self._granted_at)
        status = upstream.status
        if isinstance(upstream, DechunkingUpstream):
            rest = upstream.take_body()
        self._write(
            b"HTTP/1.1 %d %b\r\n%bx-request-id: %b\r\n%bx-meshd-attempts: %d\r\n"
            b"x-meshd-queue-ms: %d\r\n%b%b\r\n%b"
            % (
                status,
                REASONS.get(status, b"Unknown"),
                b"".join(upstream.lines),
                self.request_id,
                relay.node_lines(target),
                self._attempts,
                round((self._granted_at - self.arrived_at) * 1000),
                self.extra_lines,
                connection_line(self.keep_alive, self.http10),
                rest,
            )
        )

    def answer_went_on(self, data: bytes) -> None:
        if isinstance(self._upstream, DechunkingUpstream):
            data = self._upstream.take_body()
        self._write(data)

    def answer_ended(self) -> None:
        self._upstream = None
        self._finish("ok")

    def answer_broke(self, upstream: Upstream, reason: str) -> None:
        self._upstream = None
        if self.state is State.RELAYING:
            error = UpstreamFailed(f"model `{self.model}`: {reason}; send the request again")
            self._break_off(error, upstream.at_event_boundary())
        elif upstream.reused:
            self.relay.traffic.retried("stale_connection")
            self._open_fresh()
        else:
            self._attempt_failed(reason)

    # -- steps ------------------------------------------------------------------------------------

    def _read_envelope(self) -> None:
        try:
            envelope: Any = orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the request body is not JSON: {error}") from None
        if type(envelope) is not dict:
            raise InvalidRequest("the request body must be a JSON object")
        model = envelope.get("model")
        if type(model) is not str or not model:
            what = "is missing" if model is None else "must be a non-empty string"
            raise InvalidRequest(f"`model` {what}; GET /v1/models lists the names", param="model")
        self.model = model
        self.stream = envelope.get("stream") is True

    def _attempt(self) -> None:
        relay = self.relay
        outcome = relay.route(self.model, self._avoid)
        if not isinstance(outcome, Target):
            self._refuse(refusals.of_route(self.model, outcome))
            return
        self.target = outcome
        relay.engage(outcome.instance)
        if not self.http10:
            upstream = relay.pool(outcome).try_take()
            if upstream is not None:
                self._send(upstream)
                return
        self._open_fresh()

    def _open_fresh(self) -> None:
        assert self.target is not None
        self.relay.pool(self.target).connect(self, dechunks=self.http10)

    def _send(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._attempts += 1
        self.relay.traffic.bytes_in += len(self.body)
        if self.client.writing_paused:
            upstream.pause()
        upstream.send(
            self,
            b"POST %b HTTP/1.1\r\nhost: meshd\r\n%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n"
            % (self.path, self.forward, self.request_id, len(self.body)),
            self.body,
        )

    def _attempt_failed(self, reason: str) -> None:
        """3. Before anything of an answer was sent to the client."""
        target = self.target
        assert target is not None
        self._upstream = None
        self.target = None
        self.relay.release(target.instance)
        if self._retries < MAX_RETRIES:
            self._retries += 1
            self._avoid |= {target.instance}
            self.relay.traffic.retried("upstream_failed")
            self._attempt()
        else:
            self._refuse(
                UpstreamFailed(
                    f"model `{self.model}`: {reason}; `meshd logs` has what it said",
                    retry_after_s=refusals.QUEUE_RETRY_AFTER_S,
                )
            )

    def _break_off(self, error: MeshdError, boundary: bool) -> None:
        """4. In mid-answer."""
        transport = self.client.transport
        if boundary:
            self._write(chunk(error_event(error)) + LAST_CHUNK)
        else:
            self.keep_alive = False
            if transport is not None:
                transport.abort()
        self._finish(error.code)

    def _refuse(self, error: MeshdError) -> None:
        self._write(
            error_bytes(
                error,
                self.request_id.decode("latin-1"),
                keep_alive=self.keep_alive,
                extra=self.extra_lines,
                http10=self.http10,
            )
        )
        self._finish(error.code)

    def _write(self, data: bytes) -> None:
        transport = self.client.transport
        if data and transport is not None and not transport.is_closing():
            self._bytes_out += len(data)
            transport.write(data)

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.discard()

    def _finish(self, outcome: str) -> None:
        self.state = State.DONE
        self.body = b""
        self.relay.finished(self, outcome, self._bytes_out)
        self.client.exchange_done(self)
