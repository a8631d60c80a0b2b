"""What membership orders while it handles one event; news ride on every message."""

from __future__ import annotations

from meshd.ids import NodeId
from meshd.peers.swim.broadcasts import MESSAGE_BYTES, Broadcasts
from meshd.peers.swim.gossip import (
    Ack,
    Effect,
    Gossip,
    Message,
    Nack,
    Ping,
    PingReq,
    Send,
    Update,
    encoded_size,
)
from meshd.peers.swim.roster import Roster


class Outbox:
    def __init__(self, roster: Roster) -> None:
        self.news = Broadcasts()
        self._roster = roster
        self._effects: list[Effect] = []
        self._seq = 0

    def take(self) -> list[Effect]:
        """All that was ordered since the last call."""
        effects, self._effects = self._effects, []
        return effects

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def ping(self, to: NodeId, seq: int, *first: Update) -> None:
        self._send(to, Ping(seq, self._updates(to, first)))

    def ping_req(self, to: NodeId, seq: int, target: NodeId) -> None:
        self._send(to, PingReq(seq, target, self._updates(to)))

    def ack(self, to: NodeId, seq: int, *first: Update) -> None:
        self._send(to, Ack(seq, self._updates(to, first)))

    def nack(self, to: NodeId, seq: int) -> None:
        self._send(to, Nack(seq, self._updates(to)))

    def gossip(self, to: NodeId, *first: Update) -> None:
        """`first` and what else there is to tell; nothing if that is nothing."""
        updates = self._updates(to, first)
        if updates:
            self._send(to, Gossip(updates))

    def _send(self, to: NodeId, message: Message) -> None:
        self._effects.append(Send(to, message))

    def _updates(self, to: NodeId, first: tuple[Update, ...] = ()) -> tuple[Update, ...]:
        """What is held against `to` comes before all: it can be refuted only by who knows of it.
        Other news are not wasted on somebody who perhaps does not hear them."""
        member = self._roster.get(to)
        accusation = member.accusation() if member is not None else None
        if accusation is not None:
            return (accusation, *first)
        if not self.news:
            return first
        budget = MESSAGE_BYTES - sum(map(encoded_size, first))
        skip = {to, *(update.node for update in first)}
        return first + self.news.take(self._roster.living() + 1, skip, budget)
