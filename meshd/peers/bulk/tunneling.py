"""The process of tunnels on a host: a port on loopback for each worker, whose RPC server it is.

The engine connects there as to an RPC server of this machine; every connection becomes a bulk
stream to the worker. A connection of another user is closed where the platform tells whose one is:
an RPC server believes everybody, and lets them read and write the memory it lends.

A thread waits for the connections of each port and a thread carries each of them. At most
`MAX_CONNECTIONS` are open at once on a port; one more is closed. The engine has one and a probe
another.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from meshd.errors import MeshdError, PeerRefused, ProtocolError
from meshd.peers.bulk.dialing import open_stream
from meshd.peers.bulk.pump import pump
from meshd.peers.bulk.socket_owner import owner_of
from meshd.peers.bulk.stream import BulkStream
from meshd.peers.bulk.tunnel_words import (
    ORDER_LIMIT,
    Carried,
    Listening,
    News,
    Refused,
    TunnelEnd,
    parse_ends,
)
from meshd.peers.bulk.words import Credentials
from meshd.peers.links.frames import FrameReader, frame, parse

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 4
REPORT_S: Final = 1.0
"""Between two reports of what was carried; the end of a connection is reported at once."""
READ_BYTES: Final = 64 * 1024
ACCEPT_PAUSE_S: Final = 0.1
"""After a connection that could not be accepted, as without descriptors: it stays in the queue."""
SWITCH_INTERVAL_S: Final = 0.0005
"""How long a thread keeps the interpreter from others; Python's own 5 ms are those of a token."""
TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


class Tunneling:
    """`control`: the daemon, a blocking socket of which the order was read."""

    def __init__(
        self, control: socket.socket, credentials: Credentials, ends: Sequence[TunnelEnd]
    ) -> None:
        self._control = control
        self._credentials = credentials
        self._ports = [_Port(end) for end in ends]
        self._strangers = 0
        """Not told yet."""
        self._lock = threading.Lock()
        """Guards the counts, and what is written to `control`."""

    def run(self) -> None:
        """Until the daemon is gone. Threads of connections may still run then: end the process."""
        self._tell(Listening(ports=tuple(port.number for port in self._ports)))
        for index in range(len(self._ports)):
            threading.Thread(target=self._attend, args=(index,), name="port", daemon=True).start()
        try:
            while True:
                said, _, _ = select.select([self._control], [], [], REPORT_S)
                if said and not self._control.recv(READ_BYTES):
                    return
                self._report()
        except OSError:
            return  # it ended without having read everything

    # -- connections ------------------------------------------------------------------------------

    def _attend(self, index: int) -> None:
        """Accept what comes to one port."""
        port = self._ports[index]
        while True:
            try:
                connection, _ = port.listener.accept()
            except OSError as error:
                log.warning("a connection for node %s was lost: %s", port.end.name, error)
                time.sleep(ACCEPT_PAUSE_S)
                continue
            if self._admitted(port, connection):
                threading.Thread(
                    target=self._carry, args=(index, connection), name="tunnel", daemon=True
                ).start()
            else:
                connection.close()

    def _admitted(self, port: _Port, connection: socket.socket) -> bool:
        if not is_ours(connection):
            with self._lock:
                self._strangers += 1
            return False
        with self._lock:
            if port.connections >= MAX_CONNECTIONS:
                log.warning(
                    "%d tunnels to node %s are open already", MAX_CONNECTIONS, port.end.name
                )
                return False
            port.connections += 1
        return True

    def _carry(self, index: int, connection: socket.socket) -> None:
        port = self._ports[index]
        wanted = {"t": "open", "service": "rpc", "instance": port.end.loan}
        stream = None
        try:
            stream, _ = open_stream(self._credentials, port.end, wanted)
            with self._lock:
                port.streams.add(stream)
            pump(stream, connection)
        except MeshdError as error:
            reason = error.reason if isinstance(error, PeerRefused) else error.code
            self._tell(Refused(end=index, reason=reason, message=error.message))
        finally:
            with self._lock:
                port.connections -= 1
                if stream is not None:
                    port.ended(stream)
            if stream is not None:
                stream.close()
            connection.close()
            self._report()

    # -- the daemon -------------------------------------------------------------------------------

    def _report(self) -> None:
        with self._lock:
            carried = tuple(port.news() for port in self._ports)
            strangers, self._strangers = self._strangers, 0
            if strangers or any(map(any, carried)):
                self._write(Carried(bytes=carried, strangers=strangers))

    def _tell(self, news: News) -> None:
        with self._lock:
            self._write(news)

    def _write(self, news: News) -> None:
        try:
            self._control.sendall(frame(news.model_dump()))
        except OSError as error:  # `run` sees that as well
            log.debug("the daemon is gone: %s", error)


class _Port:
    """Where the engine finds one worker, and what went through."""

    def __init__(self, end: TunnelEnd) -> None:
        self.end = end
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.number: int = self.listener.getsockname()[1]
        self.connections = 0
        self.streams: set[BulkStream] = set()
        self._of_ended = (0, 0)
        self._told = (0, 0)

    def ended(self, stream: BulkStream) -> None:
        self.streams.remove(stream)
        self._of_ended = _sum(self._of_ended, stream)

    def news(self) -> tuple[int, int]:
        """Bytes received and sent since the last time."""
        before, self._told = self._told, _sum(self._of_ended, *self.streams)
        return self._told[0] - before[0], self._told[1] - before[1]


def _sum(start: tuple[int, int], *streams: BulkStream) -> tuple[int, int]:
    return (
        start[0] + sum(stream.bytes_in for stream in streams),
        start[1] + sum(stream.bytes_out for stream in streams),
    )


def is_ours(connection: socket.socket) -> bool:
    """Whether the other end of a connection on loopback belongs to a process of this user; also if
    the platform does not tell. Of one that is closed already nobody can tell, and it is not."""
    try:
        client, server = connection.getpeername(), connection.getsockname()
    except OSError:
        return False
    for _ in range(2):  # the table may change while it is read, and a line be missed
        try:
            table = "".join(path.read_text() for path in TABLES if path.exists())
        except OSError:
            return True
        if not table:
            return True
        if (owner := owner_of(table, client, server)) is not None:
            return owner == os.getuid()
    return False


def run_process() -> NoReturn:
    """Be a process of tunnels: standard input is the socket the daemon gave."""
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        order = parse_ends(parse(_first_frame(control)))
    except (ProtocolError, OSError) as error:
        log.error("no order for tunnels: %s", error)
        os._exit(1)
    Tunneling(control, order.credentials, order.ends).run()
    os._exit(0)  # threads that wait for the other side would hold up an orderly end


def _first_frame(control: socket.socket) -> bytes:
    """Raises ProtocolError."""
    reader = FrameReader(ORDER_LIMIT)
    while data := control.recv(READ_BYTES):
        if frames := reader.feed(data):
            return frames[0]
    raise ProtocolError("the daemon ended before it said a word")
