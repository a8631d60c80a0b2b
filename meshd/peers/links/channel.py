"""One connection that speaks frames, read by a task; for the first words of every connection.

After them the connection may be handed to another protocol (`detach`), which gets what was already
received. Full-policy: reading from the transport stops while `MAX_WAITING` frames wait.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, cast

from meshd.errors import PeerUnreachable, ProtocolError
from meshd.peers.links.frames import FrameReader, frame, parse

MAX_WAITING = 16


class FrameChannel(asyncio.Protocol):
    """Reads raise PeerUnreachable when the other side is gone, ProtocolError when it is no peer of
    ours. `read` is for one task at a time."""

    def __init__(self, limit: int) -> None:
        self.transport: asyncio.Transport | None = None
        self.alpn: str | None = None
        self.certificate: bytes | None = None
        """DER of the other side's certificate; None if it showed none."""
        self.origin = ""
        """HOST:PORT of the other side, for logs."""
        self.closed = asyncio.Event()
        self._reader = FrameReader(limit)
        self._frames: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        self._problem: Exception | None = None

    # -- asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple) and len(peer) >= 2:
            self.origin = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            self.alpn = tls.selected_alpn_protocol()
            self.certificate = tls.getpeercert(binary_form=True)

    def data_received(self, data: bytes) -> None:
        if self._problem is not None:
            return
        try:
            self._frames.extend(self._reader.feed(data))
        except ProtocolError as error:
            self._fail(error)
            self.close()
            return
        if len(self._frames) >= MAX_WAITING and self.transport is not None:
            self.transport.pause_reading()
        self._arrived.set()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.closed.set()
        why = f": {exc}" if exc is not None else ""
        self._fail(PeerUnreachable(f"the other side closed the connection{why}"))

    # -- for its owner ----------------------------------------------------------------------------

    async def read(self) -> dict[str, Any]:
        """The next frame's object. The caller bounds the wait with `asyncio.timeout`."""
        while not self._frames:
            if self._problem is not None:
                raise self._problem
            self._arrived.clear()
            await self._arrived.wait()
        body = self._frames.popleft()
        if len(self._frames) < MAX_WAITING and self.transport is not None:
            self.transport.resume_reading()
        return parse(body)

    def send(self, value: Any) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(frame(value))

    def close(self) -> None:
        """Close when what was sent is out."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def detach(self, successor: asyncio.Protocol) -> None:
        """Give the connection to `successor`: its connection_made, then what was received ahead."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise self._problem or PeerUnreachable("the connection is gone")
        self.transport = None
        transport.set_protocol(successor)
        successor.connection_made(transport)
        transport.resume_reading()
        rest = b"".join(len(f).to_bytes(4) + f for f in self._frames) + self._reader.take_rest()
        self._frames.clear()
        if rest:
            successor.data_received(rest)

    def _fail(self, problem: Exception) -> None:
        if self._problem is None:
            self._problem = problem
        self._arrived.set()
