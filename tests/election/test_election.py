"""The machine of an election: every rule of `meshd.election.election`, with literal times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.election import BID_WAIT_S, Election
from meshd.election.hosted import BACKOFF_S, PROVED_S, Phase
from meshd.election.outlook import MAX_EPOCHS
from meshd.election.turns import LAST_S, TURN_S
from meshd.election.words import (
    CapacityMeasured,
    DemandMoved,
    DeploymentsSeen,
    DrainAsked,
    Effect,
    EpochSaved,
    Event,
    HostChanged,
    HostMeasured,
    HostReported,
    LeasesChanged,
    NodesSeen,
    OffersMade,
    PublishClaims,
    PutToSleep,
    SaveEpoch,
    Standing,
    StartHost,
    StopHost,
)
from meshd.ids import ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.view import Claim, ClaimState, ModelState, Suits
from tests.election.machine import ask, asking, of, report, serving, shown
from tests.election.words import (
    DRAINING,
    FAILED,
    GB,
    OWN,
    PREPARING,
    READY,
    M,
    bid,
    claim,
    node,
    offer,
    record,
)

OTHER = ModelId("other")


# -- claiming -------------------------------------------------------------------------------------


def test_nothing_is_told_or_started_before_the_epoch_is_saved() -> None:
    election = asking(epochs={M: 6})
    assert ask(election) == [SaveEpoch(M, 7), LeasesChanged({"CUDA0": 4 * GB})]
    published, start, changed = election.handle(EpochSaved(M, 7), 0.1)
    assert isinstance(published, PublishClaims)
    assert [(c.epoch, c.state) for c in published.claims] == [(7, PREPARING)]
    assert start == StartHost(record(), 7)
    assert isinstance(changed, HostChanged)
    assert changed.cause == "first"
    assert changed.why == published.claims[0].reason


def test_6_an_epoch_that_was_claimed_while_it_was_saved_is_drawn_anew() -> None:
    """Also if whoever claimed it gave up meanwhile."""
    election = asking()
    assert of(SaveEpoch, ask(election)) == [SaveEpoch(M, 1)]
    election.handle(NodesSeen((node("a", bid(), claim(1, DRAINING)),)), 0.1)
    election.handle(NodesSeen((node("a", bid(suits=Suits.NO)),)), 0.2)
    assert of(SaveEpoch, election.handle(EpochSaved(M, 1), 0.3)) == [SaveEpoch(M, 2)]


def test_6_an_epoch_counts_although_its_record_came_after_its_claim_was_gone() -> None:
    election = asking(node("b", bid(), claim(5)))
    election.handle(NodesSeen(()), 1.0)
    assert of(SaveEpoch, ask(election, 2.0)) == [SaveEpoch(M, 6)]


def test_6_epochs_of_made_up_models_are_forgotten_and_none_is_used_twice() -> None:
    election = asking(node("b", bid(), claim(5)))
    for start in range(0, 2 * MAX_EPOCHS, 256):
        names = [ModelId(f"x{number}") for number in range(start, start + 256)]
        claims = (replace(claim(9), model=name) for name in names)
        election.handle(NodesSeen((node("b", bid(), *claims),)), 1.0)
    election.handle(NodesSeen(()), 1.0)
    (drawn,) = of(SaveEpoch, ask(election, 2.0))
    assert 6 <= drawn.epoch <= 10
    assert len(election._outlook._heard) <= MAX_EPOCHS


def test_6_no_epoch_is_below_the_floor_of_a_store_that_lost_some() -> None:
    assert of(SaveEpoch, ask(asking(floor=1000))) == [SaveEpoch(M, 1001)]
    assert of(SaveEpoch, ask(asking(floor=1000, epochs={M: 2000}))) == [SaveEpoch(M, 2001)]
    known = asking(node("b", bid(), claim(7, FAILED)), floor=1000)
    assert of(SaveEpoch, ask(known)) == [SaveEpoch(M, 1001)]


@pytest.mark.parametrize("unknown", ["nodes", "offers", "records"])
def test_nothing_is_claimed_before_all_is_known(unknown: str) -> None:
    election = Election(OWN, "own", {})
    election.handle(CapacityMeasured({"CUDA0": 10 * GB}), 0.0)
    events: dict[str, Event] = {
        "nodes": NodesSeen(()),
        "offers": OffersMade((offer(),)),
        "records": DeploymentsSeen((record(),)),
    }
    last = events.pop(unknown)
    for event in events.values():
        assert election.handle(event, 0.0) == []
    assert of(SaveEpoch, election.handle(last, 0.0)) == [SaveEpoch(M, 1)]


def test_a_first_claim_waits_for_all_bids_but_not_for_ever() -> None:
    election = asking(node("a"))
    assert ask(election) == []
    assert election.due() == BID_WAIT_S
    assert of(SaveEpoch, election.handle(NodesSeen((node("a", bid(3)),)), 0.2))
    election = asking(node("a"))
    ask(election)
    assert of(SaveEpoch, election.handle(Tick(), BID_WAIT_S))
    assert election.due() is None


def test_who_is_not_first_stands_by_and_takes_over_without_waiting() -> None:
    election = asking(node("a", bid(9)), node("b"))
    ask(election)
    election.handle(NodesSeen((node("a", bid(9), claim(1)), node("b", bid(3)))), 0.5)
    assert election.due() is None
    effects = election.handle(NodesSeen((node("b", bid(3)),)), 60.0)
    assert of(SaveEpoch, effects) == [SaveEpoch(M, 2)]
    assert of(HostChanged, election.handle(EpochSaved(M, 2), 60.0))[0].cause == "died"


def test_a_claim_seen_before_the_epoch_is_saved_ends_the_turn() -> None:
    election = asking()
    ask(election)
    effects = election.handle(NodesSeen((node("a", bid(9), claim(1, PREPARING)),)), 0.1)
    assert effects == [LeasesChanged({"CUDA0": 0})]
    assert election.handle(EpochSaved(M, 1), 0.2) == []
    assert shown(election) is None


@pytest.mark.parametrize("used", [1, 5])
def test_an_epoch_that_somebody_used_meanwhile_is_drawn_anew(used: int) -> None:
    election = asking()
    ask(election)
    election.handle(NodesSeen((node("a", bid(9), claim(used, FAILED)),)), 0.1)
    fresh = used + 1
    assert election.handle(EpochSaved(M, 1), 0.2) == [SaveEpoch(M, fresh)]
    started = of(StartHost, election.handle(EpochSaved(M, fresh), 0.3))
    assert started == [StartHost(record(), fresh)]


@pytest.mark.parametrize("change", [{"removed": True}, {"asleep": True}, {"context": 99}])
def test_a_record_that_changes_before_the_epoch_is_saved(change: dict[str, Any]) -> None:
    election = asking()
    ask(election)
    assert LeasesChanged({"CUDA0": 0}) in election.handle(
        DeploymentsSeen((record(2, **change),)), 0.1
    )
    assert election.handle(EpochSaved(M, 1), 0.2) == []


def test_words_of_an_earlier_run_of_this_node_count_for_epochs_only() -> None:
    election = asking(node(OWN, bid(9), claim(8)))
    assert of(SaveEpoch, ask(election)) == [SaveEpoch(M, 9)]


def test_epochs_outlive_the_record() -> None:
    election = serving()
    ask(election, 1.0, version=2, removed=True)
    report(election, ModelState.ABSENT, 2.0)
    assert election.hosted == {}
    assert of(SaveEpoch, ask(election, 3.0, version=3)) == [SaveEpoch(M, 2)]


def test_one_claim_for_each_set_of_offers() -> None:
    election = asking()
    election.handle(DeploymentsSeen((record(), record(model=OTHER))), 0.0)
    both = (offer(), offer(model=OTHER))
    assert of(SaveEpoch, election.handle(OffersMade(both), 0.0)) == [SaveEpoch(M, 1)]
    assert of(SaveEpoch, election.handle(Tick(), 0.1)) == []
    assert of(SaveEpoch, election.handle(OffersMade(both), 0.2)) == [SaveEpoch(OTHER, 1)]
    assert election.ledger.leased() == {"CUDA0": 8 * GB}


def test_a_bid_the_ledger_does_not_honour_is_a_failure() -> None:
    election = asking()
    election.handle(DeploymentsSeen((record(),)), 0.0)
    effects = election.handle(OffersMade((offer(size=11 * GB),)), 0.0)
    assert of(SaveEpoch, effects) == []
    assert of(StopHost, effects) == []
    assert shown(election) == (0, FAILED)
    assert "needs 11.0 GB, 10.0 GB free on CUDA0" in of(HostChanged, effects)[0].why
    assert election.due() == BACKOFF_S[0]


# -- standing -------------------------------------------------------------------------------------


def test_a_better_score_displaces_nobody() -> None:
    election = serving()
    assert election.handle(NodesSeen((node("a", bid(15)),)), 5.0) == []


def test_who_serves_stands_with_an_epoch_above_one_that_prepares() -> None:
    election = serving()
    rival = NodesSeen((node("a", bid(15), claim(4, PREPARING, 2**50)),))
    assert election.handle(rival, 5.0) == [SaveEpoch(M, 5)]
    assert election.handle(rival, 5.1) == []
    (published,) = election.handle(EpochSaved(M, 5), 5.2)
    assert isinstance(published, PublishClaims)
    assert shown(election) == (5, READY)
    assert election.handle(rival, 5.3) == []


def test_the_lower_epoch_gives_up_and_is_told_of_until_its_engine_is_gone() -> None:
    election = serving()
    published, stop, changed = election.handle(NodesSeen((node("a", claim(2)),)), 5.0)
    assert isinstance(published, PublishClaims)
    assert [c.state for c in published.claims] == [DRAINING]
    assert isinstance(stop, StopHost)
    assert stop.drain
    assert isinstance(changed, HostChanged)
    assert changed.cause == "conflict"
    assert "epoch 2 against 1" in changed.why
    assert report(election, ModelState.READY, 5.5) == []
    assert report(election, ModelState.ABSENT, 6.0) == [
        PublishClaims(()),
        LeasesChanged({"CUDA0": 0}),
    ]


def test_replicas_do_not_outbid_each_other() -> None:
    election = serving(replicas=2)
    assert election.handle(NodesSeen((node("a", claim(2)),)), 5.0) == []
    assert shown(election) == (1, READY)


def test_3_of_two_with_one_epoch_the_one_that_stands_takes_a_higher_one_once() -> None:
    """Workers that serve the newest epoch they know could not tell the two apart."""
    election = serving()
    rival = NodesSeen((node("a", claim(1)),))
    assert election.handle(rival, 5.0) == [SaveEpoch(M, 2)]
    assert election.handle(rival, 5.1) == []
    election.handle(EpochSaved(M, 2), 5.2)
    assert shown(election) == (2, READY)
    assert election.handle(NodesSeen((node("a", claim(1, DRAINING)),)), 5.3) == []


def test_3_of_two_with_one_epoch_the_one_that_loses_takes_none() -> None:
    effects = serving().handle(NodesSeen((node("a", claim(1, score=2**53)),)), 5.0)
    assert of(SaveEpoch, effects) == []
    assert of(StopHost, effects)


def test_3_replicas_with_one_epoch_leave_each_other_alone() -> None:
    election = serving(replicas=2)
    assert election.handle(NodesSeen((node("a", claim(1)),)), 5.0) == []


def test_3_who_drains_with_the_same_epoch_is_outbid() -> None:
    election = serving(replicas=2)
    assert of(SaveEpoch, election.handle(NodesSeen((node("a", claim(1, DRAINING)),)), 5.0))


def test_3_replicas_take_no_higher_epoch_when_another_node_fails_again_and_again() -> None:
    election = serving(replicas=2)
    for epoch in (2, 3, 4):
        assert election.handle(NodesSeen((node("a", claim(epoch, PREPARING)),)), 5.0) == []
        assert election.handle(NodesSeen((node("a", claim(epoch, FAILED)),)), 6.0) == []
    assert shown(election) == (1, READY)
    ask(election, 7.0, version=2, removed=True)
    report(election, ModelState.ABSENT, 8.0)
    election.handle(NodesSeen(()), 8.5)
    assert of(SaveEpoch, ask(election, 9.0, version=3)) == [SaveEpoch(M, 5)]


def test_3_a_single_host_is_above_all_that_was_ever_served() -> None:
    """Also by a host that failed since: a worker may have served it."""
    election = serving()
    assert election.handle(NodesSeen((node("a", claim(2, FAILED)),)), 5.0) == [SaveEpoch(M, 2 + 1)]


def test_3_an_epoch_heard_while_a_higher_one_is_saved_is_outbid_too() -> None:
    election = serving()
    election.handle(NodesSeen((node("a", claim(1)),)), 5.0)
    election.handle(NodesSeen((node("a", claim(2, PREPARING)),)), 5.1)
    election.handle(NodesSeen(()), 5.2)
    assert election.handle(EpochSaved(M, 2), 5.3) == [SaveEpoch(M, 3)]
    election.handle(EpochSaved(M, 3), 5.4)
    assert shown(election) == (3, READY)


@pytest.mark.parametrize("bar", ["pinned", "draining"])
@pytest.mark.parametrize(("rival", "higher"), [(1, 2), (5, 6)])
def test_3_who_may_host_no_longer_and_serves_on_takes_a_higher_epoch(
    bar: str, rival: int, higher: int
) -> None:
    """Over one that drains too, or is pinned out too; as long as nobody comes to replace both."""
    election = serving(node("b", bid()))
    if bar == "pinned":
        ask(election, 5.0, version=2, host=NodeId("b"))
    else:
        election.handle(DrainAsked(True), 5.0)
    found = NodesSeen((node("a", claim(rival, PREPARING), draining=True), node("b", bid(0, 2))))
    assert of(SaveEpoch, election.handle(found, 6.0)) == [SaveEpoch(M, higher)]
    election.handle(EpochSaved(M, higher), 6.1)
    assert shown(election) == (higher, READY)
    assert election.handle(found, 6.2) == []


def test_3_who_is_being_replaced_does_not_outbid_who_replaces_it() -> None:
    election = serving(node("a", bid()))
    election.handle(DrainAsked(True), 5.0)
    for epoch, now in ((2, 6.0), (7, 7.0)):
        coming = NodesSeen((node("a", claim(epoch, PREPARING)),))
        assert election.handle(coming, now) == []


def test_3_of_two_that_may_host_no_longer_one_takes_a_higher_epoch() -> None:
    for score, drawn in ((0, [SaveEpoch(M, 2)]), (2**53, [])):
        election = serving(node("b", bid()))
        ask(election, 5.0, version=2, host=NodeId("b"))
        both = NodesSeen((node("a", claim(1, score=score)), node("b", bid(version=2))))
        assert of(SaveEpoch, election.handle(both, 6.0)) == drawn
        assert shown(election) == (1, READY)


@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 2))
def test_3_two_hosts_that_see_each_other_stop_outbidding_each_other(
    one: int, other: int, bar_one: bool, bar_other: bool, replicas: int
) -> None:
    hosts = {"n1": one, "n2": other}
    elections = {}
    for name, epoch in hosts.items():
        election = Election(NodeId(name), name, {M: epoch - 1})
        election.handle(CapacityMeasured({"CUDA0": 10 * GB}), 0.0)
        election.handle(NodesSeen(()), 0.0)
        ask(election, replicas=replicas)
        election.handle(EpochSaved(M, epoch), 0.0)
        election.handle(OffersMade((offer(),)), 0.0)
        report(election, ModelState.READY, 0.0)
        elections[name] = election
    elections["n1"].handle(DrainAsked(bar_one), 1.0)
    elections["n2"].handle(DrainAsked(bar_other), 1.0)
    draining = {"n1": bar_one, "n2": bar_other}
    raised = 0
    for step in range(12):
        mine, theirs = ("n1", "n2") if step % 2 else ("n2", "n1")
        said = elections[theirs].hosted.get(M)
        words = [said.claim] if said is not None and said.claim is not None else []
        seen = node(theirs, *words, draining=draining[theirs])
        idle = node("n3", bid())  # for whom those that drain wait
        for order in of(SaveEpoch, elections[mine].handle(NodesSeen((seen, idle)), 2.0)):
            raised += 1
            elections[mine].handle(EpochSaved(M, order.epoch), 2.0)
    assert raised <= 2
    shows = [shown(election) for election in elections.values()]
    if [state for _, state in filter(None, shows)].count(READY) == 2 and replicas == 1:
        assert shows[0] != shows[1]


def test_replicas_lowered_and_raised() -> None:
    election = serving(node("a", claim(2)), replicas=2)
    effects = ask(election, 5.0, version=2, replicas=1)
    assert of(HostChanged, effects)[0].cause == "scaled"
    assert ask(election, 6.0, version=3, replicas=2) == []
    assert of(SaveEpoch, report(election, ModelState.ABSENT, 7.0)) == []
    again = election.handle(OffersMade((offer(version=3),)), 7.1)
    assert of(SaveEpoch, again) == [SaveEpoch(M, 3)]
    assert of(HostChanged, election.handle(EpochSaved(M, 3), 7.2))[0].cause == "scaled"


def test_demand_decides_where_it_is_left_to_it() -> None:
    election = asking(node("a", bid(9), claim(1)))
    assert ask(election, replicas=None) == []
    assert of(SaveEpoch, election.handle(DemandMoved({M: 2}), 1.0)) == [SaveEpoch(M, 2)]
    assert of(LeasesChanged, election.handle(DemandMoved({}), 1.1)) == [LeasesChanged({"CUDA0": 0})]


@pytest.mark.parametrize(
    ("change", "why"), [({"removed": True}, "unloaded"), ({"asleep": True}, "sleeps")]
)
def test_what_is_not_wanted_is_given_up(change: dict[str, Any], why: str) -> None:
    election = serving()
    effects = ask(election, 5.0, version=2, **change)
    assert of(StopHost, effects)[0].drain
    assert why in of(HostChanged, effects)[0].why
    assert of(HostChanged, effects)[0].cause == "asked"


def test_a_tombstone_while_preparing_stops_at_once() -> None:
    election = asking()
    ask(election)
    election.handle(EpochSaved(M, 1), 0.1)
    effects = ask(election, 0.2, version=2, removed=True)
    assert [stop.drain for stop in of(StopHost, effects)] == [False]
    assert shown(election) == (1, DRAINING)
    assert report(election, ModelState.LOADING, 0.3) == []
    assert PublishClaims(()) in report(election, ModelState.ABSENT, 0.4)


# -- handing over ---------------------------------------------------------------------------------


def test_a_draining_host_serves_until_enough_others_do() -> None:
    election = serving(node("a", bid()))
    assert election.handle(DrainAsked(True), 5.0) == []
    assert election.handle(NodesSeen((node("a", bid(), claim(2, PREPARING)),)), 6.0) == []
    effects = election.handle(NodesSeen((node("a", bid(), claim(2)),)), 7.0)
    assert of(HostChanged, effects)[0].cause == "moved"
    assert of(HostChanged, effects)[0].why == "own gives it up: draining; a serves it"


@pytest.mark.parametrize(
    "others", [[], [node("a", bid(suits=Suits.NO))], [node("a", bid(), claim(2, FAILED))]]
)
def test_a_draining_host_does_not_wait_for_nobody(others: list[Standing]) -> None:
    election = serving(*others)
    effects = election.handle(DrainAsked(True), 5.0)
    assert [stop.drain for stop in of(StopHost, effects)] == [True]
    assert "no other node can host it" in of(HostChanged, effects)[0].why


def test_a_drain_taken_back() -> None:
    election = serving(node("a", bid()))
    election.handle(DrainAsked(True), 5.0)
    assert election.handle(DrainAsked(False), 6.0) == []
    assert shown(election) == (1, READY)


def test_a_pin_elsewhere_is_served_here_until_that_node_does() -> None:
    election = serving(node("a", bid()))
    assert ask(election, 5.0, version=2, host=NodeId("a")) == []
    assert election.handle(NodesSeen(()), 6.0) == []
    assert of(StopHost, election.handle(NodesSeen((node("a", claim(2)),)), 7.0))


def test_a_draining_node_that_prepares_stops_at_once() -> None:
    election = asking()
    ask(election)
    election.handle(EpochSaved(M, 1), 0.1)
    assert of(StopHost, election.handle(DrainAsked(True), 0.2))


def test_14_who_bids_and_never_claims_is_passed_over() -> None:
    election = asking(node("a", bid(9)))
    assert ask(election) == []
    wakes = []
    effects: list[Effect] = []
    while not effects:
        due = election.due()
        assert due is not None
        wakes.append(due)
        effects = election.handle(Tick(), due)
    assert of(SaveEpoch, effects) == [SaveEpoch(M, 1)]
    assert wakes == [LAST_S, LAST_S + TURN_S]
    why = of(HostChanged, election.handle(EpochSaved(M, 1), wakes[-1]))[0].why
    assert why.startswith("nobody hosts it; a let its turn pass; own: ")


def test_14_a_claim_within_its_time_is_not_cut_short() -> None:
    election = asking(node("a", bid(9)))
    ask(election)
    election.handle(Tick(), LAST_S)
    election.handle(NodesSeen((node("a", bid(9), claim(1, PREPARING)),)), LAST_S + TURN_S - 0.1)
    assert election.due() is None
    assert election.handle(Tick(), LAST_S + TURN_S) == []
    election.handle(NodesSeen((node("a", bid(9)),)), 100.0)
    assert election.due() == 100.0 + LAST_S


def test_14_a_back_off_is_not_a_turn_that_passes() -> None:
    election = asking(node("a", bid(9), claim(1, FAILED)), node("b", bid(8)))
    ask(election)
    election.handle(NodesSeen((node("a", bid(9), claim(1, FAILED)), node("b", bid(8)))), 5.0)
    election.handle(NodesSeen((node("a", bid(9)), node("b", bid(8)))), 12.0)
    due = election.due()
    assert due is not None
    assert due > 12.0


def test_14_a_draining_host_does_not_wait_for_who_never_claims() -> None:
    election = serving(node("a", bid()))
    assert election.handle(DrainAsked(True), 5.0) == []
    assert election.handle(Tick(), 5.0 + LAST_S) == []
    effects = election.handle(Tick(), 5.0 + LAST_S + TURN_S)
    assert "no other node can host it" in of(HostChanged, effects)[0].why


# -- failing --------------------------------------------------------------------------------------


def test_back_off_grows_and_is_forgotten_after_proof() -> None:
    election, now, waits = asking(), 0.0, []
    ask(election)
    for epoch in range(1, len(BACKOFF_S) + 2):
        election.handle(EpochSaved(M, epoch), now)
        effects = report(election, ModelState.FAILED, now, "no memory")
        assert [stop.drain for stop in of(StopHost, effects)] == [False]
        assert shown(election) == (epoch, FAILED)
        assert election.due() is None
        report(election, ModelState.ABSENT, now)
        election.handle(OffersMade((offer(),)), now)
        due = election.due()
        assert due is not None
        assert election.handle(Tick(), due - 0.1) == []
        waits.append(due - now)
        now = due
        assert of(SaveEpoch, election.handle(Tick(), now)) == [SaveEpoch(M, epoch + 1)]
    assert waits == pytest.approx([*BACKOFF_S, BACKOFF_S[-1]])
    election.handle(EpochSaved(M, epoch + 1), now)
    report(election, ModelState.READY, now)
    report(election, ModelState.FAILED, now + PROVED_S, "driver lost")
    assert election.hosted[M].backoff_s == BACKOFF_S[0]


@pytest.mark.parametrize(("told_s", "waits_s"), [(None, 10.0), (4.0, 10.0), (3600.0, 3600.0)])
def test_who_said_when_to_come_back_is_heeded(told_s: float | None, waits_s: float) -> None:
    election = asking()
    ask(election)
    election.handle(EpochSaved(M, 1), 0.0)
    election.handle(HostReported(M, ModelState.FAILED, "the hub is busy", told_s), 5.0)
    assert election.hosted[M].backoff_s == waits_s
    assert election.hosted[M].retry_at == 5.0 + waits_s


def test_a_failed_claim_waits_for_its_engine_to_go() -> None:
    election = serving()
    report(election, ModelState.FAILED, 5.0)
    assert election.handle(Tick(), 100.0) == []
    assert election.ledger.holds(M)
    assert PublishClaims(()) in report(election, ModelState.ABSENT, 101.0)


def test_a_new_version_of_the_record_ends_the_back_off() -> None:
    election = serving()
    report(election, ModelState.FAILED, 5.0)
    report(election, ModelState.ABSENT, 5.1)
    assert of(SaveEpoch, ask(election, 6.0, version=2)) == [SaveEpoch(M, 2)]


def test_an_engine_that_ends_by_itself_is_a_failure() -> None:
    election = serving()
    effects = report(election, ModelState.ABSENT, 5.0)
    assert of(StopHost, effects) == []
    assert of(LeasesChanged, effects) == [LeasesChanged({"CUDA0": 0})]
    assert shown(election) == (1, FAILED)


def test_an_engine_that_is_started_again_does_not_count_as_ready() -> None:
    election = serving()
    assert of(PublishClaims, report(election, ModelState.LOADING, 5.0, "it crashed"))
    assert shown(election) == (1, PREPARING)
    assert report(election, ModelState.LOADING, 6.0, "50 %") == []
    report(election, ModelState.READY, 7.0)
    assert election.hosted[M].ready_at == 7.0


def test_reports_about_what_is_not_hosted_are_of_no_interest() -> None:
    election = asking()
    assert report(election, ModelState.READY, 0.0) == []
    assert election.handle(HostMeasured(M, {"CUDA0": GB}), 0.0) == []
    assert election.handle(EpochSaved(M, 9), 0.0) == []


# -- memory ---------------------------------------------------------------------------------------


def test_what_an_engine_takes_is_true_even_if_it_is_too_much() -> None:
    election = serving()
    measured = election.handle(HostMeasured(M, {"CUDA0": 12 * GB}), 1.0)
    assert measured == [LeasesChanged({"CUDA0": 12 * GB})]
    assert election.handle(HostMeasured(M, {"CUDA0": 12 * GB}), 1.1) == []
    assert election.ledger.overcommitted() is not None


def test_idle_models_are_put_to_sleep_once_and_only_if_nobody_says_yes() -> None:
    swap = offer(suits=Suits.SWAP, victims=(OTHER,))
    election = asking(node("a", bid(0)))
    election.handle(DeploymentsSeen((record(), record(model=OTHER, asleep=False))), 0.0)
    assert election.handle(OffersMade((swap,)), 0.0) == []
    alone = NodesSeen((node("a", bid(suits=Suits.NO)),))
    assert election.handle(alone, 2.0) == [PutToSleep(OTHER, M)]
    assert election.handle(OffersMade((swap,)), 2.1) == []
    asleep = DeploymentsSeen((record(), record(2, model=OTHER, asleep=True)))
    assert election.handle(asleep, 2.2) == []
    assert of(SaveEpoch, election.handle(OffersMade((offer(),)), 3.0)) == [SaveEpoch(M, 1)]


# -- other options --------------------------------------------------------------------------------


def test_other_options_restart_the_engine_under_the_same_claim() -> None:
    election = serving()
    effects = ask(election, 5.0, version=2, context=9)
    assert [stop.drain for stop in of(StopHost, effects)] == [True]
    assert shown(election) == (1, PREPARING)
    assert report(election, ModelState.READY, 5.1) == []
    assert of(LeasesChanged, report(election, ModelState.ABSENT, 5.2))
    assert election.hosted[M].phase is Phase.RESTARTING
    effects = election.handle(OffersMade((offer(version=2, size=6 * GB),)), 5.3)
    assert effects == [
        StartHost(record(2, context=9), 1),
        LeasesChanged({"CUDA0": 6 * GB}),
    ]


def test_a_restart_that_does_not_fit_gives_the_model_up() -> None:
    election = serving()
    ask(election, 5.0, version=2, context=9)
    report(election, ModelState.ABSENT, 5.1)
    effects = election.handle(
        OffersMade((offer(version=2, suits=Suits.NO, reason="needs 11 GB"),)), 5.2
    )
    assert PublishClaims(()) in effects
    assert "needs 11 GB" in of(HostChanged, effects)[0].why
    assert of(StopHost, effects) == []


def test_a_restart_ends_with_the_wish_for_it() -> None:
    election = serving()
    ask(election, 5.0, version=2, context=9)
    assert of(StopHost, ask(election, 5.1, version=3, removed=True)) == []
    assert shown(election) == (1, DRAINING)
    assert PublishClaims(()) in report(election, ModelState.ABSENT, 5.2)


def test_other_options_somewhere_else_leave_the_engine_here_alone() -> None:
    election = serving(node("a", bid()))
    assert ask(election, 5.0, version=2, context=9, host=NodeId("a")) == []
    assert shown(election) == (1, READY)


def test_a_version_with_the_same_options_leaves_the_engine_alone() -> None:
    election = serving()
    assert ask(election, 5.0, version=2, replicas=2) == []


# -- any order ------------------------------------------------------------------------------------

STANDINGS = st.builds(
    lambda name, own_bid, said, draining: node(
        name, *([own_bid] if own_bid else []), *([said] if said else []), draining=draining
    ),
    st.sampled_from(["a", "b", "z"]),
    st.none() | st.builds(bid, st.integers(0, 15), st.integers(1, 4)),
    st.none() | st.builds(claim, st.integers(1, 9), st.sampled_from(ClaimState)),
    st.booleans(),
)
RECORDS = st.builds(
    lambda version, replicas, host, context, asleep, removed: record(
        version, replicas=replicas, host=host, context=context, asleep=asleep, removed=removed
    ),
    st.integers(1, 4),
    st.sampled_from([1, 2, None]),
    st.sampled_from([None, None, OWN, NodeId("a")]),
    st.sampled_from([None, 1024]),
    st.booleans(),
    st.booleans(),
)
EVENTS = st.one_of(
    st.builds(
        lambda nodes: NodesSeen(tuple({n.node: n for n in nodes}.values())),
        st.lists(STANDINGS, max_size=3),
    ),
    st.builds(lambda one: DeploymentsSeen((one,)), RECORDS),
    st.just(DeploymentsSeen(())),
    st.builds(
        lambda version, suits, size: OffersMade((offer(version=version, suits=suits, size=size),)),
        st.integers(1, 4),
        st.sampled_from(Suits),
        st.sampled_from([4 * GB, 11 * GB]),
    ),
    st.builds(HostReported, st.just(M), st.sampled_from(ModelState)),
    st.builds(EpochSaved, st.just(M), st.integers(1, 9)),
    st.builds(DrainAsked, st.booleans()),
    st.builds(lambda wanted: DemandMoved({M: wanted}), st.integers(0, 3)),
    st.just(HostMeasured(M, {"CUDA0": 5 * GB})),
    st.just(Tick()),
)
STATES: list[Callable[[], Election]] = [asking, serving]


@given(st.sampled_from(STATES), st.lists(st.tuples(EVENTS, st.sampled_from([0.0, 0.5, 400.0]))))
def test_whatever_comes_in_whatever_order(
    state: Callable[[], Election], story: list[tuple[Event, float]]
) -> None:
    election, twin, now, epochs = state(), state(), 1.0, [0]
    if M in election.hosted:
        epochs = [1]
    published: tuple[Claim, ...] | None = None
    for event, after in story:
        now += after
        effects = election.handle(event, now)
        assert effects == twin.handle(event, now)  # equal input, equal output
        drawn = [e.epoch for e in of(SaveEpoch, effects)]
        assert drawn == sorted(set(drawn))
        assert all(epoch > epochs[-1] for epoch in drawn)  # never one twice
        epochs += drawn
        for start in of(StartHost, effects):
            assert election.ledger.holds(M)
            assert start.epoch <= max(epochs)
        for told in of(PublishClaims, effects):
            assert told.claims != published
            published = told.claims
        hosted = election.hosted.get(M)
        if hosted is None or (hosted.phase is Phase.FAILED and not hosted.engine):
            assert not election.ledger.holds(M)  # no lease without a host
        elif hosted.engine or hosted.phase is Phase.CLAIMING:
            assert election.ledger.holds(M)  # no engine without a lease
        assert election.handle(Tick(), now) == twin.handle(Tick(), now) == []  # it has come to rest
        due = election.due()
        assert due is None or due > now


def test_the_same_nodes_seen_again_change_nothing() -> None:
    election = serving(node("a", bid(15), claim(7, PREPARING)))
    assert shown(election) == (1, READY)
    seen = NodesSeen((replace(node("a", bid(15), claim(7, PREPARING)), draining=False),))
    assert [election.handle(seen, 2.0 + i) for i in range(5)] == [[]] * 5
