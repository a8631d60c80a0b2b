"""Sends a file's bytes with whatever should go wrong on the way, past aiohttp's own checks."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import BinaryIO

from aiohttp import web

from tests.hub.faults import Fault, Flip, Reset, Slow, Stall, Truncate, WrongLength
from tests.hub.repositories import StoredFile

SIOCOUTQ = 0x5411
"""Bytes sent and not yet acknowledged (tcp(7))."""
PIECE_BYTES = 4 * 1024 * 1024
SLOW_STEP_S = 0.02


async def send_file(
    request: web.Request,
    response: web.StreamResponse,
    file: StoredFile,
    span: range,
    faults: Sequence[Fault],
    on_sent: Callable[[int], None],
) -> None:
    """Answer `request` with `response` and the bytes `span` of `file`, as `faults` have it."""
    wrong = [fault for fault in faults if isinstance(fault, WrongLength)]
    response.content_length = len(span) + sum(fault.by for fault in wrong)
    stops = sorted(
        (fault for fault in faults if isinstance(fault, Truncate | Stall | Reset)),
        key=lambda fault: fault.at,
    )
    if wrong or stops:
        response.force_close()
    writer = await response.prepare(request)
    transport = request.transport
    if writer is None or transport is None:
        raise ConnectionResetError("the client has gone")
    writer.send_headers()
    end = stops[0].at if stops else span.stop
    slow = min((fault.bytes_per_s for fault in faults if isinstance(fault, Slow)), default=None)
    with file.location.open("rb") as source:
        line = _Line(transport, source, slow, on_sent)
        for flip in sorted(
            (fault for fault in faults if isinstance(fault, Flip) and fault.at < end),
            key=lambda fault: fault.at,
        ):
            await line.send(span.start, flip.at)
            await line.send_flipped(flip)
            span = range(flip.at + 1, span.stop)
        await line.send(span.start, end)
    match stops[0] if stops else None:
        case Stall():
            await asyncio.Event().wait()  # cancelled when the client or the hub goes
        case Reset():
            await _wait_arrived(transport)
            reset(transport)
        case Truncate():
            transport.close()
        case None if wrong:
            transport.close()
        case None:
            await response.write_eof()


def reset(transport: asyncio.Transport) -> None:
    """End the connection with RST instead of FIN."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Line:
    """The way to the client, at its speed."""

    def __init__(
        self,
        transport: asyncio.Transport,
        source: BinaryIO,
        bytes_per_s: float | None,
        on_sent: Callable[[int], None],
    ) -> None:
        self._transport = transport
        self._source = source
        self._bytes_per_s = bytes_per_s
        self._on_sent = on_sent

    async def send(self, start: int, stop: int) -> None:
        """The bytes from `start` to `stop` of the file, without copying them."""
        loop = asyncio.get_running_loop()
        piece = PIECE_BYTES
        if self._bytes_per_s is not None:
            piece = max(1, min(piece, round(self._bytes_per_s * SLOW_STEP_S)))
        while start < stop:
            count = min(piece, stop - start)
            async with self._paced(count):
                sent = await loop.sendfile(self._transport, self._source, start, count)
                if sent != count:
                    raise EOFError(f"{self._source.name} became shorter")
                self._on_sent(count)
            start += count

    async def send_flipped(self, flip: Flip) -> None:
        self._source.seek(flip.at)
        self._transport.write(bytes([self._source.read(1)[0] ^ flip.mask]))
        self._on_sent(1)

    @asynccontextmanager
    async def _paced(self, count: int) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        yield
        if self._bytes_per_s is not None:
            await asyncio.sleep(started_at + count / self._bytes_per_s - loop.time())


async def _wait_arrived(transport: asyncio.Transport) -> None:
    """Until the other side's kernel has everything; a reset throws away what is on the way."""
    sock = transport.get_extra_info("socket")
    while not transport.is_closing():
        waiting = fcntl.ioctl(sock.fileno(), SIOCOUTQ, b"\0" * 4)
        if transport.get_write_buffer_size() == 0 and struct.unpack("i", waiting) == (0,):
            return
        await asyncio.sleep(0.001)
