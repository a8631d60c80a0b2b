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
        breakers.failed(I, fault, "why", at)
    return breakers


def test_nothing_is_shut_without_trouble() -> None:
    breakers = Breakers()
    breakers.succeeded(I)
    assert not breakers.troubled
    assert breakers.shut(0.0) == {}
    assert breakers.begin(I, 0.0) == 0


@pytest.mark.parametrize("fault", [Fault.BROKE, Fault.ERRED])
def test_three_faults_in_a_row_open(fault: Fault) -> None:
    breakers = Breakers()
    for number in range(3):
        assert breakers.shut(0.0) == {}
        breakers.failed(I, fault, f"fault {number}", 10.0)
    assert breakers.shut(10.0) == {I: Shut(1.0, fault is Fault.ERRED, "fault 2")}
    assert breakers.shut(10.75) == {I: Shut(0.25, fault is Fault.ERRED, "fault 2")}
    assert breakers.shut(11.0) == {}


def test_a_success_in_between_starts_the_count_again() -> None:
    breakers = Breakers()
    for _ in range(5):
        breakers.failed(I, Fault.BROKE, "", 0.0)
        breakers.failed(I, Fault.ERRED, "", 0.0)
        breakers.succeeded(I)
    assert not breakers.troubled


def test_another_node_out_of_reach_opens_at_once() -> None:
    breakers = Breakers()
    breakers.failed(I, Fault.UNREACHABLE, "no route", 0.0)
    assert breakers.shut(0.0) == {I: Shut(1.0, False, "no route")}


def test_exactly_one_probe_goes_through() -> None:
    breakers = opened()
    assert breakers.begin(I, 0.5) == 0
    assert breakers.begin(I, 1.0)
    assert breakers.shut(1.0) == {I: Shut(PROBE_LIMIT_S, False, "why")}
    assert breakers.begin(I, 1.5) == 0


def test_a_probe_that_succeeds_closes() -> None:
    breakers = opened()
    assert breakers.begin(I, 1.0)
    breakers.succeeded(I)
    assert not breakers.troubled


def test_a_probe_that_fails_opens_for_twice_as_long_up_to_a_limit() -> None:
    breakers, now, lengths = opened(), 1.0, []
    for _ in range(7):
        probe = breakers.begin(I, now)
        assert probe
        breakers.failed(I, Fault.BROKE, "", now, probe)
        lengths.append(breakers.shut(now)[I].retry_after_s)
        now += lengths[-1]
    assert lengths == [2.0, 4.0, 8.0, 16.0, BACKOFF_LAST_S, BACKOFF_LAST_S, BACKOFF_LAST_S]


def test_what_was_sent_before_it_opened_does_not_lengthen_it() -> None:
    breakers = opened()
    for _ in range(20):
        breakers.failed(I, Fault.BROKE, "late", 0.5)
    assert breakers.shut(0.5) == {I: Shut(0.5, False, "why")}


def test_what_was_sent_before_it_opened_and_succeeds_closes_it() -> None:
    breakers = opened()
    breakers.succeeded(I)
    assert breakers.shut(0.0) == {}


def test_a_probe_that_others_overtook_is_a_request_like_any_other() -> None:
    breakers = opened()
    probe = breakers.begin(I, 1.0)
    breakers.succeeded(I)
    breakers.failed(I, Fault.BROKE, "", 1.0, probe)
    assert breakers.shut(1.0) == {}


def test_a_probe_that_took_too_long_decides_nothing_any_more() -> None:
    breakers = opened()
    slow = breakers.begin(I, 1.0)
    later = 1.0 + PROBE_LIMIT_S
    second = breakers.begin(I, later)
    breakers.failed(I, Fault.BROKE, "", later, slow)
    breakers.abandoned(I, slow, later)
    assert breakers.shut(later)[I].retry_after_s == PROBE_LIMIT_S
    breakers.failed(I, Fault.BROKE, "", later, second)
    assert breakers.shut(later)[I].retry_after_s == 2.0


def test_a_probe_whose_client_left_makes_room_for_the_next() -> None:
    breakers = opened()
    breakers.abandoned(I, breakers.begin(I, 1.0), 2.0)
    assert breakers.shut(2.0) == {}
    assert breakers.begin(I, 2.0)


def test_a_probe_without_an_outcome_does_not_block_for_ever() -> None:
    breakers = opened()
    assert breakers.begin(I, 1.0)
    assert breakers.begin(I, 1.0 + PROBE_LIMIT_S)


def test_the_last_fault_says_whether_it_answers() -> None:
    breakers = opened(Fault.ERRED)
    breakers.failed(I, Fault.BROKE, "reset", 1.0, breakers.begin(I, 1.0))
    assert breakers.shut(1.0) == {I: Shut(2.0, False, "reset")}


def test_engines_that_are_no_more_are_forgotten() -> None:
    breakers = opened()
    breakers.keep({I})
    assert I in breakers.shut(0.0)
    breakers.keep({InstanceId("other")})
    assert not breakers.troubled
    breakers.abandoned(I, 7, 0.0)  # the end of a request that outlived its engine
    assert not breakers.troubled


class OneCircuit(RuleBasedStateMachine):
    """Whatever happens, an open circuit lets one request through at a time, and is never shut for
    longer than its limit."""

    def __init__(self) -> None:
        super().__init__()
        self.breakers = Breakers()
        self.now = 0
        self.out: list[int] = []
        """Probe number of every request on its way."""
        self.probe, self.probed_at = 0, 0

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def send(self) -> None:
        shut = I in self.breakers.shut(self.now)
        number = self.breakers.begin(I, self.now)
        if number:
            assert not shut
            assert not self.probe or self.now - self.probed_at >= PROBE_LIMIT_S
            self.probe, self.probed_at = number, self.now
        self.out.append(number)

    @rule(fault=st.sampled_from(Fault), index=st.integers(0, 5))
    def fail(self, fault: Fault, index: int) -> None:
        if self.out:
            number = self.out.pop(index % len(self.out))
            sound = not self.breakers.troubled
            self.breakers.failed(I, fault, "why", self.now, number)
            decides = number != 0 and number == self.probe
            if decides or (sound and fault is Fault.UNREACHABLE):
                assert I in self.breakers.shut(self.now)
            if decides:
                self.probe = 0

    @rule(index=st.integers(0, 5))
    def abandon(self, index: int) -> None:
        if self.out:
            number = self.out.pop(index % len(self.out))
            if number:
                self.breakers.abandoned(I, number, self.now)
                if number == self.probe:
                    assert I not in self.breakers.shut(self.now)
                    self.probe = 0

    @rule(index=st.integers(0, 5))
    def succeed(self, index: int) -> None:
        if self.out:
            self.out.pop(index % len(self.out))
            self.breakers.succeeded(I)
            assert not self.breakers.troubled
            self.probe = 0

    @invariant()
    def bounded(self) -> None:
        for shut in self.breakers.shut(self.now).values():
            assert 0 < shut.retry_after_s <= BACKOFF_LAST_S


TestOneCircuit = OneCircuit.TestCase
