"""The host's daemon is killed under load, again and again; the model is served on by another node.

Five times, or thirty with SOAK_TEST (`make soak`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.mesh.asking import Answer, Asker, LongStream
from tests.mesh.nodes import Lan, MeshNode

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "builtin"
ROUNDS = 30 if "SOAK_TEST" in os.environ else 5
ASKERS = 2
STREAMS = 2
SERVED_LIMIT_S = 10.0
"""What a busy machine may need; the goal of 4 s is measured by bench/failover.py."""
ENGINE_LIMIT_S = 2.0
"""From the death of a daemon to that of its engines."""
MEANWHILE = {"model_loading", "upstream_failed"}
"""What clients may be told while nobody serves: to come again, or that their host died."""


@dataclass(frozen=True, slots=True)
class Found:
    served_s: float
    """From kill to the first 200 of the new host."""
    refused: int


@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_a_killed_host_is_replaced_every_time(engine_lan: Lan) -> None:
    nodes = engine_lan.mesh("a", "b", "c")
    nodes[0].load(MODEL)
    found = []
    for _ in range(ROUNDS):
        victim = _only_host(engine_lan, *nodes)
        found.append(_fail_over(engine_lan, victim, *(n for n in nodes if n is not victim)))
    _only_host(engine_lan, *nodes)
    served = sorted(f.served_s for f in found)
    engine_lan.say(
        f"{ROUNDS} hosts killed: first answer of the next one after {served[0]:.3f} s at least, "
        f"{served[len(served) // 2]:.3f} s in the middle, {served[-1]:.3f} s at most; "
        f"{max(f.refused for f in found)} refusals at most"
    )
    assert served[-1] < SERVED_LIMIT_S


def _fail_over(lan: Lan, victim: MeshNode, entry: MeshNode, other: MeshNode) -> Found:
    """Kill `victim`, the host, while clients use it by way of `entry`; bring it back afterwards."""
    epoch = entry.hosts(MODEL)[victim.name]
    with contextlib.ExitStack() as stack:
        askers = [stack.enter_context(Asker(entry, MODEL)) for _ in range(ASKERS)]
        streams = [LongStream(entry, MODEL) for _ in range(STREAMS)]
        for stream in streams:
            stack.callback(stream.close)
        lan.until(
            lambda: all(a.by(victim.name) for a in askers), timeout_s=10, what="the host answers"
        )
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        lan.until(
            lambda: all(a.by(entry.name, other.name, since=killed_at) for a in askers),
            timeout_s=SERVED_LIMIT_S + 10,
            what="another host answers all clients",
        )
        assert [s.node for s in streams] == [victim.name] * STREAMS
        assert [s.error_at_its_end() for s in streams] == ["upstream_failed"] * STREAMS
    victim.close()
    lan.until(lambda: not _engines(victim), timeout_s=ENGINE_LIMIT_S, what="its engines end")

    new = _only_host(lan, entry, other)
    assert new is not victim
    assert entry.hosts(MODEL)[new.name] > epoch
    serving = new.engine_pids()
    victim.start()
    lan.until(lambda: _stands_by(victim, new), timeout_s=20, what=f"{victim.name} stands by")
    assert _only_host(lan, victim, entry, other) is new
    assert new.engine_pids() == serving
    refused = [r for asker in askers for r in asker.failed]
    assert {r.code for r in refused} <= MEANWHILE
    first = min(_answers(askers, killed_at, new), key=lambda answer: answer.ended_at)
    return Found(first.ended_at - killed_at, len(refused))


def _answers(askers: list[Asker], since: float, *by: MeshNode) -> list[Answer]:
    return [answer for asker in askers for answer in asker.by(*(n.name for n in by), since=since)]


def _only_host(lan: Lan, *nodes: MeshNode) -> MeshNode:
    """The one that hosts the model, once all of `nodes` see that; no other engine runs."""

    def agreed() -> bool:
        found = [n.hosts(MODEL) for n in nodes]
        alike = all(f == found[0] for f in found)
        return alike and len(found[0]) == 1 and nodes[0].hosts(MODEL, "ready") == found[0]

    lan.until(agreed, timeout_s=20, what="all see one host, ready")
    (name,) = nodes[0].hosts(MODEL)
    host = next(n for n in nodes if n.name == name)
    assert len(host.engine_pids()) == 1
    assert _engines(*nodes) == host.engine_pids()
    return host


def _stands_by(node: MeshNode, host: MeshNode) -> bool:
    """Whether it has come back to the mesh and, as `host` was told, could take the model over."""
    _, _, body = host.request("GET", f"/mesh/plan?model={MODEL}")
    verdicts = {n["name"]: n["verdict"] for n in json.loads(body)["nodes"]}
    return verdicts.get(node.name) == "stands by"


def _engines(*nodes: MeshNode) -> set[int]:
    """Engines that run for any of `nodes`, whoever their parents are: an orphan is one too."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "--alias" in process.cmdline():  # they run in their daemon's data directory
                where = Path(process.cwd())
                found |= {process.pid for n in nodes if where.is_relative_to(n.data_dir)}
    return found
