"""The daemon's side: gives connections to the carrier process and answers its questions.

The process is started by the first connection and again by the next one after it died; it is ended
when it has had nothing to do for `IDLE_S`. How many connections there may be is decided here alone:
`MAX_STRANGERS` that have not been granted anything yet, and `limit` streams. Full-policy: a
stranger more is closed, a stream more is refused as busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable
from typing import Any, Final, cast

from meshd.config import environment_of_children
from meshd.errors import MeshdError, PeerRefused, ProtocolError
from meshd.ids import NodeId
from meshd.kernel import Clock
from meshd.peers.bulk.words import NUMBER_BYTES, Credentials, der_from_wire, der_to_wire
from meshd.peers.links.frames import FrameReader, frame, parse
from meshd.peers.links.hello import refusal
from meshd.peers.links.linking import Spawn
from meshd.peers.links.streams import Open, parse_open
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.trust import Trust

log = logging.getLogger(__name__)

MAX_STRANGERS: Final = 32
RESTART_PAUSE_S: Final = 1.0
"""Least time between two starts of the process: strangers can cause them."""
IDLE_S: Final = 300.0
"""It takes some 50 MB, and a third of a second to start."""
END_S: Final = 2.0
"""From SIGKILL to the end of the process."""
QUESTION_LIMIT: Final = 64 * 1024


def credentials_of(trust: Trust) -> Credentials:
    """What a process needs to open and serve bulk streams for the node of that membership."""
    membership = trust.membership
    return Credentials(
        ca_der=der_to_wire(membership.ca_certificate),
        certificate_path=str(membership.certificate_path),
        key_path=str(trust.identity.key_path),
        mesh_id=membership.mesh_id,
    )


class Handover:
    """`command` becomes the carrier process, its standard input and output two sockets
    (`words.py`). `authenticate` says whose certificate one is, `serve`
    what a node gets; both raise PeerRefused. `limit`: of streams. `lost` is called when the process
    ended unasked, and streams with it."""

    def __init__(
        self,
        command: tuple[str, ...],
        *,
        authenticate: Callable[[bytes | None], PeerCertificate],
        serve: Callable[[NodeId, Open], dict[str, Any]],
        credentials: Callable[[], Credentials],
        lost: Callable[[], None],
        limit: int,
        clock: Clock,
        spawn: Spawn,
    ) -> None:
        self.bytes_carried = [0, 0]
        """Received and sent by streams that have ended."""
        self._command = command
        self._authenticate = authenticate
        self._serve = serve
        self._credentials = credentials
        self._tell_lost = lost
        self._limit = limit
        self._clock = clock
        self._spawn = spawn
        self._numbers = itertools.count(1)
        self._carrier: _Carrier | None = None
        self._next_start_at = float("-inf")
        self._idle_timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def streams(self) -> int:
        """Open now."""
        return 0 if self._carrier is None else len(self._carrier.streams)

    def take(self, connection: socket.socket) -> None:
        """Give `connection` to the carrier, or close it."""
        with connection:
            carrier = self._running()
            if carrier is None or len(carrier.strangers) >= MAX_STRANGERS:
                return
            number = next(self._numbers)
            try:
                socket.send_fds(
                    carrier.handover, [number.to_bytes(NUMBER_BYTES)], [connection.fileno()]
                )
            except OSError as error:  # it is stuck or just died
                log.debug("a bulk connection could not be handed over: %s", error)
                return
            carrier.strangers.add(number)
            self._not_idle()

    def expect(self) -> None:
        """A connection is about to come: start the process, which takes a moment."""
        carrier = self._running()
        if carrier is not None:
            self._rest(carrier)

    def renewed(self) -> None:
        """This node has a new certificate."""
        if self._carrier is not None:
            self._equip(self._carrier)

    def cut(self, node: NodeId) -> None:
        """End the streams that `node` opened here."""
        if self._carrier is not None:
            for number, opener in self._carrier.streams.items():
                if opener == node:
                    self._carrier.tell({"t": "cut", "id": number})

    def close(self) -> None:
        """End the process, and with it every stream."""
        self._closed = True
        self._not_idle()
        if self._carrier is not None:
            self._carrier.close()

    # -- the process ------------------------------------------------------------------------------

    def _running(self) -> _Carrier | None:
        """The carrier, started if need be; None if there can be none now."""
        if self._carrier is not None or self._closed:
            return self._carrier
        now = self._clock.now()
        if now < self._next_start_at:
            return None
        self._next_start_at = now + RESTART_PAUSE_S
        handover, its_handover = socket.socketpair()
        control, its_control = socket.socketpair()
        handover.setblocking(False)
        carrier = self._carrier = _Carrier(handover, self._heard, self._lost)
        self._spawn(self._keep(carrier, control, its_handover, its_control))
        return carrier

    async def _keep(
        self,
        carrier: _Carrier,
        control: socket.socket,
        its_handover: socket.socket,
        its_control: socket.socket,
    ) -> None:
        """Start the process and wait for its end; it ends when this is cancelled."""
        loop = asyncio.get_running_loop()
        process = None
        try:
            with its_handover, its_control:
                process, _ = await loop.subprocess_exec(
                    lambda: _Exit(carrier),
                    *self._command,
                    stdin=its_handover.fileno(),
                    stdout=its_control.fileno(),
                    stderr=None,
                    env=environment_of_children(),
                    start_new_session=True,
                )
            await loop.create_unix_connection(lambda: carrier, sock=control)
            self._equip(carrier)
            log.info("the carrier of bulk streams runs as process %d", process.get_pid() or 0)
            await carrier.over.wait()
        except OSError as error:
            log.warning("the carrier of bulk streams cannot be started: %s", error)
        finally:
            carrier.close()
            self._lost(carrier)
            if process is None:
                control.close()
            else:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_S):
                        await carrier.exited.wait()
                process.close()

    def _equip(self, carrier: _Carrier) -> None:
        carrier.tell({"t": "credentials", **self._credentials().to_wire()})

    def _lost(self, carrier: _Carrier) -> None:
        if self._carrier is not carrier:
            return
        self._carrier = None
        self._not_idle()
        if not self._closed:
            log.warning(
                "the carrier of bulk streams is gone, and %d streams with it; the next connection "
                "starts another", len(carrier.streams),
            )  # fmt: skip
            if carrier.streams:
                self._tell_lost()

    def _not_idle(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _rest(self, carrier: _Carrier) -> None:
        """If it has nothing to do, it has `IDLE_S` to get something."""
        if not carrier.strangers and not carrier.streams:
            self._not_idle()
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(IDLE_S, self._retire, carrier)

    def _retire(self, carrier: _Carrier) -> None:
        """Nobody wants anything of it any more."""
        log.debug("the carrier of bulk streams is not needed and ends")
        self._idle_timer = self._carrier = None
        carrier.close()

    # -- its questions ----------------------------------------------------------------------------

    def _heard(self, carrier: _Carrier, message: dict[str, Any]) -> None:
        number = message["id"]
        match message["t"]:
            case "asked" if number in carrier.strangers:
                carrier.tell({"id": number, **self._answer(carrier, message)})
            case "ended":
                carrier.strangers.discard(number)
                carrier.streams.pop(number, None)
                self.bytes_carried[0] += message["bytes_in"]
                self.bytes_carried[1] += message["bytes_out"]
                if carrier is self._carrier:
                    self._rest(carrier)

    def _answer(self, carrier: _Carrier, question: dict[str, Any]) -> dict[str, Any]:
        try:
            node = self._authenticate(der_from_wire(question["certificate"])).node_id
            wanted = parse_open(question["open"])
            if len(carrier.streams) >= self._limit:
                raise PeerRefused(
                    f"{self._limit} bulk streams are open here already", reason="busy"
                )
            grant = self._serve(node, wanted)
        except PeerRefused as error:
            return refusal(error)
        except MeshdError as error:
            return refusal(PeerRefused(error.message, reason=error.code))
        number = question["id"]
        carrier.strangers.discard(number)
        carrier.streams[number] = node
        return {"t": "grant", "service": wanted.service, "grant": grant}


class _Carrier(asyncio.Protocol):
    """One run of the process, and what it has in hand. Speaks frames on its control socket."""

    def __init__(
        self,
        handover: socket.socket,
        heard: Callable[[_Carrier, dict[str, Any]], None],
        lost: Callable[[_Carrier], None],
    ) -> None:
        self.handover = handover
        self.strangers: set[int] = set()
        """Connections that were granted nothing yet."""
        self.streams: dict[int, NodeId] = {}
        self.over = asyncio.Event()
        """Its control socket is closed, or it has exited."""
        self.exited = asyncio.Event()
        self._heard = heard
        self._lost = lost
        self._reader = FrameReader(QUESTION_LIMIT)
        self._control: asyncio.Transport | None = None

    def tell(self, message: dict[str, Any]) -> None:
        if self._control is not None and not self._control.is_closing():
            self._control.write(frame(message))

    def close(self) -> None:
        """The process ends when it sees this."""
        self.handover.close()
        if self._control is not None:
            self._control.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._control = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                self._heard(self, parse(body))
        except (ProtocolError, KeyError):
            log.exception("the carrier of bulk streams talks nonsense and is ended")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._control = None
        self.handover.close()
        self.over.set()
        self._lost(self)


class _Exit(asyncio.SubprocessProtocol):
    def __init__(self, carrier: _Carrier) -> None:
        self._carrier = carrier

    def process_exited(self) -> None:
        self._carrier.over.set()
        self._carrier.exited.set()
