"""What we say of ourselves, and what to do about what others say of us.

Only we raise our incarnation, and only in answer to somebody who is wrong about us.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.awareness import Awareness
from meshd.peers.swim.gossip import Alive, SelfImpersonated, StateSelf, Update
from meshd.peers.swim.members import MOST_INCARNATION, believable, newer
from meshd.peers.swim.outbox import Outbox
from meshd.peers.swim.roster import Roster

MOST_ACCUSERS: Final = 8
ASK_AGAIN_S: Final = 1.0
"""After which a statement that was ordered and never came is ordered again."""


class Verdict(Enum):
    KNOWN = auto()
    OUTDATED = auto()
    """The speaker missed our last word."""
    FALSE = auto()
    """To be refuted."""
    STOLEN = auto()
    """Signed by our key, and not by us; to be refuted."""


class OwnWord:
    def __init__(
        self, self_id: NodeId, roster: Roster, outbox: Outbox, awareness: Awareness
    ) -> None:
        self.statement: Alive | None = None
        """The last one; None before the first."""
        self._self_id = self_id
        self._roster = roster
        self._outbox = outbox
        self._awareness = awareness
        self._asked = -1
        self._asked_at = 0.0
        self._accusers: list[NodeId] = []

    @property
    def left(self) -> bool:
        return self.statement is not None and self.statement.left

    def answer(self, update: Update, source: NodeId, now: float) -> bool:
        """Refute what is wrong about us; whether it is merely outdated, and `source` should hear
        our last word."""
        stated = self.statement.incarnation if self.statement is not None else -1
        if not believable(update, stated):
            return False
        match self.judge(update):
            case Verdict.KNOWN:
                return False
            case Verdict.OUTDATED:
                return True
            case Verdict.STOLEN if isinstance(update, Alive):
                self._outbox.emit(SelfImpersonated(update))
            case _:
                self._accused_by(source)
                if not isinstance(update, Alive):
                    self._accused_by(update.by)
        incarnation = self._try_raise(update.incarnation, now)
        if incarnation is not None:
            self._awareness.doubt()
            self._outbox.emit(StateSelf(incarnation))
        return False

    def judge(self, update: Update) -> Verdict:
        own = self.statement
        stated = own.incarnation if own is not None else -1
        if update.incarnation < stated:
            return Verdict.OUTDATED
        if not isinstance(update, Alive):
            # Who has left does not argue about the time of death.
            known = self.left and update.incarnation == stated
            return Verdict.KNOWN if known else Verdict.FALSE
        if own is None or newer(update, own):
            return Verdict.STOLEN
        same = (update.version, update.left) == (own.version, own.left)
        return Verdict.STOLEN if same and update != own else Verdict.KNOWN

    def try_state(self, statement: Alive) -> bool:
        """Take our new word and tell it, our accusers first; False if it is not newer."""
        before = self.statement
        if statement.node != self._self_id:
            return False
        if before is not None and not newer(statement, before):
            return False
        self.statement = statement
        if before is not None:
            self._roster.buckets.toggle(before)
        self._roster.buckets.toggle(statement)
        self._outbox.news.put(statement)
        accusers, self._accusers = self._accusers, []
        for accuser in accusers:
            self._outbox.gossip(accuser, statement)
        return True

    def _accused_by(self, accuser: NodeId) -> None:
        if accuser != self._self_id and accuser not in self._accusers:
            del self._accusers[MOST_ACCUSERS - 1 :]
            self._accusers.append(accuser)

    def _try_raise(self, incarnation: int, now: float) -> int | None:
        """The incarnation that answers `incarnation`; None if one is under way, or none is left."""
        if self._asked > incarnation and now - self._asked_at < ASK_AGAIN_S:
            return None
        if incarnation >= MOST_INCARNATION:
            return None
        self._asked = max(self._asked, incarnation + 1)
        self._asked_at = now
        return self._asked
