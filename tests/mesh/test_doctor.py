"""`meshd doctor --peer` on real networks: the step it blames is the one that is broken."""

from __future__ import annotations

import json

import pytest

from tests.mesh.nodes import Lan, MeshNode

pytestmark = pytest.mark.slow


def look(node: MeshNode, address: str) -> tuple[int, dict[str, str]]:
    """Exit code, and the state of each step."""
    done = node.meshd("doctor", "--peer", address, "--json")
    findings = json.loads(done.stdout)
    failed = [f for f in findings if f["state"] == "failed"]
    assert all(f["remedy"] for f in failed), failed
    return done.returncode, {f["step"]: f["state"] for f in findings}


def test_the_step_that_fails_is_named(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home", mdns=True).start()
    b = lan.node("b", "--join", a.invite(), mdns=True).start()
    lan.wait_whole(a, b)
    code, steps = look(b, a.peer_address)
    assert (code, set(steps.values())) == (0, {"passed"}), steps
    assert list(steps)[:3] == ["name", "tcp", "tls"]
    assert b.sees("a") == "alive"  # it looked without disturbing anything

    lan.network.block_multicast()
    code, steps = look(b, a.peer_address)
    assert (code, steps.pop("multicast")) == (1, "failed")
    assert set(steps.values()) == {"passed"}

    lan.network.isolate(a.host)
    code, steps = look(b, a.peer_address)
    assert (code, steps["name"], steps["tcp"]) == (1, "passed", "failed")
    assert set(list(steps.values())[2:]) == {"skipped"}

    code, steps = look(b, "nowhere.invalid:9338")
    assert (code, steps["name"]) == (1, "failed")


def test_a_stranger_is_told_that_it_is_one(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home").start()
    x = lan.node("x", "--mesh", "other").start()
    code, steps = look(x, a.peer_address)
    assert code == 1
    assert steps["tcp"] == "passed"
    assert "failed" in (steps["tls"], steps["certificate"], steps["mesh"])
