"""What this node could do for each deployment: its offers, counted with the leases there are. Pure.

Sizes are bytes, devices are named as the engine calls them. Rules, numbered as in the code:

1. Deployments that were removed or are asleep get no offer: nobody is to serve them.
2. A node that may host nothing says why, the same for every model.
3. What a model of unknown size needs cannot be leased, so it is not offered.
4. A model that is leased here already is counted as if it were not: an offer says what the node
   could do for it, not what is left beside it.
5. If a model does not fit, it may where others were put to sleep. Those are models that are served
   here, work on nothing and have not been asked for `SWAP_IDLE_S`; longest unused first, and only
   those without which it does not fit.
6. If it does not fit either way, or is to lie on several nodes in any case, it may with memory that
   other nodes lend.
7. What is told is coarse, and its words hold no figure that time alone changes: each new bid is a
   new advert to all nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, TypeAlias

from meshd.election.fit import HOST, Fit
from meshd.election.fit.splitting import SplitFit
from meshd.election.ledger import Holder
from meshd.election.words import Offer
from meshd.ids import ModelId
from meshd.sizes import format_size
from meshd.view import Bid, Deployment, Suits

SWAP_IDLE_S: Final = 60.0
"""Two models that are used in turn must not push each other out at every request."""
STEPS: Final = 15
"""The highest figure of a headroom or a load."""
COARSE_BITS: Final = 5
"""Of free memory that is told: the figure is at most a sixteenth below the truth."""
NOBODY_LENDS: Final = "it is to be split, and there is no other node that could lend memory"
UNKNOWN_SIZE: Final = "how much memory it needs is not known on this node yet"

Memory: TypeAlias = Mapping[str, int]

MemoryFit: TypeAlias = Callable[[Deployment, Memory], Fit | None]
"""Whether a deployment fits into memory that is free, by device; None if its size is unknown."""

MemorySplit: TypeAlias = Callable[[Deployment, Memory], SplitFit | None]
"""The same, together with memory of other nodes; None if it cannot be split from here."""


@dataclass(frozen=True, slots=True)
class Use:
    """Of a model that is READY on this node."""

    busy: bool
    """Requests are in it, or wait for it."""
    last_at: float
    """When it was last asked for, or became ready if it never was; monotonic."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What this node knows of itself."""

    capacity: Memory
    """What may be leased of each device in all."""
    leases: Mapping[Holder, Memory] = field(default_factory=lambda: MappingProxyType({}))
    """What is leased, by holder and device."""
    uses: Mapping[ModelId, Use] = field(default_factory=lambda: MappingProxyType({}))
    """Of models that are READY here; what is still being loaded is no victim."""
    weights: Collection[ModelId] = frozenset()
    """Models whose weights lie verified on its disk."""
    tokens_per_s: float | None = None
    """What its engine made with the probe model; None if that was never measured."""
    slots: int = 0
    busy_slots: int = 0
    """Of all its models."""


def barred(*, client: bool, draining: bool, engine_problem: str | None) -> str | None:
    """Why a node may host nothing, in words; None if it may. `engine_problem`: why no engine of it
    can be used; running on the CPU where that is allowed is no problem."""
    if client:
        return "a client node hosts nothing"
    if draining:
        return "the node is draining: it moves its models away"
    return engine_problem


