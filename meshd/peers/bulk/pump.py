"""Copies between a bulk stream and a local connection, both ways, until either side ends.

What goes through is the talk of an engine with a part of itself on another node: some messages of a
hundred bytes to a hundred kibibytes for each token, the next one only after the answer to the last.
So a message is passed on in the turn of the loop in which it came, and nothing waits for more.

A side that does not take what came for it stops the reading of the other one: at most one piece
each way is held here.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from typing import Any, Final

from meshd.errors import PeerRefused, PeerUnreachable
from meshd.peers.bulk.stream import PIECE_BYTES, BulkStream, prompt

log = logging.getLogger(__name__)

CONNECT_S: Final = 3.0
"""To a server on this machine."""
BROKEN: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL
"""Said without being asked for; of a socket that was cut from another thread as well."""


def pump(stream: BulkStream, local: socket.socket) -> None:
    """Until `stream` or `local` (TCP) ends or is cut; closing both is the caller's. Silence ends
    neither.

    TLS has no half-close here: the end of one direction is the end of both. What a side sent before
    it closed is passed on.
    """
    try:
        stream.unblocked()
        local.setblocking(False)
        prompt(local)
        _Pump(stream, local).run()
    except PeerUnreachable as error:
        log.debug("a tunnel ended: %s", error.message)
    except OSError as error:
        log.debug("a tunnel ended at its local side: %s", error)


def serve_rpc(stream: BulkStream, grant: dict[str, Any]) -> None:
    """The carrier's service `rpc`: the RPC server on this machine's loopback at `port` of the
    grant. Raises PeerRefused."""
    try:
        local = socket.create_connection(("127.0.0.1", grant["port"]), timeout=CONNECT_S)
    except OSError as error:
        raise PeerRefused(
            f"the RPC server of this loan does not answer: {error.strerror or error}",
            reason="no_engine",
        ) from None
    with local:
        stream.send({"t": "open"})
        pump(stream, local)


class _Pump:
    def __init__(self, stream: BulkStream, local: socket.socket) -> None:
        self._stream = stream
        self._local = local
        self._for_local = memoryview(bytearray(PIECE_BYTES))
        self._for_stream = memoryview(bytearray(PIECE_BYTES))
        self._untaken = self._for_local[:0]
        """Came from the stream and was not taken by `local` yet."""

    def run(self) -> None:
        stream, of_stream, of_local = self._stream, self._stream.fileno(), self._local.fileno()
        poll = select.poll()
        while True:
            poll.register(of_stream, self._wanted_of_stream())
            poll.register(of_local, self._wanted_of_local())
            more = stream.has_more and not self._untaken
            ready = dict(poll.poll(0 if more else None))
            at_stream, at_local = ready.get(of_stream, 0), ready.get(of_local, 0)
            if _broken(at_stream) or _broken(at_local):
                return
            if at_local & select.POLLOUT:
                self._deliver()
            if at_stream & select.POLLOUT:
                stream.push()
            if (more or at_stream & select.POLLIN) and not self._untaken:
                self._untaken = self._for_local[: stream.take(self._for_local)]
                self._deliver()
            if at_local & select.POLLIN and not self._collect():
                return

    def _wanted_of_stream(self) -> int:
        reading = 0 if self._untaken else select.POLLIN
        return reading | (select.POLLOUT if self._stream.unsent else 0)

    def _wanted_of_local(self) -> int:
        reading = 0 if self._stream.unsent else select.POLLIN
        return reading | (select.POLLOUT if self._untaken else 0)

    def _deliver(self) -> None:
        """To `local`, as much as it takes."""
        with contextlib.suppress(BlockingIOError):
            while self._untaken:
                self._untaken = self._untaken[self._local.send(self._untaken) :]

    def _collect(self) -> bool:
        """From `local` to the stream; whether `local` goes on."""
        try:
            count = self._local.recv_into(self._for_stream)
        except BlockingIOError:
            return True
        self._stream.give(self._for_stream[:count])
        return count > 0


def _broken(events: int) -> bool:
    """Whether a side is reset or cut. One that can still be read says so itself when it ends."""
    return bool(events & BROKEN) and not events & select.POLLIN
