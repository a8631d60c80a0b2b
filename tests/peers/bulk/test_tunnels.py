"""Tunnels between two nodes: real sockets, real TLS, both processes; an echo as RPC server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshd.errors import PeerRefused
from meshd.ids import LoanId, NodeId
from meshd.kernel import Pool
from meshd.peers.bulk import tunnels as module
from meshd.peers.bulk.handover import credentials_of
from meshd.peers.bulk.tunnel_words import Ends, TunnelEnd
from meshd.peers.bulk.tunneling import MAX_CONNECTIONS
from meshd.peers.bulk.tunnels import Tunnels, TunnelsFailed
from meshd.peers.bulk.words import Credentials
from meshd.peers.links.frames import FrameReader, frame, parse
from meshd.peers.links.streams import Open
from tests.peers.station import Station

CARRIER = (sys.executable, "-P", "-m", "meshd.carrier")
TUNNEL = (sys.executable, "-P", "-m", "meshd.tunnel")
LIMIT_S = 10.0
LOST_LIMIT_S = 1.0
NOBODY = 65_534


@dataclass
class Host:
    """`b`, which opens tunnels to `a`; and what it is told of them."""

    a: Station
    b: Station
    make: Callable[..., Awaitable[Station]]
    reasons: list[str] = field(default_factory=list)
    counts: dict[NodeId, tuple[int, int]] = field(default_factory=dict)
    opened: list[Tunnels] = field(default_factory=list)

    def end(self, loan: str = "loan-a", *, node: Station | None = None) -> TunnelEnd:
        node = node or self.a
        return TunnelEnd(node.id, node.name, (self.a.address,), LoanId(loan))

    async def open(self, *ends: TunnelEnd, command: tuple[str, ...] = TUNNEL) -> Tunnels:
        opened = await Tunnels.open(
            command,
            credentials_of(self.b.session.trust),
            ends or (self.end(),),
            lost=self.reasons.append,
            counted=self.count,
        )
        self.opened.append(opened)
        return opened

    def count(self, node: NodeId, received: int, sent: int) -> None:
        before = self.counts.get(node, (0, 0))
        self.counts[node] = before[0] + received, before[1] + sent


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    """`a` lends the echo's port as `loan-a` to `b`, and as `loan-gone` one where nobody listens."""
    pool, stations = Pool("work", workers=2), list[Station]()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    echo = await asyncio.start_server(_echo, "127.0.0.1", 0)
    ports = {"loan-a": echo.sockets[0].getsockname()[1], "loan-gone": nobody}

    def lend(node: NodeId, wanted: Open) -> dict[str, Any]:
        if node != stations[1].id or wanted.instance not in ports:
            raise PeerRefused("no such loan is yours", reason="no_loan")
        return {"port": ports[wanted.instance]}

    async def make(name: str, issuer: Station | None = None) -> Station:
        station = Station(name, tmp_path, pool)
        station.carrier, station.serve_bulk = CARRIER, lend
        if issuer is None:
            station.found()
            await station.start()
        else:
            station.join(issuer)
            await station.start(issuer.address)
            await issuer.until(lambda: issuer.peer(station), f"{name} known")
        stations.append(station)
        return station

    a = await make("a")
    host = Host(a, await make("b", a), make)
    yield host
    for opened in host.opened:
        await opened.close()
    for station in reversed(stations):
        await station.stop()
    echo.close()
    await echo.wait_closed()
    pool.close()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything again; ends when it is told `end`."""
    with contextlib.suppress(ConnectionError):
        while (data := await reader.read(1 << 18)) and data != b"end":
            writer.write(data)
            await writer.drain()
    writer.close()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(tunnels: Tunnels, index: int = 0) -> AsyncIterator[Connection]:
    address, port = tunnels.endpoints[index].split(":")
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(address, int(port), limit=1 << 20)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def said(connection: Connection, words: bytes) -> bytes:
    reader, writer = connection
    writer.write(words)
    return await reader.readexactly(len(words))


async def ended(connection: Connection, limit_s: float = LIMIT_S) -> bool:
    async with asyncio.timeout(limit_s):
        with contextlib.suppress(ConnectionError):
            return await connection[0].read(1) == b""
    return True


async def until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  (callbacks of a process's news)
            await asyncio.sleep(0.01)
    assert condition(), what


def carrier() -> psutil.Process:
    """The one of `a`; `b` has none."""
    (found,) = (p for p in psutil.Process().children() if "meshd.carrier" in p.cmdline())
    return found


# -- what goes through ----------------------------------------------------------------------------


async def test_what_is_said_comes_back(host: Host) -> None:
    tunnels = await host.open(host.end(), host.end("loan-gone"), host.end())
    assert len(set(tunnels.endpoints)) == 3
    async with connected(tunnels) as one, connected(tunnels, 2) as other:
        for words in (b"x", b"y" * 100, b"z" * 200_000):
            assert await said(one, words) == words
            assert await said(other, words) == words
    await until(lambda: host.counts.get(host.a.id, (0, 0))[0] > 400_000, "counted")
    assert host.counts[host.a.id][1] > 400_000
    assert tunnels.strangers == 0
    assert host.reasons == []


@pytest.mark.parametrize("megabytes", [1, pytest.param(64, marks=pytest.mark.slow)])
async def test_much_comes_back_intact_while_more_is_sent(host: Host, megabytes: int) -> None:
    data = random.Random(megabytes).randbytes(megabytes << 20)
    got, found = hashlib.sha256(), 0
    async with connected(await host.open()) as (reader, writer):

        async def send() -> None:
            for start in range(0, len(data), 1 << 20):
                writer.write(data[start : start + (1 << 20)])
                await writer.drain()

        sending = asyncio.ensure_future(send())
        while found < len(data):
            piece = await reader.read(1 << 20)
            assert piece
            got.update(piece)
            found += len(piece)
        await sending
    assert got.digest() == hashlib.sha256(data).digest()


async def test_the_end_of_either_side_is_that_of_the_other(host: Host) -> None:
    tunnels = await host.open()
    async with connected(tunnels) as connection:
        assert await said(connection, b"x") == b"x"
        connection[1].write(b"end")
        assert await ended(connection)
    await until(lambda: host.a.session.serving.bulk.streams == 0, "the worker's end")
    async with connected(tunnels) as connection:
        assert await said(connection, b"x") == b"x"
        assert host.a.session.serving.bulk.streams == 1
    await until(lambda: host.a.session.serving.bulk.streams == 0, "the worker's end")
    async with connected(tunnels) as again:
        assert await said(again, b"y") == b"y"


async def test_no_more_connections_than_an_engine_needs(host: Host) -> None:
    tunnels = await host.open()
    async with contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(connected(tunnels)) for _ in range(MAX_CONNECTIONS)]
        for connection in held:
            assert await said(connection, b"x") == b"x"
        async with connected(tunnels) as surplus:
            assert await ended(surplus)
        assert await said(held[0], b"x") == b"x"
    await until(lambda: host.a.session.serving.bulk.streams == 0, "all ended")
    async with connected(tunnels) as later:
        assert await said(later, b"x") == b"x"


# -- who may not ----------------------------------------------------------------------------------


async def refused(host: Host, end: TunnelEnd) -> str:
    """The words for a connection that could not be had."""
    tunnels = await host.open(end)
    async with connected(tunnels) as connection:
        assert await ended(connection)
    await until(lambda: tunnels.refusal(end.node_id), "the words")
    assert host.reasons == []
    return tunnels.refusal(end.node_id) or ""


async def test_what_cannot_be_had_is_refused_with_the_workers_words(host: Host) -> None:
    assert await refused(host, host.end("loan-b")) == "no such loan is yours"
    words = await refused(host, host.end("loan-gone"))
    assert "RPC server of this loan does not answer" in words


async def test_another_node_at_the_address_is_not_taken_for_the_worker(host: Host) -> None:
    c = await host.make("c", host.a)
    assert "answers" in await refused(host, host.end(node=c))


async def test_a_denied_node_is_refused(host: Host) -> None:
    await host.a.session.trust.deny(host.b.id)
    assert "deny list" in await refused(host, host.end())


async def test_a_node_of_another_mesh_is_refused(host: Host) -> None:
    host.b = await host.make("x")
    assert "not of this mesh" in await refused(host, host.end())


async def test_a_node_that_is_put_on_the_deny_list_loses_its_tunnel(host: Host) -> None:
    async with connected(await host.open()) as connection:
        assert await said(connection, b"x") == b"x"
        host.a.session.denied((host.b.id,))
        assert await ended(connection, LOST_LIMIT_S)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
async def test_another_user_of_this_machine_is_closed_out(host: Host) -> None:
    tunnels = await host.open()
    speak = (
        "import socket, sys; c = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 10)\n"
        "c.sendall(b'x')\n"
        "try: print(c.recv(1))\n"
        "except ConnectionResetError: print(b'')"
    )
    port = tunnels.endpoints[0].split(":")[1]
    argv = ("/usr/bin/env", _python_of_all(), "-c", speak, port)
    run = partial(subprocess.run, argv, user=NOBODY, cwd="/", capture_output=True, text=True)
    with ThreadPoolExecutor(1) as threads:
        done = await asyncio.get_running_loop().run_in_executor(threads, run)
    assert (done.stdout, done.stderr, done.returncode) == ("b''\n", "", 0)
    await until(lambda: tunnels.strangers == 1, "counted")
    async with connected(tunnels) as connection:
        assert await said(connection, b"x") == b"x"


def _python_of_all() -> str:
    """An interpreter any user can execute."""
    for path in (Path(sys.executable), Path("/usr/bin/python3")):
        done = subprocess.run(
            ["/usr/bin/env", str(path), "-c", ""], user=NOBODY, cwd="/", stderr=subprocess.DEVNULL
        )
        if done.returncode == 0:
            return str(path)
    pytest.skip("no interpreter here that another user can execute")


# -- what breaks ----------------------------------------------------------------------------------


async def test_a_carrier_that_is_killed_ends_the_connection(host: Host) -> None:
    async with connected(await host.open()) as connection:
        assert await said(connection, b"x") == b"x"
        carrier().kill()
        assert await ended(connection, LOST_LIMIT_S)
    assert host.reasons == []


async def test_a_tunnel_process_that_is_killed_is_told_once(host: Host) -> None:
    tunnels = await host.open()
    async with connected(tunnels) as connection:
        assert await said(connection, b"x") == b"x"
        os.kill(tunnels.pid, signal.SIGKILL)
        assert await ended(connection, LOST_LIMIT_S)
        await until(lambda: host.reasons, "lost", LOST_LIMIT_S)
        await until(
            lambda: host.a.session.serving.bulk.streams == 0, "the worker's end", LOST_LIMIT_S
        )
    await tunnels.close()
    await tunnels.close()
    assert host.reasons == ["the process of tunnels ended"]


async def test_closing_ends_connections_and_the_process(host: Host) -> None:
    tunnels = await host.open()
    pid = tunnels.pid
    async with connected(tunnels) as connection:
        assert await said(connection, b"x") == b"x"
        await tunnels.close()
        assert not psutil.pid_exists(pid)
        assert await ended(connection)
    await tunnels.close()
    assert host.reasons == []


TALKS_NONSENSE = """
import socket, time
socket.socket(fileno=0).sendall(b"\\0\\0\\0\\2[]")
time.sleep(60)
"""
TALKS_NONSENSE_LATER = """
import socket, time
daemon = socket.socket(fileno=0)
daemon.recv(9999)
for body in (b'{"t":"listening","ports":[7]}', b'{"t":"carried","bytes":[]}'):
    daemon.sendall(len(body).to_bytes(4) + body)
    time.sleep(0.2)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("/nowhere/at-all",), "cannot be started"),
        ((sys.executable, "-c", ""), "ended as it began"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "no tunnels within"),
        ((sys.executable, "-c", TALKS_NONSENSE), "ended as it began"),
    ],
)
async def test_tunnels_that_do_not_come_up_leave_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(module, "OPEN_S", 1.0)
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(TunnelsFailed, match=words):
        await host.open(command=command)
    assert {child.pid for child in psutil.Process().children()} == before
    assert host.reasons == []


