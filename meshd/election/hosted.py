"""What an election knows of one model of its own node, from the lease to the engine's end. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshd.ids import ModelId
from meshd.view import Claim, ClaimState, Deployment, ModelState, SplitPlan

BACKOFF_S = (10.0, 30.0, 60.0, 120.0, 300.0)
"""How long a node is passed over after failures in a row; the last one goes on. A node with a
broken disk should not be asked every few seconds, one that was short of memory not in an hour."""
REPLANS = 3
"""Losses of workers in a row after each of which a host plans anew; after one more it is passed
over as after a failure of its own."""
REPLAN_WAIT_S = 6.0
"""How long a plan is sought after a worker was lost: as long as it takes to hear what the others
lend now, and to ask the lost one again if it is not dead."""
PROVED_S = 600.0
"""READY for so long, and the failures before are forgotten."""


class Phase(StrEnum):
    CLAIMING = "claiming"
    """Memory is leased and the epoch on its way to the disk; nobody has been told."""
    PREPARING = "preparing"
    READY = "ready"
    RESTARTING = "restarting"
    """Its options changed, or a worker was lost: the engine stops, and is started anew once it has
    gone."""
    DRAINING = "draining"
    FAILED = "failed"


_SHOWN = {
    Phase.PREPARING: ClaimState.PREPARING,
    Phase.RESTARTING: ClaimState.PREPARING,
    Phase.READY: ClaimState.READY,
    Phase.DRAINING: ClaimState.DRAINING,
    Phase.FAILED: ClaimState.FAILED,
}


@dataclass(frozen=True, slots=True)
class Hosted:
    """One model of this node."""

    deployment: Deployment
    """As its engine was started, or will be."""
    epoch: int
    score: int
    phase: Phase
    why: str
    """The decision by which it came here, for as long as nothing newer is to be said."""
    cause: str
    wanted: int
    """Hosts that were wanted when it last stood."""
    plan: SplitPlan | None = None
    """Who holds which share; None if it lies on this node alone."""
    reason: str = ""
    """What it is at, or why it ends; says nothing if READY."""
    at: ModelState | None = None
    """Of PREPARING: what `reason` is about. Others are not told of every percent."""
    engine: bool = False
    """StartHost was ordered, and ABSENT has not come since."""
    raising: int | None = None
    """The higher epoch that is on its way to the disk."""
    ready_at: float | None = None
    replanning: bool = False
    """Of RESTARTING: workers lent it memory, and others are sought, or the same again."""
    replan_until: float | None = None
    """Set when its engine and loans are gone: when to give up if no plan fits."""
    retry_at: float | None = None
    """Of FAILED: when the claim is taken back."""
    backoff_s: float | None = None

    @property
    def model(self) -> ModelId:
        return self.deployment.model

    @property
    def claim(self) -> Claim | None:
        """What the others are told; None while there is nothing to tell."""
        if self.phase is Phase.CLAIMING:
            return None
        reason = self.why if self.phase is Phase.READY else self.reason
        workers = () if self.plan is None else tuple(part.shown for part in self.plan.parts)
        state = _SHOWN[self.phase]
        return Claim(self.model, self.epoch, state, self.score, reason, self.backoff_s, workers)


def same_engine(one: Deployment, other: Deployment) -> bool:
    """Whether an engine started for one record serves the other."""
    return _options(one) == _options(other)


def backoff_s(failures_before: int) -> float:
    return BACKOFF_S[min(failures_before, len(BACKOFF_S) - 1)]


def _options(of: Deployment) -> tuple[object, ...]:
    return of.ref, of.context, of.parallel, of.split
