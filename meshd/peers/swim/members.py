"""What is held of one other node, and how a statement changes it.

A member is the join of all it was told: the newest statement of the node itself and the charges
against the newest incarnation that was accused. Both only grow, so the order in which news arrive
does not matter. Rules, numbered as in the code:

1. Of two statements the one of the higher incarnation is newer; within one, leaving is final, and
   else the version decides. What remains is a copied data directory: any fixed order will do.
2. A charge counts against its incarnation and all lower ones; only a newer statement of the node
   itself answers it.
3. Suspected *and* declared dead is DEAD. Declared dead alone is SUSPECT: when a partition heals,
   the other side's verdicts about our neighbours arrive, and nobody here has suspected them. Our
   own failure to reach it, or anybody's suspicion, makes it a death.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.gossip import Alive, Dead, Suspect, Update, Why
from meshd.view import PeerState

MOST_INCARNATION: Final = (1 << 53) - 1
"""The largest integer that every JSON reader keeps whole."""
RUN_BITS: Final = 20
"""An incarnation is the number of the start, and below it that of refutations since."""
BELIEVABLE_STEP: Final = 1 << 24
"""How far above its last statement a node may be accused (16 of its restarts that we missed).
Anyone can accuse of any incarnation, and the accused must answer with a higher one: without a
limit one lie near `MOST_INCARNATION` would bar a node for ever."""
BELIEVABLE_FIRST: Final = 1 << 44
"""The same for a node that has stated nothing here yet."""


class Charge(IntFlag):
    NONE = 0
    SUSPECTED = 1
    DECLARED_DEAD = 2
    BOTH = 3


@dataclass(frozen=True, slots=True)
class Member:
    node: NodeId
    state: PeerState
    since: float
    """Monotonic seconds of the last change of `state`."""
    why: Why
    by: NodeId | None = None
    """Who said so, if it was not seen here."""
    statement: Alive | None = None
    """Its own newest word; None if only others have spoken of it."""
    accused: int = -1
    """The highest incarnation that was accused."""
    charges: Charge = Charge.NONE
    accuser: NodeId | None = None

    @property
    def incarnation(self) -> int:
        stated = self.statement.incarnation if self.statement is not None else -1
        return max(stated, self.accused)

    @property
    def version(self) -> int:
        return self.statement.version if self.statement is not None else -1

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.statement.addresses if self.statement is not None else ()

    @property
    def lives(self) -> bool:
        return self.state in (PeerState.ALIVE, PeerState.SUSPECT)

    def accusation(self) -> Suspect | Dead | None:
        """What stands against it, as others and itself are told; None if nothing does."""
        if not self.charges or self.accuser is None or self.state is PeerState.ALIVE:
            return None
        kind = Dead if Charge.DECLARED_DEAD in self.charges else Suspect
        return kind(self.node, self.accused, self.accuser)


def same_run(one: int, other: int) -> bool:
    """Whether two incarnations of a node belong to one start of it."""
    return one >> RUN_BITS == other >> RUN_BITS


def newer(first: Alive, second: Alive) -> bool:
    """Whether `first` says something newer than `second`, both of one node."""
    return _order(first) > _order(second)  # 1


def believable(update: Update, known: int) -> bool:
    """Whether `update` may be true of a node whose incarnation `known` is the highest heard of (-1
    if none). Statements are signed; accusations are bounded."""
    if not 0 <= update.incarnation <= MOST_INCARNATION:
        return False
    if isinstance(update, Alive):
        return 0 <= update.version <= MOST_INCARNATION
    return update.incarnation <= max(known, BELIEVABLE_FIRST) + BELIEVABLE_STEP


def joined(
    old: Member | None, update: Update, now: float, why: Why, by: NodeId | None
) -> Member | None:
    """The member after `update`, or None if that is no news. `why` and `by` are kept if the state
    changes."""
    statement = old.statement if old is not None else None
    accused, charges, accuser = -1, Charge.NONE, None
    if old is not None:
        accused, charges, accuser = old.accused, old.charges, old.accuser
    if isinstance(update, Alive):
        if statement is not None and not newer(update, statement):
            return None
        statement = update
    else:
        charge = Charge.SUSPECTED if isinstance(update, Suspect) else Charge.DECLARED_DEAD
        if update.incarnation < accused:
            return None
        if update.incarnation > accused:
            accused, charges, accuser = update.incarnation, charge, update.by
        elif charge in charges:
            return None
        else:
            charges, accuser = charges | charge, update.by
    state = _state(statement, accused, charges)
    if old is not None and old.state is state:
        now, why, by = old.since, old.why, old.by
    return Member(update.node, state, now, why, by, statement, accused, charges, accuser)


def _state(statement: Alive | None, accused: int, charges: Charge) -> PeerState:
    stated = statement.incarnation if statement is not None else -1
    if statement is not None and (stated > accused or (stated == accused and statement.left)):
        return PeerState.LEFT if statement.left else PeerState.ALIVE
    return PeerState.DEAD if charges == Charge.BOTH else PeerState.SUSPECT  # 2, 3


def _order(statement: Alive) -> tuple[int, bool, int, tuple[str, ...], bytes]:
    return (
        statement.incarnation,
        statement.left,
        statement.version,
        statement.addresses,
        statement.signature,
    )
