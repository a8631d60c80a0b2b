"""The carrier's side: connections come in, a thread each serves what the daemon grants.

Nothing is decided here. The daemon bounds how many connections there are, says whose they may be
and what they get; this process does the TLS and moves the bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, NoReturn, TypeAlias

from meshd.errors import MeshdError, PeerRefused, PeerUnreachable
from meshd.peers.bulk.stream import BulkStream
from meshd.peers.bulk.words import (
    ANSWER_LIMIT,
    ANSWER_S,
    FIRST_WORDS_S,
    NUMBER_BYTES,
    REQUEST_LIMIT,
    credentials_from_wire,
    der_from_wire,
    der_to_wire,
)
from meshd.peers.links.frames import FrameReader, frame, parse
from meshd.peers.links.hello import parse_refusal, refusal
from meshd.peers.trust.tls import carrier_context

log = logging.getLogger(__name__)

READ_BYTES: Final = 64 * 1024
NICENESS: Final = 10
"""Added to that of threads that carry weights: where all cores are busy, who waits for the next
word of a chat goes first."""
SWITCH_INTERVAL_S: Final = 0.0005
"""How long a thread keeps the interpreter from others; Python's own 5 ms are those of a token."""

Service: TypeAlias = Callable[[BulkStream, dict[str, Any]], None]
"""Serve one stream, by the daemon's grant, until either side has had enough. May raise MeshdError;
a PeerRefused is told to the other side."""


class Carrier:
    """`handover` brings connections, `control` frames; both are blocking unix sockets."""

    def __init__(
        self, handover: socket.socket, control: socket.socket, services: Mapping[str, Service]
    ) -> None:
        self._handover = handover
        self._control = control
        self._services = services
        self._context: ssl.SSLContext | None = None
        self._equipped = threading.Event()
        self._lock = threading.Lock()
        """Guards the two tables; `_speaking` guards what is written to `control`."""
        self._streams: dict[int, BulkStream] = {}
        self._asked: dict[int, Future[dict[str, Any]]] = {}
        self._speaking = threading.Lock()

    def run(self) -> None:
        """Until the daemon is gone. Threads of connections may still run then: end the process."""
        threading.Thread(target=self._listen, name="control", daemon=True).start()
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._handover, NUMBER_BYTES, 1)
            except OSError:
                return
            if not data:
                return
            if not fds:
                log.warning("a connection was lost on its way here: too many open files?")
                self._ended(int.from_bytes(data), None)
                continue
            connection = socket.socket(fileno=fds[0])
            threading.Thread(
                target=self._attend,
                args=(int.from_bytes(data), connection),
                name="stream",
                daemon=True,
            ).start()

    # -- one connection ---------------------------------------------------------------------------

    def _attend(self, number: int, connection: socket.socket) -> None:
        stream = None
        try:
            if not self._equipped.wait(FIRST_WORDS_S):
                raise PeerUnreachable("the daemon gave no credentials")
            assert self._context is not None
            stream = BulkStream(
                connection,
                self._context,
                server=True,
                limit=REQUEST_LIMIT,
                within_s=FIRST_WORDS_S,
            )
            with self._lock:
                self._streams[number] = stream
            self._serve(number, stream)
        except MeshdError as error:
            log.debug("a bulk stream ended: %s", error.message)
        except (ssl.SSLError, OSError) as error:
            log.debug("a bulk stream ended in TLS: %s", error)
        except Exception:  # a bug: it costs this stream, not the others
            log.exception("a bulk stream failed")
        finally:
            with self._lock:
                self._streams.pop(number, None)
                self._asked.pop(number, None)
            connection.close()
            self._ended(number, stream)

    def _serve(self, number: int, stream: BulkStream) -> None:
        stream.secure()
        wanted = stream.receive()
        try:
            answer = self._ask(number, stream, wanted)
            if answer["t"] == "refused":
                raise parse_refusal(answer)
            service = self._services.get(answer["service"])
            if service is None:
                raise PeerRefused(
                    f"no service `{answer['service']}` is carried here", reason="no_service"
                )
            stream.unhurried()
            service(stream, answer["grant"])
        except PeerRefused as error:
            stream.send(refusal(error))
            raise

    def _ask(self, number: int, stream: BulkStream, wanted: dict[str, Any]) -> dict[str, Any]:
        certificate = stream.certificate
        assert certificate is not None, "the context wants one"
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            self._asked[number] = answer
        self._tell(
            {"t": "asked", "id": number, "certificate": der_to_wire(certificate), "open": wanted}
        )
        try:
            return answer.result(ANSWER_S)
        except TimeoutError:
            raise PeerRefused("this node is too busy to answer", reason="busy") from None

    # -- the daemon -------------------------------------------------------------------------------

    def _listen(self) -> None:
        reader = FrameReader(ANSWER_LIMIT)
        try:
            while data := self._control.recv(READ_BYTES):
                for body in reader.feed(data):
                    self._heard(parse(body))
        except ConnectionResetError:
            pass  # it ended without having read everything
        finally:
            self._handover.shutdown(socket.SHUT_RDWR)  # ends `run`

    def _heard(self, message: dict[str, Any]) -> None:
        match message["t"]:
            case "credentials":
                mine = credentials_from_wire(message)
                self._context = carrier_context(
                    der_from_wire(mine.ca_der), mine.certificate_path, mine.key_path, server=True
                )
                self._equipped.set()
            case "grant" | "refused":
                with self._lock:
                    asked = self._asked.get(message["id"])
                if asked is not None:
                    asked.set_result(message)
            case "cut":
                with self._lock:
                    stream = self._streams.get(message["id"])
                    if stream is not None:
                        stream.abort()

    def _ended(self, number: int, stream: BulkStream | None) -> None:
        bytes_in, bytes_out = (0, 0) if stream is None else (stream.bytes_in, stream.bytes_out)
        self._tell({"t": "ended", "id": number, "bytes_in": bytes_in, "bytes_out": bytes_out})

    def _tell(self, message: dict[str, Any]) -> None:
        # Without a daemon this process ends in a moment, and nobody misses the words.
        with self._speaking, contextlib.suppress(OSError):
            self._control.sendall(frame(message))


def give_way() -> None:
    """Let this thread, for good, run after those that somebody waits for; only Linux can."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def run_process(services: Mapping[str, Service]) -> NoReturn:
    """Be a carrier process: standard input and output are the sockets the daemon gave."""
    handover, control = (socket.socket(fileno=os.dup(fd)) for fd in (0, 1))
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # whatever is printed must not be taken for a frame
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    Carrier(handover, control, services).run()
    os._exit(0)  # threads that wait for the other side would hold up an orderly end
