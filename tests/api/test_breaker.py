"""The circuits of engines; no loop, literal times."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshd.api.breaker import BACKOFF_LAST_S, FAULTS_TO_OPEN, PROBE_LIMIT_S, Breakers, Fault, Shut
from meshd.ids import InstanceId

I = InstanceId("i")  # noqa: E741


def opened(fault: Fault = Fault.BROKE, at: float = 0.0) -> Breakers:
    breakers = Breakers()
    for _ in range(FAULTS_TO_OPEN):
        breakers.failed(I, fault, "why", at, probe=False)
    return breakers


def test_nothing_is_shut_without_trouble() -> None:
    breakers = Breakers()
    breakers.succeeded(I)
    assert not breakers.troubled
    assert breakers.shut(0.0) == {}
    assert breakers.begin(I, 0.0) is False


@pytest.mark.parametrize("fault", [Fault.BROKE, Fault.ERRED])
def test_three_faults_in_a_row_open(fault: Fault) -> None:
    breakers = Breakers()
    for number in range(3):
        assert breakers.shut(0.0) == {}
        breakers.failed(I, fault, f"fault {number}", 10.0, probe=False)
    assert breakers.shut(10.0) == {I: Shut(1.0, fault is Fault.ERRED, "fault 2")}
    assert breakers.shut(10.75) == {I: Shut(0.25, fault is Fault.ERRED, "fault 2")}
    assert breakers.shut(11.0) == {}


def test_a_success_in_between_starts_the_count_again() -> None:
    breakers = Breakers()
    for _ in range(5):
        breakers.failed(I, Fault.BROKE, "", 0.0, probe=False)
        breakers.failed(I, Fault.ERRED, "", 0.0, probe=False)
        breakers.succeeded(I)
    assert not breakers.troubled


def test_another_node_out_of_reach_opens_at_once() -> None:
    breakers = Breakers()
    breakers.failed(I, Fault.UNREACHABLE, "no route", 0.0, probe=False)
    assert breakers.shut(0.0) == {I: Shut(1.0, False, "no route")}


def test_exactly_one_probe_goes_through() -> None:
    breakers = opened()
    assert breakers.begin(I, 0.5) is False
    assert breakers.begin(I, 1.0) is True
    assert breakers.shut(1.0) == {I: Shut(PROBE_LIMIT_S, False, "why")}
    assert breakers.begin(I, 1.5) is False


def test_a_probe_that_succeeds_closes() -> None:
    breakers = opened()
    assert breakers.begin(I, 1.0)
    breakers.succeeded(I)
    assert not breakers.troubled


def test_a_probe_that_fails_opens_for_twice_as_long_up_to_a_limit() -> None:
    breakers, now, lengths = opened(), 1.0, []
    for _ in range(7):
        assert breakers.begin(I, now)
        breakers.failed(I, Fault.BROKE, "", now, probe=True)
        lengths.append(breakers.shut(now)[I].retry_after_s)
        now += lengths[-1]
    assert lengths == [2.0, 4.0, 8.0, 16.0, BACKOFF_LAST_S, BACKOFF_LAST_S, BACKOFF_LAST_S]


def test_what_was_sent_before_it_opened_does_not_lengthen_it() -> None:
    breakers = opened()
    for _ in range(20):
        breakers.failed(I, Fault.BROKE, "late", 0.5, probe=False)
    assert breakers.shut(0.5) == {I: Shut(0.5, False, "why")}


def test_what_was_sent_before_it_opened_and_succeeds_closes_it() -> None:
    breakers = opened()
    breakers.succeeded(I)
    assert breakers.shut(0.0) == {}


def test_a_probe_that_others_overtook_is_a_request_like_any_other() -> None:
    breakers = opened()
    assert breakers.begin(I, 1.0)
    breakers.succeeded(I)
    breakers.failed(I, Fault.BROKE, "", 1.0, probe=True)
    assert breakers.shut(1.0) == {}


def test_a_probe_whose_client_left_makes_room_for_the_next() -> None:
    breakers = opened()
    assert breakers.begin(I, 1.0)
    breakers.abandoned(I, 2.0)
    assert breakers.shut(2.0) == {}
    assert breakers.begin(I, 2.0) is True


def test_a_probe_without_an_outcome_does_not_block_for_ever() -> None:
    breakers = opened()
    assert breakers.begin(I, 1.0)
    assert breakers.begin(I, 1.0 + PROBE_LIMIT_S) is True


def test_the_last_fault_says_whether_it_answers() -> None:
    breakers = opened(Fault.ERRED)
    assert breakers.begin(I, 1.0)
    breakers.failed(I, Fault.BROKE, "reset", 1.0, probe=True)
    assert breakers.shut(1.0) == {I: Shut(2.0, False, "reset")}


def test_engines_that_are_no_more_are_forgotten() -> None:
    breakers = opened()
    breakers.keep({I})
    assert I in breakers.shut(0.0)
    breakers.keep({InstanceId("other")})
    assert not breakers.troubled
    breakers.abandoned(I, 0.0)  # the end of a request that outlived its engine
    assert not breakers.troubled


class OneCircuit(RuleBasedStateMachine):
    """Whatever happens, an open circuit lets at most one request through at a time and is never
    shut for longer than its limit."""

    def __init__(self) -> None:
        super().__init__()
        self.breakers = Breakers()
        self.now = 0.0
        self.out: list[tuple[bool, float]] = []

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def send(self) -> None:
        if I in self.breakers.shut(self.now):
            assert self.breakers.begin(I, self.now) is False
            return
        probe = self.breakers.begin(I, self.now)
        if probe:
            assert not [1 for p, at in self.out if p and self.now - at < PROBE_LIMIT_S]
        self.out.append((probe, self.now))

    @rule(fault=st.sampled_from(Fault), number=st.integers(0, 5))
    def fail(self, fault: Fault, number: int) -> None:
        if self.out:
            probe, _ = self.out.pop(number % len(self.out))
            sound = not self.breakers.troubled
            self.breakers.failed(I, fault, "why", self.now, probe=probe)
            if probe or (sound and fault is Fault.UNREACHABLE):
                assert I in self.breakers.shut(self.now)

    @rule(number=st.integers(0, 5))
    def succeed(self, number: int) -> None:
        if self.out:
            self.out.pop(number % len(self.out))
            self.breakers.succeeded(I)
            assert not self.breakers.troubled
            self.out = [(False, at) for _, at in self.out]  # what is on its way probes no more

    @invariant()
    def bounded(self) -> None:
        for shut in self.breakers.shut(self.now).values():
            assert 0 < shut.retry_after_s <= BACKOFF_LAST_S


TestOneCircuit = OneCircuit.TestCase
