"""How soon a mesh notices who comes, dies, vanishes and comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.lan import Node, Peers, invite_from, until_each, until_whole
from bench.measure import ATTEMPTS, PEACE
from bench.processes import Stable, cpu_s, machine_cpu_s, own_cpu_s
from tests.mesh.network import Network

LIMIT_S = 30.0
SETTLE_S = 1.0
"""Between two measurements, so that the news of one does not ride along in the next."""
NOBODYS = "10.77.0.254:9338"
"""Where no host is: the address in a token that only mDNS can make good."""


@dataclass(frozen=True, slots=True)
class Join:
    seconds: float
    """From the start of a new node's process until it sees all and all see it."""
    foreign: float
    """Cores taken meanwhile by what does not belong to the benchmark."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one cycle. Each ends when the last node of the mesh has seen it."""

    join_static: Join
    """The token's addresses are right, mDNS is off."""
    join_mdns: Join
    """The token's only address is nobody's: mDNS has to find the mesh."""
    kill_unrouted_s: float
    """From SIGKILL until nobody lists the node as alive."""
    kill_dead_s: float
    """Until everybody lists it as dead."""
    restart_s: float
    """From the start of the killed node's process until everybody lists it as alive, and it all."""
    partition_unrouted_s: float
    """From the moment its frames began to vanish, without a word to anybody."""
    partition_dead_s: float
    heal_s: float
    """From the end of the partition until all list all as alive."""


class Cycles:
    """A mesh of `size`, in which the same things happen again and again."""

    def __init__(
        self, stable: Stable, lan: Network, work: Path, runtime_dir: Path, *, size: int
    ) -> None:
        self._stable = stable
        self._lan = lan
        self._work = work
        self._runtime_dir = runtime_dir
        self._members = [self._node(f"n{number}") for number in range(1, size + 1)]
        self._guest_host = lan.add("guest")
        self._token = self._lost_token = ""
        self._guests = 0

    def begin(self, cycles: int) -> None:
        """Found the mesh, with tokens for that many cycles."""
        founder, *others = self._members
        founder.start("--mesh", "bench")
        self._token = invite_from(founder.data_dir, uses=len(others) + ATTEMPTS * cycles)
        self._lost_token = elsewhere(invite_from(founder.data_dir, uses=ATTEMPTS * cycles))
        for node in others:
            node.start("--join", self._token)
        until_whole(self._members)

    def cycle(self) -> Times:
        *others, victim = self._members
        join_static = self._join("--no-mdns", "--join", self._token)
        join_mdns = self._join("--join", self._lost_token)

        self._settle()
        killed_at = victim.kill()
        unrouted_at = self._until_not_alive(others, victim)
        kill_unrouted_s = unrouted_at - killed_at
        kill_dead_s = self._until_dead(others, victim) - killed_at
        self._settle()
        started_at = victim.start()
        restart_s = until_whole(self._members, limit_s=LIMIT_S) - started_at

        self._settle()
        self._lan.isolate(victim.host)
        cut_at = time.monotonic()
        unrouted_at = self._until_not_alive(others, victim)
        partition_unrouted_s = unrouted_at - cut_at
        partition_dead_s = self._until_dead(others, victim) - cut_at
        # Both sides have to have given each other up, or there is less to heal.
        names = [n.name for n in others]
        until_each(
            [victim],
            lambda _node, peers: all(peers.get(name) == "dead" for name in names),
            limit_s=LIMIT_S,
            what=f"all are dead to {victim.name}",
        )
        self._settle()
        self._lan.heal()
        healed_at = time.monotonic()
        heal_s = until_whole(self._members, limit_s=LIMIT_S) - healed_at
        return Times(
            *(join_static, join_mdns),
            *(kill_unrouted_s, kill_dead_s, restart_s),
            *(partition_unrouted_s, partition_dead_s, heal_s),
        )

    def _join(self, *flags: str) -> Join:
        """One that others did not disturb, or the least disturbed of some: starting a node is work
        for a processor, and whoever takes that away makes it slow."""
        attempts: list[Join] = []
        while True:
            attempts.append(self._join_once(*flags))
            if attempts[-1].foreign <= PEACE or len(attempts) == ATTEMPTS:
                return min(attempts, key=lambda attempt: attempt.foreign)

    def _join_once(self, *flags: str) -> Join:
        """A node nobody knows joins, and leaves again."""
        self._settle()
        self._guests += 1
        host = replace(self._guest_host, name=f"guest{self._guests}")
        guest = Node(self._stable, host, self._work / host.name, self._runtime_dir)
        ours_s, all_s = self._cpu_s(), machine_cpu_s()
        began = guest.start(*flags)
        took_s = until_whole([*self._members, guest], limit_s=LIMIT_S) - began
        ours_s = self._cpu_s() + cpu_s(guest.pid) - ours_s
        foreign = max(0.0, machine_cpu_s() - all_s - ours_s) / took_s
        guest.stop()
        until_each(
            self._members,
            lambda _node, peers: peers.get(guest.name) != "alive",
            limit_s=LIMIT_S,
            what=f"{guest.name} is gone",
        )
        return Join(round(took_s, 4), round(foreign, 3))

    def _cpu_s(self) -> float:
        """Of the benchmark and of the members that run."""
        return own_cpu_s() + sum(cpu_s(node.pid) for node in self._members)

    def _until_not_alive(self, nodes: Sequence[Node], victim: Node) -> float:
        def seen(_node: Node, peers: Peers) -> bool:
            return peers.get(victim.name) != "alive"

        return until_each(nodes, seen, limit_s=LIMIT_S, what=f"{victim.name} is not alive")

    def _until_dead(self, nodes: Sequence[Node], victim: Node) -> float:
        def seen(_node: Node, peers: Peers) -> bool:
            return peers.get(victim.name) == "dead"

        return until_each(nodes, seen, limit_s=LIMIT_S, what=f"{victim.name} is dead")

    def _node(self, name: str) -> Node:
        return Node(self._stable, self._lan.add(name), self._work / name, self._runtime_dir)

    def _settle(self) -> None:
        time.sleep(SETTLE_S)


def elsewhere(token: str) -> str:
    """The same invite, but with an address where nobody is."""
    from meshd.peers.joining.invites import decode_invite, encode_invite

    return encode_invite(replace(decode_invite(token), addresses=(NOBODYS,)))
