"""From an inventory to a smaller cache: who is protected, what the plan is, and carrying it out.

Blocking, but for what asks nobody: the plan itself is `budget.plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from meshd.cache.budget import Holding, Item, PrunePlan
from meshd.cache.commands import PlanRow, PruneReport
from meshd.cache.inventory import Inventory, StoredSet
from meshd.cache.references import HubRef
from meshd.cache.removal import Removed, Remover


def holdings_of(
    inventory: Inventory,
    *,
    pins: Collection[HubRef] = (),
    in_use: Callable[[StoredSet], bool] = lambda _: False,
    elsewhere: Callable[[str], bool] | None = None,
) -> tuple[Holding, ...]:
    """What `budget` has to know of each set, in order.

    `pins`: references that are never removed; `elsewhere`: whether another node holds the set of a
    digest verified, None if there is no other node to ask.
    """
    pinned = [inventory.find(pin) for pin in pins]
    return tuple(
        one.holding(
            pinned=any(one is pin for pin in pinned) or any(ref in pins for ref in one.refs),
            in_use=in_use(one),
            elsewhere=None if elsewhere is None else elsewhere(one.digest),
        )
        for one in inventory.sets
    )


def prune(
    plan: PrunePlan,
    inventory: Inventory,
    holdings: Sequence[Holding],
    remover: Remover,
    *,
    dry_run: bool,
) -> PruneReport:
    """Do what `plan` says, or only tell. `holdings`: those it was made of, in the inventory's
    order. What another program is downloading stays. Raises OSError."""
    removed = Removed()
    if not dry_run:
        sets = dict(zip(map(_key, holdings), inventory.sets, strict=True))
        for item, _ in plan.remove:
            if isinstance(item, Holding):
                removed += remover.remove(sets[_key(item)].removal())
            else:
                removed += remover.clear(item)
    freed = plan.freed_bytes if dry_run else removed.freed_bytes
    return PruneReport(
        dry_run=dry_run,
        remove=tuple(_row(item, reason) for item, reason in plan.remove),
        keep=tuple(_row(item, reason) for item, reason in plan.keep),
        freed_bytes=freed,
        still_over_bytes=max(0, plan.over_bytes - freed),
        busy=removed.busy,
    )


def _key(holding: Holding) -> tuple[str, tuple[str, ...]]:
    """Two repositories may hold the same weights: the digest alone does not do."""
    return holding.digest, holding.refs


def _row(item: Item, reason: str) -> PlanRow:
    if isinstance(item, Holding):
        return PlanRow(
            what=item.model,
            ref=item.refs[0] if item.refs else None,
            size_bytes=item.size_bytes,
            last_used_at=item.last_used_at,
            reason=reason,
        )
    return PlanRow(
        what=item.path,
        ref=None,
        size_bytes=item.size_bytes,
        last_used_at=None,
        reason=f"{item.kind}: {reason}",
    )
