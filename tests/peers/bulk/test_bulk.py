"""Bulk streams between real nodes: real sockets, real TLS, a real carrier process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshd.errors import MeshdError, PeerRefused, PeerUnreachable
from meshd.ids import NodeId
from meshd.kernel import Pool
from meshd.peers.bulk import handover
from meshd.peers.bulk.dialing import open_stream
from meshd.peers.bulk.handover import credentials_of
from meshd.peers.bulk.stream import BulkStream
from meshd.peers.bulk.words import Credentials, der_from_wire
from meshd.peers.links.frames import frame
from meshd.peers.links.streams import Open
from meshd.peers.protocol import ALPN_BULK, ALPN_CTL
from meshd.peers.trust.tls import carrier_context, client_context, joining_context
from meshd.view import Role
from tests.peers.station import Station

CARRIER = (sys.executable, "-m", "tests.peers.bulk.carrying")
SHARD = {"t": "open", "service": "shard", "sha256": "a" * 64}
CUT_LIMIT_S = 2.0


@dataclass(frozen=True)
class Peer:
    node_id: str
    name: str
    addresses: tuple[str, ...]


class Dialler:
    """What a process on `station`'s machine does; blocking work, in threads."""

    def __init__(self, station: Station, threads: ThreadPoolExecutor) -> None:
        self.station = station
        self._threads = threads

    @property
    def credentials(self) -> Credentials:
        return credentials_of(self.station.session.trust)

    async def do(self, work: Callable[[], Any]) -> Any:
        async with asyncio.timeout(20):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def open(
        self, to: Station, wanted: dict[str, Any] = SHARD, *, node: str = "", also: str = ""
    ) -> tuple[BulkStream, dict[str, Any]]:
        addresses = (also, to.address) if also else (to.address,)
        peer = Peer(node or to.id, to.name, addresses)
        opened: tuple[BulkStream, dict[str, Any]] = await self.do(
            lambda: open_stream(self.credentials, peer, wanted)
        )
        return opened


def grant(node: NodeId, wanted: Open) -> dict[str, Any]:
    if wanted.service == "manifest":
        return {"t": "open", "manifests": [wanted.ref, node]}
    assert wanted.sha256 is not None
    return {"value": int(wanted.sha256[0], 16), "forever": wanted.sha256[1] == "f"}


@pytest.fixture
async def nodes(
    tmp_path: Path,
) -> AsyncIterator[tuple[Station, Dialler, Callable[..., Awaitable[Station]]]]:
    """`a`, which serves; a member `b` of its mesh that dials; and a maker of others."""
    pool, stations = Pool("work", workers=2), list[Station]()

    async def make(name: str, issuer: Station | None = None, role: Role = Role.MEMBER) -> Station:
        station = Station(name, tmp_path, pool)
        station.carrier, station.serve_bulk = CARRIER, grant
        if issuer is None:
            station.found()
            await station.start()
        else:
            station.join(issuer, role)
            await station.start(issuer.address)
            await issuer.until(lambda: issuer.peer(station), f"{name} known")
        stations.append(station)
        return station

    a = await make("a")
    b = await make("b", a)
    with ThreadPoolExecutor(64, "dial") as threads:
        yield a, Dialler(b, threads), make
        for station in reversed(stations):
            await station.stop()
    pool.close()


def read(stream: BulkStream, length: int) -> bytes:
    stream.send({"t": "read", "offset": 0, "length": length})
    assert stream.receive() == {"t": "data", "length": length}
    data = bytearray(length)
    stream.read_into(memoryview(data))
    return bytes(data)


