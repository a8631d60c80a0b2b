"""Nodes that die, vanish, come back; a network that breaks and heals."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.mesh.nodes import REACTION_S, Lan

pytestmark = pytest.mark.slow

KILL_LIMIT_S = 1.5
SILENCE_LIMIT_S = 4.0
HEAL_LIMIT_S = 5.0


def test_a_killed_node_is_dead_and_a_restarted_one_itself_again(lan: Lan) -> None:
    a, b, c, d = lan.mesh("a", "b", "c", "d")
    survivors = [a, b, c]
    before = d.id
    os.kill(d.pid, signal.SIGKILL)
    seen = lan.wait_seen("d", "dead", by=survivors, timeout_s=KILL_LIMIT_S + REACTION_S)
    assert max(seen.values()) < KILL_LIMIT_S + REACTION_S
    assert a.mesh["alive"] == 3
    d.close()
    d.start()
    lan.wait_seen("d", "alive", by=survivors, timeout_s=2 + REACTION_S)
    assert d.id == before
    assert a.peers()["d"]["id"] == before
    lan.wait_whole(a, b, c, d)


def test_a_node_killed_and_restarted_at_once_was_never_gone_for_long(lan: Lan) -> None:
    a, b, c = lan.mesh("a", "b", "c")
    os.kill(c.pid, signal.SIGKILL)
    c.close()
    c.start()
    lan.wait_whole(a, b, c, timeout_s=3 + REACTION_S)


def test_two_of_four_killed_together(lan: Lan) -> None:
    a, b, c, d = lan.mesh("a", "b", "c", "d")
    for victim in (c, d):
        os.kill(victim.pid, signal.SIGKILL)
    for victim in (c, d):
        lan.wait_seen(victim.name, "dead", by=[a, b], timeout_s=KILL_LIMIT_S + REACTION_S)


def test_a_silent_node_is_dead_and_back_when_the_wire_is(lan: Lan) -> None:
    nodes = a, b, c, d = lan.mesh("a", "b", "c", "d")
    pids = [n.pid for n in nodes]
    lan.network.isolate(d.host)
    lan.wait_seen("d", "dead", by=[a, b, c], timeout_s=SILENCE_LIMIT_S + REACTION_S)
    for name in "abc":
        lan.wait_seen(name, "dead", by=[d], timeout_s=10)
    lan.network.heal()
    took_s = lan.wait_whole(*nodes, timeout_s=HEAL_LIMIT_S + REACTION_S)
    lan.say(f"one view {took_s:.3f} s after the partition healed")
    assert [n.pid for n in nodes if n.process and n.process.poll() is None] == pids


def test_two_halves_become_one_again(lan: Lan) -> None:
    nodes = a, b, c, d = lan.mesh("a", "b", "c", "d")
    lan.network.partition([a.host, b.host], [c.host, d.host])
    for one, other in (((a, b), (c, d)), ((c, d), (a, b))):
        for node in one:
            lan.wait_seen(node.name, "dead", by=other, timeout_s=SILENCE_LIMIT_S + 2 + REACTION_S)
    assert (a.sees("b"), d.sees("c")) == ("alive", "alive")
    lan.network.heal()
    took_s = lan.wait_whole(*nodes, timeout_s=HEAL_LIMIT_S + REACTION_S)
    lan.say(f"one view {took_s:.3f} s after the halves met")


def test_a_frozen_node_is_dead_and_thaws(lan: Lan) -> None:
    """Its kernel acknowledges everything; only its own word counts."""
    a, b, c = lan.mesh("a", "b", "c")
    os.kill(c.pid, signal.SIGSTOP)
    try:
        lan.wait_seen("c", "dead", by=[a, b], timeout_s=SILENCE_LIMIT_S + REACTION_S)
    finally:
        os.kill(c.pid, signal.SIGCONT)
    lan.wait_whole(a, b, c, timeout_s=HEAL_LIMIT_S + REACTION_S)


def test_a_lossy_network_kills_nobody(lan: Lan) -> None:
    nodes = lan.mesh("a", "b", "c", "d")
    lan.network.lose(20)
    dead: set[tuple[str, str]] = set()
    suspected = looked = 0
    until = time.monotonic() + 12
    while time.monotonic() < until:
        for node in nodes:
            states = {name: peer["state"] for name, peer in node.peers().items()}
            dead |= {(node.name, name) for name, state in states.items() if state == "dead"}
            suspected += sum(state == "suspect" for state in states.values())
            looked += len(states)
    lan.network.heal()
    lan.say(f"{suspected} of {looked} looks met a suspect at 20 % loss")
    assert dead == set()
    lan.wait_whole(*nodes, timeout_s=HEAL_LIMIT_S + REACTION_S)


def test_a_third_nodes_detour_keeps_two_from_burying_each_other(lan: Lan) -> None:
    """a and b cannot reach each other, c reaches both: nobody is dead."""
    a, b, c = lan.mesh("a", "b", "c")
    lan.network.partition([a.host], [b.host])
    until = time.monotonic() + 2 * SILENCE_LIMIT_S
    while time.monotonic() < until:
        assert a.sees("b") != "dead", lan.report()
        assert b.sees("a") != "dead", lan.report()
    assert (c.sees("a"), c.sees("b")) == ("alive", "alive")
