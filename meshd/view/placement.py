"""What nodes tell each other about which of them hosts what. Sizes are bytes.

A deployment is everybody's: any member may write it, and the newest writing stands. Bids and claims
are a node's own word about itself, part of its signed advert.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from meshd.ids import ModelId, NodeId
from meshd.view.split import WorkerShare

if TYPE_CHECKING:
    from meshd.view.shape import ModelShape


class Cause(StrEnum):
    """Who wished for a model."""

    OPERATOR = "operator"
    """`meshd load`."""
    FLAG = "flag"
    """`--model`."""
    AUTO = "auto"
    """`--auto`: chosen for a mesh that had nothing to do."""
    DEMAND = "demand"
    """A request named it."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What the mesh should serve. Of two records of one model the one with the higher `stamp`
    stands; a removed one stays as a tombstone."""

    model: ModelId
    ref: str
    version: int
    """Higher than that of every record of this model its writer knew."""
    origin: NodeId
    """Who wrote this version."""
    replicas: int | None = 1
    """Hosts wanted; None lets demand decide."""
    context: int | None = None
    """Tokens per slot; None leaves it to the host's configuration."""
    parallel: int | None = None
    """Slots; None as above."""
    host: NodeId | None = None
    """The only node that may host it; None for any."""
    cause: Cause = Cause.OPERATOR
    asleep: bool = False
    """Served by nobody until it is asked for again."""
    removed: bool = False
    split: bool = False
    """To lie on several nodes even if one could hold it; for tests of that."""
    shape: ModelShape | None = None
    """What its memory depends on; None while nobody has said so who could read its headers."""

    @property
    def stamp(self) -> tuple[int, NodeId]:
        return self.version, self.origin


class Suits(StrEnum):
    """Whether a node could host a model."""

    YES = "yes"
    SWAP = "swap"
    """If it unloads models there that nobody uses."""
    SPLIT = "split"
    """If other nodes lend it memory."""
    NO = "no"


@dataclass(frozen=True, slots=True)
class Bid:
    """What a node says it could do for a deployment, whether or not it hosts it. The numbers are
    coarse so that a bid changes seldom."""

    model: ModelId
    version: int
    """Of the deployment it is for."""
    suits: Suits
    reason: str = ""
    """Why not, in words and figures; what it counts with if it suits."""
    weights: bool = False
    """Its weights lie verified on this node's disk."""
    needs_bytes: int = 0
    free_bytes: int = 0
    """Memory that could be leased for it now (with SWAP: after unloading)."""
    headroom: int = 0
    """0..15: memory that would be left free on the device it fills most, in sixteenths of that one:
    plenty of main memory says nothing about a full accelerator."""
    speed: int = 0
    """log2 of the tokens/s its engine made with the probe model, 0 if never measured."""
    load: int = 0
    """0..15: busy slots of the node, in sixteenths."""
    accelerated: bool = False
    """All layers of the model would lie on accelerators."""
    workers: int = 0
    """With SPLIT: how many nodes would lend memory."""


class ClaimState(StrEnum):
    PREPARING = "preparing"
    """Fetching, verifying, loading."""
    READY = "ready"
    DRAINING = "draining"
    """It gives the model up after its requests."""
    FAILED = "failed"
    """It was to host it and could not; it is passed over for a while."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A node's word that it hosts a model, or why it does not although it was its turn."""

    model: ModelId
    epoch: int
    """Higher than every epoch of this model its node had seen when it claimed; grows by model."""
    state: ClaimState
    score: int
    """Rank of the bid it was made with; higher is better."""
    reason: str = ""
    """Of FAILED and DRAINING: why; of PREPARING: what it is at; of READY: why this node."""
    retry_in_s: float | None = None
    """Of FAILED: how long its node asks to be passed over, from when it said so; for people. It
    takes the claim back when that is over."""
    workers: tuple[WorkerShare, ...] = ()
    """Who lends memory for it; empty if it lies on its host alone."""