async def test_nonsense_later_ends_it(host: Host) -> None:
    tunnels = await host.open(command=(sys.executable, "-c", TALKS_NONSENSE_LATER))
    assert tunnels.endpoints == ("127.0.0.1:7",)
    await until(lambda: host.reasons, "lost")
    await until(lambda: not psutil.pid_exists(tunnels.pid), "ended")


# -- the process by itself ------------------------------------------------------------------------

ORDER = Ends(
    credentials=Credentials("", "/nowhere", "/nowhere", ""),
    ends=(TunnelEnd(NodeId("n"), "n", ("127.0.0.1:1",), LoanId("loan-a")),),
)


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    control, its_control = socket.socketpair()
    with control:
        with its_control:
            process = subprocess.Popen(TUNNEL, stdin=its_control.fileno(), stderr=subprocess.PIPE)
        control.settimeout(LIMIT_S)
        yield process, control
    process.kill()
    process.communicate()


def test_it_ends_with_the_daemon(process: Any) -> None:
    child, control = process
    control.sendall(frame(ORDER.model_dump()))
    reader = FrameReader(1 << 16)
    (body,) = reader.feed(control.recv(1 << 16))
    (port,) = parse(body)["ports"]
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as connection:
        # Credentials that cannot be used: the daemon is told, and the connection closed.
        (body,) = reader.feed(control.recv(1 << 16))
        assert parse(body)["t"] == "refused"
        assert connection.recv(1) == b""
    control.close()
    assert child.wait(LIMIT_S) == 0


@pytest.mark.parametrize("order", [b"", b"\0\0\0\2[]", b"\0\0\0\2{}", b"\xff" * 8])
def test_without_an_order_it_ends_and_says_why(process: Any, order: bytes) -> None:
    child, control = process
    control.sendall(order)
    control.shutdown(socket.SHUT_WR)
    assert child.wait(LIMIT_S) == 1
    assert b"no order for tunnels" in child.stderr.read()
