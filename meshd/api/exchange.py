"""One request's life, from its body to the last byte of its answer.

No task, no await: an exchange moves when it is called, by its client's connection, by admission,
by its upstream connection, or by the sweeper when it is late. Both lanes of connection.py use it.

NEW → WAITING (for admission) → SENT (no answer yet) → RELAYING → DONE, and from each straight to
DONE. What ends it, and what the client sees:

1. Refused before the engine was asked: the error of refusals.py.
2. The engine answered: its bytes.
3. An attempt failed before its answer began: another target is tried, twice at most; where there
   is no other, the same one once. Then 502.
   a. No connection, or one that ended without an answer or with what is none. A kept connection
      that turns out to be dead is replaced at once and not counted.
   b. A 5xx answer (but 501) or 429, while there is another target. The last one's is relayed.
   c. The node of the target died, or is in doubt while there is another target.
   Engines may so run a request twice, which for inference costs time and nothing else.
4. The engine broke in mid-answer, or its node died: if a stream stands between two events, one more
   event with the error and a clean end; otherwise the connection is cut, so that nobody takes a
   part for a whole.
5. No first byte in time, of all attempts together: 504.
6. The client left: the upstream connection is closed at once, and the engine frees the slot.

The client may be another node (`from_peer`). Then only engines of this one count, and what it does
not serve is 503 rather than 404: the other node saw it here a moment ago, and tries elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from meshd.api import refusals
from meshd.api.admission import Refusal
from meshd.api.attempts import HEALTHY_REFUSALS, Attempts, State, may_be_better_elsewhere
from meshd.api.breaker import Fault
from meshd.api.envelope import read_envelope
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
from meshd.errors import MeshdError, UpstreamFailed
from meshd.view import Target

if TYPE_CHECKING:
    from meshd.api.relay import Relay


class Client(Protocol):
    """The client's connection."""

    transport: asyncio.Transport | None

    @property
    def writing_paused(self) -> bool: ...

    def exchange_done(self, exchange: Exchange) -> None: ...


class Exchange(Attempts):
    """See the module's docstring."""

    __slots__ = (
        "_bytes_out",
        "_granted_at",
        "_queued_there_s",
        "_sent_at",
        "arrived_at",
        "body",
        "client",
        "extra_lines",
        "forward",
        "keep_alive",
        "needs_slot",
        "origin",
        "path",
        "request_id",
        "stream",
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
        from_peer: bool = False,
    ) -> None:
        super().__init__(relay, http10=http10, from_peer=from_peer)
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
        self.extra_lines = extra_lines
        """Header lines for the answer (CORS)."""
        self.stream = False
        self.arrived_at = 0.0
        self._granted_at = 0.0
        self._sent_at = 0.0
        """When the present attempt was sent; 0 if nobody counts."""
        self._queued_there_s = 0.0
        """What another node says that the request waited there."""
        self._bytes_out = 0

    # -- called by the client's connection --------------------------------------------------------

    def start(self) -> None:
        """Read the envelope, route and admit. May end the exchange before it returns."""
        relay = self.relay
        self.arrived_at = relay.clock.now()
        relay.active.add(self)
        try:
            name, self.stream = read_envelope(self.body)
            self.model = relay.known_as(name, own=self.from_peer)
        except MeshdError as error:
            self._refuse(error)
            return
        if relay.draining:
            self.keep_alive = False
            self._refuse(refusals.shutting_down())
            return
        outcome = relay.route(self.model, own=self.from_peer)
        if relay.usage is not None and not self.from_peer:
            outcome = self._tell_asked(relay.usage, outcome)
        if isinstance(outcome, Target):
            if outcome.local and outcome.model in relay.withdrawn:
                self._refuse(refusals.withdrawn())
                return
        elif not isinstance(outcome, NotReady) or self.wait_s <= 0:
            self._refuse(self._unrouted(outcome))
            return
        self.state = State.WAITING
        relay.admit(self)

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
        relay = self.relay
        self._granted_at = now = relay.clock.now()
        self._due_at = now + relay.settings.first_byte_timeout_s
        self.state = State.SENT
        outcome = relay.route(self.model, own=self.from_peer)
        if isinstance(outcome, Target):
            self._attempt(outcome)
        else:
            self._refuse(self._unrouted(outcome))

    def refused(self, reason: Refusal) -> None:
        if self.state is State.DONE:
            return
        relay = self.relay
        outcome = self._route()
        explained = reason in (Refusal.NOT_READY, Refusal.FAILED, Refusal.GONE)
        if explained and not isinstance(outcome, Target):
            self._refuse(self._unrouted(outcome))
        else:
            waited_s = relay.clock.now() - self.arrived_at
            self._refuse(refusals.of_admission(self.model, reason, waited_s))

    # -- called by the sweeper and at the end of the node -----------------------------------------

    def check_late(self, now: float) -> None:
        if self.state is State.SENT and now >= self._due_at:
            error = self._timeout()
            self._judge(Fault.BROKE, error.message)
            self.fail(error)

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

    def answer_began(self, upstream: Upstream, rest: bytes) -> None:
        relay = self.relay
        target = self.target
        assert target is not None
        if upstream.status >= 429 and may_be_better_elsewhere(upstream.status):
            reason = f"{relay.pool(target).who} answered {upstream.status}"
            self._judge(None if upstream.status in HEALTHY_REFUSALS else Fault.ERRED, reason)
            if self._has_other_target():
                self._upstream = None
                upstream.give_up()
                self._attempt_failed(reason, f"status_{upstream.status}")
                return
        elif relay.breakers.troubled:
            self._judge(None)
        self.state = State.RELAYING
        self.body = b""
        if upstream.until_close or (upstream.dechunks and upstream.chunked):
            self.keep_alive = False
        row = relay.traffic.of(self.model, "local" if target.local else "remote")
        if not target.local:
            self._queued_there_s = upstream.queued_s
        row.ttft.observe(relay.clock.now() - self._granted_at)
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
            self._attempt_broke(reason, "connection_lost")

    # -- steps ------------------------------------------------------------------------------------

    def _open_fresh(self) -> None:
        assert self.target is not None
        self._sent_at = 0.0
        self._ticket += 1
        self.relay.pool(self.target).connect(self, self._ticket, dechunks=self.http10)

    def _send(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._attempts += 1
        if self.relay.usage is not None:
            self._sent_at = self.relay.clock.now()
        self.relay.traffic.bytes_in += len(self.body)
        if self.client.writing_paused:
            upstream.pause()
        upstream.send(
            self,
            b"POST %b HTTP/1.1\r\nhost: meshd\r\n%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n"
            % (self.path, self.forward, self.request_id, len(self.body)),
            self.body,
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

    def _finish(self, outcome: str) -> None:
        if self._probe:
            self._forgo_probe()
        if self._sent_at and not self.from_peer and outcome in ("ok", "client_gone"):
            assert self.target is not None
            self.relay.answered(self.target, self._sent_at, self._queued_there_s)
        self.state = State.DONE
        self.body = b""
        self.relay.finished(self, outcome, self._bytes_out)
        self.client.exchange_done(self)
