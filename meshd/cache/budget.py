"""What goes when the cache is too large. Pure.

`plan` decides, `removal.py` acts; `meshd cache prune --dry-run` shows the plan and does nothing.

1. Leftovers that are of no more use go first, whether room is needed or not.
2. Then sets of weights, the one used longest ago first, until what is left and what is to come fit
   into the budget. What a set frees is what no set that stays shares with it.
3. A set that has turned out not to be needed for that stays: of two ways to make room, the one
   that keeps what was used last.
4. Never one that an engine runs on, never a pinned one, and without `force` never the last copy in
   the mesh that is not known to be broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeAlias

IN_USE: Final = "an engine runs on it"
PINNED: Final = "pinned in the configuration (cache.pins)"
LAST_COPY: Final = "the last verified copy in the mesh; only --force removes it"
FITS: Final = "fits into the budget"
NO_BUDGET: Final = "no budget is set (cache.budget)"
NOT_ENOUGH: Final = "removing it would not make room"
OLDEST: Final = "used longest ago"
BROKEN: Final = "broken, and used longest ago"


class LeftoverKind(StrEnum):
    PARTIAL = "partial"
    """A download that did not end."""
    DAMAGED = "damaged"
    """A file that was set aside until its replacement is there."""
    ORPHAN = "orphan"
    """A blob no snapshot links to."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file in the cache that belongs to no set."""

    path: str
    kind: LeftoverKind
    size_bytes: int
    """What it takes on the disk; partials have holes."""
    useless: bool
    """Nobody will come back for it."""
    reason: str
    """Why it may go, or why it stays."""

    @property
    def blob(self) -> str:
        """Name of the blob it is, was, or was to be."""
        return self.path.rpartition("/")[2].partition(".")[0]


@dataclass(frozen=True, slots=True)
class Holding:
    """A set of weights on this machine's disk."""

    digest: str
    model: str
    refs: tuple[str, ...]
    blobs: Mapping[str, int] = field(hash=False)
    """What of it is on the disk: bytes, by path."""
    last_used_at: float
    """Unix time."""
    pinned: bool = False
    in_use: bool = False
    intact: bool = True
    """Nothing is known to be wrong with it."""
    elsewhere: bool | None = None
    """Whether another node holds it verified; None: there is no other node that could be asked."""

    @property
    def size_bytes(self) -> int:
        return sum(self.blobs.values())


Item: TypeAlias = Holding | Leftover


@dataclass(frozen=True, slots=True)
class PrunePlan:
    remove: tuple[tuple[Item, str], ...]
    """In this order, with the reason."""
    keep: tuple[tuple[Item, str], ...]
    over_bytes: int
    """By how much the budget is exceeded before; 0 or less if it is not."""
    freed_bytes: int

    @property
    def still_over_bytes(self) -> int:
        """By how much it is exceeded afterwards."""
        return max(0, self.over_bytes - self.freed_bytes)


def plan(
    sets: Sequence[Holding],
    leftovers: Sequence[Leftover] = (),
    *,
    used_bytes: int,
    budget_bytes: int | None,
    need_bytes: int = 0,
    force: bool = False,
) -> PrunePlan:
    """What to remove so that `used_bytes` (of the whole cache) and `need_bytes` (of what is to
    come) fit into `budget_bytes`; None is no limit."""
    useless = [(item, item.reason) for item in leftovers if item.useless]
    freed = sum(item.size_bytes for item, _ in useless)
    over = 0 if budget_bytes is None else used_bytes + need_bytes - budget_bytes

    chosen, released = _choose(sets, over - freed, force=force)
    remove = [(item, OLDEST if item.intact else BROKEN) for item in chosen]
    idle = NO_BUDGET if budget_bytes is None else FITS if released >= over - freed else NOT_ENOUGH
    keep = [
        (item, _protection(item, force=force) or idle)
        for item in sorted(sets, key=_age)
        if item not in chosen
    ]
    return PrunePlan(
        remove=(*useless, *remove),
        keep=(*keep, *((item, item.reason) for item in leftovers if not item.useless)),
        over_bytes=over,
        freed_bytes=freed + released,
    )


def objection(holding: Holding, *, force: bool) -> str | None:
    """Why a set may not be removed although somebody named it, or None.

    Who names a set on a node that has no others to ask needs no force: there `elsewhere` is None.
    """
    if holding.in_use:
        return IN_USE
    if force:
        return None
    if holding.pinned:
        return PINNED
    return LAST_COPY if holding.intact and holding.elsewhere is False else None


def own_bytes(holding: Holding, others: Iterable[Holding]) -> int:
    """What removing `holding` alone would free: blobs no other set has."""
    shared = {path for other in others if other is not holding for path in other.blobs}
    return sum(size for path, size in holding.blobs.items() if path not in shared)


def _protection(holding: Holding, *, force: bool) -> str | None:
    """Why room is never made with this set, or None."""
    if holding.in_use:
        return IN_USE
    if holding.pinned:
        return PINNED
    return LAST_COPY if holding.intact and not holding.elsewhere and not force else None


def _choose(sets: Sequence[Holding], over: int, *, force: bool) -> tuple[list[Holding], int]:
    """The sets to remove, oldest first, and what that frees."""
    shares = Counter(path for holding in sets for path in holding.blobs)
    candidates = [s for s in sorted(sets, key=_age) if _protection(s, force=force) is None]
    chosen: list[Holding] = []
    released = 0
    for holding in candidates:
        if released >= over:
            break
        chosen.append(holding)
        released += _release(holding, shares)
    # Some may free too little to matter, for instance because another set has the same files.
    # Give back from the most recently used on.
    for holding in reversed(chosen.copy()):
        regained = _regain(holding, shares)
        if released - regained >= over or not regained:
            chosen.remove(holding)
            released -= regained
        else:
            _release(holding, shares)
    return chosen, released


def _release(holding: Holding, shares: Counter[str]) -> int:
    """Take the set away; the bytes that then belong to none."""
    shares.subtract(holding.blobs.keys())
    return sum(size for path, size in holding.blobs.items() if not shares[path])


def _regain(holding: Holding, shares: Counter[str]) -> int:
    """Put the set back; the bytes that belonged to none."""
    regained = sum(size for path, size in holding.blobs.items() if not shares[path])
    shares.update(holding.blobs.keys())
    return regained


def _age(holding: Holding) -> tuple[float, str]:
    return (holding.last_used_at, holding.digest)