def offers(
    deployments: Iterable[Deployment],
    node: NodeFacts,
    fit: MemoryFit,
    now: float,
    *,
    bar: str | None = None,
    split: MemorySplit = lambda deployment, free: None,
) -> tuple[Offer, ...]:
    """One for each deployment that is to be served, in their order. `bar`: see `barred`."""
    wanted = [d for d in deployments if not d.removed and not d.asleep]  # 1
    common = Bid(
        model=ModelId(""),
        version=0,
        suits=Suits.NO,
        speed=speed_figure(node.tokens_per_s),
        load=min(STEPS, 16 * node.busy_slots // node.slots) if node.slots > 0 else 0,
    )
    made = []
    for deployment in wanted:
        model = deployment.model
        bid = replace(
            common, model=model, version=deployment.version, weights=model in node.weights
        )
        if bar is not None:  # 2
            made.append(Offer(replace(bid, reason=bar)))
        else:
            made.append(_offer(deployment, bid, node, fit, split, now))
    return tuple(made)


def speed_figure(tokens_per_s: float | None) -> int:
    """log2, rounded; at least 1 of what was measured, 0 if nothing was."""
    if tokens_per_s is None or tokens_per_s <= 0:
        return 0
    return max(1, round(math.log2(tokens_per_s)))


def coarse(size: int) -> int:
    """`size` with its leading bits only, rounded down."""
    drop = max(0, size.bit_length() - COARSE_BITS)
    return size >> drop << drop


def _offer(
    deployment: Deployment,
    bid: Bid,
    node: NodeFacts,
    fit: MemoryFit,
    split: MemorySplit,
    now: float,
) -> Offer:
    model = deployment.model
    free = _free(node, {model})  # 4
    found = fit(deployment, free)
    if found is None:  # 3
        return Offer(replace(bid, reason=UNKNOWN_SIZE))
    if deployment.split:  # 6
        return _splitting(bid, found, (), split(deployment, free), free, node)
    if found.fits:
        return _fitting(bid, found, free, node)
    candidates = _candidates(model, node, now)
    victims = _victims(deployment, candidates, node, fit)
    if victims is None:
        return _splitting(bid, found, candidates, split(deployment, free), free, node)
    freed = _free(node, {model, *victims})
    swapped = fit(deployment, freed)
    assert swapped is not None, "its size was known a moment ago"
    offer = _fitting(bid, swapped, freed, node)
    names = ", ".join(f"`{victim}`" for victim in victims)
    reason = f"{found.words}; it would fit if {names}, unused now, slept: {swapped.words}"
    return Offer(replace(offer.bid, suits=Suits.SWAP, reason=reason), offer.memory, victims)


def _fitting(bid: Bid, found: Fit, free: Memory, node: NodeFacts) -> Offer:
    told = replace(
        bid,
        suits=Suits.YES,
        reason=found.words,
        accelerated=bool(found.layers) and not found.beside,
        needs_bytes=found.needed,
        free_bytes=max(found.needed, coarse(found.needed + found.headroom)),  # 7
        headroom=_headroom(found.memory, free, node),
    )
    return Offer(told, found.memory)


def _splitting(
    bid: Bid,
    alone: Fit,
    candidates: Collection[ModelId],
    found: SplitFit | None,
    free: Memory,
    node: NodeFacts,
) -> Offer:
    """What does not fit alone, or is not to lie on one node (6)."""
    if found is None or found.plan is None:
        return _not_fitting(bid, alone, candidates, found)
    plan = found.plan
    devices = [device for part in plan.parts for device, _ in part.memory]
    told = replace(
        bid,
        suits=Suits.SPLIT,
        reason=found.words,
        accelerated=not plan.beside and HOST not in devices,
        needs_bytes=found.needed,
        free_bytes=max(found.needed, coarse(found.needed + found.headroom)),
        headroom=_headroom(found.memory, free, node),
        workers=len(plan.parts),
    )
    return Offer(told, found.memory, plan=plan)


def _not_fitting(
    bid: Bid, found: Fit, candidates: Collection[ModelId], split: SplitFit | None
) -> Offer:
    beside = "; not even if everything that is unused here slept" if candidates else ""
    free = max(0, found.needed - found.missing)
    reason = found.words + beside
    if found.fits:
        reason = NOBODY_LENDS if split is None else split.words
    elif split is not None:
        # Short: both are of interest, and reasons are cut on their way.
        here = f"needs {format_size(found.needed)}, {format_size(free)} free here"
        reason = f"{here}{beside}; {split.words}"
    return Offer(replace(bid, reason=reason, needs_bytes=found.needed, free_bytes=coarse(free)))


def _headroom(needed: Memory, free: Memory, node: NodeFacts) -> int:
    """See `Bid.headroom`."""
    left = [
        16 * (free[device] - need) // node.capacity[device]
        for device, need in needed.items()
        if need
    ]
    return min((STEPS, *left))


def _free(node: NodeFacts, without: Collection[Holder]) -> Memory:
    """What is free by device, as if the models of `without` had no lease."""
    free = dict(node.capacity)
    for holder, memory in node.leases.items():
        if holder not in without:
            for device, size in memory.items():
                free[device] = free.get(device, 0) - size
    return MappingProxyType({device: max(0, size) for device, size in free.items()})


def _candidates(wanted: ModelId, node: NodeFacts, now: float) -> tuple[ModelId, ...]:
    """Models that may be put to sleep for `wanted`, longest unused first (5)."""
    unused = [
        (use.last_at, model)
        for model, use in node.uses.items()
        if model != wanted
        and model in node.leases
        and not use.busy
        and now - use.last_at >= SWAP_IDLE_S
    ]
    return tuple(model for _, model in sorted(unused))


def _victims(
    deployment: Deployment, candidates: tuple[ModelId, ...], node: NodeFacts, fit: MemoryFit
) -> tuple[ModelId, ...] | None:
    """The fewest of the longest unused: more are taken until it fits, and those that turn out not
    to be needed are spared, the last used first. None if all of them are not enough."""

    def fits(asleep: Collection[ModelId]) -> bool:
        found = fit(deployment, _free(node, {deployment.model, *asleep}))
        return found is not None and found.fits

    taken = next(
        (candidates[:count] for count in range(1, len(candidates) + 1) if fits(candidates[:count])),
        None,
    )
    if taken is None:
        return None
    for model in reversed(taken):
        spared = tuple(victim for victim in taken if victim != model)
        if spared and fits(spared):
            taken = spared
    return taken
