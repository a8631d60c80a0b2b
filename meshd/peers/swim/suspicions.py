"""All suspicions that run here: who is tried again, and which verdict falls."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.agenda import Agenda
from meshd.peers.swim.alarms import Alarm, NextReprobe, SuspicionEnds
from meshd.peers.swim.gossip import Why
from meshd.peers.swim.outbox import Outbox
from meshd.peers.swim.roster import Roster
from meshd.peers.swim.suspicion import Suspicion
from meshd.peers.swim.timing import Timing

CROWD: Final = 10
"""Own suspicions at once beyond which each is tried less often: if everybody is silent, it is our
network that broke, and shouting does not mend it."""


class End(Enum):
    NOT_YET = auto()
    LOOK = auto()
    """Others suspected, and neither a death nor a refutation came: probe it ourselves."""
    DEATH = auto()


class Suspicions:
    """One a member that is SUSPECT, so bounded by the roster."""

    def __init__(
        self, roster: Roster, outbox: Outbox, agenda: Agenda[Alarm], timing: Timing
    ) -> None:
        self._roster = roster
        self._outbox = outbox
        self._agenda = agenda
        self._timing = timing
        self._running: dict[NodeId, Suspicion] = {}
        self._seqs: dict[NodeId, int] = {}
        """Number of the pings to a node under own suspicion."""
        self._by_seq: dict[int, NodeId] = {}
        self._helpers: dict[NodeId, set[NodeId]] = {}
        """Who was asked to try it."""

    def is_own(self, node: NodeId) -> bool:
        return node in self._seqs

    def hear(self, node: NodeId, now: float) -> None:
        """Somebody suspects `node`; that we do already changes nothing."""
        if node not in self._running:
            self._running[node] = Suspicion(self._timing, now)
            self._arm(node)

    def adopt(self, node: NodeId, now: float, *, link_lost: bool = False) -> None:
        """We suspect it. A lost link is followed by a try at once: that dials."""
        suspicion = self._running.setdefault(node, Suspicion(self._timing, now))
        if not suspicion.own:
            suspicion.adopt(now)
            seq = self._outbox.next_seq()
            self._seqs[node] = seq
            self._by_seq[seq] = node
            self._agenda.set(NextReprobe(node), now + self._gap_s())
        if link_lost:
            suspicion.link_lost = True
            self._outbox.ping(node, self._seqs[node])
        self._arm(node)

    def doubt_death(self, node: NodeId, now: float) -> None:
        """It was declared dead, and nobody here suspected it: find out, in the least time."""
        self.adopt(node, now)
        self._running[node].confirm_fully()
        self._outbox.ping(node, self._seqs[node])
        self._arm(node)

    def clear(self, node: NodeId) -> None:
        if self._running.pop(node, None) is not None:
            self._agenda.cancel(SuspicionEnds(node))
        seq = self._seqs.pop(node, None)
        if seq is not None:
            del self._by_seq[seq]
            self._helpers.pop(node, None)
            self._agenda.cancel(NextReprobe(node))

    def try_confirm(self, node: NodeId, by: NodeId) -> bool:
        """`by` suspects it too; whether that is worth telling."""
        suspicion = self._running.get(node)
        if suspicion is None or not suspicion.try_confirm(by):
            return False
        self._arm(node)
        return True

    def live(self, node: NodeId, now: float) -> None:
        """A sign of life: the verdict waits, for the refutation that must follow."""
        suspicion = self._running.get(node)
        if suspicion is not None:
            suspicion.live(now)
            self._arm(node)

    def refuse(self, node: NodeId, now: float) -> bool:
        """A dial was refused; whether it is dead by that."""
        suspicion = self._running.get(node)
        if suspicion is None:
            return False
        if suspicion.refuse(now):
            return True
        self._arm(node)
        if suspicion.link_lost and suspicion.own:
            self._agenda.set(NextReprobe(node), now + self._timing.refused_confirm_s / 2)
        return False

    def reprobe(self, node: NodeId, now: float) -> None:
        """Try it again, directly and through others; each message tells it that it is suspected."""
        seq = self._seqs.get(node)
        if seq is None:
            return
        self._outbox.ping(node, seq)
        relays = self._roster.sample(self._timing.relays, (node,))
        for relay in relays:
            self._outbox.ping_req(relay, seq, node)
            self._helpers.setdefault(node, set()).add(relay)
        # The fewer can help, the more often we try: two nodes alone must not give up sooner.
        share = (1 + len(relays)) / (1 + self._timing.relays)
        self._agenda.set(NextReprobe(node), now + share * self._gap_s())

    def acked(self, sender: NodeId, seq: int, now: float) -> None:
        """Somebody got an answer; it counts if we asked that one."""
        node = self._by_seq.get(seq)
        if node is not None and sender in self._helpers.get(node, ()):
            self.live(node, now)

    def end(self, node: NodeId, now: float) -> tuple[End, Why]:
        """What the end of the suspicion means, and why it would be a death."""
        suspicion = self._running.get(node)
        if suspicion is None:
            return End.NOT_YET, Why.NO_ANSWER
        if suspicion.own:
            refused = suspicion.refused_at is not None
            return End.DEATH, Why.REFUSED if refused else Why.NO_ANSWER
        suspicion.wait_again(now)
        self._arm(node)
        return End.LOOK, Why.NO_ANSWER

    def postpone(self, by_s: float) -> None:
        for suspicion in self._running.values():
            suspicion.postpone(by_s)

    def _arm(self, node: NodeId) -> None:
        self._agenda.set(SuspicionEnds(node), self._running[node].ends_at())

    def _gap_s(self) -> float:
        return self._timing.reprobe_interval_s * max(1.0, len(self._seqs) / CROWD)
