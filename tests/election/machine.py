"""The machine of one node in states that many tests begin with, and what they look at."""

from __future__ import annotations

from typing import Any, TypeVar

from meshd.election.election import Election
from meshd.election.words import (
    CapacityMeasured,
    DeploymentsSeen,
    Effect,
    EpochSaved,
    HostReported,
    NodesSeen,
    OffersMade,
    Standing,
)
from meshd.ids import ModelId
from meshd.kernel.machine import Tick
from meshd.view import ClaimState, ModelState
from tests.election.words import GB, OWN, READY, M, offer, record

E = TypeVar("E")


def of(kind: type[E], effects: list[Effect]) -> list[E]:
    return [e for e in effects if isinstance(e, kind)]


def asking(*nodes: Standing, epochs: dict[ModelId, int] | None = None, floor: int = 0) -> Election:
    """It knows everything but the deployment."""
    election = Election(OWN, "own", epochs or {}, floor)
    election.handle(CapacityMeasured({"CUDA0": 10 * GB}), 0.0)
    election.handle(NodesSeen(nodes), 0.0)
    return election


def ask(election: Election, now: float = 0.0, **changes: Any) -> list[Effect]:
    deployment = record(**changes)
    effects = election.handle(DeploymentsSeen((deployment,)), now)
    return effects + election.handle(OffersMade((offer(version=deployment.version),)), now)


def serving(*nodes: Standing, **changes: Any) -> Election:
    """READY with epoch 1 since time 0; `nodes` came after that."""
    election = asking()
    ask(election, **changes)
    election.handle(EpochSaved(M, 1), 0.0)
    election.handle(OffersMade((offer(),)), 0.0)
    election.handle(HostReported(M, ModelState.READY), 0.0)
    assert shown(election) == (1, READY)
    if nodes:
        election.handle(NodesSeen(nodes), 1.0)
    return election


def shown(election: Election) -> tuple[int, ClaimState] | None:
    """Epoch and state of its claim, as others are told."""
    hosted = election.hosted.get(M)
    said = None if hosted is None else hosted.claim
    return None if said is None else (said.epoch, said.state)


def report(election: Election, state: ModelState, now: float, reason: str = "") -> list[Effect]:
    return election.handle(HostReported(M, state, reason or None), now)


def rests(election: Election, now: float) -> bool:
    """Whether nothing is left to be done until it wants to be woken."""
    due = election.due()
    return election.handle(Tick(), now) == [] and (due is None or due > now)
