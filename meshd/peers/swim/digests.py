"""Anti-entropy: two tables are compared by 16 numbers, and only what differs is exchanged.

Members that live (suspects too: a suspicion passes by itself) count; tombstones do not, so that
nodes which forget one at different times do not differ, and one is never passed on for ever.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.gossip import Alive, Update, encoded_size

BUCKETS: Final = 16
SYNC_BYTES: Final = 16 * 1024
"""Estimated size of one Sync: far below the limit of a frame, so that it blocks nothing."""


def bucket_of(node: NodeId) -> int:
    return zlib.crc32(node.encode(errors="surrogatepass")) % BUCKETS


def fingerprint(statement: Alive) -> int:
    """64 bits over what makes a statement newer than another of the same node."""
    word = f"{statement.node}/{statement.incarnation}/{statement.version}"
    return int.from_bytes(
        hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
    )


class Buckets:
    """The digest of a table, kept up to date in constant time: each bucket is the exclusive or of
    its fingerprints."""

    def __init__(self) -> None:
        self._values = [0] * BUCKETS

    def toggle(self, statement: Alive) -> None:
        """Put a statement in, or take it out again."""
        self._values[bucket_of(statement.node)] ^= fingerprint(statement)

    def values(self) -> tuple[int, ...]:
        return tuple(self._values)

    def differing(self, theirs: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers of the buckets that differ; none if `theirs` is no digest of this kind."""
        if len(theirs) != BUCKETS:
            return ()
        pairs = zip(self._values, theirs, strict=True)
        return tuple(n for n, (ours, other) in enumerate(pairs) if ours != other)


def chunks(
    updates: Iterable[Update], limit_bytes: int = SYNC_BYTES
) -> Iterator[tuple[Update, ...]]:
    """In order, each within `limit_bytes` or a single update. At least one, maybe empty."""
    chunk: list[Update] = []
    size = 0
    for update in updates:
        more = encoded_size(update)
        if chunk and size + more > limit_bytes:
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(update)
        size += more
    yield tuple(chunk)
