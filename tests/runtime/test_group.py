"""An engine and what other nodes lend it as one unit: every rule of `Group`, with literal times."""

from __future__ import annotations

from typing import assert_never

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshd.kernel.machine import Tick
from meshd.runtime.child_events import ChildState, StartAsked, StopAsked
from meshd.runtime.faults import RPC_LOST
from meshd.runtime.group import (
    NEWS_S,
    AskingMoved,
    AskWorkers,
    Effect,
    EndLoans,
    EngineMoved,
    Event,
    Granted,
    Group,
    KillLaunched,
    LaunchEngine,
    LoansEnded,
    NotGranted,
    StopAsking,
    StopLaunched,
    Tell,
    WorkerLost,
)

ENDS = ("127.0.0.1:1", "127.0.0.1:2")
LOST = "worker c was lost: its rpc-server ended"
ABORT = EngineMoved(ChildState.FAILED, "a worker's rpc-server went away", RPC_LOST)
STOPPED = EngineMoved(ChildState.STOPPED, None)
UNWANTED = EndLoans("the model is no longer wanted here")


@pytest.fixture
def group() -> Group:
    return Group("b, c")


def at(group: Group) -> tuple[ChildState, str | None]:
    return group.state, group.reason


def orders(group: Group, event: Event, now: float = 0.0) -> list[Effect]:
    return [effect for effect in group.handle(event, now) if effect != Tell()]


def ask(group: Group) -> None:
    assert orders(group, StartAsked()) == [AskWorkers()]


def serve(group: Group) -> None:
    ask(group)
    assert orders(group, Granted(ENDS)) == [LaunchEngine(ENDS)]
    assert orders(group, EngineMoved(ChildState.STARTING, "starting the engine")) == []
    assert orders(group, EngineMoved(ChildState.READY, None)) == []
    assert at(group) == (ChildState.READY, None)


# 1


def test_workers_are_asked_before_the_engine_starts(group: Group) -> None:
    assert group.handle(StartAsked(), 0.0) == [Tell(), AskWorkers()]
    assert at(group) == (ChildState.STARTING, "asking b, c for memory")
    assert group.handle(AskingMoved("b reads its weights"), 1.0) == [Tell()]
    assert at(group) == (ChildState.STARTING, "b reads its weights")
    assert group.handle(Granted(ENDS), 2.0) == [LaunchEngine(ENDS)]
    assert group.handle(AskingMoved("too late"), 2.0) == []
    assert group.handle(EngineMoved(ChildState.STARTING, "starting"), 2.0) == [Tell()]
    assert at(group) == (ChildState.STARTING, "starting")
    assert group.due() is None


def test_what_is_not_granted_has_failed_and_nothing_is_left_to_end(group: Group) -> None:
    ask(group)
    assert orders(group, NotGranted("c lends nothing")) == []
    assert at(group) == (ChildState.FAILED, "c lends nothing")
    assert group.worker_lost
    assert orders(group, StopAsked(0.0)) == []
    assert at(group) == (ChildState.STOPPED, None)


# 2, 3, 5


def test_a_lost_worker_kills_the_engine_and_ends_all_loans(group: Group) -> None:
    serve(group)
    assert orders(group, WorkerLost(LOST)) == [KillLaunched(), EndLoans(LOST)]
    assert at(group) == (ChildState.FAILED, LOST)
    assert group.worker_lost
    assert orders(group, EngineMoved(ChildState.STOPPING, "stopping the engine")) == []
    assert orders(group, STOPPED) == []
    assert orders(group, LoansEnded()) == []
    assert at(group) == (ChildState.FAILED, LOST)
    assert orders(group, StopAsked(5.0)) == []
    assert at(group) == (ChildState.STOPPED, None)


