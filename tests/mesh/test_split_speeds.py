"""Layers of a split between two real nodes, of which one has the faster memory by its setting."""

from __future__ import annotations

import pytest

from tests.mesh.nodes import Lan, MeshNode, Nodes
from tests.mesh.splitting import MODEL, load, tidy, wait_placed
from tests.models import WIDE, wide_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SPEEDS = {"a": "5GB", "b": "50GB"}
"""Bytes a second."""
GONE_LIMIT_S = 10.0


@pytest.mark.timeout(600)
def test_the_node_with_the_faster_memory_holds_what_it_can(engine_lan: Lan) -> None:
    nodes = a, b = _mesh(engine_lan)
    engine_lan.until(
        lambda: [_speed(node) for node in nodes] == [5 * 10**9, 50 * 10**9],
        timeout_s=10,
        what="both know how fast their memory is",
    )
    assert _share(engine_lan, nodes, host=a, worker=b) == 1  # the host keeps no layer
    assert _share(engine_lan, nodes, host=b, worker=a) == pytest.approx(1 / WIDE.layers, abs=1e-4)


def _mesh(lan: Lan) -> Nodes:
    a = lan.node("a", "--mesh", "home", MESHD_ENGINE__MEMORY_SPEED=SPEEDS["a"]).start()
    token = a.invite()
    b = lan.node("b", "--join", token, MESHD_ENGINE__MEMORY_SPEED=SPEEDS["b"]).start()
    lan.wait_whole(a, b)
    return a, b


def _speed(node: MeshNode) -> int | None:
    (device,) = node.status()["devices"] or [{"memory_bytes_per_s": None}]
    speed: int | None = device["memory_bytes_per_s"]
    return speed


def _share(lan: Lan, nodes: Nodes, *, host: MeshNode, worker: MeshNode) -> float:
    """Of the worker, of a model that is loaded on both, answers, and is unloaded again."""
    load(host, wide_model(), "--split", "--host", host.name)
    where = wait_placed(lan, *nodes)
    assert (where.host, where.workers) == (host.name, (worker.name,))
    question = {"model": MODEL, "prompt": "hi", "max_tokens": 2}
    status, headers, _ = worker.request("POST", "/v1/completions", question)
    assert (status, headers["x-meshd-node"]) == (200, host.name)
    assert where.plan is not None
    (told,) = where.plan["workers"]
    host.unload(MODEL)
    lan.until(lambda: tidy(None, nodes), timeout_s=GONE_LIMIT_S, what="nothing is left")
    share: float = told["share"]
    return share
