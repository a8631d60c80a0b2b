"""What we believe of other nodes: the one place where a member changes.

A change has consequences that must not be forgotten wherever it comes from: it is announced, told
on, and starts or ends a suspicion, a probe or the life of a tombstone.
"""

from __future__ import annotations

from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.agenda import Agenda
from meshd.peers.swim.alarms import Alarm, TombstoneAges
from meshd.peers.swim.exchange import Exchange
from meshd.peers.swim.gossip import AdvertNewer, Alive, Dead, MemberChanged, Suspect, Update, Why
from meshd.peers.swim.members import Charge, Member, believable, joined, same_run
from meshd.peers.swim.outbox import Outbox
from meshd.peers.swim.probing import Probing
from meshd.peers.swim.roster import Roster
from meshd.peers.swim.suspicions import Suspicions
from meshd.peers.swim.timing import Timing
from meshd.view import PeerState

MOST_REVOKED: Final = 65_536
"""Full-policy: the first falls out; the handshake still refuses it."""


class Beliefs:
    def __init__(
        self,
        self_id: NodeId,
        roster: Roster,
        outbox: Outbox,
        agenda: Agenda[Alarm],
        suspicions: Suspicions,
        probing: Probing,
        exchange: Exchange,
        timing: Timing,
    ) -> None:
        self._self_id = self_id
        self._roster = roster
        self._outbox = outbox
        self._agenda = agenda
        self._suspicions = suspicions
        self._probing = probing
        self._exchange = exchange
        self._timing = timing
        self._revoked: dict[NodeId, None] = {}

    def is_revoked(self, node: NodeId) -> bool:
        return node in self._revoked

    def learn(
        self, update: Update, source: NodeId, why: Why, now: float, *, tell: bool = True
    ) -> None:
        """Take one update about another node. `source`: who sent it, maybe we ourselves; `why`: for
        a state that does not explain itself; `tell`: whether it is told on if it is news."""
        node = update.node
        old = self._roster.get(node)
        known = old.incarnation if old is not None else -1
        if node in self._revoked or node == self._self_id or not believable(update, known):
            return
        new = joined(old, update, now, _reason(update, old, why), self._teller(update, source))
        if new is None:
            self._confirm(update, old)
        elif self._make_room(node):
            self._put(old, new, now)
            if new.version > (old.version if old is not None else -1):
                self._outbox.emit(AdvertNewer(node, new.version, source))
            told = update if isinstance(update, Alive) else new.accusation()
            changed = old is None or old.state is not new.state or isinstance(update, Alive)
            if tell and changed and told is not None:
                self._outbox.news.put(told)

    def suspect(self, node: NodeId, why: Why, now: float, *, link_lost: bool = False) -> None:
        """We have evidence of our own that it is gone. Its death, if it was declared dead."""
        member = self._roster.get(node)
        if member is None or not member.lives:
            return
        word = Suspect(node, member.incarnation, self._self_id)
        self.learn(word, self._self_id, why, now)
        member = self._roster.get(node)
        if member is not None and member.state is PeerState.SUSPECT:
            if not self._suspicions.is_own(node):
                self._outbox.news.put(word)  # to those who heard of it, a confirmation
            self._suspicions.adopt(node, now, link_lost=link_lost)

    def bury(self, node: NodeId, why: Why, now: float) -> None:
        """Our verdict. It takes both charges: we may not have suspected it aloud."""
        member = self._roster.get(node)
        if member is not None:
            for kind in (Suspect, Dead):
                word = kind(node, member.incarnation, self._self_id)
                self.learn(word, self._self_id, why, now)

    def forget(self, node: NodeId, why: Why) -> None:
        member = self._roster.remove(node)
        if member is not None:
            self._outbox.emit(MemberChanged(node, member.state, None, why))
        self._agenda.cancel(TombstoneAges(node))
        self._suspicions.clear(node)
        self._probing.drop(node)
        self._outbox.news.drop(node)

    def revoke(self, node: NodeId) -> None:
        """Forget it, and take no word from or about it any more."""
        if len(self._revoked) >= MOST_REVOKED and node not in self._revoked:
            del self._revoked[next(iter(self._revoked))]
        self._revoked[node] = None
        self.forget(node, Why.REVOKED)

    def _teller(self, update: Update, source: NodeId) -> NodeId | None:
        """Who is to be named for the change; None if it was seen here."""
        if isinstance(update, Alive):
            return None if source == update.node else source
        return None if update.by == self._self_id else update.by

    def _confirm(self, update: Update, old: Member | None) -> None:
        """No news about the node, but maybe about who suspects it."""
        if (
            isinstance(update, Suspect)
            and old is not None
            and old.accused == update.incarnation
            and update.by not in (old.accuser, self._self_id)
            and self._suspicions.try_confirm(update.node, update.by)
        ):
            self._outbox.news.put(update)

    def _put(self, old: Member | None, new: Member, now: float) -> None:
        node = new.node
        self._roster.put(new)
        before = old.state if old is not None else None
        if before is new.state:
            return
        self._outbox.emit(MemberChanged(node, before, new.state, new.why, new.by))
        if not new.lives:
            self._suspicions.clear(node)
            self._probing.drop(node)
            left = new.state is PeerState.LEFT
            kept_s = self._timing.left_kept_s if left else self._timing.dead_kept_s
            self._agenda.set(TombstoneAges(node), now + kept_s)
            return
        self._agenda.cancel(TombstoneAges(node))
        if new.state is PeerState.ALIVE:
            self._suspicions.clear(node)
            if before is PeerState.DEAD:
                self._revive(old, new, now)
            return
        if new.charges == Charge.DECLARED_DEAD:
            self._probing.drop(node)
            self._suspicions.doubt_death(node, now)
        else:
            self._suspicions.hear(node, now)

    def _revive(self, old: Member | None, new: Member, now: float) -> None:
        """A node that never stopped was dead to us: a partition healed. Our other verdicts are as
        doubtful; those who can see more than we could must not hear them as news."""
        if old is not None and same_run(old.incarnation, new.incarnation):
            self._outbox.news.drop_deaths()
        self._exchange.compare_revived(new.node, now)

    def _make_room(self, node: NodeId) -> bool:
        evicted, room = self._roster.try_make_room(node)
        if evicted is not None:
            self._outbox.emit(MemberChanged(evicted.node, evicted.state, None, Why.FORGOTTEN))
            self._agenda.cancel(TombstoneAges(evicted.node))
        return room


def _reason(update: Update, old: Member | None, why: Why) -> Why:
    if not isinstance(update, Alive):
        return why
    if update.left:
        return Why.LEFT
    doubted = old is not None and old.state in (PeerState.SUSPECT, PeerState.DEAD)
    return Why.REFUTED if doubted else why
