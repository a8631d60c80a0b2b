"""Models that lie on several nodes, as their host's machine decides about them (rule 15)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshd.election.election import Election
from meshd.election.hosted import BACKOFF_S, PROVED_S, REPLAN_WAIT_S, REPLANS, Phase
from meshd.election.words import (
    DeploymentsSeen,
    DrainAsked,
    Effect,
    EpochSaved,
    HostChanged,
    HostReported,
    LeasesChanged,
    NodesSeen,
    Offer,
    OffersMade,
    PublishClaims,
    SaveEpoch,
    StartHost,
    StopHost,
)
from meshd.ids import NodeId
from meshd.kernel.machine import Tick
from meshd.view import Claim, ModelState, Suits
from tests.election.machine import asking, of, report, rests, shown
from tests.election.words import (
    FAILED,
    GB,
    PREPARING,
    READY,
    M,
    bid,
    claim,
    node,
    offer,
    part,
    plan,
    record,
    split_offer,
)

NOTHING = offer(suits=Suits.NO, reason="2.0 GB short even if it is split")
LOST = "worker b was lost: its connection ended"


def claiming(*workers: str) -> Election:
    """Its turn has come, with memory of these nodes; its epoch is on its way to the disk."""
    election = asking()
    election.handle(DeploymentsSeen((record(),)), 0.0)
    effects = election.handle(OffersMade((split_offer(*workers),)), 0.0)
    assert of(SaveEpoch, effects) == [SaveEpoch(M, 1)]
    return election


def splitting(*workers: str) -> Election:
    """It loads with memory of these nodes since time 0, with epoch 1."""
    election = claiming(*workers)
    assert of(StartHost, election.handle(EpochSaved(M, 1), 0.0))
    election.handle(OffersMade((split_offer(*workers),)), 0.0)
    return election


def lose(election: Election, now: float) -> list[Effect]:
    return election.handle(HostReported(M, ModelState.FAILED, LOST, worker_lost=True), now)


def lost(election: Election, now: float) -> Election:
    """And what was left of it has ended."""
    lose(election, now)
    report(election, ModelState.ABSENT, now)
    return election


def bids(election: Election, one: Offer, now: float) -> list[Effect]:
    return election.handle(OffersMade((one,)), now)


def claimed(effects: list[Effect]) -> Claim:
    (published,) = of(PublishClaims, effects)
    (told,) = published.claims
    return told


# -- claiming -------------------------------------------------------------------------------------


def test_15_a_split_is_claimed_and_started_with_its_plan() -> None:
    election = claiming("b", "c")
    assert election.ledger.leased() == {"CUDA0": 4 * GB}, "its own part"
    effects = election.handle(EpochSaved(M, 1), 0.1)
    assert of(StartHost, effects) == [StartHost(record(), 1, plan("b", "c"))]
    told = claimed(effects)
    assert (told.state, told.workers) == (PREPARING, (part("b").shown, part("c").shown))
    assert "own: with memory of 2 other nodes, weights on disk" in told.reason


def test_15_it_shows_its_workers_while_it_serves() -> None:
    told = claimed(report(splitting("b"), ModelState.READY, 5.0))
    assert (told.state, [w.name for w in told.workers]) == (READY, ["b"])


def test_15_what_lies_on_one_node_has_no_workers() -> None:
    election = asking()
    election.handle(DeploymentsSeen((record(),)), 0.0)
    bids(election, offer(), 0.0)
    effects = election.handle(EpochSaved(M, 1), 0.0)
    assert of(StartHost, effects) == [StartHost(record(), 1, None)]
    assert claimed(effects).workers == ()


@pytest.mark.parametrize("suits", [Suits.YES, Suits.SWAP])
def test_15_who_can_host_it_alone_goes_first_even_if_more_hosts_are_wanted(suits: Suits) -> None:
    election = asking(node("a", bid(0, suits=suits)))
    election.handle(DeploymentsSeen((record(replicas=2),)), 0.0)
    assert bids(election, split_offer("b"), 0.0) == []
    seen = NodesSeen((node("a", bid(0, suits=suits), claim(1)),))
    assert of(SaveEpoch, election.handle(seen, 0.2)) == [SaveEpoch(M, 2)], "the second host"


def test_15_fewer_workers_go_first() -> None:
    one = node("a", bid(0, suits=Suits.SPLIT, workers=1))
    three = node("a", bid(15, suits=Suits.SPLIT, workers=3))
    for rival, saved in ((one, []), (three, [SaveEpoch(M, 1)])):
        election = asking(rival)
        election.handle(DeploymentsSeen((record(),)), 0.0)
        assert of(SaveEpoch, bids(election, split_offer("b", "c"), 0.0)) == saved


# -- a worker is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.READY])
def test_15_a_lost_worker_ends_the_engine_and_keeps_the_claim(state: ModelState) -> None:
    election = splitting("b", "c")
    report(election, state, 1.0)
    effects = lose(election, 2.0)
    told = claimed(effects)
    assert (told.epoch, told.state, told.workers) == (1, PREPARING, ())
    assert told.reason == f"planning anew: {LOST}"
    assert of(StopHost, effects) == [StopHost(M, LOST, drain=False)]
    assert of(HostChanged, effects) == [HostChanged(M, f"own is planning anew: {LOST}", "failed")]
    assert rests(election, 2.0)


def test_15_nothing_is_started_while_the_old_engine_has_its_memory() -> None:
    election = splitting("b")
    lose(election, 1.0)
    assert of(StartHost, bids(election, split_offer("c"), 1.5)) == []
    assert election.ledger.holds(M)
    assert of(LeasesChanged, report(election, ModelState.ABSENT, 2.0)) == [
        LeasesChanged({"CUDA0": 0})
    ]
    assert of(StartHost, election.handle(Tick(), 2.5)) == [], "that plan was made before"


def test_15_it_starts_anew_with_another_plan_under_the_same_epoch() -> None:
    election = lost(splitting("b", "c"), 1.0)
    effects = bids(election, split_offer("c", "d", size=5 * GB), 1.5)
    assert of(StartHost, effects) == [StartHost(record(), 1, plan("c", "d"))]
    assert [w.name for w in claimed(effects).workers] == ["c", "d"]
    assert of(LeasesChanged, effects) == [LeasesChanged({"CUDA0": 5 * GB})]
    assert of(SaveEpoch, effects) == []
    report(election, ModelState.READY, 3.0)
    assert shown(election) == (1, READY)
    assert election.due() is None


def test_15_or_without_workers_if_it_fits_alone_now() -> None:
    election = lost(splitting("b"), 1.0)
    effects = bids(election, offer(), 1.5)
    assert of(StartHost, effects) == [StartHost(record(), 1, None)]


def test_15_a_plan_is_waited_for_and_not_for_ever() -> None:
    """It takes a moment to hear what the others lend now."""
    election = lost(splitting("b"), 1.0)
    assert of(StopHost, bids(election, NOTHING, 1.1)) == []
    assert shown(election) == (1, PREPARING)
    assert election.due() == 1.0 + REPLAN_WAIT_S
    assert election.handle(Tick(), 0.9 + REPLAN_WAIT_S) == []
    effects = election.handle(Tick(), 1.0 + REPLAN_WAIT_S)
    assert of(PublishClaims, effects) == [PublishClaims(())]
    assert of(HostChanged, effects) == [
        HostChanged(M, "own gives it up: not any more: 2.0 GB short even if it is split", "moved")
    ]
    assert election.hosted == {}
    assert rests(election, 1.0 + REPLAN_WAIT_S)


def test_15_a_plan_that_comes_within_that_time_is_taken() -> None:
    election = lost(splitting("b"), 1.0)
    bids(election, NOTHING, 1.1)
    effects = bids(election, split_offer("c"), 3.9)
    assert of(StartHost, effects) == [StartHost(record(), 1, plan("c"))]
    assert election.due() is None


def test_15_the_time_to_plan_counts_from_the_end_of_the_engine() -> None:
    election = splitting("b")
    lose(election, 1.0)
    bids(election, NOTHING, 1.1)
    assert election.due() is None
    report(election, ModelState.ABSENT, 9.0)
    bids(election, NOTHING, 9.1)
    assert election.due() == 9.0 + REPLAN_WAIT_S


def test_15_after_it_gave_up_it_claims_again_when_something_fits() -> None:
    election = lost(splitting("b"), 1.0)
    bids(election, NOTHING, 1.1)
    election.handle(Tick(), 1.0 + REPLAN_WAIT_S)
    assert of(SaveEpoch, bids(election, split_offer("b"), 60.0)) == [SaveEpoch(M, 2)]


def test_15_a_plan_the_own_ledger_does_not_honour_is_a_failure() -> None:
    election = lost(splitting("b"), 1.0)
    effects = bids(election, split_offer("c", size=11 * GB), 1.5)
    assert of(StartHost, effects) == []
    assert "its bid was wrong: needs 11.0 GB" in of(HostChanged, effects)[0].why
    assert shown(election) == (1, FAILED)


# -- in a row -------------------------------------------------------------------------------------


def again(election: Election, now: float) -> None:
    """A worker is lost, and another one is found."""
    lost(election, now)
    assert of(StartHost, bids(election, split_offer("b"), now + 0.1))
    bids(election, split_offer("b"), now + 0.1)


def test_15_after_several_losses_in_a_row_it_is_passed_over() -> None:
    election = splitting("b")
    for count in range(REPLANS):
        again(election, 1.0 + count)
    effects = lose(election, 10.0)
    told = claimed(effects)
    assert (told.epoch, told.state, told.reason) == (1, FAILED, LOST)
    assert told.retry_in_s == BACKOFF_S[0]
    assert of(StopHost, effects) == [StopHost(M, LOST, drain=False)]
    report(election, ModelState.ABSENT, 10.0)
    assert of(StartHost, bids(election, split_offer("c"), 10.1)) == []
    assert election.due() == 10.0 + BACKOFF_S[0]


def test_15_after_the_back_off_one_loss_more_is_enough() -> None:
    """It failed in a row still: a worker that is lost at every load must not keep a model from
    nodes that do without it."""
    election = splitting("b")
    for count in range(REPLANS):
        again(election, 1.0 + count)
    lost(election, 10.0)
    later = 10.0 + BACKOFF_S[0]
    bids(election, split_offer("b"), 10.1)
    assert of(SaveEpoch, election.handle(Tick(), later)) == [SaveEpoch(M, 2)]
    election.handle(EpochSaved(M, 2), later)
    assert claimed(lose(election, later + 1.0)).state is FAILED


def test_15_readiness_for_a_moment_does_not_start_the_count_anew() -> None:
    election = splitting("b")
    for count in range(REPLANS):
        report(election, ModelState.READY, 10.0 * count + 1.0)
        again(election, 10.0 * count + 2.0)
    report(election, ModelState.READY, 100.0)
    assert claimed(lose(election, 99.0 + PROVED_S)).state is FAILED


def test_15_readiness_for_long_does() -> None:
    election = splitting("b")
    for count in range(REPLANS):
        again(election, 1.0 + count)
    report(election, ModelState.READY, 100.0)
    for count in range(REPLANS):
        again(election, 100.0 + PROVED_S + count)
    assert claimed(lose(election, 200.0 + PROVED_S)).state is FAILED


def test_15_another_failure_than_a_lost_worker_is_its_own() -> None:
    election = splitting("b")
    effects = report(election, ModelState.FAILED, 1.0, "out of memory")
    told = claimed(effects)
    assert (told.state, told.reason, told.retry_in_s) == (FAILED, "out of memory", BACKOFF_S[0])


# -- meanwhile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"removed": True}, {"asleep": True}])
@pytest.mark.parametrize("gone", [False, True])
def test_15_what_is_not_wanted_any_more_is_not_planned_anew(
    change: dict[str, Any], gone: bool
) -> None:
    election = splitting("b")
    lose(election, 1.0)
    if gone:
        report(election, ModelState.ABSENT, 1.1)
    effects = election.handle(DeploymentsSeen((record(2, **change),)), 1.2)
    assert [e.cause for e in of(HostChanged, effects)] == ["asked"]
    assert of(StopHost, effects) == [], "it was ordered to stop"
    if not gone:
        effects = report(election, ModelState.ABSENT, 1.3)
    assert of(PublishClaims, effects) == [PublishClaims(())]
    assert election.hosted == {}


def test_15_a_draining_host_does_not_plan_anew() -> None:
    election = lost(splitting("b"), 1.0)
    effects = election.handle(DrainAsked(True), 1.1)
    assert [e.cause for e in of(HostChanged, effects)] == ["moved"]
    assert election.hosted == {}


def test_15_its_claim_stands_against_others_while_it_plans() -> None:
    election = lost(splitting("b"), 1.0)
    lower = NodesSeen((node("a", claim(1, PREPARING)),))
    assert of(SaveEpoch, election.handle(lower, 1.1)) == [SaveEpoch(M, 2)]
    election.handle(EpochSaved(M, 2), 1.2)
    effects = bids(election, split_offer("c"), 1.3)
    assert of(StartHost, effects) == [StartHost(record(), 2, plan("c"))]


def test_15_and_falls_to_one_that_serves() -> None:
    election = lost(splitting("b"), 1.0)
    effects = election.handle(NodesSeen((node("a", claim(2)),)), 1.1)
    assert [e.cause for e in of(HostChanged, effects)] == ["conflict"]
    assert election.hosted == {}
    assert bids(election, split_offer("c"), 1.2) == []


# -- other options --------------------------------------------------------------------------------


def test_13_a_split_with_other_options_is_planned_anew() -> None:
    election = splitting("b", "c")
    report(election, ModelState.READY, 1.0)
    wider = record(2, context=9)
    effects = election.handle(DeploymentsSeen((wider,)), 5.0)
    assert of(StopHost, effects) == [StopHost(M, "restarting with other options", drain=True)]
    assert claimed(effects).workers == ()
    report(election, ModelState.ABSENT, 5.1)
    assert of(StartHost, bids(election, split_offer("b", "c"), 5.2)) == [], "of version 1"
    effects = bids(election, split_offer("b", "d", version=2), 5.3)
    assert of(StartHost, effects) == [StartHost(wider, 1, plan("b", "d"))]


def test_13_its_workers_memory_is_waited_for() -> None:
    """They have it back a moment after the host has its own."""
    election = splitting("b")
    election.handle(DeploymentsSeen((record(2, context=9),)), 5.0)
    report(election, ModelState.ABSENT, 5.1)
    lacking = replace(NOTHING, bid=replace(NOTHING.bid, version=2))
    assert of(HostChanged, bids(election, lacking, 5.2)) == []
    assert election.due() == 5.1 + REPLAN_WAIT_S
    assert of(StartHost, bids(election, split_offer("b", version=2), 5.4))


def test_13_it_is_no_loss_of_a_worker() -> None:
    election = splitting("b")
    for version in range(2, 3 + REPLANS):
        now = 10.0 * version
        election.handle(DeploymentsSeen((record(version, context=version),)), now)
        report(election, ModelState.ABSENT, now)
        bids(election, split_offer("b", version=version), now)
    assert election.hosted[M].phase is Phase.PREPARING
    assert claimed(lose(election, 100.0)).state is PREPARING


def test_13_to_be_split_or_not_is_an_option() -> None:
    election = asking()
    election.handle(DeploymentsSeen((record(),)), 0.0)
    bids(election, offer(), 0.0)
    election.handle(EpochSaved(M, 1), 0.0)
    report(election, ModelState.READY, 1.0)
    forced = record(2, split=True)
    assert of(StopHost, election.handle(DeploymentsSeen((forced,)), 5.0))
    report(election, ModelState.ABSENT, 5.1)
    effects = bids(election, split_offer("b", version=2), 5.2)
    assert of(StartHost, effects) == [StartHost(forced, 1, plan("b"))]


def test_13_what_lay_on_one_node_does_not_wait_for_others() -> None:
    election = asking()
    election.handle(DeploymentsSeen((record(),)), 0.0)
    bids(election, offer(), 0.0)
    election.handle(EpochSaved(M, 1), 0.0)
    election.handle(DeploymentsSeen((record(2, host=NodeId("n0"), context=9),)), 5.0)
    report(election, ModelState.ABSENT, 5.1)
    lacking = replace(NOTHING, bid=replace(NOTHING.bid, version=2))
    assert [e.cause for e in of(HostChanged, bids(election, lacking, 5.2))] == ["moved"]