def test_a_worker_can_be_lost_while_the_engine_starts(group: Group) -> None:
    ask(group)
    group.handle(Granted(ENDS), 0.0)
    group.handle(EngineMoved(ChildState.STARTING, "starting"), 0.0)
    assert orders(group, WorkerLost(LOST)) == [KillLaunched(), EndLoans(LOST)]


def test_a_worker_can_be_lost_before_it_is_known_to_serve(group: Group) -> None:
    ask(group)
    assert orders(group, WorkerLost(LOST)) == []
    assert orders(group, Granted(ENDS)) == [EndLoans(LOST)]
    assert at(group) == (ChildState.FAILED, LOST)
    assert orders(group, StopAsked(0.0)) == []
    assert group.state is ChildState.FAILED  # the loans are not over
    group.handle(LoansEnded(), 0.0)
    assert at(group) == (ChildState.STOPPED, None)


def test_an_engine_that_fails_by_itself_ends_the_loans(group: Group) -> None:
    serve(group)
    failed = EngineMoved(ChildState.FAILED, "out of memory: RPC0", "out_of_memory")
    assert orders(group, failed) == [EndLoans("out of memory: RPC0")]
    assert at(group) == (ChildState.FAILED, "out of memory: RPC0")
    assert not group.worker_lost
    assert orders(group, WorkerLost(LOST)) == []
    assert group.reason == "out of memory: RPC0"
    assert orders(group, StopAsked(0.0)) == [StopLaunched(0.0)]
    group.handle(STOPPED, 0.0)
    group.handle(LoansEnded(), 0.0)
    assert at(group) == (ChildState.STOPPED, None)


# 4


def test_an_abort_waits_for_the_name_of_the_lost_worker(group: Group) -> None:
    serve(group)
    assert orders(group, ABORT, 10.0) == []
    assert at(group) == (ChildState.STOPPING, ABORT.reason)  # nobody is sent there
    assert group.due() == 10.0 + NEWS_S
    assert orders(group, Tick(), 10.5) == []
    assert orders(group, WorkerLost(LOST), 10.6) == [EndLoans(LOST)]  # it is dead already
    assert at(group) == (ChildState.FAILED, LOST)
    assert group.due() is None


def test_an_abort_of_which_no_news_comes_is_told_as_it_is(group: Group) -> None:
    serve(group)
    group.handle(ABORT, 10.0)
    assert orders(group, Tick(), 10.0 + NEWS_S) == [EndLoans(str(ABORT.reason))]
    assert at(group) == (ChildState.FAILED, ABORT.reason)
    assert group.worker_lost
    assert group.due() is None


def test_a_stop_ends_the_wait_for_news(group: Group) -> None:
    serve(group)
    group.handle(ABORT, 10.0)
    assert orders(group, StopAsked(30.0), 10.1) == [StopLaunched(30.0)]
    assert group.due() is None
    assert orders(group, STOPPED) == [UNWANTED]
    group.handle(LoansEnded(), 10.2)
    assert group.state is ChildState.STOPPED


# 5, 6, 7


def test_loans_last_as_long_as_the_drain(group: Group) -> None:
    serve(group)
    assert orders(group, StopAsked(30.0)) == [StopLaunched(30.0)]
    assert orders(group, EngineMoved(ChildState.DRAINING, "finishing")) == []
    assert at(group) == (ChildState.DRAINING, "finishing")
    assert orders(group, STOPPED) == [UNWANTED]
    assert group.state is not ChildState.STOPPED
    assert group.handle(LoansEnded(), 9.0) == [Tell()]
    assert at(group) == (ChildState.STOPPED, None)


def test_a_worker_lost_in_the_drain_ends_it(group: Group) -> None:
    serve(group)
    group.handle(StopAsked(30.0), 0.0)
    group.handle(EngineMoved(ChildState.DRAINING, "finishing"), 0.0)
    assert orders(group, WorkerLost(LOST)) == [KillLaunched(), EndLoans(LOST)]
    assert orders(group, LoansEnded()) == []
    group.handle(STOPPED, 0.1)
    assert at(group) == (ChildState.STOPPED, None)


