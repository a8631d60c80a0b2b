"""Which node is the best one for a model, by what nodes say of themselves. Pure.

Every node ranks with these functions over the same words, so all of them come to the same order
without talking. A node comes into the ranking of a deployment if

1. it may host it: it hosts at all, is not draining, and the deployment is not pinned elsewhere;
2. it has no claim of the model, of any state: who hosts, gives up or failed is not asked again;
3. it has bid for this version of the deployment, and does not say NO.

The order, best first: YES before SWAP before SPLIT, fewer workers, all layers on accelerators
before not, weights on disk before none, more headroom, more speed, less load. Accelerators come so
early since what is loaded stays for long: weights are fetched once, and main memory, of which there
is more, is slower by far.
What is equal in all of that is decided by a hash of the model and the node, so that models for
which all nodes are equal spread over them, and one node's leaving moves only its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from heapq import nlargest

from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Bid, Deployment, Suits

_PARTS = 15
"""Headroom and load count to this."""
_WORKERS = 7
"""More count as so many."""
_SPEED_BITS = 6
_SPEEDS = (1 << _SPEED_BITS) - 1
_LOT_BITS = 32
"""All of a score is below 2^53: it survives JSON."""
_SUITS = {Suits.YES: 3, Suits.SWAP: 2, Suits.SPLIT: 1, Suits.NO: 0}


@dataclass(frozen=True, slots=True)
class Ranked:
    """A node in the ranking of one deployment."""

    node: Standing
    bid: Bid
    score: int


def score(model: ModelId, node: NodeId, bid: Bid) -> int:
    """The rank of a bid as one number, higher is better; figures out of range count as the nearest
    one in it. Of different nodes' bids hardly ever equal; then the higher node id is better."""
    return _worth(bid) << _LOT_BITS | _lot(model, node)


def may_not_host(node: Standing, deployment: Deployment) -> str | None:
    """Why it must not host this deployment, whatever it could (1); None if it may."""
    if not node.hosts:
        return "a client hosts nothing"
    if deployment.host is not None and deployment.host != node.node:
        return "pinned to another node"
    if node.draining:
        return "draining"
    return None


def current_bid(node: Standing, deployment: Deployment) -> Bid | None:
    """Its bid, if it is for this version of the deployment or a newer one that is on its way."""
    bid = node.bids.get(deployment.model)
    return bid if bid is not None and bid.version >= deployment.version else None


def not_ranked(node: Standing, deployment: Deployment) -> str | None:
    """Why it is not in the ranking (1–3), in words; None if it is."""
    if (reason := may_not_host(node, deployment)) is not None:  # 1
        return reason
    if (claim := node.claims.get(deployment.model)) is not None:  # 2
        return f"{claim.state}: {claim.reason}" if claim.reason else str(claim.state)
    if (bid := current_bid(node, deployment)) is None:  # 3
        return "has not said whether it could"
    if bid.suits is Suits.NO:
        return bid.reason or "says it cannot"
    return None


def ranked(node: Standing, deployment: Deployment) -> Ranked | None:
    """Its place in the ranking, as far as that is its own; None if it is not in it."""
    bid = _bid_ranked(node, deployment)
    return None if bid is None else _ranked(node, bid)


def rank(deployment: Deployment, nodes: Iterable[Standing]) -> tuple[Ranked, ...]:
    """The ranking, best first."""
    found = [r for node in nodes if (r := ranked(node, deployment)) is not None]
    return tuple(sorted(found, key=order, reverse=True))


def first_ranked(
    deployment: Deployment, nodes: Iterable[Standing], places: int
) -> tuple[Ranked, ...]:
    """The first `places` of the ranking, without working out all of it."""
    found = [
        (_merits(node, bid), node, bid)
        for node in nodes
        if (bid := _bid_ranked(node, deployment)) is not None
    ]
    if places < 1 or not found:
        return ()
    least = nlargest(places, (merits for merits, _, _ in found))[-1]
    best = [_ranked(node, bid) for merits, node, bid in found if merits >= least]
    return tuple(sorted(best, key=order, reverse=True)[:places])


def order(of: Ranked) -> tuple[int, NodeId]:
    """Key of the ranking's order, higher is better."""
    return of.score, of.node.node


