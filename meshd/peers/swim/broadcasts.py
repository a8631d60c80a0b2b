"""News that still have to travel (SWIM, section 4.1: infection-style dissemination)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final, TypeAlias

from meshd.ids import NodeId
from meshd.peers.swim.gossip import Dead, Update, encoded_size

MESSAGE_BYTES: Final = 1200
"""Estimated size of all updates on one message: with the rest of it less than a packet."""
MESSAGE_UPDATES: Final = 6
MOST: Final = 512
RETELL: Final = 3
"""λ: each update is told λ·log2(n + 1) times; 3 leaves nobody out with high probability."""


Tier: TypeAlias = dict[NodeId, Update]
"""Updates that were told equally often, the newest last."""


class Broadcasts:
    """At most one update a node (the newest) and `MOST` in all.

    Full-policy: what was told most often, and of that the oldest, makes room; a member that floods
    us with news of made-up nodes delays other news but costs no memory, and digests repair it.
    """

    def __init__(self) -> None:
        self._tiers: dict[int, Tier] = {}
        """By how often they were told."""
        self._tier_of: dict[NodeId, int] = {}

    def __len__(self) -> int:
        return len(self._tier_of)

    def put(self, update: Update) -> None:
        """Tell `update` instead of anything older about that node."""
        self.drop(update.node)
        if len(self) >= MOST:
            self.drop(next(iter(self._tiers[max(self._tiers)])))
        self._place(update, 0)

    def drop(self, node: NodeId) -> None:
        told = self._tier_of.pop(node, None)
        if told is not None:
            tier = self._tiers[told]
            del tier[node]
            if not tier:
                del self._tiers[told]

    def drop_deaths(self) -> None:
        deaths = [u.node for u in self._eager() if isinstance(u, Dead)]
        for node in deaths:
            self.drop(node)

    def take(
        self, nodes: int, skip: Collection[NodeId] = (), budget_bytes: int = MESSAGE_BYTES
    ) -> tuple[Update, ...]:
        """For one message in a mesh of `nodes`: the least told first, of those the newest; none
        about the nodes in `skip`. One that fits into no message goes alone."""
        taken: list[Update] = []
        for update in self._eager():
            size = encoded_size(update)
            giant = size > MESSAGE_BYTES and not taken
            if update.node in skip or (size > budget_bytes and not giant):
                continue
            budget_bytes -= size
            taken.append(update)
            if len(taken) == MESSAGE_UPDATES:
                break
        limit = RETELL * max(1, nodes.bit_length())  # ceil(log2(n + 1))
        for update in reversed(taken):  # so that the newest stays the last of its tier
            told = self._tier_of[update.node] + 1
            self.drop(update.node)
            if told < limit:
                self._place(update, told)
        return tuple(taken)

    def _place(self, update: Update, told: int) -> None:
        self._tiers.setdefault(told, {})[update.node] = update
        self._tier_of[update.node] = told

    def _eager(self) -> Iterator[Update]:
        for told in sorted(self._tiers):
            yield from reversed(self._tiers[told].values())
