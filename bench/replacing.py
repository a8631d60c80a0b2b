"""A mesh whose hosts are killed one after the other, and how soon the next one serves."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.lan import Node, invite_from, until_whole
from bench.processes import BenchError, Stable, family_cpu_s, machine_cpu_s, wait_for
from bench.watching import Client, Event, Events
from meshd.cli.client import AdminClient
from tests.mesh.network import Network

MODEL = "builtin"
NAMES = ("n1", "n2", "n3")
LIMIT_S = 30.0
SETTLE_S = 1.0
"""Between two rounds, so that the news of one does not ride along in the next."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one round, one part after the other, as the node that takes over tells of them."""

    detect_s: float
    """From SIGKILL until it knows that the host is dead."""
    claim_s: float
    """Until its claim is out: the epoch is on its disk by then."""
    verify_s: float
    """Until its weights were found whole and unchanged, and the engine is started."""
    load_s: float
    """Until the engine has loaded them and answered its daemon's first question."""
    first_token_s: float
    """Until the client had a token of it."""
    total_s: float
    """From SIGKILL to that token."""
    foreign: float
    """Cores taken meanwhile by what does not belong to the benchmark."""


def times_of(
    events: Iterable[Event],
    *,
    victim: str,
    node: str,
    killed_at: float,
    answered_at: float,
    foreign: float,
) -> Times:
    """Out of the events that `node`, which took over from `victim`, told after `killed_at`.

    Raises BenchError if one is missing.
    """
    left = iter([event for event in events if event["at"] >= killed_at])
    dead_at = _first(left, type="peer", peer=victim, state="dead")
    claimed_at = _first(left, type="host", node=node, state="preparing")
    verified_at = _first(left, type="model", model=MODEL, state="loading")
    ready_at = _first(left, type="host", node=node, state="ready")
    steps = (killed_at, dead_at, claimed_at, verified_at, ready_at, answered_at)
    parts = [after - before for before, after in itertools.pairwise(steps)]
    return Times(*(round(figure, 4) for figure in (*parts, sum(parts), foreign)))


def _first(events: Iterable[Event], **wanted: str) -> float:
    """When the next of `events` came that says this; those before it are used up."""
    for event in events:
        if wanted.items() <= event.items():
            return float(event["at"])
    raise BenchError(f"no event says {wanted}")


class Replacing:
    """Three nodes, one of which hosts the model."""

    def __init__(self, stable: Stable, lan: Network, work: Path, engine_dir: Path) -> None:
        self._nodes = [Node(stable, lan.add(name), work / name, engine_dir) for name in NAMES]

    def begin(self) -> None:
        """Returns when one node hosts the model, and the others have done so before: its weights
        are on every disk and were verified once."""
        founder, *others = self._nodes
        founder.start("--no-mdns", "--mesh", "bench")
        token = invite_from(founder.data_dir, uses=len(others))
        for node in others:
            node.start("--no-mdns", "--join", token)
        until_whole(self._nodes)
        admin = AdminClient(founder.data_dir / "admin.sock")
        for hosts in (len(self._nodes), 1):
            admin.post("/load", {"ref": MODEL, "replicas": hosts})
            self._until_settled(hosts)

    def round(self) -> Times:
        """Kill the host, see who takes over, and bring it back as a standby."""
        time.sleep(SETTLE_S)
        (name,) = _hosts(self._nodes[0])
        victim = next(n for n in self._nodes if n.name == name)
        entry, other = (n for n in self._nodes if n is not victim)
        with contextlib.ExitStack() as stack:
            told = {
                n.name: stack.enter_context(contextlib.closing(Events(n.host)))
                for n in (entry, other)
            }
            client = stack.enter_context(contextlib.closing(Client(entry.host, MODEL)))
            _wait(lambda: client.first_tokens({victim.name}), f"{victim.name} answers")
            ours_s, all_s = _cpu_s(entry, other), machine_cpu_s()
            killed_at = time.time()
            victim.kill()
            _wait(lambda: client.first_tokens(told), "another host answers")
            ended_at = time.time()
            ours_s, all_s = _cpu_s(entry, other) - ours_s, machine_cpu_s() - all_s
        node, answered_at = client.first_tokens(told)[0]
        victim.start("--no-mdns")
        until_whole(self._nodes)
        self._until_settled(1)
        if _hosts(victim) != {node}:
            raise BenchError(f"{victim.name} came back and {node} hosts no longer")
        return times_of(
            told[node].seen,
            victim=victim.name,
            node=node,
            killed_at=killed_at,
            answered_at=answered_at,
            foreign=max(0.0, all_s - ours_s) / (ended_at - killed_at),
        )

    def _until_settled(self, hosts: int) -> None:
        """So many hosts, the same to all nodes, and all other nodes ready to take over."""

        def settled() -> bool:
            found = [_hosts(node) for node in self._nodes]
            if len(found[0]) != hosts or any(names != found[0] for names in found):
                return False
            plan = self._nodes[0].get(f"/mesh/plan?model={MODEL}")
            verdicts = [] if plan is None else [node["verdict"] for node in plan["nodes"]]
            standbys = len(self._nodes) - hosts
            return sorted(verdicts) == ["hosts"] * hosts + ["stands by"] * standbys

        _wait(settled, f"{hosts} of {len(self._nodes)} host, and the others stand by")


def _cpu_s(*nodes: Node) -> float:
    """Of this process, and of `nodes` with their engines. The killed node, which this process has
    waited for, is in neither."""
    return time.process_time() + sum(family_cpu_s(node.pid) for node in nodes)


def _wait(condition: Callable[[], object], what: str) -> None:
    wait_for(condition, limit_s=LIMIT_S, what=what, step_s=0.02)


def _hosts(node: Node) -> set[str]:
    """Who, as `node` sees it, is ready with the model."""
    models = node.get("/mesh/models") or []
    found = [h for m in models if m["id"] == MODEL for h in m["hosts"]]
    return {h["node"] for h in found if h["state"] == "ready"}
