"""What a simulated node offers: by its memory and leases, unless it boasts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from meshd.election.words import Offer
from meshd.ids import ModelId
from meshd.view import Bid, Deployment, ModelState, Suits

if TYPE_CHECKING:
    from tests.sim.placement.station import Station

LARGEST = 15


def offer_for(station: Station, deployment: Deployment, needs: int) -> Offer:
    """What it leased for this model already counts as free."""
    model = deployment.model
    own = _taken_by(station, (model,))
    free = {
        device: size - station.leased.get(device, 0) + own.get(device, 0)
        for device, size in station.capacity.items()
    }
    memory = _placed(needs, free)
    bid = _bid(station, deployment, needs, free)
    if not station.member or station.draining:
        return Offer(replace(bid, reason="takes no models"))
    if model in station.doomed or station.ignores(model):
        boast = replace(bid, suits=Suits.YES, headroom=LARGEST, reason="boasts")
        return Offer(boast, memory or {})
    if memory is not None:
        return Offer(replace(bid, suits=Suits.YES, reason="fits"), memory)
    victims: tuple[ModelId, ...] = ()
    for victim in _idle(station, model):
        victims = (*victims, victim)
        freed = _taken_by(station, victims)
        memory = _placed(needs, {d: size + freed.get(d, 0) for d, size in free.items()})
        if memory is not None:
            return Offer(replace(bid, suits=Suits.SWAP, reason="after a swap"), memory, victims)
    return Offer(replace(bid, reason="does not fit"))


def _bid(station: Station, deployment: Deployment, needs: int, free: Mapping[str, int]) -> Bid:
    left = max(0, sum(free.values()) - needs)
    busy = station.busy & set(station.engines.running)
    return Bid(
        deployment.model,
        deployment.version,
        Suits.NO,
        weights=deployment.model in station.weights,
        needs_bytes=needs,
        free_bytes=max(0, sum(free.values())),
        headroom=min(LARGEST, 16 * left // max(1, sum(station.capacity.values()))),
        speed=5 + station.index % 4,
        load=min(LARGEST, 3 * len(busy)),
    )


def _idle(station: Station, wanted: ModelId) -> list[ModelId]:
    """Whom nobody uses, and who is not on the way out already."""
    asleep = {record.model for record in station.book.records if record.asleep or record.removed}
    return [
        model
        for model, engine in sorted(station.engines.running.items())
        if engine.state is ModelState.READY
        and not engine.stopping
        and model != wanted
        and model not in station.busy
        and model not in asleep
    ]


def _taken_by(station: Station, models: Iterable[ModelId]) -> Mapping[str, int]:
    taken: dict[str, int] = {}
    for model in models:
        lease = station.machine.ledger.leases.get(model)
        for device, size in (lease.memory if lease is not None else {}).items():
            taken[device] = taken.get(device, 0) + size
    return taken


def _placed(needs: int, free: Mapping[str, int]) -> Mapping[str, int] | None:
    """On one device if it fits there, else on all of them in equal parts."""
    if not free:
        return None
    roomiest = max(free, key=lambda device: (free[device], device))
    if free[roomiest] >= needs:
        return {roomiest: needs}
    part = -(-needs // len(free))
    return dict.fromkeys(free, part) if min(free.values()) >= part else None
