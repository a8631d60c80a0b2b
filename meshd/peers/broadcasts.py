"""News that still have to travel (SWIM, section 4.1: infection-style dissemination)."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from meshd.ids import NodeId
from meshd.peers.gossip import Dead, Update, encoded_size

MESSAGE_BYTES: Final = 1200
"""Estimated size of all updates on one message: with the rest of it less than a packet."""
MESSAGE_UPDATES: Final = 6
MOST: Final = 512
RETELL: Final = 3
"""λ: each update is told λ·log2(n + 1) times; 3 leaves nobody out with high probability."""


@dataclass(slots=True)
class _Item:
    update: Update
    order: int
    told: int = 0
    size: int = 0


class Broadcasts:
    """At most one update a node (the newest) and `MOST` in all.

    Full-policy: what was told most often, and of that the oldest, makes room; a member that floods
    us with news of made-up nodes delays other news but costs no memory, and digests repair it.
    """

    def __init__(self) -> None:
        self._items: dict[NodeId, _Item] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, update: Update) -> None:
        """Tell `update` instead of anything older about that node."""
        self._order += 1
        self._items.pop(update.node, None)
        if len(self._items) >= MOST:
            worst = max(self._items.values(), key=_eagerness)
            del self._items[worst.update.node]
        self._items[update.node] = _Item(update, self._order, size=encoded_size(update))

    def drop(self, node: NodeId) -> None:
        self._items.pop(node, None)

    def drop_deaths(self) -> None:
        self._items = {n: i for n, i in self._items.items() if not isinstance(i.update, Dead)}

    def take(
        self, nodes: int, skip: Collection[NodeId] = (), budget_bytes: int = MESSAGE_BYTES
    ) -> tuple[Update, ...]:
        """For one message in a mesh of `nodes`: the least told first, of those the newest; none
        about the nodes in `skip`."""
        if not self._items:
            return ()
        limit = RETELL * max(1, nodes.bit_length())  # ceil(log2(n + 1))
        taken: list[Update] = []
        items = (item for node, item in self._items.items() if node not in skip)
        for item in heapq.nsmallest(MESSAGE_UPDATES, items, key=_eagerness):
            if item.size > budget_bytes:
                continue
            budget_bytes -= item.size
            taken.append(item.update)
            item.told += 1
            if item.told >= limit:
                del self._items[item.update.node]
        return tuple(taken)


def _eagerness(item: _Item) -> tuple[int, int]:
    return item.told, -item.order
