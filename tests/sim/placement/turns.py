"""Whether it was a node's turn: what must be true when it sets out to claim a model.

By what the node itself had seen: it may host the model and says YES to it; its offers are newer
than its last lease; whoever may host has bid, or had the time to; not enough others stand, and
those whose bids are better are fewer than the places to be filled, but for those that never claim
and have had the time to, and those that may still wait for one of these: they count the time from
when they saw it. Nobody is put to sleep for a model that somebody could host without that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from meshd.election.election import BID_WAIT_S
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Bid, ClaimState, Deployment, Suits

if TYPE_CHECKING:
    from tests.sim.placement.station import Station


def assert_turn(
    station: Station, record: Deployment, wanted: int, known_s: float, silent: Collection[NodeId]
) -> None:
    """`known_s`: how long the node knows the record; `silent`: who may be passed over."""
    where = f"{station.name} claims {record.model}"
    offer = station.offers.get(record.model)
    assert offer is not None, f"{where} without an offer"
    assert offer.bid.suits is Suits.YES, f"{where}, offering {offer}"
    assert record.host in (None, station.id), f"{where}, pinned to {record.host}"
    assert not station.draining, f"{where}, draining"
    eligible = [s for s in station.seen if may_host(s, record)]
    mute = [s.name for s in eligible if bid_of(s, record) is None]
    assert not mute or known_s >= BID_WAIT_S - 1e-6, f"{where} before {mute} could bid"
    places = wanted - standing(station.seen, record)
    passed = [_merits(bid) for s in eligible if s.node in silent and (bid := bid_of(s, record))]
    better = [
        s.name
        for s in eligible
        if record.model not in s.claims
        and s.node not in silent
        and (bid := bid_of(s, record)) is not None
        and bid.suits is not Suits.NO
        and _merits(bid) > _merits(offer.bid)
        and not any(merits >= _merits(bid) for merits in passed)
    ]
    assert len(better) < places, f"{where}, {places} to be filled, before {better}"


def assert_no_better_way(station: Station, record: Deployment, silent: Collection[NodeId]) -> None:
    """Before others are put to sleep for it."""
    free = [
        s.name
        for s in station.seen
        if may_host(s, record)
        and s.node not in silent
        and record.model not in s.claims
        and (bid := bid_of(s, record)) is not None
        and bid.suits is Suits.YES
    ]
    assert not free, f"{station.name} makes room for {record.model}, and {free} have it"


def standing(seen: Sequence[Standing], record: Deployment) -> int:
    """Others that host the model, or prepare to, and may."""
    return sum(
        may_host(s, record)
        and record.model in s.claims
        and s.claims[record.model].state in (ClaimState.PREPARING, ClaimState.READY)
        for s in seen
    )


def may_host(other: Standing, record: Deployment) -> bool:
    return other.hosts and not other.draining and record.host in (None, other.node)


def bid_of(other: Standing, record: Deployment) -> Bid | None:
    bid = other.bids.get(record.model)
    return bid if bid is not None and bid.version >= record.version else None


def record_of(station: Station, model: ModelId) -> Deployment:
    """As its machine was told last."""
    return next(record for record in station.shown if record.model == model)


def _merits(bid: Bid) -> tuple[bool, bool, int, int, int]:
    return bid.suits is Suits.YES, bid.weights, bid.headroom, bid.speed, -bid.load
