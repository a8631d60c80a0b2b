"""What a node says of what it hosts or could host, as JSON in its advert: bids and claims. Pure.

Everything that is read is bounded, and unknown fields are ignored. What is written is as short as
it can be: fields that have their usual value are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final

from pydantic import Field, StringConstraints

from meshd.ids import ModelId
from meshd.peers.trust.wire import WireModel
from meshd.view import Bid, Claim, ClaimState, Suits

MAX_BIDS: Final = 256
MAX_CLAIMS: Final = 256
MAX_REASON_CHARS: Final = 240
"""Of a bid or claim that is written; longer ones are cut. Four times that is read."""

Counter = Annotated[int, Field(ge=0, lt=1 << 53)]
"""JSON numbers are exact up to there."""
Sixteenths = Annotated[int, Field(ge=0, le=15)]
Model = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""No narrower than the name of a deployment may be: nodes bid for all there are."""
Reason = Annotated[str, StringConstraints(max_length=1024)]

_SUITS_ORDER: Final = (Suits.YES, Suits.SWAP, Suits.NO)
_STATE_ORDER: Final = (
    ClaimState.READY,
    ClaimState.PREPARING,
    ClaimState.DRAINING,
    ClaimState.FAILED,
)


class AdvertBid(WireModel):
    model: Model
    version: Counter
    suits: Annotated[Suits, Field(strict=False)]
    reason: Reason = ""
    weights: bool = False
    needs_bytes: Counter = 0
    free_bytes: Counter = 0
    headroom: Sixteenths = 0
    speed: Annotated[int, Field(ge=0, le=63)] = 0
    load: Sixteenths = 0

    def to_view(self) -> Bid:
        return Bid(
            model=ModelId(self.model),
            version=self.version,
            suits=self.suits,
            reason=self.reason,
            weights=self.weights,
            needs_bytes=self.needs_bytes,
            free_bytes=self.free_bytes,
            headroom=self.headroom,
            speed=self.speed,
            load=self.load,
        )


class AdvertClaim(WireModel):
    model: Model
    epoch: Counter
    state: Annotated[ClaimState, Field(strict=False)]
    score: Counter
    reason: Reason = ""
    retry_in_s: Annotated[float, Field(ge=0, le=1e6)] | None = None

    def to_view(self) -> Claim:
        return Claim(
            model=ModelId(self.model),
            epoch=self.epoch,
            state=self.state,
            score=self.score,
            reason=self.reason,
            retry_in_s=self.retry_in_s,
        )


def bids_to_wire(bids: Iterable[Bid]) -> list[dict[str, Any]]:
    """At most MAX_BIDS. Full-policy: who suits comes first; among equals by name of model."""
    kept = sorted(bids, key=lambda b: (_SUITS_ORDER.index(b.suits), b.model))[:MAX_BIDS]
    return [
        {"model": bid.model, "version": bid.version, "suits": bid.suits.value}
        | _short(
            reason=bid.reason[:MAX_REASON_CHARS],
            weights=bid.weights,
            needs_bytes=bid.needs_bytes,
            free_bytes=bid.free_bytes,
            headroom=bid.headroom,
            speed=bid.speed,
            load=bid.load,
        )
        for bid in kept
    ]


def claims_to_wire(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """At most MAX_CLAIMS. Full-policy: what is served comes first, what failed last."""
    kept = sorted(claims, key=lambda c: (_STATE_ORDER.index(c.state), c.model))[:MAX_CLAIMS]
    return [
        {
            "model": claim.model,
            "epoch": claim.epoch,
            "state": claim.state.value,
            "score": claim.score,
        }
        | _short(
            reason=claim.reason[:MAX_REASON_CHARS],
            # Whole seconds: it is for people, and an advert a decimal would be noise.
            retry_in_s=None if claim.retry_in_s is None else float(round(claim.retry_in_s)),
        )
        for claim in kept
    ]


def _short(**fields: Any) -> dict[str, Any]:
    """Without what reads as its default when it is missing: None, False, 0 and ''."""
    return {name: value for name, value in fields.items() if value}
