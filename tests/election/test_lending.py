"""Memory that is lent to hosts of split models: every rule of `meshd.election.lending`, through the
machine, with literal times. Numbers in names are those of the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshd.election.election import Election
from meshd.election.lending import RENEWED_S
from meshd.election.words import (
    CapacityMeasured,
    DemandMoved,
    DeploymentsSeen,
    DrainAsked,
    Effect,
    EndLoan,
    EpochSaved,
    Event,
    LeasesChanged,
    LoanAnswered,
    LoanAsked,
    LoanEnded,
    LoanRenewed,
    NodesSeen,
    OffersMade,
    SaveEpoch,
    StartHost,
)
from meshd.ids import LoanId, ModelId
from meshd.kernel.machine import Tick
from meshd.view import Claim, ClaimState, Loan
from tests.election.machine import ask, asking, of, rests, serving
from tests.election.words import (
    DRAINING,
    FAILED,
    GB,
    PREPARING,
    READY,
    M,
    claim,
    loan,
    node,
    offer,
    record,
)

FIRST, SECOND, THIRD = LoanId("loan-1"), LoanId("loan-2"), LoanId("loan-3")
OTHER = ModelId("other")


def lending(*loans: Loan, **changes: Any) -> Election:
    """A node that knows the record of the model, has 10 GB, and granted these loans at time 0."""
    election = asking(node("h", claim(1, PREPARING)), node("rival"))
    election.handle(DeploymentsSeen((record(**changes),)), 0.0)
    for wanted in loans or (loan(1),):
        assert of(LoanAnswered, election.handle(LoanAsked(wanted), 0.0))[0].refusal is None
    return election


def refusal(election: Election, wanted: Loan, now: float = 1.0) -> str | None:
    (answered,) = of(LoanAnswered, election.handle(LoanAsked(wanted), now))
    assert answered.loan == wanted.id
    return answered.refusal


# -- grants ---------------------------------------------------------------------------------------


def test_what_is_granted_is_leased_and_makes_offers_out_of_date() -> None:
    election = asking()
    assert election.handle(LoanAsked(loan(1)), 0.0) == [
        LoanAnswered(FIRST, None),
        LeasesChanged({"CUDA0": 4 * GB}),
    ]
    assert election.lent[FIRST].loan == loan(1)
    assert election.due() == RENEWED_S
    assert rests(election, 0.0)


def test_a_model_is_lent_for_whose_record_is_still_on_its_way() -> None:
    assert refusal(asking(), loan(1)) is None


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (loan(2, "g", size=7 * GB), "needs 7.0 GB, 6.0 GB free on CUDA0"),
        (loan(2, "g", device="ROCm0"), "needs 4.0 GB, 0 B free on ROCm0"),
    ],
)
def test_what_is_not_there_is_not_lent(wanted: Loan, words: str) -> None:
    election = lending()
    assert election.handle(LoanAsked(wanted), 1.0) == [LoanAnswered(SECOND, words)]
    assert set(election.lent) == {FIRST}
    assert election.ledger.leased() == {"CUDA0": 4 * GB}


def test_nothing_is_lent_that_a_model_of_this_node_has_and_the_other_way_round() -> None:
    election = serving()
    assert refusal(election, loan(1, model=OTHER, size=7 * GB)) is not None
    assert refusal(election, loan(2, model=OTHER, size=6 * GB)) is None
    election.handle(DeploymentsSeen((record(), record(model=OTHER))), 2.0)
    effects = election.handle(OffersMade((offer(), offer(model=OTHER))), 2.0)
    assert of(SaveEpoch, effects) == [], "its bid was from before the loan"
    assert election.ledger.overcommitted() is None


def test_11_a_grant_keeps_claims_back_until_offers_are_made_anew() -> None:
    election = asking(node("a"))
    assert ask(election) == []
    election.handle(LoanAsked(loan(1, model=OTHER)), 0.1)
    assert of(SaveEpoch, election.handle(Tick(), 5.0)) == []
    assert of(SaveEpoch, election.handle(OffersMade((offer(),)), 5.0)) == [SaveEpoch(M, 1)]


# -- asked for anew -------------------------------------------------------------------------------


def test_1_what_a_host_asks_for_anew_ends_what_it_had() -> None:
    election = lending()
    assert election.handle(LoanAsked(loan(2, epoch=2)), 1.0) == [
        EndLoan(FIRST, "asked for anew"),
        LoanAnswered(SECOND, None),
        LeasesChanged({"CUDA0": 8 * GB}),
    ]
    assert (election.lent[FIRST].ending, election.lent[SECOND].ending) == (True, False)
    assert of(EndLoan, election.handle(LoanAsked(loan(3, size=GB)), 2.0)) == [
        EndLoan(SECOND, "asked for anew")
    ], "the first is ordered to end already"


def test_1_also_if_the_new_one_cannot_be_granted() -> None:
    """The memory of the old one is not free before its process is gone."""
    election = lending()
    ended, answered = election.handle(LoanAsked(loan(2, size=7 * GB)), 1.0)
    assert ended == EndLoan(FIRST, "asked for anew")
    assert answered == LoanAnswered(SECOND, "needs 7.0 GB, 6.0 GB free on CUDA0")
    election.handle(LoanEnded(FIRST), 1.1)
    assert refusal(election, loan(3, size=7 * GB), 1.2) is None


def test_1_other_models_of_that_host_and_other_hosts_of_that_model_are_left_alone() -> None:
    election = lending(loan(1), replicas=2)
    for wanted in (loan(2, model=OTHER, size=GB), loan(3, "g", size=GB)):
        assert of(EndLoan, election.handle(LoanAsked(wanted), 1.0)) == []
    assert not any(lent.ending for lent in election.lent.values())


# -- draining -------------------------------------------------------------------------------------


def test_2_a_draining_node_ends_its_loans_once_and_grants_none() -> None:
    election = lending(loan(1), loan(2, model=OTHER))
    why = "this node is draining"
    assert election.handle(DrainAsked(True), 1.0) == [EndLoan(FIRST, why), EndLoan(SECOND, why)]
    assert rests(election, 1.0)
    assert refusal(election, loan(3, "g")) == why
    assert election.due() is None, "nobody waits for what is to end anyhow"


def test_2_a_node_that_takes_part_again_lends_again() -> None:
    election = lending()
    election.handle(DrainAsked(True), 1.0)
    election.handle(DrainAsked(False), 2.0)
    assert election.lent[FIRST].ending, "its host was told"
    assert refusal(election, loan(2, "g"), 2.0) is None


# -- fences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [PREPARING, READY])
def test_3_a_newer_host_ends_a_loan_and_keeps_it_from_being_granted(state: ClaimState) -> None:
    election = lending()
    seen = NodesSeen((node("h", claim(1, state)), node("rival", claim(2, state))))
    why = "rival hosts it, with epoch 2"
    assert election.handle(seen, 1.0) == [EndLoan(FIRST, why)]
    assert election.handle(seen, 2.0) == []
    assert refusal(election, loan(2)) == why
    assert refusal(election, loan(3, "rival", epoch=2, size=GB)) is None


def test_3_a_host_that_is_ready_goes_before_a_newer_one_that_prepares() -> None:
    """After a partition heals: the one that serves stands, and takes a higher epoch in a moment."""
    election = lending()
    seen = NodesSeen((node("h", claim(1, READY)), node("rival", claim(2, PREPARING))))
    assert election.handle(seen, 1.0) == []
    assert refusal(election, loan(2, "rival", epoch=2, size=GB)) == "h hosts it, with epoch 1"
    over = NodesSeen((node("h", claim(1, PREPARING)), node("rival", claim(2, PREPARING))))
    assert election.handle(over, 2.0) == [EndLoan(FIRST, "rival hosts it, with epoch 2")]


@pytest.mark.parametrize("said", [claim(2, FAILED), claim(2, DRAINING), claim(1, READY)])
def test_3_who_does_not_contend_or_is_no_newer_ends_nothing(said: Claim) -> None:
    election = lending()
    seen = NodesSeen((node("h", claim(1, READY)), node("rival", said)))
    assert election.handle(seen, 1.0) == []
    assert refusal(election, loan(2)) is None


def test_3_the_claim_of_its_own_host_with_a_higher_epoch_ends_nothing() -> None:
    """It took that over a rival it won against: its loan is as new as its claim."""
    election = lending()
    assert election.handle(NodesSeen((node("h", claim(5, READY)),)), 1.0) == []
    between = NodesSeen((node("h", claim(5, READY)), node("rival", claim(4, READY))))
    assert election.handle(between, 2.0) == []
    above = NodesSeen((node("h", claim(5, READY)), node("rival", claim(6, READY))))
    assert of(EndLoan, election.handle(above, 3.0))


@pytest.mark.parametrize("changes", [{"replicas": 2}, {"replicas": None}])
def test_3_where_more_hosts_are_wanted_none_is_the_newest(changes: dict[str, int | None]) -> None:
    election = lending(**changes)
    election.handle(DemandMoved({M: 2}), 0.5)
    newer = NodesSeen((node("h", claim(1, READY)), node("rival", claim(2, READY))))
    assert of(EndLoan, election.handle(newer, 1.0)) == []
    assert refusal(election, loan(2)) is None


def test_3_this_node_itself_may_be_the_host_that_stands() -> None:
    election = lending(loan(1, epoch=3, size=GB))
    election.handle(OffersMade((offer(),)), 0.5)
    (saved,) = of(SaveEpoch, election.handle(NodesSeen((node("h", claim(3, FAILED)),)), 1.0))
    why = f"own hosts it, with epoch {saved.epoch}"
    assert of(EndLoan, election.handle(EpochSaved(M, saved.epoch), 1.0)) == [EndLoan(FIRST, why)]
    assert refusal(election, loan(2, epoch=3, size=GB)) == why


def test_3_claims_of_other_models_end_nothing() -> None:
    rival = node("rival", Claim(OTHER, 9, READY, 0))
    assert lending().handle(NodesSeen((node("h", claim(1)), rival)), 1.0) == []


# -- renewals -------------------------------------------------------------------------------------


def test_4_a_loan_that_is_not_renewed_ends_once() -> None:
    election = lending()
    assert election.handle(Tick(), RENEWED_S - 0.1) == []
    why = "its host was not heard of for 5 s"
    assert election.handle(Tick(), RENEWED_S) == [EndLoan(FIRST, why)]
    assert election.due() is None
    assert election.handle(Tick(), 100.0) == []
    assert election.ledger.leased() == {"CUDA0": 4 * GB}, "its process may be there still"


def test_4_renewed_it_lives_on() -> None:
    election = lending(loan(1), loan(2, model=OTHER))
    assert election.handle(LoanRenewed(FIRST), 3.0) == []
    assert election.due() == RENEWED_S
    assert [e.loan for e in of(EndLoan, election.handle(Tick(), RENEWED_S))] == [SECOND]
    assert election.due() == 3.0 + RENEWED_S


def test_4_what_ends_is_not_renewed() -> None:
    election = lending()
    election.handle(Tick(), RENEWED_S)
    assert election.handle(LoanRenewed(FIRST), RENEWED_S) == []
    assert election.lent[FIRST].ending
    assert election.due() is None
    assert election.handle(LoanRenewed(THIRD), RENEWED_S) == [], "it is not known"


# -- ends -----------------------------------------------------------------------------------------


def test_5_memory_is_free_when_its_process_is_gone_and_not_before() -> None:
    election = lending(loan(1, size=10 * GB))
    election.handle(DrainAsked(True), 1.0)
    election.handle(DrainAsked(False), 2.0)
    assert refusal(election, loan(2, "g", size=GB), 2.0) == "needs 1.0 GB, 0 B free on CUDA0"
    assert election.handle(LoanEnded(FIRST), 3.0) == [LeasesChanged({"CUDA0": 0})]
    assert not election.lent
    assert refusal(election, loan(3, "g", size=10 * GB), 3.0) is None


def test_5_a_process_that_ends_by_itself_frees_as_well() -> None:
    election = lending()
    assert election.handle(LoanEnded(FIRST), 1.0) == [LeasesChanged({"CUDA0": 0})]
    assert election.handle(LoanEnded(FIRST), 1.1) == []
    assert election.due() is None


# -- any order ------------------------------------------------------------------------------------

CAPACITY = {"CUDA0": 10 * GB, "CPU": 20 * GB}
HOSTS, MODELS = ("a", "b"), (M, OTHER)
CLAIMS = st.none() | st.builds(
    claim, st.integers(1, 6), st.sampled_from([PREPARING, READY, FAILED, DRAINING])
)


def precedence(said: Claim | None) -> tuple[bool, int]:
    return (False, 0) if said is None else (said.state is READY, said.epoch)


class AnyOrder(RuleBasedStateMachine):
    """A worker of which two hosts want memory for two models, while it hosts one of them now and
    then. One replica of each is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.election = asking()
        self.election.handle(CapacityMeasured(CAPACITY), 0.0)
        self.election.handle(DeploymentsSeen(tuple(record(model=m) for m in MODELS)), 0.0)
        self.loans: dict[LoanId, Loan] = {}
        """Granted, and their processes are not gone."""
        self.ordered: set[LoanId] = set()
        self.claims: dict[str, Claim] = {}
        self.drawn = 0
        self.draining = False

    def take(self, event: Event) -> list[Effect]:
        effects = self.election.handle(event, self.now)
        for order in of(EndLoan, effects):
            assert order.loan in self.loans, "only what was granted ends"
            assert order.loan not in self.ordered, "and once"
            self.ordered.add(order.loan)
        for start in of(StartHost, effects):
            assert self.election.ledger.holds(start.deployment.model)
        return effects

    @rule(
        host=st.sampled_from(HOSTS),
        epoch=st.integers(1, 6),
        model=st.sampled_from(MODELS),
        device=st.sampled_from(["CUDA0", "CPU", "ROCm0"]),
        size=st.integers(1, 12),
    )
    def asked(self, host: str, epoch: int, model: ModelId, device: str, size: int) -> None:
        self.drawn += 1
        wanted = loan(self.drawn, host, epoch, size * GB, model=model, device=device)
        free = self.election.ledger.free().get(device, 0)
        (answered,) = of(LoanAnswered, self.take(LoanAsked(wanted)))
        if answered.refusal is None:
            assert size * GB <= free
            assert not self.draining
            self.loans[wanted.id] = wanted

    @rule(draw=st.data())
    def renewed(self, draw: st.DataObject) -> None:
        self.of_one(draw, LoanRenewed)

    @rule(draw=st.data())
    def gone(self, draw: st.DataObject) -> None:
        if (over := self.of_one(draw, LoanEnded)) is not None:
            del self.loans[over]
            self.ordered.discard(over)

    def of_one(
        self, draw: st.DataObject, event: Callable[[LoanId], LoanRenewed | LoanEnded]
    ) -> LoanId | None:
        if not self.loans:
            return None
        chosen = draw.draw(st.sampled_from(sorted(self.loans)))
        self.take(event(chosen))
        return chosen

    @rule(first=CLAIMS, second=CLAIMS)
    def seen(self, first: Claim | None, second: Claim | None) -> None:
        said = zip(HOSTS, (first, second), strict=True)
        self.claims = {name: c for name, c in said if c is not None}
        nodes = (node(name, *([c] if (c := self.claims.get(name)) else [])) for name in HOSTS)
        self.take(NodesSeen(tuple(nodes)))

    @rule(on=st.booleans())
    def drains(self, on: bool) -> None:
        self.draining = on
        self.take(DrainAsked(on))

    @rule(size=st.integers(1, 9))
    def bids(self, size: int) -> None:
        """And claims, and comes to start an engine, if nobody else does."""
        for saved in of(SaveEpoch, self.take(OffersMade((offer(size=size * GB),)))):
            self.take(EpochSaved(saved.model, saved.epoch))

    @rule(after_s=st.sampled_from([0.5, 2.0, RENEWED_S]))
    def later(self, after_s: float) -> None:
        self.now += after_s
        self.take(Tick())

    @invariant()
    def it_has_come_to_rest(self) -> None:
        assert self.take(Tick()) == []
        due = self.election.due()
        assert due is None or due > self.now

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        assert self.election.ledger.overcommitted() is None

    @invariant()
    def each_loan_has_its_lease_until_its_process_is_gone(self) -> None:
        assert set(self.election.lent) == set(self.loans)
        held = {h: e for h, e in self.election.ledger.leases.items() if h not in MODELS}
        assert set(held) == set(self.loans)
        for name, granted in self.loans.items():
            assert held[name].memory == dict(granted.ask.part.memory)
            assert self.election.lent[name].ending is (name in self.ordered)

    @invariant()
    def no_host_is_served_after_one_that_goes_before_it(self) -> None:
        for name, granted in self.loans.items():
            if name in self.ordered or granted.ask.model != M:
                continue
            said = self.claims.get(granted.host)
            standing = max((False, granted.ask.epoch), precedence(said))
            hosted = self.election.hosted.get(M)
            rivals = [None if hosted is None else hosted.claim]
            rivals += [c for host, c in self.claims.items() if host != granted.host]
            for rival in rivals:
                if rival is not None and rival.state in (PREPARING, READY):
                    assert standing >= precedence(rival)

    @invariant()
    def a_draining_node_lends_nothing(self) -> None:
        assert not self.draining or set(self.loans) == self.ordered


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