async def until(condition: Callable[[], object], what: str, deadline_s: float = 10.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  (no view tells of streams)
            await asyncio.sleep(0.01)
    assert condition(), what


# -- members --------------------------------------------------------------------------------------


async def test_a_member_is_served(nodes: Any) -> None:
    a, b, _ = nodes
    stream, answer = await b.open(a)
    assert (answer["t"], answer["value"]) == ("open", 10)
    assert answer["pid"] != os.getpid()
    for length in (1, 70_000, 1 << 20, 5):
        assert await b.do(partial(read, stream, length)) == b"\x0a" * length
    assert a.session.serving.bulk.streams == 1
    stream.close()
    await until(lambda: a.session.serving.bulk.streams == 0, "the end was told")
    received, sent = a.session.serving.bulk.bytes_carried
    assert sent > 70_000 + (1 << 20)
    assert received > 0


async def test_a_question_is_answered_by_the_grant(nodes: Any) -> None:
    a, b, _ = nodes
    wanted = {"t": "open", "service": "manifest", "ref": "Owner/Repo:q4_k_m"}
    stream, answer = await b.open(a, wanted)
    assert answer["manifests"] == ["Owner/Repo:q4_k_m", b.station.id]
    with pytest.raises(PeerUnreachable, match="closed"):
        await b.do(stream.receive)
    stream.close()


async def test_streams_are_independent(nodes: Any) -> None:
    a, b, _ = nodes
    opened = await asyncio.gather(
        *(b.open(a, SHARD | {"sha256": digit * 64}) for digit in "123456789")
    )
    pids = {answer["pid"] for _, answer in opened}
    assert len(pids) == 1
    works = [b.do(partial(read, stream, 1 << 18)) for stream, _ in opened]
    for number, data in enumerate(await asyncio.gather(*works), 1):
        assert data == bytes((number,)) * (1 << 18)
    for stream, _ in opened:
        stream.close()


async def test_another_address_is_tried(nodes: Any) -> None:
    a, b, _ = nodes
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    stream, _ = await b.open(a, also=nobody)
    stream.close()


async def test_a_bug_costs_one_stream(nodes: Any, capfd: pytest.CaptureFixture[str]) -> None:
    a, b, _ = nodes
    (one, _), (other, _) = await b.open(a), await b.open(a)
    one.send({"t": "bug"})
    with pytest.raises(PeerUnreachable):
        await b.do(one.receive)
    assert await b.do(partial(read, other, 10)) == b"\x0a" * 10
    one.close()
    other.close()
    assert "ZeroDivisionError" in capfd.readouterr().err


async def test_a_refusal_in_the_middle_is_said(nodes: Any) -> None:
    a, b, _ = nodes
    stream, _ = await b.open(a)
    stream.send({"t": "refuse"})
    answer = await b.do(stream.receive)
    assert (answer["t"], answer["reason"], answer["message"]) == ("refused", "gone", "not any more")
    stream.close()


# -- refused --------------------------------------------------------------------------------------


async def refused(attempt: Awaitable[Any]) -> PeerRefused:
    with pytest.raises(PeerRefused) as caught:
        await attempt
    return caught.value


@pytest.mark.parametrize(
    ("wanted", "reason", "words"),
    [
        ({"service": "shard", "sha256": "short"}, "protocol_error", "opened with"),
        ({"service": "no-such"}, "no_service", "no-such"),
        ({"service": "manifest", "ref": "x\n"}, "protocol_error", "opened with"),
    ],
)
async def test_what_cannot_be_had_is_refused_with_words(
    nodes: Any, wanted: dict[str, Any], reason: str, words: str
) -> None:
    a, b, _ = nodes

    def only_known(node: NodeId, asked: Open) -> dict[str, Any]:
        if asked.service == "no-such":
            raise PeerRefused("there is no service `no-such` here", reason="no_service")
        return grant(node, asked)

    a.serve_bulk = only_known
    error = await refused(b.open(a, {"t": "open"} | wanted))
    assert error.reason == reason
    assert words in error.message
    await until(lambda: a.session.serving.bulk._carrier.strangers == set(), "forgotten")


async def test_a_service_the_carrier_does_not_know_is_refused(nodes: Any) -> None:
    a, b, _ = nodes
    a.serve_bulk = lambda *_: {}
    error = await refused(b.open(a, {"t": "open", "service": "no-such"}))
    assert error.reason == "no_service"


async def test_a_denied_node_is_told_so(nodes: Any) -> None:
    a, b, _ = nodes
    await a.session.trust.deny(b.station.id)
    error = await refused(b.open(a))
    assert error.reason == "denied"
    assert "deny list" in error.message


async def test_a_node_of_another_mesh_is_refused_by_either_side(nodes: Any) -> None:
    a, b, make = nodes
    x = Dialler(await make("x"), b._threads)
    error = await refused(x.open(a))
    assert (error.reason, "not of this mesh" in error.message) == ("wrong_mesh", True)

    def careless() -> bytes:
        """Trusts everybody; it is the other side that must say no."""
        context = joining_context()
        context.set_alpn_protocols([ALPN_BULK])
        context.load_cert_chain(x.credentials.certificate_path, x.credentials.key_path)
        return said_to(a, context)

    assert await b.do(careless) == b"unknown ca"
    assert a.session.serving.bulk.streams == 0


async def test_a_stranger_is_refused(nodes: Any) -> None:
    a, b, _ = nodes
    context = joining_context()
    context.set_alpn_protocols([ALPN_BULK])
    assert await b.do(lambda: said_to(a, context)) == b"certificate required"


def said_to(to: Station, context: ssl.SSLContext) -> bytes:
    """What comes back for an `open`; of an alert its words."""
    with (
        socket.create_connection(("127.0.0.1", to.port), timeout=10) as plain,
        context.wrap_socket(plain) as made,
    ):
        try:
            made.sendall(frame(SHARD))
            return made.recv(4096)
        except ssl.SSLError as error:
            return str(error.reason).partition("ALERT_")[2].replace("_", " ").lower().encode()


async def test_another_node_at_the_address_is_not_taken_for_the_one_meant(nodes: Any) -> None:
    a, b, make = nodes
    c = await make("c", a)
    error = await refused(b.open(a, node=c.id))
    assert error.reason == "other_node"
    with pytest.raises(PeerUnreachable, match="no address"):
        open_stream(b.credentials, Peer(a.id, "a", ()), SHARD)


async def test_a_client_serves_nothing_and_is_not_asked(nodes: Any) -> None:
    a, b, make = nodes
    client = await make("c", a, Role.CLIENT)
    error = await refused(b.open(client))
    assert (error.reason, "client" in error.message) == ("no_service", True)
    await a.until(lambda: len(a.board.current.peers) == 2, "both known")
    await a.until(lambda: a.peer(client).role is Role.CLIENT, "its role")
    assert [p.node_id for p in a.session.bulk_peers()] == [b.station.id]
    stream, _ = await Dialler(client, b._threads).open(a)  # it may use what members have
    stream.close()


async def test_a_node_without_a_carrier_is_told_apart(nodes: Any) -> None:
    a, b, _ = nodes
    without = replace(a.session.serving._needs, carrier=())
    a.session.serving._needs = without
    assert a.session.serving.take_bulk is None
    a.listener._speakers = replace(a.listener._speakers, bulk=None)
    error = await refused(b.open(a))
    assert error.reason == "no_service"


# -- revocation and renewal -----------------------------------------------------------------------


async def test_a_node_that_is_revoked_loses_its_streams_at_once(nodes: Any) -> None:
    a, b, make = nodes
    c = Dialler(await make("c", a), b._threads)
    forever = SHARD | {"sha256": "bf" + "0" * 62}
    (victim, _), (bystander, _) = await b.open(a, forever), await c.open(a)
    buffer = memoryview(bytearray(1 << 20))
    began = threading.Event()

    def drink() -> float:
        with contextlib.suppress(PeerUnreachable):
            while True:
                victim.read_into(buffer)
                began.set()
        return time.monotonic()

    drinking = asyncio.ensure_future(b.do(drink))
    await b.do(began.wait)
    revoked_at = time.monotonic()
    await a.session.trust.deny(b.station.id)
    a.session.denied((b.station.id,))
    assert await drinking - revoked_at < CUT_LIMIT_S
    victim.close()
    assert await c.do(partial(read, bystander, 100)) == b"\x0a" * 100
    await until(lambda: a.session.serving.bulk.streams == 1, "only the bystander's")
    bystander.close()


async def test_a_stuck_stream_is_cut_as_well(nodes: Any) -> None:
    """The carrier's thread waits in a write to a node that does not read."""
    a, b, _ = nodes
    stuck, _ = await b.open(a, SHARD | {"sha256": "bf" + "0" * 62})
    a.session.denied((b.station.id,))
    await until(lambda: a.session.serving.bulk.streams == 0, "cut", CUT_LIMIT_S)
    stuck.close()


async def test_a_renewed_certificate_is_shown_in_new_streams(nodes: Any) -> None:
    a, b, _ = nodes
    first, _ = await b.open(a)
    renewed = a.store.renew_own(a.session.trust.membership, time.time() + 3600)
    a.session.trust._renewed(renewed)
    await until(lambda: a.session.serving.bulk._carrier is not None, "there")

    async def shown() -> bool:
        stream, _ = await b.open(a)
        try:
            return bool(stream.certificate == renewed.certificate)
        finally:
            stream.close()

    async with asyncio.timeout(10):
        while not await shown():
            pass
    assert await b.do(partial(read, first, 10)) == b"\x0a" * 10
    first.close()


# -- the process ----------------------------------------------------------------------------------


async def test_a_carrier_that_dies_costs_its_streams_only(nodes: Any) -> None:
    a, b, _ = nodes
    stream, answer = await b.open(a)
    os.kill(answer["pid"], signal.SIGKILL)
    with pytest.raises(PeerUnreachable):
        await b.do(stream.receive)
    stream.close()
    await until(lambda: a.session.serving.bulk._carrier is None, "noticed")
    assert a.bulk_losses == 1
    assert a.peer(b.station) is not None
    assert a.session.linking.links.get(b.station.id) is not None
    a.session.serving.bulk._next_start_at = 0.0
    again, second = await b.open(a)
    assert second["pid"] != answer["pid"]
    assert await b.do(partial(read, again, 10)) == b"\x0a" * 10
    again.close()
    await until(lambda: not a.session.serving.bulk.streams, "the stream has ended")
    os.kill(second["pid"], signal.SIGKILL)
    await until(lambda: a.session.serving.bulk._carrier is None, "noticed again")
    assert a.bulk_losses == 1  # nobody lost anything


async def test_a_carrier_that_cannot_start_is_not_tried_again_at_once(
    nodes: Any, tmp_path: Path
) -> None:
    a, b, _ = nodes
    note = tmp_path / "starts"
    a.session.serving.bulk._command = ("/bin/sh", "-c", f"echo >> {note}; exit 1")
    for _ in range(5):
        with pytest.raises(MeshdError):
            await b.open(a)
    await until(lambda: a.session.serving.bulk._carrier is None, "noticed")
    assert len(note.read_text()) <= 3
    a.session.serving.bulk._command = (str(tmp_path / "nothing"),)
    a.session.serving.bulk._next_start_at = 0.0
    with pytest.raises(MeshdError):
        await b.open(a)
    await until(lambda: a.session.serving.bulk._carrier is None, "noticed")


async def test_the_end_of_the_session_ends_the_process(nodes: Any) -> None:
    a, b, _ = nodes
    stream, answer = await b.open(a)
    a.session.serving.bulk.close()
    with pytest.raises(PeerUnreachable):
        await b.do(stream.receive)
    stream.close()
    await until(lambda: not psutil.pid_exists(answer["pid"]), "gone")
    with pytest.raises(PeerUnreachable):
        await b.open(a)


async def test_a_carrier_that_is_not_needed_ends_and_comes_back(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, _ = nodes
    monkeypatch.setattr(handover, "IDLE_S", 0.1)
    stream, answer = await b.open(a)
    other, _ = await b.open(a)
    other.close()
    await until(lambda: a.session.serving.bulk.streams == 1, "one left")
    await asyncio.sleep(0.3)  # longer than it may idle: it does not
    assert await b.do(partial(read, stream, 10)) == b"\x0a" * 10
    stream.close()
    await until(lambda: a.session.serving.bulk._carrier is None, "ended")
    await until(lambda: not psutil.pid_exists(answer["pid"]), "gone")
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "carrier" in r.message]
    a.session.serving.bulk._next_start_at = 0.0
    again, _ = await b.open(a)
    again.close()


async def test_a_carrier_is_there_before_an_expected_stream_and_ends_if_none_comes(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = nodes
    a.session.serving.expect_bulk()
    await until(lambda: a.session.serving.bulk._carrier is not None, "started")
    expected = a.session.serving.bulk._carrier
    stream, _ = await b.open(a)
    assert a.session.serving.bulk._carrier is expected
    monkeypatch.setattr(handover, "IDLE_S", 0.1)
    stream.close()
    await until(lambda: a.session.serving.bulk._carrier is None, "ended after its stream")
    a.session.serving.bulk._next_start_at = 0.0
    a.session.serving.expect_bulk()
    assert a.session.serving.bulk._carrier is not None
    await until(lambda: a.session.serving.bulk._carrier is None, "ended without one")


# -- strangers ------------------------------------------------------------------------------------


async def silent(to: Station, context: ssl.SSLContext) -> socket.socket:
    """A connection that has said its ClientHello and nothing more."""
    made = socket.create_connection(("127.0.0.1", to.port), timeout=10)
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    made.sendall(outgoing.read())
    return made


async def test_half_open_connections_do_not_hold_up_others_and_are_bounded(nodes: Any) -> None:
    a, b, _ = nodes
    first, _ = await b.open(a)
    mine = b.credentials
    context = carrier_context(
        der_from_wire(mine.ca_der), mine.certificate_path, mine.key_path, server=False
    )
    half_open = [await silent(a, context) for _ in range(handover.MAX_STRANGERS - 1)]
    bulk = a.session.serving.bulk
    await until(lambda: len(bulk._carrier.strangers) == len(half_open), "all in the carrier")
    second, _ = await b.open(a)
    assert await b.do(partial(read, second, 10)) == b"\x0a" * 10
    flood = [await silent(a, context) for _ in range(100)]
    await until(lambda: len(bulk._carrier.strangers) == handover.MAX_STRANGERS, "full")
    for made in flood[1:]:
        made.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert await b.do(partial(made.recv, 1)) == b""
    assert await b.do(partial(read, first, 10)) == b"\x0a" * 10
    for made in (*half_open, *flood):
        made.close()
    await until(lambda: not bulk._carrier.strangers, "forgotten")
    for stream in (first, second, (await b.open(a))[0]):
        stream.close()


async def test_more_streams_than_may_be_are_refused_as_busy(nodes: Any) -> None:
    a, b, _ = nodes
    a.session.serving.bulk._limit = 2
    first, second = (await b.open(a))[0], (await b.open(a))[0]
    error = await refused(b.open(a))
    assert error.reason == "busy"
    first.close()
    await until(lambda: a.session.serving.bulk.streams == 1, "one left")
    third, _ = await b.open(a)
    second.close()
    third.close()


async def test_rubbish_after_the_hand_over_ends_that_connection_only(nodes: Any) -> None:
    a, b, _ = nodes
    stream, _ = await b.open(a)

    def rubbish(data: bytes) -> None:
        opened, _ = open_stream(b.credentials, Peer(a.id, "a", (a.address,)), SHARD)
        opened.write(memoryview(data))
        with contextlib.suppress(PeerUnreachable):
            while True:
                opened.read_into(memoryview(bytearray(1)))
        opened.close()

    for data in (b"\xff" * 8, b"\0\0\0\2[]", b"\0\0\0\1{", frame({"t": "x"}), b"\0\0\x20\0"):
        await b.do(partial(rubbish, data))
    assert await b.do(partial(read, stream, 10)) == b"\x0a" * 10
    stream.close()


async def test_a_hello_in_pieces_goes_where_it_belongs(nodes: Any) -> None:
    """To the carrier or to the daemon; and the daemon does not spin while it waits."""
    a, b, _ = nodes

    async def in_pieces(context: ssl.SSLContext, first_words: bytes) -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing)
        reader, writer = await asyncio.open_connection("127.0.0.1", a.port)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        hello = outgoing.read()
        for place in range(0, len(hello), 40):
            writer.write(hello[place : place + 40])
            await writer.drain()
            await asyncio.sleep(0.005)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                incoming.write(await reader.read(65536))
        tls.write(first_words)
        writer.write(outgoing.read())
        while True:
            try:
                return tls.read(4096)
            except ssl.SSLWantReadError:
                incoming.write(await reader.read(65536))
            finally:
                if not outgoing.pending:
                    writer.close()

    trust = b.station.session.trust
    bulk = client_context(trust.membership, trust.identity, ALPN_BULK)
    async with asyncio.timeout(10):
        assert b'"value":10' in await in_pieces(bulk, frame(SHARD))
        control = client_context(trust.membership, trust.identity, ALPN_CTL)
        hello = b.station.session.own_hello("doctor").to_wire()
        assert b'"hello"' in await in_pieces(control, frame(hello))
