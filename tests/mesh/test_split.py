"""A model that fits on no node, over three real ones: what it answers, what is told of it, what its
loads send, and that nothing stays of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.mesh.nodes import Lan, MeshNode, Nodes
from tests.mesh.splitting import (
    MODEL,
    Placed,
    answer,
    load,
    of,
    plan_of,
    question,
    sent,
    split_mesh,
    tidy,
    wait_placed,
)
from tests.models import WIDE, wide_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = [f"{number} bottles of {what}" for number in range(5) for what in ("tea", "ink", "", "é")]
TOKENS = 64
FEW_TOKENS = 12
"""Of an answer whose way over the network is counted with a load."""
GONE_LIMIT_S = 10.0
WEIGHTS = 2 * WIDE.parameters


@pytest.mark.timeout(900)
def test_a_split_model_answers_as_it_does_alone_and_leaves_nothing(engine_lan: Lan) -> None:
    weights = wide_model()
    nodes = a, *_ = split_mesh(engine_lan, "a", "b", "c")
    before = _free(nodes, weights)
    load(a, weights, "--host", "a")
    where = wait_placed(engine_lan, *nodes)
    _is_told(where, nodes)
    engine_lan.until(
        lambda: all(0 < free < before[name] for name, free in _free(nodes[1:], weights).items()),
        timeout_s=5,
        what="workers count with what they lend",
    )
    alone = engine_lan.node("alone", "--mesh", "alone").start()
    load(alone, weights)
    with ThreadPoolExecutor() as pool:
        expected, found = pool.map(_answers, (alone, a))
    assert len(set(expected)) == len(PROMPTS)
    assert found == expected
    assert alone.stop() == 0
    first = _unloaded(engine_lan, a, nodes)
    shares = {w["node"]: w["share"] for w in _workers(where)}
    assert all(first[name] >= share * WEIGHTS for name, share in shares.items())

    # What was lent is free again: the same plan is made anew, and finds its tensors.
    engine_lan.until(lambda: _free(nodes, weights) == before, timeout_s=5, what="leases are back")
    load(a, weights, "--host", "a")
    again = wait_placed(engine_lan, *nodes)
    assert again.plan == where.plan
    begun = answer(a, PROMPTS[0], FEW_TOKENS).rstrip("\ufffd")  # the last character may be cut
    assert begun
    assert expected[0].startswith(begun)
    total = _unloaded(engine_lan, a, nodes)
    second = {name: total[name] - first[name] for name in total}
    engine_lan.say(f"sent to workers: {first} at the first load, {second} at the second")
    assert sum(second.values()) < 0.01 * weights.stat().st_size


def _is_told(where: Placed, nodes: Nodes) -> None:
    """Every node names the workers and their shares, wherever it is asked."""
    workers = _workers(where)
    assert where.plan is not None
    assert where.plan["kind"] == "split"
    assert {w["node"] for w in workers} == {n.name for n in nodes} - {where.host}
    assert all(w["bytes"] > 0 and w["share"] > 0 for w in workers)
    assert sum(w["share"] for w in workers) < 1
    words = ",".join(f"{w['node']}:{w['share']:.2f}" for w in workers)
    for node in nodes:
        status, headers, _ = node.request("POST", "/v1/completions", question("hi", 1))
        way = "local" if node.name == where.host else "remote"
        assert (status, headers["x-meshd-node"]) == (200, where.host)
        assert headers["x-meshd-route"] == f"{way}; workers={words}"
        (host,) = (n for n in plan_of(node)["nodes"] if n["verdict"] == "hosts")
        told = [(w["name"], w["share"], w["bytes"]) for w in host["workers"]]
        assert told == [(w["node"], w["share"], w["bytes"]) for w in workers]
        assert all(f"{w['node']} ({w['share']:.0%})" in host["why"] for w in workers)
    _was_ready_after_a_token(of(nodes, where.host))


def _was_ready_after_a_token(host: MeshNode) -> None:
    """What its machines saw, in order: the startup probe, whose last step is a generated token,
    before anybody was told that the engine is ready."""
    machines = (f" child {MODEL} ", f" group {MODEL} ")
    lines = [x for x in host.admin.get("/flight")["lines"] if any(m in x for m in machines)]
    proved = next(n for n, x in enumerate(lines) if "ProbePassed" in x and "STARTUP" in x)
    ready = next(n for n, x in enumerate(lines) if "EngineMoved" in x and "READY" in x)
    assert proved < ready


def _unloaded(lan: Lan, host: MeshNode, nodes: Nodes) -> dict[str, int]:
    """Unload it, and wait until nothing is left; what `host` had sent to each worker until then."""
    host.unload(MODEL)
    gone_s = lan.until(lambda: tidy(None, nodes), timeout_s=GONE_LIMIT_S, what="nothing is left")
    lan.say(f"unloaded: no engine, RPC server, tunnel or loan after {gone_s:.3f} s")
    assert [n.hosts(MODEL) for n in nodes] == [{}, {}, {}]
    return sent(host)


def _free(nodes: Nodes, weights: Path) -> dict[str, int]:
    """Bytes each node has free, as it counts before it takes a model."""
    return {
        node.name: bid["free_bytes"]
        for node in nodes
        for bid in plan_of(node, str(weights))["nodes"]
        if bid["name"] == node.name
    }


def _workers(where: Placed) -> list[dict[str, Any]]:
    assert where.plan is not None
    workers: list[dict[str, Any]] = where.plan["workers"]
    return workers


def _answers(node: MeshNode) -> list[str]:
    return [answer(node, prompt, TOKENS) for prompt in PROMPTS]