def test_a_stop_while_the_workers_are_asked_waits_until_that_is_undone(group: Group) -> None:
    ask(group)
    assert orders(group, StopAsked(0.0)) == [StopAsking()]
    assert orders(group, StopAsked(0.0)) == []  # once is enough
    assert orders(group, AskingMoved("b reads its weights")) == []
    assert group.state is ChildState.STARTING
    orders(group, NotGranted("no longer asked"))
    assert at(group) == (ChildState.STOPPED, None)


def test_a_grant_faster_than_the_end_of_asking_is_given_back(group: Group) -> None:
    ask(group)
    group.handle(StopAsked(0.0), 0.0)
    assert orders(group, Granted(ENDS)) == [UNWANTED]
    orders(group, LoansEnded())
    assert at(group) == (ChildState.STOPPED, None)


class GroupRules(RuleBasedStateMachine):
    """Whatever comes in whatever order: each thing begun is ended once, and STOPPED is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.group = Group("b")
        self.now = 0.0
        self.asked = self.held = self.ending = self.stopping = self.hurried = False
        self.engine: ChildState | None = None
        self.post(StartAsked())

    def post(self, event: Event) -> None:
        for effect in self.group.handle(event, self.now):
            self.run(effect)

    def run(self, effect: Effect) -> None:
        match effect:
            case AskWorkers():
                self.asked = True
            case StopAsking():
                assert self.asked
                assert not self.hurried
                self.hurried = True
            case LaunchEngine():
                assert self.held
                assert not self.ending
                assert self.engine is None
                self.engine = ChildState.STARTING
            case StopLaunched():
                assert self.engine is not None
            case KillLaunched():
                assert self.engine is not None
                assert self.engine is not ChildState.FAILED
                self.engine = ChildState.STOPPING
            case EndLoans():
                assert self.held
                assert not self.ending
                self.ending = True
            case Tell():
                pass
            case _:
                assert_never(effect)

    @precondition(lambda self: self.asked)
    @rule(granted=st.booleans())
    def answer(self, granted: bool) -> None:
        self.asked = False
        self.held = granted
        self.post(Granted(ENDS) if granted else NotGranted("no"))

    @precondition(lambda self: self.asked or self.held)
    @rule()
    def lose(self) -> None:
        self.post(WorkerLost(LOST))

    @precondition(lambda self: self.engine in (ChildState.STARTING, ChildState.READY))
    @rule(state=st.sampled_from([ChildState.READY, ChildState.FAILED]), rpc=st.booleans())
    def engine_moves(self, state: ChildState, rpc: bool) -> None:
        self.engine = state
        self.post(EngineMoved(state, "r", RPC_LOST if rpc else None))

    @precondition(lambda self: self.engine and (self.stopping or self.engine == "stopping"))
    @rule()
    def engine_ends(self) -> None:
        self.engine = None
        self.post(STOPPED)

    @precondition(lambda self: self.ending)
    @rule()
    def loans_end(self) -> None:
        self.held = self.ending = False
        self.post(LoansEnded())

    @rule(drain_s=st.sampled_from([0.0, 30.0]))
    def stop(self, drain_s: float) -> None:
        self.stopping = True
        self.post(StopAsked(drain_s))

    @rule()
    def wait(self) -> None:
        self.now += NEWS_S
        self.post(Tick())
        assert self.group.due() is None or self.group.due() > self.now  # type: ignore[operator]

    @invariant()
    def stopped_is_the_end_of_all(self) -> None:
        left = self.asked or self.held or self.engine is not None
        assert (self.group.state is ChildState.STOPPED) == (self.stopping and not left)

    @invariant()
    def what_failed_says_why_and_gives_back(self) -> None:
        if self.group.state is ChildState.FAILED:
            assert self.group.reason
            assert self.ending or not self.held


TestGroupRules = GroupRules.TestCase
