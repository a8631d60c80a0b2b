"""Speaks to an RPC server: a question whether it is the right one, and a connection to fill it.

A server serves one connection at a time and leaves others waiting; hold none longer than needed.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Self

from meshd.errors import UpstreamFailed
from meshd.runtime.lending import rpc_words
from meshd.runtime.lending.ports import LOOPBACK

PROBE_LIMIT_S = 5.0
STALL_LIMIT_S = 60.0
"""Of a connection that fills a server: it may be writing a large tensor to a slow disk."""
WAIT_S = 0.5
ANSWER_LIMIT_BYTES = 4096


async def probe(endpoint: str, rpc_protocol: str) -> None:
    """Ask the RPC server at `endpoint` (HOST:PORT) for its protocol and its devices; at most
    `PROBE_LIMIT_S`.

    Raises UpstreamFailed if none answers, it does not speak exactly `rpc_protocol`, or it has no
    device.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                await _converse(reader, writer, endpoint, rpc_protocol)
            finally:
                writer.close()
    except TimeoutError:
        raise UpstreamFailed(
            f"the RPC server at {endpoint} did not answer within {PROBE_LIMIT_S:g} s; does it "
            "serve somebody else?"
        ) from None
    except (OSError, EOFError) as error:
        raise UpstreamFailed(
            f"the RPC server at {endpoint} cannot be asked what it speaks ({_words(error)}); "
            f"expected protocol {rpc_protocol}"
        ) from None


async def _converse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, endpoint: str, rpc_protocol: str
) -> None:
    writer.write(rpc_words.hello())
    body = await _answer(reader)
    if len(body) != rpc_words.HELLO_BYTES:
        raise UpstreamFailed(
            f"the RPC server at {endpoint} answered HELLO with {len(body)} bytes; protocol "
            f"{rpc_protocol} was expected, which has {rpc_words.HELLO_BYTES}"
        )
    found = rpc_words.read_hello(body)
    if found != rpc_protocol:
        raise UpstreamFailed(
            f"the RPC server at {endpoint} speaks protocol {found}, not {rpc_protocol}; both "
            "nodes need an engine of one build"
        )
    if rpc_protocol != rpc_words.PROTOCOL:
        return  # what else it understands is not known
    writer.write(rpc_words.device_count())
    body = await _answer(reader)
    if len(body) != rpc_words.DEVICE_COUNT_BYTES or rpc_words.read_device_count(body) < 1:
        raise UpstreamFailed(f"the RPC server at {endpoint} has no device")


async def _answer(reader: asyncio.StreamReader) -> bytes:
    length = rpc_words.read_length(await reader.readexactly(rpc_words.LENGTH_BYTES))
    if length > ANSWER_LIMIT_BYTES:
        raise OSError(f"it announced an answer of {length} bytes")
    return await reader.readexactly(length)


def _words(error: OSError | EOFError) -> str:
    if isinstance(error, EOFError):
        return "it closed the connection"
    return os.strerror(error.errno) if error.errno else str(error)


class Connection:
    """A blocking connection to this machine's own RPC server, of protocol `rpc_words.PROTOCOL`.

    `waiting` is called at least every `WAIT_S` while something lasts; what it raises ends the
    call. Every method raises OSError: a server that does not like a request closes the
    connection, and TimeoutError says that nothing moved for `STALL_LIMIT_S`.
    """

    def __init__(self, port: int, waiting: Callable[[], None]) -> None:
        self._waiting = waiting
        self._socket = socket.create_connection((LOOPBACK, port), timeout=PROBE_LIMIT_S)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def hello(self) -> str:
        """The server's protocol; the first thing to ask."""
        return rpc_words.read_hello(self._ask(rpc_words.hello(), rpc_words.HELLO_BYTES))

    def allocate(self, size: int) -> tuple[int, int] | None:
        """A buffer on the server's first device and its address; None if it has no room."""
        answer = self._ask(rpc_words.allocate(0, size), rpc_words.ALLOCATED_BYTES)
        buffer = rpc_words.read_allocated(answer)
        if buffer is None:
            return None
        answer = self._ask(rpc_words.base_of(buffer), rpc_words.BASE_BYTES)
        return buffer, rpc_words.read_base(answer)

    def free(self, buffer: int) -> None:
        self._send(rpc_words.free(buffer))
        self.settle()

    def set_tensor(
        self, head: bytes, file: BinaryIO, offset: int, size: int, moved: Callable[[int], None]
    ) -> None:
        """Send `head` (see `set_tensor_head`) and `size` bytes of `file` from `offset`, which do
        not pass through this process. `moved` is told the number of bytes that went. Returns when
        the server is done with them."""
        self._send(head)
        sent = 0
        while sent < size:
            try:
                count = os.sendfile(
                    self._socket.fileno(), file.fileno(), offset + sent, size - sent
                )
            except BlockingIOError:
                self._wait(select.POLLOUT)
                continue
            if count == 0:
                raise OSError(f"{file.name} ends before byte {offset + size}")
            sent += count
            moved(count)
        self.settle()

    def settle(self) -> None:
        """Wait until the server has done all that was asked of it."""
        self._ask(rpc_words.device_count(), rpc_words.DEVICE_COUNT_BYTES)

    def _ask(self, request: bytes, expected: int) -> bytes:
        self._send(request)
        length = rpc_words.read_length(self._receive(rpc_words.LENGTH_BYTES))
        if length != expected:
            raise OSError(f"the RPC server answered {length} bytes, not {expected}")
        return self._receive(length)

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                chunk = self._socket.recv(count - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not chunk:
                raise ConnectionResetError("the RPC server closed the connection")
            data += chunk
        return data

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        deadline = time.monotonic() + STALL_LIMIT_S
        while not poll.poll(WAIT_S * 1000):
            self._waiting()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the RPC server did nothing for {STALL_LIMIT_S:g} s")
