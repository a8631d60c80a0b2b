"""Comparing tables with another member, and sending what differs."""

from __future__ import annotations

from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.digests import BUCKETS, bucket_of, chunks
from meshd.peers.swim.gossip import Alive, Digest, Send, Sync, Update
from meshd.peers.swim.outbox import Outbox
from meshd.peers.swim.roster import Roster
from meshd.peers.swim.throttle import Throttle

ANSWER_GAP_S: Final = 0.2
"""Between two tables sent to one peer. The attack: asking for a megabyte with a hundred bytes."""
REVIVED_GAP_S: Final = 0.2
"""Between two comparisons because a dead member is back: when half a mesh comes back, the first few
bring news of all."""


class Exchange:
    def __init__(self, self_id: NodeId, roster: Roster, outbox: Outbox) -> None:
        self._self_id = self_id
        self._roster = roster
        self._outbox = outbox
        self._answers = Throttle(ANSWER_GAP_S, 4096)
        self._revived_at: float | None = None

    def compare_with(self, node: NodeId) -> None:
        self._outbox.emit(Send(node, Digest(self._roster.buckets.values(), answer=True)))

    def compare_with_any(self) -> None:
        for node in self._roster.sample(1):
            self.compare_with(node)

    def compare_revived(self, node: NodeId, now: float) -> None:
        """A partition healed, it seems; `node` has been on the other side."""
        if self._revived_at is None or now - self._revived_at >= REVIVED_GAP_S:
            self._revived_at = now
            self.compare_with(node)

    def answer_digest(self, sender: NodeId, digest: Digest, own: Alive | None, now: float) -> None:
        """Send what we know of the buckets that differ, and ask for theirs where they have any: a
        newcomer is told everything and asked for itself."""
        differing = self._roster.buckets.differing(digest.buckets)
        if not digest.answer or not differing or not self._answers.try_pass(sender, now):
            return
        empty = tuple(n for n in differing if not digest.buckets[n])
        self._send(sender, empty, own, answer=False)
        self._send(sender, tuple(n for n in differing if n not in empty), own, answer=True)

    def answer_sync(self, sender: NodeId, sync: Sync, own: Alive | None, now: float) -> None:
        buckets = tuple(sorted({n for n in sync.buckets if 0 <= n < BUCKETS}))
        if sync.answer and buckets and self._answers.try_pass(sender, now):
            self._send(sender, buckets, own, answer=False)

    def _send(
        self, to: NodeId, buckets: tuple[int, ...], own: Alive | None, *, answer: bool
    ) -> None:
        if not buckets:
            return
        updates: list[Update] = self._roster.knowledge(buckets)
        if own is not None and bucket_of(self._self_id) in buckets:
            updates.append(own)
        parts = list(chunks(updates))
        for part in parts[:-1]:
            self._outbox.emit(Send(to, Sync(buckets, part, answer=False)))
        # Asked for once, with the last: by then they have taken all of ours.
        self._outbox.emit(Send(to, Sync(buckets, parts[-1], answer=answer)))
