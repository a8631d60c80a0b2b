"""What a node says of what it hosts, could host, lends and is asked for, as JSON in its advert:
bids, claims, memory it lends and demand. Pure.

Everything that is read is bounded, and unknown fields are ignored. What is written is as short as
it can be: fields that have their usual value are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import Field, StringConstraints

from meshd.ids import ModelId, NodeId
from meshd.peers.trust.wire import WireModel
from meshd.view import Bid, Claim, ClaimState, Lendable, Suits, WorkerShare

MAX_BIDS: Final = 256
MAX_CLAIMS: Final = 256
MAX_DEMAND: Final = 256
MAX_LENDS: Final = 64
MAX_WORKERS: Final = 16
"""Of one claim; an engine knows no more."""
MAX_LOAD: Final = 65_536.0
"""Slots that one node's clients can be said to keep busy of one model."""
MAX_MODEL_CHARS: Final = 256
MAX_REASON_CHARS: Final = 240
"""Of a bid or claim that is written; longer ones are cut. Four times that is read."""

Counter = Annotated[int, Field(ge=0, lt=1 << 53)]
"""JSON numbers are exact up to there."""
Sixteenths = Annotated[int, Field(ge=0, le=15)]
Model = Annotated[str, StringConstraints(min_length=1, max_length=MAX_MODEL_CHARS)]
"""No narrower than the name of a deployment may be: nodes bid for all there are."""
Reason = Annotated[str, StringConstraints(max_length=1024)]
Load = Annotated[float, Field(ge=0, le=MAX_LOAD, allow_inf_nan=False)]

_SUITS_ORDER: Final = (Suits.YES, Suits.SWAP, Suits.SPLIT, Suits.NO)
_STATE_ORDER: Final = (
    ClaimState.READY,
    ClaimState.PREPARING,
    ClaimState.DRAINING,
    ClaimState.FAILED,
)


@dataclass(frozen=True, slots=True)
class Placement:
    """What one node says of it."""

    bids: tuple[Bid, ...] = ()
    claims: tuple[Claim, ...] = ()
    demand: tuple[tuple[ModelId, float], ...] = ()
    """Of its clients."""
    lends: tuple[Lendable, ...] = ()


class AdvertBid(WireModel):
    model: Model
    version: Counter
    suits: Annotated[Suits, Field(strict=False)]
    reason: Reason = ""
    accelerated: bool = False
    weights: bool = False
    needs_bytes: Counter = 0
    free_bytes: Counter = 0
    headroom: Sixteenths = 0
    speed: Annotated[int, Field(ge=0, le=63)] = 0
    load: Sixteenths = 0
    workers: Annotated[int, Field(ge=0, le=MAX_WORKERS)] = 0

    def to_view(self) -> Bid:
        return Bid(
            model=ModelId(self.model),
            version=self.version,
            suits=self.suits,
            reason=self.reason,
            accelerated=self.accelerated,
            weights=self.weights,
            needs_bytes=self.needs_bytes,
            free_bytes=self.free_bytes,
            headroom=self.headroom,
            speed=self.speed,
            load=self.load,
            workers=self.workers,
        )


class AdvertWorker(WireModel):
    """Of a claim: who lends memory for it."""

    node: Annotated[str, StringConstraints(pattern=r"^[a-z2-7]{52}$")]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    """As its host calls it: as a node may be named, perhaps with a suffix. It stands in headers."""
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    bytes: Counter

    def to_view(self) -> WorkerShare:
        return WorkerShare(NodeId(self.node), self.name, self.share, self.bytes)


class AdvertLendable(WireModel):
    device: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    free_bytes: Counter = 0
    accelerator: bool = False
    bytes_per_s: Annotated[int, Field(gt=0, lt=1 << 53)] | None = None

    def to_view(self) -> Lendable:
        return Lendable(self.device, self.free_bytes, self.accelerator, self.bytes_per_s)


class AdvertClaim(WireModel):
    model: Model
    epoch: Counter
    state: Annotated[ClaimState, Field(strict=False)]
    score: Counter
    reason: Reason = ""
    retry_in_s: Annotated[float, Field(ge=0, le=1e6)] | None = None
    workers: list[AdvertWorker] = Field(default_factory=list, max_length=MAX_WORKERS)

    def to_view(self) -> Claim:
        return Claim(
            model=ModelId(self.model),
            epoch=self.epoch,
            state=self.state,
            score=self.score,
            reason=self.reason,
            retry_in_s=self.retry_in_s,
            workers=tuple(worker.to_view() for worker in self.workers),
        )


def bids_to_wire(bids: Iterable[Bid]) -> list[dict[str, Any]]:
    """At most MAX_BIDS. Full-policy: who suits comes first; among equals by name of model."""
    kept = sorted(bids, key=lambda b: (_SUITS_ORDER.index(b.suits), b.model))[:MAX_BIDS]
    return [
        {"model": bid.model, "version": bid.version, "suits": bid.suits.value}
        | _short(
            reason=bid.reason[:MAX_REASON_CHARS],
            accelerated=bid.accelerated,
            weights=bid.weights,
            needs_bytes=bid.needs_bytes,
            free_bytes=bid.free_bytes,
            headroom=bid.headroom,
            speed=bid.speed,
            load=bid.load,
            workers=min(bid.workers, MAX_WORKERS),
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
            workers=[
                {"node": w.node, "name": w.name, "share": w.share, "bytes": w.bytes}
                for w in claim.workers[:MAX_WORKERS]
            ],
        )
        for claim in kept
    ]


def lends_to_wire(lends: Iterable[Lendable]) -> list[dict[str, Any]]:
    """At most MAX_LENDS; full-policy: the first ones stay."""
    return [
        {"device": lend.device[:256]}
        | _short(
            free_bytes=lend.free_bytes, accelerator=lend.accelerator, bytes_per_s=lend.bytes_per_s
        )
        for lend in tuple(lends)[:MAX_LENDS]
    ]


def demand_to_wire(demand: Iterable[tuple[ModelId, float]]) -> dict[str, float]:
    """Slots by model, at most MAX_DEMAND. Full-policy: the greatest loads come first, among equals
    by name of model; a name too long to be read anywhere is left out."""
    told = [
        (m, min(load, MAX_LOAD)) for m, load in demand if load > 0 and len(m) <= MAX_MODEL_CHARS
    ]
    return dict(sorted(told, key=lambda row: (-row[1], row[0]))[:MAX_DEMAND])


def _short(**fields: Any) -> dict[str, Any]:
    """Without what reads as its default when it is missing: None, False, 0, '' and []."""
    return {name: value for name, value in fields.items() if value}
