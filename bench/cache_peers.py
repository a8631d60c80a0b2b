"""Weights from node to node: `python -m bench.cache_peers`.

Two hosts of a LAN of namespaces. A set of files goes from one to the other through a carrier, with
TLS and every chunk hashed, beside `cat file | nc` over the same wire, in turns. Then again while a
chat is relayed between daemons on the same two hosts, and the delay of its events is measured. The
files lie in memory, so that it is the way and not the disk that is measured. Needs root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.chats import chat_status
from bench.compiled import binary
from bench.figures import Goal, goals_table, show, table
from bench.fronts import SLOTS
from bench.lan import API_PORT, invite_from, network
from bench.processes import BenchError, Stable, machine_cpu_s, wait_for
from meshd.cache.builtin import write_model
from meshd.cache.chunks import CHUNK_BYTES
from meshd.kernel import Pool
from meshd.peers.bulk.words import der_to_wire
from meshd.peers.trust.membership import Membership
from tests.mesh.network import Host
from tests.peers.station import Station

RESULTS = Path(__file__).with_name("results") / "cache_peers.json"
ROUNDS = 7
TOTAL_BYTES = 2 << 30
SHARDS = 4
STREAMS = 4
SHARE = 0.7
DELAY_LIMIT_MS = 10.0
BULK_PORT, NC_PORT = 9400, 9401
EVENT_RATE_HZ = 100
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Transfer:
    seconds: float
    mb_per_s: float
    cores: float
    """Taken by the whole machine meanwhile."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Events of one relayed stream, each timed against its schedule."""

    events: int
    lost: int
    delay_p50_ms: float
    delay_p99_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cache_peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--mib", type=int, default=TOTAL_BYTES >> 20, help="size of the set")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    try:
        found = measure(
            rounds=options.rounds, total_bytes=options.mib << 20, streams=options.streams
        )
    except BenchError as error:
        print(f"bench.cache_peers: {error}", file=sys.stderr)
        return 1
    print(tables(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(
    *, rounds: int = ROUNDS, total_bytes: int = TOTAL_BYTES, streams: int = STREAMS
) -> dict[str, Any]:
    """Everything, as JSON. Raises BenchError."""
    memory = Path("/dev/shm")
    work = Path(tempfile.mkdtemp(prefix="mp-", dir=memory if memory.is_dir() else None))
    try:
        with Stable(work) as stable, network() as lan:
            here, there = lan.add("here"), lan.add("there")
            files = _make_set(work, total_bytes)
            with _Hosts(stable, work, here, there, files, streams) as hosts:
                turns = [_round(hosts, number) for number in range(rounds)]
                idle, busy = _chats(stable, work, hosts)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    share = median(turn["carrier"].mb_per_s / turn["nc"].mb_per_s for turn in turns)
    goals = [
        Goal("carrier beside nc, median", share, SHARE, at_least=True),
        Goal("event delay meanwhile, p99", busy.delay_p99_ms, DELAY_LIMIT_MS, unit=" ms"),
        Goal("events lost meanwhile", busy.lost, 0),
    ]
    return {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine.describe(),
        "versions": machine.versions("meshd", "uvloop"),
        "bytes": total_bytes,
        "files": SHARDS,
        "streams": streams,
        "turns": [{name: asdict(one) for name, one in turn.items()} for turn in turns],
        "share": share,
        "chat": {"idle": asdict(idle), "busy": asdict(busy)},
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in goals],
    }


def tables(found: dict[str, Any]) -> str:
    turns = found["turns"]
    rows = [
        [
            name,
            *(show(of(turn[key][figure] for turn in turns), digits) for of in (min, median, max)),
        ]
        for name, key, figure, digits in (
            ("carrier, TLS and hashing, MB/s", "carrier", "mb_per_s", 0),
            ("cat | nc, MB/s", "nc", "mb_per_s", 0),
            ("cores, carrier", "carrier", "cores", 2),
            ("cores, nc", "nc", "cores", 2),
        )
    ]
    chat = found["chat"]
    delays = [
        [name, *(show(chat[name][f"delay_{p}_ms"], 2) for p in ("p50", "p99")), chat[name]["lost"]]
        for name in ("idle", "busy")
    ]
    goals = [Goal(**{k: v for k, v in goal.items() if k != "verdict"}) for goal in found["goals"]]
    head = f"{found['bytes'] >> 20} MiB in {found['files']} files, {found['streams']} streams"
    return "\n\n".join(
        [
            table([head, "least", "median", "most"], rows),
            table(
                ["events of a relayed chat, ms", "p50", "p99", "lost"],
                [[str(cell) for cell in row] for row in delays],
            ),
            goals_table(goals),
        ]
    )


# -- transfers ------------------------------------------------------------------------------------


class _Hosts:
    """The node that has the set, and the place it goes to."""

    def __init__(
        self,
        stable: Stable,
        work: Path,
        here: Host,
        there: Host,
        files: list[Path],
        streams: int,
    ) -> None:
        self.here, self.there, self.files = here, there, files
        self._work = work
        self._streams = streams
        self._into = work / "into"
        pool = Pool("work", workers=1)
        self._host, self._reader = (Station(name, work, pool) for name in ("host", "reader"))
        pool.close()
        self._membership = _one_mesh(self._host, self._reader)
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Hosts:
        argv = [sys.executable, "-m", "bench.peer_host", str(self._host.directory)]
        argv += [f"{self.here.address}:{BULK_PORT}", *map(str, self.files)]
        with self.here.inside():
            self._server = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._server.stdout is not None
        if not self._server.stdout.readline():
            raise BenchError("the node that has the set did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.communicate(timeout=LIMIT_S)  # it ends with its input

    def carrier(self) -> Transfer:
        """The set through the carrier, by a process on the other host."""
        with self._emptied():
            order = json.dumps(self._order())
            argv = [sys.executable, "-m", "bench.peer_reader", order]
            with self.there.inside():
                child = subprocess.Popen(
                    argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            assert child.stdin is not None
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                child.kill()
                child.wait()
                raise BenchError("the reader did not start")
            before = machine_cpu_s()
            said, _ = child.communicate("go\n", timeout=LIMIT_S)
            spent_s = machine_cpu_s() - before
            if child.returncode:
                raise BenchError(f"the reader failed with {child.returncode}")
            return self._transfer(json.loads(said)["seconds"], spent_s)

    def nc(self) -> Transfer:
        """The same files one after the other in `cat FILES | nc`, into one file."""
        with self._emptied(), (self._into / "all").open("wb") as out:
            with self.there.inside():
                listener = subprocess.Popen(
                    [str(binary("netcat")), "listen", str(NC_PORT)], stdout=out
                )
            with self.there.inside():
                _wait_listens(NC_PORT)
            before, began = machine_cpu_s(), time.monotonic()
            with self.here.inside():
                cat = subprocess.Popen(["cat", *map(str, self.files)], stdout=subprocess.PIPE)
                to = [str(binary("netcat")), str(self.there.address), str(NC_PORT)]
                sender = subprocess.Popen(to, stdin=cat.stdout)
            assert cat.stdout is not None
            cat.stdout.close()
            codes = [child.wait(LIMIT_S) for child in (cat, sender, listener)]
            seconds = time.monotonic() - began
            if any(codes):
                raise BenchError(f"cat, nc and nc ended with {codes}")
            return self._transfer(seconds, machine_cpu_s() - before)

    @contextmanager
    def _emptied(self) -> Iterator[None]:
        shutil.rmtree(self._into, ignore_errors=True)
        self._into.mkdir()
        yield
        total = sum(path.stat().st_size for path in self._into.iterdir())
        if total != self.total_bytes:
            raise BenchError(f"{total} bytes of {self.total_bytes} arrived")
        shutil.rmtree(self._into)

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def _transfer(self, seconds: float, spent_s: float) -> Transfer:
        return Transfer(
            round(seconds, 3),
            round(self.total_bytes / seconds / 1e6, 1),
            round(spent_s / seconds, 2),
        )

    def _order(self) -> dict[str, Any]:
        mine = self._membership
        return {
            "peer": {
                "node_id": self._host.id,
                "name": "host",
                "addresses": [f"{self.here.address}:{BULK_PORT}"],
            },
            "credentials": {
                "ca_der": der_to_wire(mine.ca_certificate),
                "certificate_path": str(mine.certificate_path),
                "key_path": str(self._reader.identity.key_path),
                "mesh_id": mine.mesh_id,
            },
            "shards": [
                {"path": path.name, "size": path.stat().st_size, "sha256": path.name}
                for path in self.files
            ],
            "streams": self._streams,
            "into": str(self._into),
        }


def _round(hosts: _Hosts, number: int) -> dict[str, Transfer]:
    names = ("carrier", "nc") if number % 2 == 0 else ("nc", "carrier")
    turn: dict[str, Transfer] = {name: getattr(hosts, name)() for name in names}
    _say(f"round {number + 1}: " + ", ".join(f"{n} {turn[n].mb_per_s:.0f} MB/s" for n in turn))
    return turn


def _one_mesh(host: Station, reader: Station) -> Membership:
    """Both in one mesh; the reader's membership."""
    founded = host.found()
    assert founded.authority is not None
    return reader.admitted_by(founded.authority)


def _make_set(work: Path, total_bytes: int) -> list[Path]:
    """Files that go by their sha256, with their chunk hashes beside them."""
    made = []
    for _ in range(SHARDS):
        fresh, whole, chunks = work / "fresh", hashlib.sha256(), []
        with fresh.open("wb") as file:
            left = total_bytes // SHARDS
            while left:
                chunk = os.urandom(min(CHUNK_BYTES, left))
                file.write(chunk)
                whole.update(chunk)
                chunks.append(hashlib.sha256(chunk).digest())
                left -= len(chunk)
        path = work / whole.hexdigest()
        fresh.rename(path)
        path.with_name(f"{path.name}.chunks").write_bytes(b"".join(chunks))
        made.append(path)
    return made


def _wait_listens(port: int) -> None:
    """Not by connecting: it accepts one connection only."""
    suffix = f":{port:04X}"

    def listens() -> bool:
        rows = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        return any(row.split()[1].endswith(suffix) and row.split()[3] == "0A" for row in rows)

    wait_for(listens, limit_s=10.0, what="nc listens")


# -- a chat meanwhile -----------------------------------------------------------------------------


def _chats(stable: Stable, work: Path, hosts: _Hosts) -> tuple[Chat, Chat]:
    """A relayed stream alone, and while the set goes to and fro between the same hosts."""
    model = _start_daemons(stable, work, hosts)
    idle = _chat(hosts.there, model, 5.0)
    _say(f"chat alone: p99 {idle.delay_p99_ms:.2f} ms")
    found: list[Chat] = []
    done = threading.Event()

    def talk() -> None:
        try:
            found.append(_chat(hosts.there, model, 10.0))
        finally:
            done.set()

    talking = threading.Thread(target=talk)
    talking.start()
    while not done.is_set():
        _say(f"meanwhile: {hosts.carrier().mb_per_s:.0f} MB/s")
    talking.join()
    if not found:
        raise BenchError("the chat ended early")
    _say(f"chat meanwhile: p99 {found[0].delay_p99_ms:.2f} ms")
    return idle, found[0]


def _start_daemons(stable: Stable, work: Path, hosts: _Hosts) -> str:
    """A daemon with the mock engine beside the set, one without at the other end; the model."""
    runtime = work / "mock-engine"
    runtime.mkdir()
    (runtime / "llama-server").symlink_to(binary("mock_engine"))
    weights = work / "bench.gguf"
    write_model(weights)
    model = weights.stem

    def start(host: Host, *flags: str) -> None:
        argv = [str(Path(sys.executable).with_name("meshd")), "run", "--name", host.name]
        argv += ["--runtime-dir", str(runtime), "--data-dir", str(work / f"d-{host.name}")]
        argv += ["--listen", f"127.0.0.1:{API_PORT}", "--no-mdns", "--log-level", "warning"]
        settings = {"MESHD_ENGINE__PARALLEL": str(SLOTS), "XDG_CACHE_HOME": str(work / "cache")}
        with host.inside():
            stable.start(f"meshd-{host.name}", [*argv, *flags], env=settings)
            wait_for(
                lambda: chat_status(API_PORT, model) == 200,
                limit_s=30.0,
                what=f"{host.name} answers a chat",
                step_s=0.1,
            )

    start(hosts.here, "--mesh", "bench", "--model", str(weights))
    start(hosts.there, "--client", "--join", invite_from(work / "d-here", uses=1))
    return model


def _chat(at: Host, model: str, seconds: float) -> Chat:
    """A stream asked of the daemon on `at`, which relays it."""
    events = round(seconds * EVENT_RATE_HZ)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "How fast?"}],
        "stream": True,
        "n_events": events,
        "rate_hz": EVENT_RATE_HZ,
    }
    argv = [str(binary("load")), "streams", "--body", json.dumps(body), "--connections", "1"]
    argv += ["--events", str(events), "--max-s", str(2 * seconds + 2), "--port", str(API_PORT)]
    with at.inside():
        client = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, problem = client.communicate(timeout=LIMIT_S)
    if client.returncode:
        raise BenchError(f"the client failed: {problem.strip()}")
    report = json.loads(said)
    delay = report["delay_us"]
    return Chat(
        report["events"],
        report["lost"],
        round(delay.get("p50", 0.0) / 1e3, 3),
        round(delay.get("p99", 0.0) / 1e3, 3),
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
