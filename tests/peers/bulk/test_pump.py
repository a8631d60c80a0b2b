"""Copying between a bulk stream and a local connection: real sockets, real TLS, threads."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meshd.peers.bulk.pump import pump
from meshd.peers.bulk.stream import PIECE_BYTES, BulkStream
from meshd.peers.bulk.words import ANSWER_LIMIT, der_from_wire, der_to_wire
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import load_or_create
from meshd.peers.trust.tls import carrier_context
from tests.conftest import wait_until

LIMIT_S = 10.0


class Tunnel:
    """`near` to `far` through two pumps; all of it TCP on this machine."""

    def __init__(self, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
        self.near, near_local = connected()
        self.far, far_local = connected()
        wire = connected()
        self.streams = [
            BulkStream(end, context, server=server, limit=ANSWER_LIMIT, within_s=LIMIT_S)
            for end, context, server in zip(wire, contexts, (False, True), strict=True)
        ]
        self.pumps = [
            threading.Thread(target=self._carry, args=args)
            for args in zip(self.streams, (near_local, far_local), strict=True)
        ]
        for thread in self.pumps:
            thread.start()

    def _carry(self, stream: BulkStream, local: socket.socket) -> None:
        with local:
            stream.secure()
            stream.send({"t": "hello"})  # what comes with the frame is in the TLS engine already
            assert stream.receive() == {"t": "hello"}
            stream.unhurried()
            pump(stream, local)
            stream.close()

    def wait_over(self) -> None:
        for thread in self.pumps:
            thread.join(LIMIT_S)
            assert not thread.is_alive()

    def close(self) -> None:
        self.near.close()
        self.far.close()
        for stream in self.streams:
            stream.abort()
        self.wait_over()


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=LIMIT_S)
        other, _ = listener.accept()
    other.settimeout(LIMIT_S)
    return one, other


@pytest.fixture(scope="module")
def contexts(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    directory: Path = tmp_path_factory.mktemp("node")
    identity = load_or_create(directory)
    mine = MeshStore(directory / "mesh", identity).found("home")
    ca = der_from_wire(der_to_wire(mine.ca_certificate))
    paths = str(mine.certificate_path), str(identity.key_path)
    return carrier_context(ca, *paths, server=False), carrier_context(ca, *paths, server=True)


@pytest.fixture
def tunnel(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[Tunnel]:
    tunnel = Tunnel(contexts)
    yield tunnel
    tunnel.close()


def exactly(connection: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        piece = connection.recv(min(1 << 20, length - len(found)))
        assert piece, f"ended after {len(found)} of {length} bytes"
        found += piece
    return bytes(found)


@pytest.mark.parametrize("length", [1, 100, 16_384, 16_385, PIECE_BYTES, PIECE_BYTES + 1, 3 << 20])
def test_a_message_comes_whole_and_without_another(tunnel: Tunnel, length: int) -> None:
    for number, (sender, receiver) in enumerate(
        ((tunnel.near, tunnel.far), (tunnel.far, tunnel.near)) * 2
    ):
        message = random.Random(number).randbytes(length)
        with ThreadPoolExecutor(1) as threads:
            sent = threads.submit(sender.sendall, message)
            assert exactly(receiver, length) == message
            sent.result(LIMIT_S)


def test_much_goes_both_ways_at_once(tunnel: Tunnel) -> None:
    data = {end: random.Random(end).randbytes(16 << 20) for end in ("near", "far")}
    with ThreadPoolExecutor(4) as threads:
        for end, connection in (("near", tunnel.near), ("far", tunnel.far)):
            threads.submit(connection.sendall, data[end])
        at_far = threads.submit(exactly, tunnel.far, 16 << 20)
        at_near = threads.submit(exactly, tunnel.near, 16 << 20)
        for found, end in ((at_far, "near"), (at_near, "far")):
            expected = hashlib.sha256(data[end]).digest()
            assert hashlib.sha256(found.result(30)).digest() == expected
    for stream in tunnel.streams:
        assert 16 << 20 < stream.bytes_in < 17 << 20
        assert 16 << 20 < stream.bytes_out < 17 << 20


def fill(connection: socket.socket) -> int:
    """Send until nothing more is taken for a while; how much was."""
    connection.settimeout(0.5)
    sent, zeros = 0, bytes(1 << 16)
    try:
        while True:
            sent += connection.send(zeros)
    except TimeoutError:
        connection.settimeout(LIMIT_S)
        return sent


def test_who_does_not_read_stops_the_sender_and_nothing_is_lost(tunnel: Tunnel) -> None:
    for sender, receiver in ((tunnel.near, tunnel.far), (tunnel.far, tunnel.near)):
        sent = fill(sender)
        assert sent < 64 << 20  # three connections' buffers and a piece or two
        receiver.sendall(b"the other way is free")
        assert exactly(sender, 21) == b"the other way is free"
        assert exactly(receiver, sent) == bytes(sent)


@pytest.mark.parametrize("end", ["near", "far"])
def test_the_end_of_a_side_comes_after_what_it_sent(tunnel: Tunnel, end: str) -> None:
    sender, receiver = (tunnel.near, tunnel.far) if end == "near" else (tunnel.far, tunnel.near)
    last_words = random.Random(end).randbytes(5 << 20)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(sender.sendall, last_words).add_done_callback(lambda _: sender.close())
        assert exactly(receiver, len(last_words)) == last_words
    assert receiver.recv(1) == b""
    tunnel.wait_over()


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("cut", [0, 1])
def test_a_stream_that_is_cut_ends_at_once(tunnel: Tunnel, cut: int, *, filled: bool) -> None:
    """Also when it waits for somebody who does not read."""
    tunnel.near.sendall(b"x")
    assert exactly(tunnel.far, 1) == b"x"
    if filled:
        fill(tunnel.near)
        fill(tunnel.far)
    tunnel.streams[cut].abort()
    tunnel.wait_over()


def test_a_reset_ends_it(tunnel: Tunnel) -> None:
    tunnel.far.sendall(b"nobody reads this")
    wait_until(lambda: tunnel.near.recv(1, socket.MSG_PEEK), what="it came")
    tunnel.near.close()  # with unread bytes: a reset
    tunnel.wait_over()


def test_rubbish_on_the_wire_ends_it(tunnel: Tunnel) -> None:
    tunnel.near.sendall(b"x")
    assert exactly(tunnel.far, 1) == b"x"
    tunnel.streams[0]._connection.sendall(b"\xff" * 100)
    tunnel.wait_over()


@pytest.mark.slow
def test_a_side_that_reads_nothing_for_long_does_not_end_it(tunnel: Tunnel) -> None:
    """An engine computes for longer than the kernel would ask whether the machine is there."""
    sent = fill(tunnel.near)
    tunnel.pumps[0].join(15.0)
    assert exactly(tunnel.far, sent) == bytes(sent)
    tunnel.far.sendall(b"done")
    assert exactly(tunnel.near, 4) == b"done"