def comes_next(
    deployment: Deployment, own: Ranked, others: Iterable[Standing], places: int
) -> bool:
    """Whether `own` is among the first `places` of the ranking. A SWAP is never while somebody says
    YES: what would be unloaded for it may stay; and a SPLIT never while somebody can host it
    alone."""
    before, merits = 0, own.score >> _LOT_BITS
    for node in others:
        bid = _bid_ranked(node, deployment)
        if bid is None or (others_merits := _merits(node, bid)) < merits:
            continue  # without a look at the lots, of which most ranks do not depend
        if others_merits == merits and order(_ranked(node, bid)) < order(own):
            continue
        if suits_less(own.bid, bid):
            return False
        before += 1
        if before >= places:
            return False
    return places > 0


def suits_less(one: Bid, other: Bid) -> bool:
    """Whether `one` is of a lower kind, whatever the figures of both are."""
    return _SUITS[one.suits] < _SUITS[other.suits]


def all_have_bid(deployment: Deployment, nodes: Iterable[Standing]) -> bool:
    """Whether every node that may host the deployment has said whether it could."""
    return all(
        current_bid(node, deployment) is not None or may_not_host(node, deployment) is not None
        for node in nodes
    )


def merit(bid: Bid) -> str:
    """What a bid counts with, in words and figures."""
    speed = f"about {1 << _clamp(bid.speed, 40)} tokens/s" if bid.speed > 0 else "speed unmeasured"
    parts = [
        "weights on disk" if bid.weights else "weights to be fetched",
        f"{_clamp(bid.headroom, _PARTS)}/16 of its memory left over",
        speed,
        f"{_clamp(bid.load, _PARTS)}/16 of its slots busy",
    ]
    if bid.accelerated:
        parts.insert(0, "all layers on accelerators")
    if bid.suits is Suits.SWAP:
        parts.insert(0, "after unloading idle models")
    elif bid.suits is Suits.SPLIT:
        parts.insert(0, f"with memory of {_nodes(bid.workers)}")
    return ", ".join(parts)


def behind(better: Bid, worse: Bid) -> str:
    """The first thing, in the order of the ranking, by which one bid comes after another."""
    if better.suits is not worse.suits and worse.suits is Suits.SWAP:
        return "would have to unload idle models"
    if better.suits is not worse.suits or better.workers != worse.workers:
        return f"would need memory of {_nodes(worse.workers)}"
    if better.accelerated != worse.accelerated:
        return "not all of its layers would lie on accelerators"
    if better.weights != worse.weights:
        return "would have to fetch the weights"
    if better.headroom != worse.headroom:
        return f"{worse.headroom}/16 of its memory left over, not {better.headroom}/16"
    if better.speed != worse.speed:
        return f"about {1 << _clamp(worse.speed, 40)} tokens/s, not {1 << _clamp(better.speed, 40)}"
    if better.load != worse.load:
        return f"{worse.load}/16 of its slots busy, not {better.load}/16"
    return "equal; the lot decided"


def _bid_ranked(node: Standing, deployment: Deployment) -> Bid | None:
    """The bid with which it is in the ranking (1–3): `not_ranked` without words, as this is asked
    of every node for every model."""
    bid = node.bids.get(deployment.model)
    if bid is None or bid.suits is Suits.NO or bid.version < deployment.version:
        return None
    if deployment.model in node.claims or may_not_host(node, deployment) is not None:
        return None
    return bid


def _ranked(node: Standing, bid: Bid) -> Ranked:
    return Ranked(node, bid, score(bid.model, node.node, bid))


def _merits(node: Standing, bid: Bid) -> int:
    """What its bid is worth, worked out once for every word of a node."""
    merits = node.merits.get(bid.model)
    if merits is None:
        merits = node.merits[bid.model] = _worth(bid)
    return merits


def _worth(bid: Bid) -> int:
    """The score but for the lot."""
    value = _SUITS[bid.suits]
    value = value << 3 | _WORKERS - _clamp(bid.workers, _WORKERS)
    value = value << 1 | bid.accelerated
    value = value << 1 | bid.weights
    value = value << 4 | _clamp(bid.headroom, _PARTS)
    value = value << _SPEED_BITS | _clamp(bid.speed, _SPEEDS)
    return value << 4 | _PARTS - _clamp(bid.load, _PARTS)


def _nodes(count: int) -> str:
    return "another node" if count == 1 else f"{count} other nodes"


def _clamp(value: int, top: int) -> int:
    return value if 0 <= value <= top else max(0, min(top, value))


def _lot(model: ModelId, node: NodeId) -> int:
    digest = blake2b(f"{model}\n{node}".encode(), digest_size=_LOT_BITS // 8).digest()
    return int.from_bytes(digest, "big")
