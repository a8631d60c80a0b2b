"""Pings for others, who got no answer themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.agenda import Agenda
from meshd.peers.swim.alarms import Alarm, ErrandTimeout
from meshd.peers.swim.outbox import Outbox

MOST: Final = 256


@dataclass(frozen=True, slots=True)
class _Errand:
    requester: NodeId
    their_seq: int
    target: NodeId


class Errands:
    """Each ends in one Ack or one Nack to the requester.

    Full-policy: Nack at once. The attack is a peer that has us ping for it without end.
    """

    def __init__(self, outbox: Outbox, agenda: Agenda[Alarm], limit_s: float) -> None:
        self._outbox = outbox
        self._agenda = agenda
        self._limit_s = limit_s
        self._errands: dict[int, _Errand] = {}

    def run(self, requester: NodeId, their_seq: int, target: NodeId, now: float) -> None:
        if len(self._errands) >= MOST:
            self._outbox.nack(requester, their_seq)
            return
        seq = self._outbox.next_seq()
        self._errands[seq] = _Errand(requester, their_seq, target)
        self._outbox.ping(target, seq)
        self._agenda.set(ErrandTimeout(seq), now + self._limit_s)

    def acked(self, sender: NodeId, seq: int) -> None:
        errand = self._errands.get(seq)
        if errand is not None and errand.target == sender:
            del self._errands[seq]
            self._agenda.cancel(ErrandTimeout(seq))
            self._outbox.ack(errand.requester, errand.their_seq)

    def give_up(self, seq: int) -> None:
        errand = self._errands.pop(seq, None)
        if errand is not None:
            self._outbox.nack(errand.requester, errand.their_seq)
