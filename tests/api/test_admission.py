from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from meshd.api.admission import (
    Admission,
    CapacityChanged,
    Effect,
    Granted,
    ModelClosed,
    Refusal,
    Refused,
    RequestAbandoned,
    RequestArrived,
    RequestFinished,
)
from meshd.ids import ModelId
from meshd.kernel.machine import Tick

M = ModelId("m")


def arrive(
    key: str,
    *,
    origin: str = "a",
    needs_slot: bool = True,
    wait_until: float = 0.0,
    deadline: float = 100.0,
) -> RequestArrived:
    return RequestArrived(key, M, origin, needs_slot, wait_until, deadline)


def machine(slots: int | None = 1, queue_limit: int = 4) -> Admission:
    made = Admission(queue_limit)
    made.handle(CapacityChanged(M, slots), 0.0)
    return made


def test_a_free_slot_is_granted_at_once() -> None:
    admission = machine()
    assert admission.handle(arrive("r1"), 1.0) == (Granted("r1"),)
    assert admission.in_flight(M) == 1
    assert admission.due() is None


def test_without_a_free_slot_it_waits_and_gets_the_next_one() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 1.0)
    assert admission.handle(arrive("r2"), 1.0) == ()
    assert admission.waiting(M) == 1
    assert admission.handle(RequestFinished("r1"), 2.0) == [Granted("r2")]
    assert (admission.waiting(M), admission.in_flight(M)) == (0, 1)


def test_finishing_twice_frees_one_slot() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 1.0)
    admission.handle(RequestFinished("r1"), 2.0)
    assert admission.handle(RequestFinished("r1"), 2.0) == ()
    assert admission.in_flight(M) == 0


def test_a_full_queue_refuses() -> None:
    admission = machine(queue_limit=1)
    admission.handle(arrive("r1"), 1.0)
    admission.handle(arrive("r2"), 1.0)
    assert admission.handle(arrive("r3"), 1.0) == (Refused("r3", Refusal.QUEUE_FULL),)


def test_no_slot_needed_passes_by_the_queue() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 1.0)
    admission.handle(arrive("r2"), 1.0)
    assert admission.handle(arrive("t", needs_slot=False), 1.0) == (Granted("t"),)
    assert admission.in_flight(M) == 1
    assert admission.handle(RequestFinished("t"), 1.0) == ()


def test_origins_take_turns() -> None:
    admission = machine(queue_limit=10)
    admission.handle(arrive("r0"), 0.0)
    for key, origin in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c")):
        admission.handle(arrive(key, origin=origin), 0.0)
    order, last = [], "r0"
    for _ in range(5):
        (effect,) = admission.handle(RequestFinished(last), 1.0)
        last = str(effect.key)
        order.append(last)
    assert order == ["a1", "b1", "c1", "a2", "a3"]


def test_an_abandoned_request_leaves_the_queue() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 0.0)
    admission.handle(arrive("r2"), 0.0)
    assert admission.handle(RequestAbandoned("r2"), 0.0) == ()
    assert admission.due() is None
    assert admission.handle(RequestFinished("r1"), 0.0) == ()


def test_an_abandoned_granted_request_frees_its_slot() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 0.0)
    admission.handle(arrive("r2"), 0.0)
    assert admission.handle(RequestAbandoned("r1"), 0.0) == [Granted("r2")]


def test_the_deadline_of_a_waiting_request() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 0.0)
    admission.handle(arrive("r2", deadline=7.0), 0.0)
    assert admission.due() == 7.0
    assert admission.handle(Tick(), 6.9) == []
    assert admission.handle(Tick(), 7.0) == [Refused("r2", Refusal.DEADLINE)]
    assert admission.due() is None


def test_a_model_that_is_not_ready_refuses_who_does_not_wait() -> None:
    admission = machine(slots=None)
    assert admission.handle(arrive("r1"), 5.0) == (Refused("r1", Refusal.NOT_READY),)
    unknown = RequestArrived("r2", ModelId("other"), "a", True, 0.0, 100.0)
    assert admission.handle(unknown, 5.0) == (Refused("r2", Refusal.NOT_READY),)


def test_who_waits_for_loading_is_granted_when_it_is_ready() -> None:
    admission = machine(slots=None)
    assert admission.handle(arrive("r1", wait_until=30.0), 0.0) == ()
    assert admission.handle(arrive("t", wait_until=30.0, needs_slot=False), 0.0) == ()
    assert admission.handle(arrive("r2", wait_until=30.0), 0.0) == ()
    assert admission.due() == 30.0
    effects = admission.handle(CapacityChanged(M, 1), 10.0)
    assert effects == [Granted("t"), Granted("r1")]
    # r2 waits for a slot now, and that may take until its deadline
    assert admission.handle(Tick(), 30.0) == []
    assert admission.due() == 100.0


def test_who_waited_for_loading_in_vain() -> None:
    admission = machine(slots=None)
    admission.handle(arrive("r1", wait_until=30.0), 0.0)
    assert admission.handle(Tick(), 30.0) == [Refused("r1", Refusal.NOT_READY)]


def test_when_a_model_stops_being_ready_only_those_stay_who_asked_to_wait() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 0.0)
    admission.handle(arrive("r2"), 0.0)
    admission.handle(arrive("r3", wait_until=30.0), 0.0)
    assert admission.handle(CapacityChanged(M, None), 5.0) == [Refused("r2", Refusal.NOT_READY)]
    assert admission.due() == 30.0
    assert admission.handle(RequestFinished("r1"), 6.0) == ()
    assert admission.handle(CapacityChanged(M, 1), 7.0) == [Granted("r3")]


