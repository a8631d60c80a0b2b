"""The table of members, and who of them is asked next."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, MutableSequence
from types import MappingProxyType
from typing import Any, Final, Protocol

from meshd.ids import NodeId
from meshd.peers.swim.digests import Buckets, bucket_of
from meshd.peers.swim.gossip import Alive, Dead, Update
from meshd.peers.swim.members import Member
from meshd.view import PeerState

MOST: Final = 4096


class Chance(Protocol):
    """The part of `random.Random` that is used; injected, so that equal seeds give equal runs."""

    def random(self) -> float: ...
    def shuffle(self, x: MutableSequence[Any]) -> None: ...


class Roster:
    """Every other node, at most `MOST`.

    Full-policy: the oldest tombstone makes room for a node; if there is none, the newcomer is
    refused. The attack is a member that accuses made-up nodes: those turn into tombstones when
    they do not answer, while living members keep their place.
    """

    def __init__(self, self_id: NodeId, chance: Chance) -> None:
        self.buckets = Buckets()
        self._self_id = self_id
        self._chance = chance
        self._members: dict[NodeId, Member] = {}
        self._living: list[NodeId] = []
        """ALIVE and SUSPECT, sorted: the ring."""
        self._tombs: dict[NodeId, None] = {}
        """All others, the oldest first."""
        self._order: list[NodeId] = []
        """Who is still to be probed in this round; the last comes first."""
        self._round = True
        """Whether the next probe is one of the round, or goes to the successor on the ring."""

    @property
    def members(self) -> Mapping[NodeId, Member]:
        return MappingProxyType(self._members)

    def get(self, node: NodeId) -> Member | None:
        return self._members.get(node)

    def living(self) -> int:
        return len(self._living)

    def dead(self) -> list[NodeId]:
        """Those that can be dialled: somebody's word alone has no address."""
        return [
            m.node
            for m in self._members.values()
            if m.state is PeerState.DEAD and m.statement is not None
        ]

    # -- changes ----------------------------------------------------------------------------------

    def try_make_room(self, node: NodeId) -> tuple[Member | None, bool]:
        """Whether `node` may be put in, and the tombstone that was taken out for it."""
        if node in self._members or len(self._members) < MOST:
            return None, True
        oldest = next(iter(self._tombs), None)
        return (self.remove(oldest), True) if oldest is not None else (None, False)

    def put(self, member: Member) -> None:
        node = member.node
        old = self._members.get(node)
        lived = old is not None and old.lives
        self._members[node] = member
        if old is not None and lived and old.statement is not None:
            self.buckets.toggle(old.statement)
        if member.lives and member.statement is not None:
            self.buckets.toggle(member.statement)
        if not member.lives:
            self._tombs.setdefault(node)
        at = bisect.bisect_left(self._living, node)
        if lived and not member.lives:
            del self._living[at]
        elif member.lives and not lived:
            self._tombs.pop(node, None)
            self._living.insert(at, node)
            # Somewhere in the round that runs: a newcomer is not probed by all at once. A node that
            # comes and goes must not fill the round with itself.
            if len(self._order) < 2 * len(self._living):
                place = int(self._chance.random() * (len(self._order) + 1))
                self._order.insert(place, node)

    def remove(self, node: NodeId) -> Member | None:
        member = self._members.pop(node, None)
        self._tombs.pop(node, None)
        if member is not None and member.lives:
            if member.statement is not None:
                self.buckets.toggle(member.statement)
            del self._living[bisect.bisect_left(self._living, node)]
        return member

    # -- choices ----------------------------------------------------------------------------------

    def try_next(self, unwanted: Callable[[NodeId], bool]) -> NodeId | None:
        """Whom to probe next.

        In turn the next of a shuffled round (SWIM, section 4.3: everyone is asked within a bounded
        time) and the nearest wanted successor on the ring of ids, so that each node has one other
        that asks it every second interval: what is gone is noticed soon in a mesh of any size.
        """
        self._round = not self._round
        chosen = None if self._round else self._successor(unwanted)
        return chosen or self._next_of_round(unwanted) or self._successor(unwanted)

    def sample(self, most: int, unwanted: Iterable[NodeId] = ()) -> list[NodeId]:
        """Up to `most` different ALIVE members, evenly drawn."""
        chosen: list[NodeId] = []
        seen = set(unwanted)
        size = len(self._living)
        if size <= 4 * most:
            pool = [n for n in self._living if n not in seen and self._is_alive(n)]
            self._chance.shuffle(pool)
            return pool[:most]
        # A large table is not copied for three names; a mesh of suspects gives fewer.
        for _ in range(8 * most):
            node = self._living[int(self._chance.random() * size)]
            if node not in seen and self._is_alive(node):
                seen.add(node)
                chosen.append(node)
                if len(chosen) == most:
                    break
        return chosen

    def knowledge(self, buckets: Iterable[int]) -> list[Update]:
        """All that is told of these buckets in a Sync: the words of the living and of those that
        left, and the deaths of nodes that were known alive."""
        wanted = set(buckets)
        told: list[Update] = []
        for member in self._members.values():
            statement = member.statement
            if statement is None or bucket_of(member.node) not in wanted:
                continue
            told.append(_death(member, statement) or statement)
        return told

    def _is_alive(self, node: NodeId) -> bool:
        return self._members[node].state is PeerState.ALIVE

    def _successor(self, unwanted: Callable[[NodeId], bool]) -> NodeId | None:
        start = bisect.bisect(self._living, self._self_id)
        size = len(self._living)
        for step in range(size):
            node = self._living[(start + step) % size]
            if not unwanted(node):
                return node
        return None

    def _next_of_round(self, unwanted: Callable[[NodeId], bool]) -> NodeId | None:
        for _ in range(2):
            while self._order:
                node = self._order.pop()
                member = self._members.get(node)
                if member is not None and member.lives and not unwanted(node):
                    return node
            self._order = list(self._living)
            self._chance.shuffle(self._order)
        return None


def _death(member: Member, statement: Alive) -> Dead | None:
    if member.state is not PeerState.DEAD or member.accuser is None:
        return None
    return Dead(member.node, max(member.accused, statement.incarnation), member.accuser)
