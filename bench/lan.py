"""Nodes of a benchmark's mesh, each on a host of its own, and what they say of each other."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from subprocess import Popen
from typing import Any

from bench.processes import BenchError, Stable
from meshd.cli.client import AdminClient
from meshd.errors import MeshdError
from tests.mesh.network import Host, Network, NetworkError

API_PORT = 9337
POLL_S = 0.02
"""Between two rounds of questions to all nodes: often enough for times of tenths of a second, and
seldom enough to leave the machine to what is measured."""
START_LIMIT_S = 30.0
ONE_MEMORY = {"MESHD_ENGINE__MEMORY_SPEED": "10GB"}
"""All nodes share one machine's memory: none is to measure it while the others are measured."""

Peers = Mapping[str, str]
"""State of each other node, by name."""


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A LAN. Raises BenchError where none can be made."""
    try:
        with Network() as made:
            yield made
    except NetworkError as error:
        raise BenchError(f"no network of namespaces here: {error}") from None


class Node:
    """One node; started and ended as often as one likes, always the same data directory."""

    def __init__(self, stable: Stable, host: Host, directory: Path, runtime_dir: Path) -> None:
        self.host = host
        self.data_dir = directory
        self._stable = stable
        self._runtime_dir = runtime_dir
        self._child: Popen[bytes] | None = None
        self._kept: http.client.HTTPConnection | None = None

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def start(self, *flags: str) -> float:
        """Start it; the moment before `exec`. It is not waited for."""
        argv = [str(Path(sys.executable).with_name("meshd")), "run", "--name", self.name]
        argv += ["--data-dir", str(self.data_dir), "--runtime-dir", str(self._runtime_dir)]
        argv += ["--listen", f"127.0.0.1:{API_PORT}", "--log-level", "warning", *flags]
        began = time.monotonic()
        with self.host.inside():
            self._child = self._stable.start(f"meshd-{self.name}", argv, env=ONE_MEMORY)
        return began

    def stop(self) -> None:
        """SIGTERM, and until it is gone: the others know that it went."""
        self._forget_connection()
        assert self._child is not None
        self._stable.end(self._child)

    def kill(self) -> float:
        """SIGKILL; the moment it was sent."""
        self._forget_connection()
        assert self._child is not None
        killed_at = time.monotonic()
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        self._stable.end(self._child)
        return killed_at

    def peers(self) -> Peers | None:
        """As its API lists them now; None while it does not answer."""
        peers = self.get("/mesh/peers")
        return None if peers is None else {p["name"]: p["state"] for p in peers}

    def log(self) -> str:
        assert self._child is not None
        code = self._child.poll()
        return f"{self.name}, exit code {code}:\n{self._stable.log_of(f'meshd-{self.name}')}"

    def get(self, path: str) -> Any:
        """The JSON of a path of its API; None if it does not answer, or not with 200."""
        try:
            connection = self._connection()
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            self._forget_connection()
            return None
        return json.loads(body) if answer.status == 200 else None

    def _connection(self) -> http.client.HTTPConnection:
        if self._kept is None:
            fresh = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=10)
            with self.host.inside():
                fresh.connect()
            self._kept = fresh
        return self._kept

    def _forget_connection(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def invite_from(data_dir: Path, *, uses: int) -> str:
    """A token of a node that may have been started a moment ago only.

    Raises BenchError if it does not invite within `START_LIMIT_S`.
    """
    body = {"ttl_s": 86_400, "uses": uses, "role": "member", "issuer": False}
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            token: str = AdminClient(data_dir / "admin.sock").post("/invite", body)["token"]
        except MeshdError as error:
            if time.monotonic() > deadline:
                raise BenchError(f"{data_dir.name} does not invite: {error.message}") from None
            time.sleep(0.05)
        else:
            return token


# -- times ----------------------------------------------------------------------------------------


def until_each(
    nodes: Collection[Node],
    seen: Callable[[Node, Peers], bool],
    *,
    limit_s: float,
    what: str,
    poll_s: float = POLL_S,
) -> float:
    """The moment at which the last of `nodes` had once listed what `seen` asks for.

    Raises BenchError with the logs of those that did not within `limit_s`.
    """
    waiting = list(nodes)
    deadline = time.monotonic() + limit_s
    while True:
        for node in tuple(waiting):
            peers = node.peers()
            if peers is not None and seen(node, peers):
                waiting.remove(node)
        now = time.monotonic()
        if not waiting:
            return now
        if now > deadline:
            told = "\n".join(f"{node.log()}\n{node.peers()}" for node in waiting)
            raise BenchError(f"not within {limit_s:g} s: {what}\n{told}")
        time.sleep(poll_s)


def until_whole(
    nodes: Collection[Node], *, limit_s: float = START_LIMIT_S, poll_s: float = POLL_S
) -> float:
    """The moment at which each had listed all others as alive."""
    names = {n.name for n in nodes}

    def whole(node: Node, peers: Peers) -> bool:
        return names - {node.name} <= {name for name, state in peers.items() if state == "alive"}

    what = f"one mesh of {len(nodes)}"
    return until_each(nodes, whole, limit_s=limit_s, what=what, poll_s=poll_s)
