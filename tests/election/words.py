"""Short ways to say deployments, bids and standings in tests of the election."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshd.election.words import Offer, Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Bid, Claim, ClaimState, Deployment, Suits

M = ModelId("llama")
OWN = NodeId("n0")
PREPARING, READY = ClaimState.PREPARING, ClaimState.READY
DRAINING, FAILED = ClaimState.DRAINING, ClaimState.FAILED
GB = 10**9


def record(version: int = 1, model: ModelId = M, **changes: Any) -> Deployment:
    return replace(Deployment(model, f"org/{model}", version, OWN), **changes)


def bid(headroom: int = 4, version: int = 1, **changes: Any) -> Bid:
    return replace(Bid(M, version, Suits.YES, weights=True, headroom=headroom, speed=5), **changes)


def offer(headroom: int = 4, version: int = 1, size: int = 4 * GB, **changes: Any) -> Offer:
    victims = changes.pop("victims", ())
    return Offer(bid(headroom, version, **changes), {"CUDA0": size}, victims)


def claim(epoch: int, state: ClaimState = READY, score: int = 0, reason: str = "") -> Claim:
    return Claim(M, epoch, state, score, reason)


def node(name: str, *words: Bid | Claim, **changes: Any) -> Standing:
    """A node whose id is its name."""
    bids: Mapping[ModelId, Bid] = {w.model: w for w in words if isinstance(w, Bid)}
    claims: Mapping[ModelId, Claim] = {w.model: w for w in words if isinstance(w, Claim)}
    return replace(Standing(NodeId(name), name, bids, claims), **changes)
