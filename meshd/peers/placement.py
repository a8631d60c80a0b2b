"""What nodes say of who hosts what, as JSON: bids and claims in adverts, deployments in frames.

Pure. Everything that is read is bounded, and unknown fields are ignored. What is written is as
short as it can be: fields that have their usual value are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final

from pydantic import Field, StringConstraints

from meshd.ids import ModelId, NodeId
from meshd.peers.trust.wire import Node, WireModel, read
from meshd.view import Bid, Cause, Claim, ClaimState, Deployment, Suits

MAX_BIDS: Final = 256
MAX_CLAIMS: Final = 256
MAX_REASON_CHARS: Final = 240
"""Of a bid or claim that is written; longer ones are cut. Four times that is read."""
MAX_RECORDS: Final = 32
"""Deployments in one frame: 170 KiB of the longest there may be, usually 8."""
MAX_REPLICAS: Final = 4096

Counter = Annotated[int, Field(ge=0, lt=1 << 53)]
"""JSON numbers are exact up to there."""
Sixteenths = Annotated[int, Field(ge=0, le=15)]
Model = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,256}$")]
"""A name without control characters: it comes to people's terminals."""
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


class DeploymentRecord(WireModel):
    model: Model
    ref: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,1024}$")]
    version: Counter
    origin: Node
    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | None = 1
    context: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    parallel: Annotated[int, Field(ge=1, le=65_536)] | None = None
    host: Node | None = None
    cause: Annotated[Cause, Field(strict=False)] = Cause.OPERATOR
    asleep: bool = False
    removed: bool = False

    def to_view(self) -> Deployment:
        return Deployment(
            model=ModelId(self.model),
            ref=self.ref,
            version=self.version,
            origin=NodeId(self.origin),
            replicas=self.replicas,
            context=self.context,
            parallel=self.parallel,
            host=None if self.host is None else NodeId(self.host),
            cause=self.cause,
            asleep=self.asleep,
            removed=self.removed,
        )


class _Records(WireModel):
    entries: Annotated[tuple[DeploymentRecord, ...], Field(max_length=MAX_RECORDS, strict=False)]


def record_to_wire(record: Deployment) -> dict[str, Any]:
    """None of `replicas` is a word of its own, demand decides, and always written."""
    return {
        "model": record.model,
        "ref": record.ref,
        "version": record.version,
        "origin": record.origin,
        "replicas": record.replicas,
        "cause": record.cause.value,
    } | _short(
        context=record.context,
        parallel=record.parallel,
        host=record.host,
        asleep=record.asleep,
        removed=record.removed,
    )


def records_from_wire(entries: object) -> tuple[Deployment, ...]:
    """The deployments of one frame. Raises ProtocolError."""
    found = read(_Records, {"entries": entries}, "deployments").entries
    return tuple(entry.to_view() for entry in found)


def _short(**fields: Any) -> dict[str, Any]:
    """Without what reads as its default when it is missing: None, False, 0 and ''."""
    return {name: value for name, value in fields.items() if value}
