"""What a tunnel adds to a round trip, and how much goes through it.

    .venv/bin/python -m bench.tunnel_pump [--rounds N]

Two nodes on loopback. The client talks to a server in a process of its own, directly and through
both processes of a tunnel: two passings, each way, with TLS in between. Rounds alternate; a figure
is the median over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import machine
from bench.figures import show, table
from meshd.ids import LoanId, NodeId
from meshd.kernel import Pool
from meshd.peers.bulk.handover import credentials_of
from meshd.peers.bulk.tunnel_words import TunnelEnd
from meshd.peers.bulk.tunnels import Tunnels
from meshd.peers.links.streams import Open
from tests.peers.station import Station

ROUNDS: Final = 5
PINGS: Final = {100: 1000, 16 << 10: 1000, 1 << 20: 100}
"""Round trips of a round, by the bytes of either message."""
BULK_BYTES: Final = 512 << 20
PASSINGS: Final = 4
"""A process that passes a message on, of one round trip."""
CARRIER: Final = (sys.executable, "-P", "-m", "meshd.carrier")
TUNNEL: Final = (sys.executable, "-P", "-m", "meshd.tunnel")

Address = tuple[str, int]
Round = dict[str, dict[str, float]]
"""way → figure → value."""


# -- the server -----------------------------------------------------------------------------------


def serve() -> None:
    """Says its port. Each connection is one line `ping SIZE`, `up SIZE` or `down SIZE` and what
    belongs to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection, contextlib.suppress(ConnectionError):
                _answer(connection)


def _answer(connection: socket.socket) -> None:
    kind, size = connection.recv(32).split()
    length = int(size)
    connection.sendall(b".")
    buffer = memoryview(bytearray(min(length, 1 << 20)))
    match kind:
        case b"ping":
            while _receive(connection, buffer):
                connection.sendall(buffer)
        case b"up":
            for _ in range(length // len(buffer)):
                _receive(connection, buffer)
            connection.sendall(b".")
        case _:
            for _ in range(length // len(buffer)):
                connection.sendall(buffer)


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill `buffer`; False at the end of the connection."""
    while buffer:
        count = connection.recv_into(buffer)
        if not count:
            return False
        buffer = buffer[count:]
    return True


# -- the client -----------------------------------------------------------------------------------


def measure(address: Address) -> dict[str, float]:
    """One round; round trips in microseconds, MB/s."""
    found: dict[str, float] = {}
    for size, count in PINGS.items():
        trips = sorted(_pings(address, size, count))
        found[f"{size} p50"] = median(trips) * 1e6
        found[f"{size} p99"] = trips[math.ceil(0.99 * count) - 1] * 1e6
    for kind in ("up", "down"):
        found[kind] = BULK_BYTES / _bulk(address, kind) / 1e6
    return found


def _connect(address: Address, kind: str, size: int) -> socket.socket:
    connection = socket.create_connection(address)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(f"{kind} {size}".encode())
    _receive(connection, memoryview(bytearray(1)))
    return connection


def _pings(address: Address, size: int, count: int) -> list[float]:
    message = memoryview(bytearray(size))
    trips = []
    with _connect(address, "ping", size) as connection:
        for _ in range(count + 10):
            began = time.perf_counter()
            connection.sendall(message)
            _receive(connection, message)
            trips.append(time.perf_counter() - began)
    return trips[10:]  # the first ones find everything asleep


def _bulk(address: Address, kind: str) -> float:
    """Seconds for `BULK_BYTES`."""
    piece = memoryview(bytearray(1 << 20))
    with _connect(address, kind, BULK_BYTES) as connection:
        began = time.perf_counter()
        for _ in range(BULK_BYTES // len(piece)):
            if kind == "up":
                connection.sendall(piece)
            else:
                _receive(connection, piece)
        if kind == "up":
            _receive(connection, piece[:1])
        return time.perf_counter() - began


# -- the nodes ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def tunnel(directory: Path, port: int) -> AsyncIterator[Address]:
    """Where a host finds the server, which a worker has at `port`."""

    def lend(node: NodeId, wanted: Open) -> dict[str, Any]:
        return {"port": port}

    pool = Pool("work", workers=2)
    worker, host = (Station(name, directory, pool) for name in ("worker", "host"))
    worker.carrier, worker.serve_bulk = CARRIER, lend
    worker.found()
    await worker.start()
    host.join(worker)
    await host.start(worker.address)
    end = TunnelEnd(worker.id, worker.name, (worker.address,), LoanId("loan"))
    tunnels = await Tunnels.open(
        TUNNEL,
        credentials_of(host.session.trust),
        [end],
        lost=print,
        counted=lambda *_: None,
    )
    try:
        address, _, number = tunnels.endpoints[0].partition(":")
        yield address, int(number)
    finally:
        await tunnels.close()
        for station in (host, worker):
            await station.stop()
        pool.close()


async def run(rounds: int, port: int) -> list[Round]:
    """`port`: of the server."""
    loop, found = asyncio.get_running_loop(), list[Round]()
    with ThreadPoolExecutor(1) as thread, tempfile.TemporaryDirectory() as directory:
        async with tunnel(Path(directory), port) as through:
            ways = {"direct": ("127.0.0.1", port), "tunnel": through}
            for _ in range(rounds):
                this = Round()
                for way, address in ways.items():
                    this[way] = await loop.run_in_executor(thread, measure, address)
                found.append(this)
    return found


@contextlib.contextmanager
def server() -> Iterator[int]:
    """Its port."""
    argv = [sys.executable, "-m", "bench.tunnel_pump", "--serve"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def report(rounds: list[Round]) -> str:
    def of(way: str, figure: str) -> float:
        return median(one[way][figure] for one in rounds)

    rows = []
    for size, count in PINGS.items():
        added = median(
            one["tunnel"][f"{size} p50"] - one["direct"][f"{size} p50"] for one in rounds
        )
        figures = [of(way, f"{size} {p}") for way in ("direct", "tunnel") for p in ("p50", "p99")]
        cells = [show(value, 0) for value in (*figures, added, added / PASSINGS)]
        rows.append([f"{size:,} B", f"{count * len(rounds):,}", *cells])
    head = ["round trip, µs", "n", "direct p50", "p99", "tunnel p50", "p99", "added", "a passing"]
    bulk = [
        [f"{kind}, {BULK_BYTES >> 20} MiB", str(len(rounds))]
        + [show(of(way, kind), 0) for way in ("direct", "tunnel")]
        for kind in ("up", "down")
    ]
    return "\n\n".join((table(head, rows), table(["MB/s", "n", "direct", "tunnel"], bulk)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.tunnel_pump", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    print(", ".join(f"{key} {value}" for key, value in machine.describe().items()), end="\n\n")
    with server() as port:
        print(report(asyncio.run(run(arguments.rounds, port))))


if __name__ == "__main__":
    main()
