"""Daemons on the hosts of a network, and what a test asks of all of them."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import MeshdError
from tests.conftest import wait_until
from tests.mesh.network import Host, Network
from tests.node.conftest import Daemon

API = "127.0.0.1:9337"
PEER_PORT = 9338
REACTION_S = 1.0
"""What a busy machine may add to a limit of the mesh before a test calls it broken."""


class MeshNode(Daemon):
    """`meshd run` on `host`, under the host's name."""

    def __init__(
        self, host: Host, data_dir: Path, engine_dir: Path, *flags: str, **environ: str
    ) -> None:
        any_address = "0.0.0.0" if host.address else "[::]"
        super().__init__(
            data_dir,
            engine_dir,
            *("--name", host.name, "--listen", API),
            *("--peer-listen", f"{any_address}:{PEER_PORT}"),
            *flags,
            **environ,
        )
        self.host = host

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def peer_address(self) -> str:
        """Where other hosts reach it."""
        return f"{self.host.address or f'[{self.host.address6}]'}:{PEER_PORT}"

    def start(self) -> MeshNode:
        """Returns when it answers and knows whether it is in a mesh or has to join one."""
        with self.host.inside():
            super().start()
        wait_until(lambda: self.mesh["state"] != "none", what=f"a mesh; {self.stderr()}")
        return self

    def ends(self, *, timeout_s: float = 30.0) -> tuple[int, str]:
        """Run it to its own end: its exit code, and the one line with which it complained. It may
        have warned that it found no engine before it came to that."""
        self.data_dir.mkdir(exist_ok=True)
        with self.host.inside():
            done = subprocess.run(
                self._command,
                env=self._environ,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        mild = (" INFO ", " WARNING ")
        lines = [x for x in done.stderr.splitlines() if not any(level in x for level in mild)]
        (line,) = lines or [done.stderr]
        return done.returncode, line

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        with self.host.inside():
            return super().request(method, path, body, headers)

    def connect(self) -> http.client.HTTPConnection:
        """A kept connection to its API."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with self.host.inside():
            connection.connect()
        return connection

    def meshd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of the CLI, typed on its host."""
        argv = [sys.executable, "-m", "meshd", *arguments, "--data-dir", str(self.data_dir)]
        return self.host.run(argv)

    # -- what it knows ----------------------------------------------------------------------------

    @property
    def id(self) -> str:
        node_id: str = self.status()["node"]["id"]
        return node_id

    @property
    def mesh(self) -> dict[str, Any]:
        mesh: dict[str, Any] = self.status()["mesh"]
        return mesh

    def peers(self) -> dict[str, dict[str, Any]]:
        """By name."""
        return {peer["name"]: peer for peer in self.status()["peers"]}

    def sees(self, other: str) -> str | None:
        """The state in which it lists the node of that name."""
        peer = self.peers().get(other)
        return None if peer is None else str(peer["state"])

    def hosts(self, model: str, *states: str) -> dict[str, int]:
        """Epochs by name of the nodes that, as it sees them, have the model in one of `states`
        (any if none)."""
        found = [h for m in self.status()["models"] if m["id"] == model for h in m["hosts"]]
        return {h["node"]: h["epoch"] for h in found if not states or h["state"] in states}

    def engine_pids(self) -> set[int]:
        return {engine.pid for engine in self.engines()}

    def invite(self, **options: Any) -> str:
        token: str = self.admin.post(
            "/invite", {"ttl_s": 3600, "uses": 1, "role": "member", "issuer": False} | options
        )["token"]
        return token

    def mesh_files(self) -> list[str]:
        """What its membership left on disk, relative to the data directory."""
        base = self.data_dir
        return sorted(str(p.relative_to(base)) for p in (base / "mesh").rglob("*"))


class Lan:
    """Nodes of one test. mDNS is off unless a test turns it on: then only it can find anybody."""

    def __init__(
        self,
        network: Network,
        base_dir: Path,
        measured: list[str],
        engine_dir: Path | None = None,
    ) -> None:
        self.network = network
        self._measured = measured
        self._base_dir = base_dir
        self._engine_dir = engine_dir or base_dir / "no-engine"
        self._engine_dir.mkdir(exist_ok=True)
        self._nodes: list[MeshNode] = []

    def close(self) -> None:
        for node in self._nodes:
            node.close()

    def node(
        self,
        name: str,
        *flags: str,
        mdns: bool = False,
        ipv4: bool = True,
        data_dir: Path | None = None,
        engine_dir: Path | None = None,
        **environ: str,
    ) -> MeshNode:
        """A node that is not started yet, on the host of that name, which is made if need be.
        Called again, it is the same machine: the next start has the same data directory."""
        host = self.network.hosts.get(name) or self.network.add(name, ipv4=ipv4)
        node = MeshNode(
            host,
            data_dir or self._base_dir / name,
            engine_dir or self._engine_dir,
            *(() if mdns else ("--no-mdns",)),
            *flags,
            **{**_ON_FEW_CORES, **environ},
        )
        self._nodes.append(node)
        return node

    def mesh(self, *names: str, flags: Mapping[str, Collection[str]] | None = None) -> Nodes:
        """A mesh of that many: the first founds it and invites the others. Returns when each
        sees all."""
        flags = flags or {}
        founder = self.node(names[0], "--mesh", "home", *flags.get(names[0], ())).start()
        token = founder.invite(uses=len(names))
        others = [self.node(n, "--join", token, *flags.get(n, ())).start() for n in names[1:]]
        self.wait_whole(founder, *others)
        return (founder, *others)

    # -- waiting ----------------------------------------------------------------------------------

    def until(self, condition: Callable[[], object], *, timeout_s: float, what: str) -> float:
        """Seconds until `condition` holds; a failure shows what every node logged."""
        began = time.monotonic()
        try:
            wait_until(condition, timeout_s=timeout_s, what=what)
        except (pytest.fail.Exception, MeshdError) as failure:
            raise AssertionError(f"{failure}\n{self.report()}") from None
        return time.monotonic() - began

    def wait_whole(self, *nodes: MeshNode, timeout_s: float = 15.0) -> float:
        """Seconds until each of `nodes` sees exactly the others, alive."""
        names = {n.name for n in nodes}

        def whole() -> bool:
            return all(
                {p["name"] for p in n.peers().values() if p["state"] == "alive"} == names - {n.name}
                for n in nodes
            )

        return self.until(whole, timeout_s=timeout_s, what=f"one mesh of {sorted(names)}")

    def wait_seen(
        self, name: str, *states: str, by: Collection[MeshNode], timeout_s: float
    ) -> dict[str, float]:
        """Seconds, for each of `by`, until it lists `name` in one of `states`."""
        began = time.monotonic()
        seen: dict[str, float] = {}

        def all_saw() -> bool:
            for node in by:
                if node.name not in seen and node.sees(name) in states:
                    seen[node.name] = round(time.monotonic() - began, 3)
            return len(seen) == len(by)

        self.until(all_saw, timeout_s=timeout_s, what=f"{name} is {states} at all")
        self.say(f"{name} {'/'.join(states)} after {seen} s")
        return seen

    def say(self, line: str) -> None:
        """A line for the end of the test run: what was measured, beside what was asserted."""
        self._measured.append(line)

    def report(self) -> str:
        return "\n".join(f"--- {node.name}\n{_outcome(node)}" for node in self._nodes)


Nodes = tuple[MeshNode, ...]

_ON_FEW_CORES = {
    # Threads of several engines that spin while they wait for each other would hold all of them up
    # for seconds.
    "MESHD_ENGINE__THREADS": "1",
    # All nodes have the same memory: what a busy machine makes of it must not move plans.
    "MESHD_ENGINE__MEMORY_SPEED": "10GB",
    # Daemons start by the dozen here: whatever the tests themselves run with, these need not be
    # compiled each time.
    "PYTHONDONTWRITEBYTECODE": "",
}


def _outcome(node: MeshNode) -> str:
    try:
        status = node.status()
        seen = json.dumps({"mesh": status["mesh"], "peers": status["peers"]}, indent=1)
    except MeshdError as error:
        seen = error.message
    return f"{seen}\n{node.stderr()}"
