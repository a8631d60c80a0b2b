"""Two daemons on two hosts, one with weights, and ways to bring these to the other.

The daemons are real ones: `here` holds the set, verified, and the mock engine; `there` is a client
node that relays chats to it, and under whose name processes fetch. Everything lies in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.chats import chat_status
from bench.compiled import binary
from bench.fronts import SLOTS
from bench.lan import API_PORT, invite_from
from bench.processes import BenchError, Stable, machine_cpu_s, wait_for
from meshd.cache.builtin import write_model
from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.cache.references import HubRef
from meshd.cache.store import Store
from meshd.cache.transfer.words import Credentials, FetchOrder, PeerSource
from meshd.errors import MeshdError
from meshd.peers.bulk.dialing import open_stream
from meshd.peers.bulk.words import der_to_wire
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import load_or_create
from tests.mesh.network import Host

SHARDS = 4
PEER_PORT, NC_PORT = 9338, 9401
LIMIT_S = 120.0
START_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Transfer:
    seconds: float
    mb_per_s: float
    cores: float
    """Taken by the whole machine meanwhile."""


class Wire:
    """`transfer` brings the set from one host to the other, one of `WAYS`."""

    WAYS = ("carrier", "fetch", "nc")

    def __init__(self, stable: Stable, work: Path, here: Host, there: Host, total: int) -> None:
        self.here, self.there = here, there
        self._stable = stable
        self._work = work
        self._into = work / "into"
        self._places = Places(work / "hub", work / "here-cache" / "meshd" / "weights", work)
        self._manifest = _make_set(self._places, total)
        self.model = self._start_daemons()
        self._peer = self._peer_source()
        self._credentials = self._own_credentials()
        self._wait_served()

    def transfer(self, way: str, streams: int) -> Transfer:
        shutil.rmtree(self._into, ignore_errors=True)
        self._into.mkdir()
        match way:
            case "carrier":
                seconds, spent_s = self._read(streams)
            case "fetch":
                seconds, spent_s = self._fetch(streams)
            case _:
                seconds, spent_s = self._nc()
        total = self._manifest.total_bytes
        arrived = sum(p.stat().st_size for p in self._into.rglob("*") if not p.is_symlink())
        if arrived < total:
            raise BenchError(f"{way}: {arrived} bytes of {total} arrived")
        shutil.rmtree(self._into)
        return Transfer(
            round(seconds, 3), round(total / seconds / 1e6, 1), round(spent_s / seconds, 2)
        )

    # -- ways -------------------------------------------------------------------------------------

    def _read(self, streams: int) -> tuple[float, float]:
        """The carrier at its best: a reader that hashes chunks and decides nothing."""
        order = {
            "peer": self._peer.model_dump(),
            "credentials": self._credentials.model_dump(),
            "shards": [shard.model_dump() for shard in self._manifest.shards],
            "streams": streams,
            "into": str(self._into),
        }
        with self._child("bench.peer_reader", json.dumps(order)) as child:
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                raise BenchError("the reader did not start")
            before = machine_cpu_s()
            said, _ = child.communicate("go\n", timeout=LIMIT_S)
            spent_s = machine_cpu_s() - before
            if child.returncode:
                raise BenchError(f"the reader failed with {child.returncode}")
        return json.loads(said)["seconds"], spent_s

    def _fetch(self, streams: int) -> tuple[float, float]:
        """The daemon's own fetch child, from its start to the files landed and verified whole."""
        order = FetchOrder(
            ref=self._manifest.repo,
            manifest=self._manifest,
            hub_dir=str(self._into / "hub"),
            state_dir=str(self._into / "state"),
            builtin_dir=str(self._into / "builtin"),
            offline=True,
            peers=(self._peer,),
            credentials=self._credentials,
            workers=streams,
        )
        before, began = machine_cpu_s(), time.monotonic()
        with self._child("meshd.fetcher") as child:
            news, _ = child.communicate(order.model_dump_json(), timeout=LIMIT_S)
        seconds = time.monotonic() - began
        if child.returncode:
            raise BenchError(f"the fetch failed: {news.splitlines()[-1:]}")
        return seconds, machine_cpu_s() - before

    def _nc(self) -> tuple[float, float]:
        """The same files one after the other in `cat FILES | nc`, into one file."""
        files = [str(self._blob(shard)) for shard in self._manifest.shards]
        with self.there.inside(), (self._into / "all").open("wb") as out:
            listener = subprocess.Popen([str(binary("netcat")), "listen", str(NC_PORT)], stdout=out)
            _wait_listens(NC_PORT)
        before, began = machine_cpu_s(), time.monotonic()
        with self.here.inside():
            cat = subprocess.Popen(["cat", *files], stdout=subprocess.PIPE)
            to = [str(binary("netcat")), str(self.there.address), str(NC_PORT)]
            sender = subprocess.Popen(to, stdin=cat.stdout)
        assert cat.stdout is not None
        cat.stdout.close()
        codes = [child.wait(LIMIT_S) for child in (cat, sender, listener)]
        if any(codes):
            raise BenchError(f"cat, nc and nc ended with {codes}")
        return time.monotonic() - began, machine_cpu_s() - before

    @contextmanager
    def _child(self, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A process on the host that fetches; it does not outlive the block."""
        argv = [sys.executable, "-m", module, *arguments]
        with self.there.inside():
            child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()
                child.communicate()

    # -- the two nodes ----------------------------------------------------------------------------

    def _start_daemons(self) -> str:
        """The model whose chats `there` relays to `here`."""
        runtime = self._work / "mock-engine"
        runtime.mkdir()
        (runtime / "llama-server").symlink_to(binary("mock_engine"))
        weights = self._work / "bench.gguf"
        write_model(weights)
        flags = ("--runtime-dir", str(runtime))
        self._start(self.here, weights.stem, *flags, "--mesh", "bench", "--model", str(weights))
        token = invite_from(self._data_dir(self.here), uses=1)
        self._start(self.there, weights.stem, *flags, "--client", "--join", token)
        return weights.stem

    def _start(self, host: Host, model: str, *flags: str) -> None:
        argv = [sys.executable, "-m", "meshd", "run", "--name", host.name, "--no-mdns"]
        argv += ["--data-dir", str(self._data_dir(host)), "--log-level", "warning"]
        argv += ["--listen", f"127.0.0.1:{API_PORT}", "--peer-listen", f"0.0.0.0:{PEER_PORT}"]
        settings = {
            "MESHD_ENGINE__PARALLEL": str(SLOTS),
            "XDG_CACHE_HOME": str(self._work / f"{host.name}-cache"),
            "HF_HUB_CACHE": str(self._places.hub if host is self.here else self._work / "none"),
        }
        with host.inside():
            self._stable.start(host.name, [*argv, *flags], env=settings)
            try:
                wait_for(
                    lambda: chat_status(API_PORT, model) == 200,
                    limit_s=START_LIMIT_S,
                    what=f"{host.name} answers a chat",
                    step_s=0.1,
                )
            except BenchError as error:
                raise BenchError(f"{error}\n{self._stable.log_of(host.name)}") from None

    def _wait_served(self) -> None:
        """Until `here` has looked through its cache."""
        wanted = {"t": "open", "service": "shard", "sha256": self._manifest.shards[0].sha256}

        def served() -> bool:
            try:
                stream, _ = open_stream(self._credentials, self._peer, wanted)
            except MeshdError:
                return False
            stream.close()
            return True

        with self.there.inside():
            wait_for(served, limit_s=START_LIMIT_S, what="the set is served", step_s=0.2)

    def _data_dir(self, host: Host) -> Path:
        return self._work / f"{host.name}-data"

    def _peer_source(self) -> PeerSource:
        node = load_or_create(self._data_dir(self.here)).node_id
        address = f"{self.here.address}:{PEER_PORT}"
        return PeerSource(node_id=node, name=self.here.name, addresses=(address,))

    def _own_credentials(self) -> Credentials:
        directory = self._data_dir(self.there)
        identity = load_or_create(directory)
        membership = MeshStore(directory / "mesh", identity).load()
        assert membership is not None, "it has joined"
        return Credentials(
            ca_der=der_to_wire(membership.ca_certificate),
            certificate_path=str(membership.certificate_path),
            key_path=str(identity.key_path),
            mesh_id=membership.mesh_id,
        )

    def _blob(self, shard: Shard) -> Path:
        return self._places.blob(self._manifest.repo, shard.sha256)


def chat(at: Host, model: str, *, seconds: float, rate_hz: int) -> dict[str, Any]:
    """The report on one stream asked of the daemon on `at`, which relays it."""
    events = round(seconds * rate_hz)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "How fast?"}],
        "stream": True,
        "n_events": events,
        "rate_hz": rate_hz,
    }
    argv = [str(binary("load")), "streams", "--body", json.dumps(body), "--connections", "1"]
    argv += ["--events", str(events), "--max-s", str(2 * seconds + 2), "--port", str(API_PORT)]
    with at.inside():
        client = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, problem = client.communicate(timeout=LIMIT_S)
    if client.returncode:
        raise BenchError(f"the client failed: {problem.strip()}")
    report: dict[str, Any] = json.loads(said)
    return report


def _make_set(places: Places, total_bytes: int) -> Manifest:
    """Random files in the layout of the hub's cache, known and verified."""
    repo, commit, store = "bench/set", "0" * 40, Store.at(places)
    (places.repo(repo) / "blobs").mkdir(parents=True)
    shards = []
    for number in range(1, SHARDS + 1):
        fresh, whole, chunks = places.repo(repo) / "fresh", hashlib.sha256(), []
        with fresh.open("wb") as file:
            left = total_bytes // SHARDS
            while left:
                chunk = os.urandom(min(CHUNK_BYTES, left))
                left -= file.write(chunk)
                whole.update(chunk)
                chunks.append(hashlib.sha256(chunk).digest())
        sha256 = whole.hexdigest()
        blob = places.blob(repo, sha256)
        fresh.rename(blob)
        store.chunks.save(sha256, b"".join(chunks))
        store.ledger.record_landed(blob, sha256)
        path = f"set-{number:05d}-of-{SHARDS:05d}.gguf"
        link = places.snapshot(repo, commit, path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
        shards.append(Shard(path=path, size=blob.stat().st_size, sha256=sha256))
    manifest = Manifest(repo=repo, revision=commit, shards=tuple(shards))
    store.manifests.put(HubRef(repo), manifest)
    return manifest


def _wait_listens(port: int) -> None:
    """Not by connecting: it accepts one connection only. For the calling thread's host."""
    suffix = f":{port:04X}"

    def listens() -> bool:
        rows: Sequence[str] = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        return any(row.split()[1].endswith(suffix) and row.split()[3] == "0A" for row in rows)

    wait_for(listens, limit_s=10.0, what="nc listens")
