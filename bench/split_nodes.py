"""Nodes of the benchmark of splits, of which none has room for the model."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lan import Node, invite_from, until_whole
from bench.processes import BenchError, Stable, argv_of, children_of, wait_for
from bench.split_engines import CONTEXT, THREADS
from bench.watching import Client, Events
from meshd.cli.client import AdminClient
from tests.mesh.network import Network

OWNER = "owner"
"""Hosts the model."""
LENDERS = ("first", "second", "third")
"""Lend memory to it, two at a time; the third comes when one of the others is to be lost."""
LONER = "loner"
"""Has room for the model, and a mesh of its own."""
OWN_ROOM, LENT_ROOM = "400MB", "460MB"
"""Of the owner and of each that lends: enough for one of the model's three layers, and too little
for two. A worker needs more, for its RPC server."""
LIMIT_S = 120.0
SETTLE_S = 1.0
"""Between two losses, so that the news of one does not ride along in the next."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Seconds from the SIGKILL of a worker's daemon."""

    noticed_s: float
    """Until its host served the model no longer."""
    total_s: float
    """Until a client of that host had a token of the next plan."""


class SplitNodes:
    """A mesh of four, and a node beside it."""

    def __init__(
        self, stable: Stable, lan: Network, work: Path, engine_dir: Path, weights: Path
    ) -> None:
        self._weights = weights
        self._nodes = {
            name: Node(stable, lan.hosts[name], work / name, engine_dir)
            for name in (OWNER, *LENDERS, LONER)
        }
        self._work = work
        self._lenders: tuple[str, ...] = ()
        """Those that were started."""
        self._token = ""

    @property
    def _mesh(self) -> list[Node]:
        return [self._nodes[name] for name in (OWNER, *self._lenders)]

    @property
    def _owner(self) -> Node:
        return self._nodes[OWNER]

    def begin(self) -> None:
        """Returns when the owner and two lenders are a mesh."""
        for name, node in self._nodes.items():
            node.data_dir.mkdir()
            # Caches of their own, as on machines of their own.
            (node.data_dir / "config.toml").write_text(
                f'cache_dir = "{self._cache_of(name)}"\n\n[engine]\nthreads = {THREADS}\n'
            )
        self._owner.start("--no-mdns", "--mesh", "split", "--max-vram", OWN_ROOM)
        self._nodes[LONER].start("--no-mdns", "--mesh", "lone")
        self._token = invite_from(self._owner.data_dir, uses=len(LENDERS))
        self._join(*LENDERS[:2])
        wait_for(lambda: self._nodes[LONER].peers() is not None, limit_s=LIMIT_S, what="the loner")

    def complete(self) -> None:
        """Let the third one come."""
        self._join(LENDERS[2])

    def _join(self, *names: str) -> None:
        for name in names:
            self._nodes[name].start("--no-mdns", "--join", self._token, "--max-vram", LENT_ROOM)
        self._lenders += names
        until_whole(self._mesh)

    # -- loads ------------------------------------------------------------------------------------

    def load(self) -> float:
        """Seconds until it is served by the owner and two lenders."""
        took = self._load(self._owner, {"host": OWNER, "split": True})
        if len(self._workers()) != 2:
            raise BenchError(f"planned over {self._workers()}, not over two nodes")
        return took

    def load_alone(self) -> float:
        """Seconds until the loner serves it."""
        return self._load(self._nodes[LONER], {})

    def unload(self) -> None:
        """Returns when no node has it any more, the loner included."""
        for node in (self._owner, self._nodes[LONER]):
            if self._model(node) is not None:
                AdminClient(node.data_dir / "admin.sock").post(
                    "/unload", {"model": self._weights.stem, "drain_s": 1}
                )
                self._wait(lambda n=node: not (self._model(n) or {}).get("hosts"), "it is unloaded")
        self._wait(
            lambda: not any(map(self._children, (OWNER, *self._lenders))),
            "nothing is lent any more",
        )

    def forget_tensors(self) -> None:
        """What the lenders have kept of tensors."""
        for name in LENDERS:
            shutil.rmtree(self._nodes[name].data_dir / "tensors", ignore_errors=True)

    def _load(self, node: Node, wishes: dict[str, Any]) -> float:
        wishes |= {"ref": str(self._weights), "context": CONTEXT, "parallel": 1}
        began = time.monotonic()
        AdminClient(node.data_dir / "admin.sock").post("/load", wishes)
        self._wait(lambda: (self._model(node) or {}).get("state") == "ready", "it is served")
        return time.monotonic() - began

    def _wait(self, condition: Any, what: str) -> None:
        try:
            wait_for(condition, limit_s=LIMIT_S, what=what, step_s=0.02)
        except BenchError as error:
            logs = "\n".join(node.log() for node in (*self._mesh, self._nodes[LONER]))
            raise BenchError(f"{error}: {self._model(self._owner)}\n{logs}") from None

    # -- what runs --------------------------------------------------------------------------------

    def engine_socket(self) -> Path:
        """Through the process, whose directory's own path may be too long for a socket."""
        pid = self._process(OWNER, "llama-server")
        argv = argv_of(pid)
        return Path(f"/proc/{pid}/cwd") / argv[argv.index("--host") + 1]

    def command_lines(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The engine's and an RPC server's."""
        engine = argv_of(self._process(OWNER, "llama-server"))
        return engine, argv_of(self._process(self._workers()[0], "rpc-server"))

    def _process(self, name: str, program: str) -> int:
        found = [p for p in self._children(name) if program in argv_of(p)[0]]
        if len(found) != 1:
            raise BenchError(f"{name} runs {len(found)} processes of {program}")
        return found[0]

    def _children(self, name: str) -> list[int]:
        """Engines and RPC servers of a node."""
        node = self._nodes[name]
        return [p for p in children_of(node.pid) if "server" in (argv_of(p) or ("",))[0]]

    def _model(self, node: Node) -> Any:
        # A connection that was kept through minutes of silence is closed at the first use.
        models = node.get("/mesh/models") or node.get("/mesh/models") or []
        return next((m for m in models if m["id"] == self._weights.stem), None)

    def _workers(self) -> list[str]:
        """Names of those that lend, as the owner tells."""
        hosts = (self._model(self._owner) or {}).get("hosts", [])
        plans = [host["plan"] for host in hosts if host["node"] == OWNER]
        return [w["node"] for p in plans if p["kind"] == "split" for w in p["workers"]]

    def _cache_of(self, name: str) -> Path:
        return self._work / f"{name}-cache"

    # -- losses -----------------------------------------------------------------------------------

    def lose_worker(self, number: int) -> Lost:
        """Kill one of the two that lend, see the model served with the third, and bring the killed
        one back."""
        time.sleep(SETTLE_S)
        victim = self._nodes[self._workers()[number % 2]]
        with contextlib.ExitStack() as stack:
            told = stack.enter_context(contextlib.closing(Events(self._owner.host)))
            asking = Client(self._owner.host, self._weights.stem)
            client = stack.enter_context(contextlib.closing(asking))
            self._wait(lambda: client.first_tokens({OWNER}), "it answers")
            killed_at = time.time()
            victim.kill()
            self._wait(lambda: self._ended_at(told, killed_at), "the host notices")
            ended_at = self._ended_at(told, killed_at)
            self._wait(lambda: client.first_tokens({OWNER})[-1][1] > ended_at, "it is served again")
            served_at = next(at for _, at in client.first_tokens({OWNER}) if at > ended_at)
        workers = self._workers()
        if victim.name in workers:
            raise BenchError(f"{victim.name} was killed, and the plan is {workers}")
        victim.start("--no-mdns", "--max-vram", LENT_ROOM)
        until_whole(self._mesh)
        return Lost(round(ended_at - killed_at, 3), round(served_at - killed_at, 3))

    def _ended_at(self, told: Events, since: float) -> float:
        """When the owner said that it is not ready any more; 0.0 if it has not."""
        about = {"type": "model", "model": self._weights.stem}
        return next(
            (
                float(event["at"])
                for event in told.seen
                if about.items() <= event.items()
                and event["at"] >= since - 0.001  # whole milliseconds
                and event["state"] != "ready"
            ),
            0.0,
        )
