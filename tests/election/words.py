"""Short ways to say deployments, bids and standings in tests of the election."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshd.election.words import Offer, Standing
from meshd.ids import LoanId, ModelId, NodeId
from meshd.view import (
    Bid,
    Claim,
    ClaimState,
    Deployment,
    Loan,
    LoanAsk,
    Part,
    SplitPlan,
    Suits,
)

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
    victims, plan = changes.pop("victims", ()), changes.pop("plan", None)
    return Offer(bid(headroom, version, **changes), {"CUDA0": size}, victims, plan)


def split_offer(*workers: str, version: int = 1, size: int = 4 * GB) -> Offer:
    """With memory of these nodes."""
    return offer(
        version=version, size=size, suits=Suits.SPLIT, workers=len(workers), plan=plan(*workers)
    )


def part(worker: str, size: int = GB, device: str = "CUDA0", share: float = 0.25) -> Part:
    return Part(NodeId(worker), worker, ((device, size),), (4,), 0, False, share)


def plan(*workers: str) -> SplitPlan:
    return SplitPlan(tuple(map(part, workers)), (("CUDA0", 4),))


def loan(number: int, host: str = "h", epoch: int = 1, size: int = 4 * GB, **changes: Any) -> Loan:
    """Asked of this node; `changes`: of the device, or of the model."""
    lent = part(OWN, size, changes.pop("device", "CUDA0"))
    ask = LoanAsk(changes.pop("model", M), epoch, "7.0.0", lent, None)
    return Loan(LoanId(f"loan-{number}"), NodeId(host), ask)


def claim(epoch: int, state: ClaimState = READY, score: int = 0, reason: str = "") -> Claim:
    return Claim(M, epoch, state, score, reason)


def node(name: str, *words: Bid | Claim, **changes: Any) -> Standing:
    """A node whose id is its name."""
    bids: Mapping[ModelId, Bid] = {w.model: w for w in words if isinstance(w, Bid)}
    claims: Mapping[ModelId, Claim] = {w.model: w for w in words if isinstance(w, Claim)}
    return replace(Standing(NodeId(name), name, bids, claims), **changes)
