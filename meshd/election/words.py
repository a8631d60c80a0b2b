"""What happens to an election, and what it orders: the words of `election.py`. Sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from meshd.ids import LoanId, ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.view import Bid, Claim, Deployment, Loan, ModelState, SplitPlan


@dataclass(frozen=True, slots=True)
class Standing:
    """What another node that is alive or suspected says of itself."""

    node: NodeId
    name: str
    bids: Mapping[ModelId, Bid] = field(default_factory=lambda: MappingProxyType({}))
    claims: Mapping[ModelId, Claim] = field(default_factory=lambda: MappingProxyType({}))
    draining: bool = False
    """It moves its models away, and takes no new ones."""
    hosts: bool = True
    """False for a client node."""
    merits: dict[ModelId, int] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What ranking.py found its bids to be worth: a node is ranked again and again by the same
    words."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A bid of this node with what only it needs to know."""

    bid: Bid
    memory: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """What would be leased, by device as the engine calls it."""
    victims: tuple[ModelId, ...] = ()
    """With `Suits.SWAP`: the models to be put to sleep first, longest unused first."""
    plan: SplitPlan | None = None
    """With `Suits.SPLIT`: who would hold what; `memory` is this node's part."""


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodesSeen:
    """All other nodes that are alive or suspected; who is missing is dead or left."""

    nodes: tuple[Standing, ...]


@dataclass(frozen=True, slots=True)
class DeploymentsSeen:
    """The whole table, tombstones included; at most one record a model."""

    records: tuple[Deployment, ...]


@dataclass(frozen=True, slots=True)
class OffersMade:
    """This node's bids, all of them; counted with the leases there are."""

    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class CapacityMeasured:
    """What may be leased of each device in all; less than before when one was lost."""

    memory: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class HostReported:
    """How far this node's own hosting of `model` is; ABSENT: it has ended, its memory is free."""

    model: ModelId
    state: ModelState
    reason: str | None = None
    retry_after_s: float | None = None
    """Of FAILED: trying earlier is known to be in vain, or unwelcome."""
    worker_lost: bool = False
    """Of FAILED: a worker refused or was lost; nothing is known to be wrong with this node."""


@dataclass(frozen=True, slots=True)
class HostMeasured:
    """What the engine said it takes after it was loaded, by device."""

    model: ModelId
    memory: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class EpochSaved:
    """The order `SaveEpoch` is on disk."""

    model: ModelId
    epoch: int


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """By hand or before the end: move everything away (`on`), or take part again."""

    on: bool


@dataclass(frozen=True, slots=True)
class DemandMoved:
    """Hosts that demand asks for, of deployments that leave it to demand."""

    replicas: Mapping[ModelId, int]


@dataclass(frozen=True, slots=True)
class LoanAsked:
    """A host asks this node for memory; ends in LoanAnswered at once. `loan.id` is new."""

    loan: Loan


@dataclass(frozen=True, slots=True)
class LoanRenewed:
    """Its host needs it still."""

    loan: LoanId


@dataclass(frozen=True, slots=True)
class LoanEnded:
    """What used its memory is gone."""

    loan: LoanId


Event = (
    NodesSeen
    | DeploymentsSeen
    | OffersMade
    | CapacityMeasured
    | HostReported
    | HostMeasured
    | EpochSaved
    | DrainAsked
    | DemandMoved
    | LoanAsked
    | LoanRenewed
    | LoanEnded
    | Tick
)


# -- effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SaveEpoch:
    """Write it down, durably; ends in EpochSaved. Nothing is claimed before: a node that crashed
    must not come back with an epoch it used already."""

    model: ModelId
    epoch: int


@dataclass(frozen=True, slots=True)
class StartHost:
    """Prepare and load; the memory is leased. What becomes of it: HostReported."""

    deployment: Deployment
    epoch: int
    plan: SplitPlan | None = None
    """Who lends memory for it; None if it is to lie on this node alone."""


@dataclass(frozen=True, slots=True)
class StopHost:
    """Ends in HostReported(ABSENT). `drain`: requests in flight finish first."""

    model: ModelId
    reason: str
    drain: bool = True


@dataclass(frozen=True, slots=True)
class PublishClaims:
    """This node's claims, all of them, instead of those before."""

    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class LeasesChanged:
    """Offers that were made before are out of date: make them anew, with these leases."""

    leased: Mapping[str, int]
    """By device."""


@dataclass(frozen=True, slots=True)
class PutToSleep:
    """Write the deployment's record anew, asleep: its memory is needed for `wanted_for`."""

    model: ModelId
    wanted_for: ModelId


@dataclass(frozen=True, slots=True)
class HostChanged:
    """For the log, `/mesh/events` and the metrics: this node began or ended to host."""

    model: ModelId
    why: str
    """The decision with its figures, in one line."""
    cause: str
    """A word for metrics: `first`, `died`, `moved`, `failed`, `scaled`, `conflict`, `asked`."""


@dataclass(frozen=True, slots=True)
class LoanAnswered:
    """The memory of that loan is leased, or why not."""

    loan: LoanId
    refusal: str | None


@dataclass(frozen=True, slots=True)
class EndLoan:
    """Stop what uses its memory, and tell its host; ends in LoanEnded."""

    loan: LoanId
    reason: str


Effect = (
    SaveEpoch
    | StartHost
    | StopHost
    | PublishClaims
    | LeasesChanged
    | PutToSleep
    | HostChanged
    | LoanAnswered
    | EndLoan
)
