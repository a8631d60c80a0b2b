"""The ledger: nothing is granted twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshd.election.ledger import Ledger, Shortage
from meshd.ids import ModelId

A, B = ModelId("a"), ModelId("b")


def ledger(**memory: int) -> Ledger:
    book = Ledger()
    book.set_capacity(memory)
    return book


def test_what_is_leased_is_not_free() -> None:
    book = ledger(gpu=10, host=4)
    assert book.lease(A, 1, {"gpu": 7, "host": 1}) is None
    assert book.holds(A)
    assert not book.holds(B)
    assert dict(book.leased()) == {"gpu": 7, "host": 1}
    assert dict(book.free()) == {"gpu": 3, "host": 3}
    assert book.leases[A].epoch == 1


def test_all_devices_or_none() -> None:
    book = ledger(gpu=10, host=4)
    assert book.lease(A, 1, {"gpu": 5, "host": 5}) == Shortage("host", 5, 4)
    assert dict(book.leased()) == {"gpu": 0, "host": 0}
    assert not book.holds(A)


def test_the_device_that_lacks_most_is_named() -> None:
    book = ledger(gpu=10, host=4)
    assert book.lease(A, 1, {"gpu": 20, "host": 5}) == Shortage("gpu", 20, 10)


def test_a_shortage_in_words() -> None:
    shortage = Shortage("CUDA0", 18_200_000_000, 11_400_000_000)
    assert str(shortage) == "needs 18.2 GB, 11.4 GB free on CUDA0"


def test_an_unknown_device_has_nothing() -> None:
    book = ledger(gpu=10)
    assert book.lease(A, 1, {"npu": 1}) == Shortage("npu", 1, 0)
    assert book.lease(A, 1, {"npu": 0}) is None
    assert book.holds(A)


def test_a_second_lease_replaces_the_first_where_it_fits() -> None:
    book = ledger(gpu=10)
    assert book.lease(A, 1, {"gpu": 8}) is None
    assert book.lease(A, 2, {"gpu": 9}) is None
    assert dict(book.leased()) == {"gpu": 9}
    assert book.lease(A, 3, {"gpu": 11}) == Shortage("gpu", 11, 10)
    assert (book.leases[A].epoch, dict(book.leases[A].memory)) == (2, {"gpu": 9})


def test_a_measured_engine_is_true_above_capacity_and_stops_grants_there() -> None:
    book = ledger(gpu=10, host=4)
    assert book.lease(A, 1, {"gpu": 8}) is None
    assert book.measure(A, {"gpu": 12})
    assert not book.measure(A, {"gpu": 12, "host": 0})
    assert book.overcommitted() == "gpu: 12 B leased of 10 B"
    assert dict(book.free()) == {"gpu": 0, "host": 4}
    assert book.lease(B, 1, {"gpu": 1}) == Shortage("gpu", 1, 0)
    assert book.lease(B, 1, {"host": 4}) is None
    assert book.measure(A, {"gpu": 9})
    assert book.overcommitted() is None


def test_what_is_measured_after_the_end_is_of_the_past() -> None:
    book = ledger(gpu=10)
    assert not book.measure(A, {"gpu": 5})
    assert dict(book.leased()) == {"gpu": 0}


def test_a_lost_device_overcommits_what_is_out() -> None:
    book = ledger(gpu=10)
    assert book.lease(A, 1, {"gpu": 5}) is None
    book.set_capacity({})
    assert book.overcommitted() == "gpu: 5 B leased of 0 B"
    assert dict(book.free()) == {}
    assert book.release(A)
    assert not book.release(A)
    assert book.overcommitted() is None


@pytest.mark.parametrize("memory", [{"gpu": -1}, {"gpu": 5, "host": -5}])
def test_memory_below_zero_is_a_bug(memory: dict[str, int]) -> None:
    book = ledger(gpu=10)
    with pytest.raises(ValueError, match="below zero"):
        book.lease(A, 1, memory)
    with pytest.raises(ValueError, match="below zero"):
        book.set_capacity(memory)


MODELS = st.sampled_from([ModelId(name) for name in "abcd"])
MEMORY = st.dictionaries(st.sampled_from(["gpu", "host", "npu"]), st.integers(0, 12), max_size=3)


@given(st.lists(st.tuples(MODELS, MEMORY), max_size=12), MEMORY)
def test_grants_alone_never_overcommit(
    wishes: list[tuple[ModelId, dict[str, int]]], capacity: dict[str, int]
) -> None:
    book = Ledger()
    book.set_capacity(capacity)
    for epoch, (model, memory) in enumerate(wishes):
        book.lease(model, epoch, memory)
        assert book.overcommitted() is None


class LedgerMachine(RuleBasedStateMachine):
    """The ledger beside the plainest book there is: a dict of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Ledger()
        self.capacity: dict[str, int] = {}
        self.out: dict[ModelId, dict[str, int]] = {}

    def free(self, device: str, but: ModelId) -> int:
        taken = sum(m.get(device, 0) for model, m in self.out.items() if model != but)
        return max(0, self.capacity.get(device, 0) - taken)

    @rule(memory=MEMORY)
    def set_capacity(self, memory: dict[str, int]) -> None:
        self.book.set_capacity(memory)
        self.capacity = memory

    @rule(model=MODELS, memory=MEMORY)
    def lease(self, model: ModelId, memory: dict[str, int]) -> None:
        fits = all(size <= self.free(device, model) for device, size in memory.items())
        shortage = self.book.lease(model, 1, memory)
        assert (shortage is None) == fits
        if shortage is None:
            self.out[model] = memory
        else:
            assert shortage.needed == memory[shortage.device]
            assert shortage.free == self.free(shortage.device, model) < shortage.needed

    @precondition(lambda self: self.out)
    @rule(data=st.data(), memory=MEMORY)
    def measure(self, data: st.DataObject, memory: dict[str, int]) -> None:
        model = data.draw(st.sampled_from(sorted(self.out)))
        self.book.measure(model, memory)
        self.out[model] = memory

    @rule(model=MODELS)
    def release(self, model: ModelId) -> None:
        assert self.book.release(model) == (self.out.pop(model, None) is not None)

    @invariant()
    def the_sums_agree(self) -> None:
        devices = set(self.capacity).union(*self.out.values())
        totals = {d: sum(m.get(d, 0) for m in self.out.values()) for d in devices}
        assert {d: n for d, n in self.book.leased().items() if n} == {
            d: n for d, n in totals.items() if n
        }
        over = any(taken > self.capacity.get(d, 0) for d, taken in totals.items())
        assert (self.book.overcommitted() is not None) == over


TestLedgerMachine = LedgerMachine.TestCase
