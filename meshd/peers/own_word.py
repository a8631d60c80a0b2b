"""What we say of ourselves, and what to do about what others say of us."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from meshd.ids import NodeId
from meshd.peers.gossip import Alive, Update
from meshd.peers.members import MOST_INCARNATION, newer

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


@dataclass(slots=True)
class OwnWord:
    """Only we raise our incarnation, and only in answer to somebody who is wrong about us."""

    statement: Alive | None = None
    _asked: int = -1
    _asked_at: float = 0.0
    _accusers: list[NodeId] = field(default_factory=list)

    @property
    def left(self) -> bool:
        return self.statement is not None and self.statement.left

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

    def try_refute(self, incarnation: int, now: float) -> int | None:
        """The incarnation to state so that `incarnation` is answered; None if that is under way or
        cannot be."""
        if self._asked > incarnation and now - self._asked_at < ASK_AGAIN_S:
            return None
        if incarnation >= MOST_INCARNATION:
            return None
        self._asked = max(self._asked, incarnation + 1)
        self._asked_at = now
        return self._asked

    def accused_by(self, *accusers: NodeId) -> None:
        for accuser in accusers:
            if accuser not in self._accusers and len(self._accusers) < MOST_ACCUSERS:
                self._accusers.append(accuser)

    def take_accusers(self) -> list[NodeId]:
        """Who is told first that we have refuted."""
        accusers, self._accusers = self._accusers, []
        return accusers

    def try_state(self, statement: Alive) -> bool:
        """Take our own new word; False if it is older than the last one."""
        if self.statement is not None and not newer(statement, self.statement):
            return False
        self.statement = statement
        return True
