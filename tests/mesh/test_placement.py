"""Which of several real nodes hosts a model, with real engines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from typing import Any

import pytest

from tests.mesh.asking import Asker
from tests.mesh.nodes import Lan, MeshNode, Nodes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "builtin"
AGREED_LIMIT_S = 20.0
MOVED_LIMIT_S = 30.0


@pytest.fixture
def nodes(engine_lan: Lan) -> Nodes:
    return engine_lan.mesh("a", "b", "c")


def test_one_node_hosts_it_and_another_joins_it(engine_lan: Lan, nodes: Nodes) -> None:
    _a, b, c = nodes
    b.load(MODEL)
    first = _the_host(engine_lan, nodes)
    pids = first.engine_pids()
    for node in nodes:
        status, headers, _ = node.request("POST", "/v1/chat/completions", _chat())
        assert (status, headers["x-meshd-node"]) == (200, first.name)
        plan = _plan(node)
        assert first.name in plan["decision"]
        verdicts = {n["name"]: n["verdict"] for n in plan["nodes"]}
        assert verdicts == {n.name: "hosts" if n is first else "stands by" for n in nodes}

    c.load(MODEL, replicas=2)
    names = _agreed(engine_lan, nodes, lambda found: len(found) == 2)
    assert first.name in names
    assert first.engine_pids() == pids
    assert {n.name for n in nodes if n.engines()} == names

    other = next(n for n in nodes if n.name not in names)
    other.unload(MODEL)
    _agreed(engine_lan, nodes, lambda found: not found)
    engine_lan.until(
        lambda: not any(n.engines() for n in nodes), timeout_s=10, what="no engine runs"
    )
    assert [n.status()["deployments"] for n in nodes] == [[], [], []]


def test_a_pin_moves_a_model_and_no_request_fails(engine_lan: Lan, nodes: Nodes) -> None:
    a, b, c = nodes
    a.load(MODEL, host="c")
    assert _the_host(engine_lan, nodes) is c
    with Asker(b, MODEL) as asker:
        _wait_answered(engine_lan, asker, by={"c"})
        done = b.meshd("load", MODEL, "--host", "a")
        assert done.returncode == 0, done.stderr
        _agreed(engine_lan, nodes, lambda found: found == {"a"}, timeout_s=MOVED_LIMIT_S)
        _wait_answered(engine_lan, asker, by={"a"})
    assert asker.failed == []
    assert c.engines() == []


def test_drain_hands_over_and_no_request_fails(engine_lan: Lan, nodes: Nodes) -> None:
    nodes[0].load(MODEL)
    host = _the_host(engine_lan, nodes)
    others = [n for n in nodes if n is not host]
    with Asker(host, MODEL) as own, Asker(others[0], MODEL) as remote:
        _wait_answered(engine_lan, own, remote, by={host.name})
        assert host.meshd("drain").returncode == 0
        names = {n.name for n in others}
        _agreed(
            engine_lan,
            nodes,
            lambda found: len(found) == 1 and found <= names,
            timeout_s=MOVED_LIMIT_S,
        )
        _wait_answered(engine_lan, own, remote, by=names)
    assert own.failed == []
    assert remote.failed == []
    assert host.engines() == []
    assert host.status()["node"]["state"] == "draining"


def test_after_a_partition_one_host_stands_and_its_engine_was_left_alone(
    engine_lan: Lan, nodes: Nodes
) -> None:
    nodes[0].load(MODEL)
    cut_off = _the_host(engine_lan, nodes)
    epoch = cut_off.hosts(MODEL)[cut_off.name]
    rest = tuple(n for n in nodes if n is not cut_off)
    engine_lan.network.isolate(cut_off.host)
    began = time.monotonic()
    names = {n.name for n in rest}
    (name,) = _agreed(
        engine_lan,
        rest,
        lambda found: len(found) == 1 and found <= names,
        timeout_s=MOVED_LIMIT_S,
    )
    engine_lan.say(f"another host {time.monotonic() - began:.3f} s after the host was cut off")
    new = next(n for n in rest if n.name == name)
    pids = new.engine_pids()
    # Whoever is cut off serves on.
    status, headers, _ = cut_off.request("POST", "/v1/chat/completions", _chat())
    assert (status, headers["x-meshd-node"]) == (200, cut_off.name)

    engine_lan.network.heal()
    engine_lan.wait_whole(*nodes)
    assert _agreed(engine_lan, nodes, lambda found: len(found) == 1) == {new.name}
    engine_lan.until(lambda: not cut_off.engines(), timeout_s=10, what="the old engine ends")
    assert new.engine_pids() == pids
    assert new.hosts(MODEL)[new.name] > epoch


def test_a_node_without_room_hosts_nothing_and_says_why(engine_lan: Lan) -> None:
    nodes = a, _b, c = engine_lan.mesh("a", "b", "c", flags={"c": ("--max-vram", "1MB")})
    c.load(MODEL, replicas=3)
    assert _agreed(engine_lan, nodes, lambda found: len(found) == 2) == {"a", "b"}
    for node in nodes:
        told = {n["name"]: n for n in _plan(node)["nodes"]}
        assert told["c"]["verdict"] == "cannot"
        assert "1.0 MB free" in told["c"]["why"]
    assert a.hosts(MODEL, "ready").keys() == {"a", "b"}
    assert c.engines() == []


def test_what_is_deployed_outlives_a_restart_of_all_nodes(engine_lan: Lan, nodes: Nodes) -> None:
    a, *others = nodes
    a.load(MODEL, parallel=3)
    _the_host(engine_lan, nodes)
    for node in nodes:
        assert node.stop() == 0
    for node in (*others, a):
        node.start()
    engine_lan.wait_whole(*nodes)
    _the_host(engine_lan, nodes)
    for node in nodes:
        (record,) = node.status()["deployments"]
        assert (record["model"], record["parallel"], record["origin"]) == (MODEL, 3, "a")


def test_who_hosts_again_after_a_kill_uses_no_epoch_twice(engine_lan: Lan) -> None:
    nodes = a, b = engine_lan.mesh("a", "b")
    b.load(MODEL, host="a")
    assert _the_host(engine_lan, nodes) is a
    epoch = b.hosts(MODEL)["a"]
    a.close()  # SIGKILL
    a.start()
    engine_lan.until(
        lambda: b.hosts(MODEL, "ready").get("a", 0) > epoch,
        timeout_s=AGREED_LIMIT_S,
        what="a hosts it again, by a higher epoch",
    )
    assert _the_host(engine_lan, nodes) is a


def test_who_was_away_does_not_bring_back_what_was_unloaded(engine_lan: Lan, nodes: Nodes) -> None:
    a, b, c = nodes
    a.load(MODEL, replicas=3)
    _agreed(engine_lan, nodes, lambda found: len(found) == 3)
    c.close()  # SIGKILL: it knows of nothing
    b.unload(MODEL)
    _agreed(engine_lan, (a, b), lambda found: not found)
    c.start()
    engine_lan.wait_whole(*nodes)
    engine_lan.until(
        lambda: not c.status()["deployments"] and not c.engines(),
        timeout_s=AGREED_LIMIT_S,
        what="c has learned that it was unloaded",
    )
    assert [n.status()["deployments"] for n in nodes] == [[], [], []]
    assert [n.hosts(MODEL) for n in nodes] == [{}, {}, {}]


# -- steps ----------------------------------------------------------------------------------------


def _chat() -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def _plan(node: MeshNode) -> dict[str, Any]:
    done = node.meshd("plan", MODEL, "--json")
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def _hosts(nodes: Nodes) -> set[str] | None:
    """The hosts if all of `nodes` see the same ones, and all of them ready; None while not."""
    first, *others = (n.hosts(MODEL) for n in nodes)
    alike = all(found == first for found in others)
    return set(first) if alike and all(n.hosts(MODEL, "ready") == first for n in nodes) else None


def _agreed(
    lan: Lan,
    nodes: Nodes,
    enough: Callable[[set[str]], bool],
    *,
    timeout_s: float = AGREED_LIMIT_S,
) -> set[str]:
    """The hosts once all `nodes` see the same ones, and those are `enough`."""
    found: set[str] | None = None

    def reached() -> bool:
        nonlocal found
        found = _hosts(nodes)
        return found is not None and enough(found)

    lan.until(reached, timeout_s=timeout_s, what="all see the same hosts, ready")
    assert found is not None
    return found


def _the_host(lan: Lan, nodes: Nodes) -> MeshNode:
    (name,) = _agreed(lan, nodes, lambda found: len(found) == 1)
    host = next(n for n in nodes if n.name == name)
    assert [n.name for n in nodes if n.engines()] == [name]
    return host


def _wait_answered(lan: Lan, *askers: Asker, by: Collection[str]) -> None:
    """Each of `askers` gets an answer of one of those nodes from now on."""
    since = time.monotonic()
    lan.until(
        lambda: all(asker.by(*by, since=since) for asker in askers),
        timeout_s=10,
        what=f"answers by {sorted(by)}",
    )
