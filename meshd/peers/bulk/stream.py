"""One bulk stream: TLS over a TCP connection, for one thread.

The TLS engine works in memory and the socket is read and written in large pieces: a TLS record has
16 KiB at most, and two system calls for each of them cost a fifth of the speed. Frames are those of
links (`frames.py`); raw bytes come between them as the frames say. Everything blocks, until a
stream of whose bytes nothing is known any more is made `unblocked`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import Any, Final, cast

from meshd.errors import PeerUnreachable, ProtocolError
from meshd.peers.links.frames import HEADER_BYTES, frame, parse

PIECE_BYTES: Final = 256 * 1024
"""Read from or written to the socket at once."""
SILENCE_S: Final = 60.0
"""The other side is given up when nothing moves for so long."""
KEEP_ALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 4}
"""Seconds of silence before the kernel asks whether the other machine is there, seconds between
two questions, and questions without an answer that end the connection; by the option's name, as far
as the platform has it. Not TCP_USER_TIMEOUT: Linux also ends by it a connection whose other side is
well and just does not read, as an engine that computes for longer than that."""


class TlsFailed(PeerUnreachable):
    """TLS does not go on. `alert`: the other side objected, most likely to our certificate."""

    def __init__(self, message: str, *, alert: bool) -> None:
        super().__init__(message)
        self.alert = alert


class BulkStream:
    """Made by `secure`. Methods raise PeerUnreachable when the other side is gone or silent for
    too long, ProtocolError when it sends what it may not. For one thread, but for `abort`."""

    def __init__(
        self,
        connection: socket.socket,
        context: ssl.SSLContext,
        *,
        server: bool,
        limit: int,
        within_s: float,
    ) -> None:
        """Takes `connection` over. `limit`: of a frame that is received, in bytes; `within_s`: for
        everything up to `unhurried`."""
        self.bytes_in = 0
        self.bytes_out = 0
        """On the wire, so far."""
        self._connection = connection
        self._limit = limit
        self._hurry_until: float | None = time.monotonic() + within_s
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._piece = memoryview(bytearray(PIECE_BYTES))
        self._unsent = memoryview(b"")
        """Encrypted, and not taken by the socket when it was unblocked."""

    def secure(self) -> None:
        """The handshake. Raises PeerUnreachable, ssl.SSLCertVerificationError."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            except ssl.SSLCertVerificationError:
                with contextlib.suppress(PeerUnreachable):
                    self._flush()  # the alert says why
                raise
            except ssl.SSLError as error:
                with contextlib.suppress(PeerUnreachable):
                    self._flush()
                raise _failed(error) from None
        self._flush()

    @property
    def alpn(self) -> str | None:
        return self._tls.selected_alpn_protocol()

    @property
    def certificate(self) -> bytes | None:
        """Of the other side, DER; after the handshake."""
        return self._tls.getpeercert(binary_form=True)

    def unhurried(self) -> None:
        """The first words are said: from now on only silence ends the stream."""
        self._hurry_until = None
        self._connection.settimeout(SILENCE_S)

    # -- frames and bytes -------------------------------------------------------------------------

    def send(self, value: dict[str, Any]) -> None:
        self.write(memoryview(frame(value)))

    def receive(self) -> dict[str, Any]:
        header = bytearray(HEADER_BYTES)
        self.read_into(memoryview(header))
        length = int.from_bytes(header)
        if length > self._limit:
            raise ProtocolError(f"a frame of {length} bytes is over the limit of {self._limit}")
        body = bytearray(length)
        self.read_into(memoryview(body))
        return parse(bytes(body))

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with raw bytes."""
        while buffer:
            try:
                # With a buffer it returns how much it put there, whatever its signature says.
                count = cast("int", self._tls.read(len(buffer), buffer))
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self._flush()
                self._fill()
                continue
            except ssl.SSLError as error:
                raise _failed(error) from None
            if not count:
                raise PeerUnreachable("the other side closed the stream")
            buffer = buffer[count:]

    def write(self, data: memoryview) -> None:
        """Send raw bytes."""
        data = data.cast("B")
        for start in range(0, len(data), PIECE_BYTES):
            self._encrypt(data[start : start + PIECE_BYTES])
            self._flush()

    # -- bytes, without waiting -------------------------------------------------------------------

    def unblocked(self) -> None:
        """From now on only the methods below, none of which waits. Silence does not end the stream
        any more; that the other machine is gone does."""
        self._connection.setblocking(False)
        prompt(self._connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def has_more(self) -> bool:
        """Whether `take` may find bytes although the socket has none."""
        return bool(self._incoming.pending or self._tls.pending())

    @property
    def unsent(self) -> bool:
        """Whether `push` has something to do when the socket can be written."""
        return bool(self._unsent or self._outgoing.pending)

    def take(self, buffer: memoryview) -> int:
        """How many bytes were put into `buffer`; 0: none have come."""
        if not self.has_more:
            try:
                count = self._connection.recv_into(self._piece)
            except BlockingIOError:
                return 0
            except OSError as error:
                raise _broken(error) from None
            if not count:
                raise PeerUnreachable("the other side closed the stream")
            self.bytes_in += count
            self._incoming.write(self._piece[:count])
        return self._decrypt(buffer)

    def give(self, data: memoryview) -> None:
        """Take over all of `data` and send what the socket takes of it; the rest is `unsent`. Give
        nothing more until it is sent."""
        self._encrypt(data)
        self.push()

    def push(self) -> None:
        """Send what the socket takes now of what is unsent."""
        try:
            while self.unsent:
                if not self._unsent:
                    self._unsent = memoryview(self._outgoing.read())
                count = self._connection.send(self._unsent)
                self.bytes_out += count
                self._unsent = self._unsent[count:]
        except BlockingIOError:
            pass
        except OSError as error:
            raise _broken(error) from None

    def _decrypt(self, buffer: memoryview) -> int:
        """What the TLS engine has in hand, as far as it fits."""
        filled = 0
        try:
            while filled < len(buffer) and self.has_more:
                free = buffer[filled:]
                count = cast("int", self._tls.read(len(free), free))
                if not count:
                    raise PeerUnreachable("the other side closed the stream")
                filled += count
        except ssl.SSLWantReadError:
            pass  # the record is not complete
        except ssl.SSLError as error:
            raise _failed(error) from None
        return filled

    def _encrypt(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._tls.write(data) :]  # one record a call
        except ssl.SSLError as error:
            raise _failed(error) from None

    # -- end --------------------------------------------------------------------------------------

    def close(self) -> None:
        """What was sent still arrives. No farewell in TLS: frames tell what is whole."""
        self._connection.close()

    def abort(self) -> None:
        """End it now. From any thread: the one that uses the stream gets PeerUnreachable."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    # -- the socket -------------------------------------------------------------------------------

    def _fill(self) -> None:
        """At least one byte from the socket into the TLS engine, or the end of the stream."""
        try:
            self._mind_the_hurry()
            count = self._connection.recv_into(self._piece)
        except OSError as error:
            raise _broken(error) from None
        self.bytes_in += count
        if count:
            self._incoming.write(self._piece[:count])
        else:
            self._incoming.write_eof()

    def _flush(self) -> None:
        """What the TLS engine has to say, to the socket."""
        rest = memoryview(self._outgoing.read())
        try:
            while rest:
                self._mind_the_hurry()
                count = self._connection.send(rest)
                self.bytes_out += count
                rest = rest[count:]
        except OSError as error:
            raise _broken(error) from None

    def _mind_the_hurry(self) -> None:
        if self._hurry_until is not None:
            left_s = self._hurry_until - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)


def prompt(connection: socket.socket) -> None:
    """What is sent on `connection` goes at once, and its end is noticed although nothing is."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _broken(error: OSError) -> PeerUnreachable:
    if isinstance(error, TimeoutError):
        return PeerUnreachable("the other side was silent for too long")
    return PeerUnreachable(f"the stream broke: {error.strerror or error}")


def _failed(error: ssl.SSLError) -> PeerUnreachable:
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLEOFError) or "EOF" in reason:
        return PeerUnreachable("the other side closed the stream")
    words = reason.replace("_", " ").lower()
    return TlsFailed(f"TLS ended: {words}", alert="ALERT" in reason)
