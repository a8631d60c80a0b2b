"""What is said of RPC servers that are not the right ones."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from meshd.errors import UpstreamFailed
from meshd.runtime.lending import rpc_client
from meshd.runtime.lending.rpc_client import Connection, probe

HELLO = struct.pack("<QBBBx24x", 28, 7, 0, 0)
ONE_DEVICE = struct.pack("<QI", 4, 1)


@asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[str]:
    """Answers the n-th request with the n-th answer, and closes after the last. Its endpoint."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for answer in answers:
                _, length = struct.unpack("<BQ", await reader.readexactly(9))
                await reader.readexactly(length)
                writer.write(answer)
        except EOFError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def refusal(endpoint: str, protocol: str = "7.0.0") -> str:
    with pytest.raises(UpstreamFailed) as caught:
        await probe(endpoint, protocol)
    assert endpoint in caught.value.message
    return caught.value.message


async def test_the_right_one() -> None:
    async with server(HELLO, ONE_DEVICE) as endpoint:
        await probe(endpoint, "7.0.0")


async def test_another_protocol() -> None:
    async with server(HELLO) as endpoint:
        assert "speaks protocol 7.0.0, not 7.0.1" in await refusal(endpoint, "7.0.1")


async def test_of_an_unknown_protocol_only_the_version_is_asked() -> None:
    async with server(struct.pack("<QBBBx24x", 28, 8, 1, 0)) as endpoint:
        await probe(endpoint, "8.1.0")


async def test_no_device() -> None:
    async with server(HELLO, struct.pack("<QI", 4, 0)) as endpoint:
        assert "has no device" in await refusal(endpoint)


async def test_an_answer_of_another_length() -> None:
    async with server(struct.pack("<Q3s", 3, b"\x01\x00\x00")) as endpoint:
        assert "answered HELLO with 3 bytes" in await refusal(endpoint)


async def test_an_endless_answer() -> None:
    async with server(b"HTTP/1.1 400 Bad Request") as endpoint:
        assert "announced an answer of" in await refusal(endpoint)


async def test_it_closes() -> None:
    async with server() as endpoint:
        words = await refusal(endpoint)
        assert "closed" in words or "reset" in words
        assert "expected protocol 7.0.0" in words


async def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and never listens
        assert "refused" in await refusal(f"127.0.0.1:{bound.getsockname()[1]}")


async def test_it_serves_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_client, "PROBE_LIMIT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        assert "did not answer within 0.1 s" in await refusal(endpoint)


def test_a_filling_connection_gives_up_on_a_server_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc_client, "WAIT_S", 0.01)
    monkeypatch.setattr(rpc_client, "STALL_LIMIT_S", 0.05)
    waits: list[None] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Connection(listener.getsockname()[1], lambda: waits.append(None)) as connection,
        pytest.raises(TimeoutError, match="did nothing"),
    ):
        connection.hello()
    assert waits