def test_a_failed_model_refuses_all_until_it_has_a_capacity_again() -> None:
    admission = machine()
    admission.handle(arrive("r1"), 0.0)
    admission.handle(arrive("r2", wait_until=30.0), 0.0)
    closed = ModelClosed(M, Refusal.FAILED)
    assert admission.handle(closed, 1.0) == [Refused("r2", Refusal.FAILED)]
    assert admission.handle(arrive("r3"), 1.0) == (Refused("r3", Refusal.FAILED),)
    admission.handle(RequestFinished("r1"), 1.0)
    admission.handle(CapacityChanged(M, 1), 2.0)
    assert admission.handle(arrive("r4"), 2.0) == (Granted("r4"),)


def test_fewer_slots_grant_nothing_until_enough_are_free() -> None:
    admission = machine(slots=2)
    admission.handle(arrive("r1"), 0.0)
    admission.handle(arrive("r2"), 0.0)
    admission.handle(arrive("r3"), 0.0)
    assert admission.handle(CapacityChanged(M, 1), 0.0) == []
    assert admission.handle(RequestFinished("r1"), 0.0) == []
    assert admission.handle(RequestFinished("r2"), 0.0) == [Granted("r3")]


def test_deadlines_of_those_long_gone_are_swept_out() -> None:
    admission = machine(slots=1, queue_limit=10_000)
    admission.handle(arrive("r"), 0.0)
    for number in range(5_000):
        admission.handle(arrive(f"q{number}"), 0.0)
        admission.handle(RequestAbandoned(f"q{number}"), 0.0)
    assert len(admission._dues) < 100


class AnyOrder(RuleBasedStateMachine):
    """Any order of events: never more in flight than slots, one outcome each, none starved."""

    requests: Bundle[str] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.limit = 5
        self.admission = Admission(self.limit)
        self.now = 0.0
        self.slots: int | None = None
        self.number = 0
        self.outcomes: dict[str, str] = {}
        self.waiting: dict[str, tuple[str, bool, float]] = {}
        self.holding: set[str] = set()
        self.passed_over: dict[str, int] = {}

    def take(self, effects: tuple[Effect, ...] | list[Effect]) -> None:
        for effect in effects:
            key = str(effect.key)
            assert key not in self.outcomes, "a second outcome"
            origin, needs_slot, _ = self.waiting.pop(key)
            if isinstance(effect, Granted):
                self.outcomes[key] = "granted"
                assert self.slots is not None
                if needs_slot:
                    self.holding.add(key)
                    assert len(self.holding) <= self.slots
                    self.note_turn(origin)
            else:
                self.outcomes[key] = effect.reason

    def note_turn(self, origin: str) -> None:
        others = {o for o, needs, _ in self.waiting.values() if needs and o != origin}
        self.passed_over = {o: self.passed_over.get(o, 0) + 1 for o in others}
        assert all(count <= 3 for count in self.passed_over.values()), "an origin starves"

    @rule(
        target=requests,
        origin=st.sampled_from("abc"),
        needs_slot=st.booleans(),
        wait_s=st.sampled_from([0.0, 2.0, 50.0]),
        deadline_s=st.sampled_from([1.0, 20.0]),
    )
    def arrives(self, origin: str, needs_slot: bool, wait_s: float, deadline_s: float) -> str:
        self.number += 1
        key = f"r{self.number}"
        wait_until = self.now + wait_s if wait_s else 0.0
        self.waiting[key] = (origin, needs_slot, self.now + deadline_s)
        event = RequestArrived(key, M, origin, needs_slot, wait_until, self.now + deadline_s)
        self.take(list(self.admission.handle(event, self.now)))
        return key

    @rule(key=consumes(requests), abandon=st.booleans())
    def ends(self, key: str, abandon: bool) -> None:
        if key in self.waiting:
            self.waiting.pop(key)
            self.outcomes[key] = "abandoned"
            event: RequestFinished | RequestAbandoned = RequestAbandoned(key)
        else:
            self.holding.discard(key)
            event = RequestAbandoned(key) if abandon else RequestFinished(key)
        self.take(list(self.admission.handle(event, self.now)))

    @rule(slots=st.one_of(st.none(), st.integers(0, 3)))
    def capacity(self, slots: int | None) -> None:
        self.slots = slots
        self.take(list(self.admission.handle(CapacityChanged(M, slots), self.now)))

    @rule(reason=st.sampled_from([Refusal.FAILED, Refusal.GONE]))
    def closes(self, reason: Refusal) -> None:
        self.slots = None
        self.take(list(self.admission.handle(ModelClosed(M, reason), self.now)))
        assert not self.waiting

    @rule(seconds=st.floats(0.0, 30.0))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.admission.due()) is not None and due <= until:
            self.now = max(self.now, due)
            self.take(list(self.admission.handle(Tick(), self.now)))
        self.now = until

    @invariant()
    def books_agree(self) -> None:
        assert self.admission.waiting(M) == len(self.waiting) <= self.limit
        assert self.admission.in_flight(M) == len(self.holding)
        assert all(deadline > self.now for _, _, deadline in self.waiting.values())
        if self.slots is not None and len(self.holding) < self.slots:
            assert not any(needs for _, needs, _ in self.waiting.values())


TestAnyOrder = AnyOrder.TestCase
