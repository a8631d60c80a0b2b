"""The plan of one file: each rule, and that no interleaving ends with wrong bytes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.transfer.flights import PATIENCE_FACTOR, PATIENCE_S, YOUNG_S
from meshd.cache.transfer.plan import (
    BEFORE,
    HEAD_START_S,
    HUB,
    HUB_SPAN,
    MAX_ACCOUNTS,
    MENDING_S,
    PEER_SPAN,
    Decision,
    Plan,
)

SIZE = 10 * CHUNK_BYTES - 5


def digest_of(word: str) -> bytes:
    return hashlib.sha256(word.encode()).digest()


def right(index: int) -> bytes:
    return digest_of(f"right {index}")


def list_of(chunks: int, word: str = "right") -> bytes:
    return b"".join(digest_of(f"{word} {index}") for index in range(chunks))


def bits(*indices: int) -> bytes:
    return sum(1 << index for index in indices).to_bytes(2, "little")


def plan_for(*sources: str, **arguments: object) -> Plan:
    """The hub has been waiting for long enough."""
    plan = Plan(SIZE, sources, **arguments)  # type: ignore[arg-type]
    if HUB in sources:
        plan.offered(HUB, None, None)
    return plan


def bring(
    plan: Plan, source: str, index: int | None = None, digest: bytes | None = None
) -> Decision:
    """One chunk of what `source` is given, or exactly `index`, which must be what it is given."""
    span = plan.next(source, 0.0)
    assert span is not None
    assert index is None or span.first == index
    decision = plan.arrived(span.token, span.first, digest or right(span.first), 0.0)
    if decision is Decision.STORE:
        plan.stored(span.first)
    plan.finished(span.token)
    return decision


def bring_all(plan: Plan, source: str, word: str = "right") -> None:
    while span := plan.next(source, 0.0):
        for index in range(span.first, span.first + span.count):
            if plan.arrived(span.token, index, digest_of(f"{word} {index}"), 0.0) is Decision.STORE:
                plan.stored(index)
        plan.finished(span.token)


def test_the_hub_alone_brings_everything_in_order() -> None:
    plan = plan_for(HUB)
    assert plan.missing_bytes == SIZE
    bring_all(plan, HUB)
    assert plan.complete
    assert plan.missing_bytes == 0
    assert plan.settle() is None


def test_spans_are_as_long_as_their_source_likes() -> None:
    plan = Plan(1000 * CHUNK_BYTES, (HUB, "a"), streams=2)
    plan.offered("a", None, None)
    hub, peer = plan.next(HUB, 0.0), plan.next("a", 0.0)
    assert hub is not None
    assert peer is not None
    assert (hub.count, peer.count) == (HUB_SPAN, PEER_SPAN)
    assert peer.first == HUB_SPAN


def test_spans_get_shorter_towards_the_end() -> None:
    plan = Plan(8 * CHUNK_BYTES, (HUB,), streams=4)
    span = plan.next(HUB, 0.0)
    assert span is not None
    assert span.count == 1


def test_what_is_there_is_not_brought_again() -> None:
    plan = plan_for(HUB, there={0: right(0), 2: right(2)})
    assert plan.missing_bytes == SIZE - 2 * CHUNK_BYTES
    span = plan.next(HUB, 0.0)
    assert span is not None
    assert (span.first, span.count) == (1, 1)


def test_what_is_there_and_differs_from_own_hashes_is_brought_again() -> None:
    plan = plan_for(HUB, own=list_of(10), there={0: right(0), 1: digest_of("bad")})
    assert plan.has(0)
    assert not plan.has(1)
    assert plan.take_dropped() == (1,)
    assert plan.take_dropped() == ()


def test_a_failed_span_goes_to_others() -> None:
    plan = plan_for(HUB, "a")
    plan.offered("a", None, None)
    span = plan.next("a", 0.0)
    assert span is not None
    plan.finished(span.token)
    plan.gone("a", "went away")
    bring_all(plan, HUB)
    assert plan.complete
    assert plan.why_out() == {"a": "went away"}


def test_rule_1_a_chunk_against_its_own_list_bans() -> None:
    plan = plan_for(HUB, "a")
    plan.offered("a", None, list_of(10))
    assert bring(plan, "a", digest=digest_of("wrong")) is Decision.BANNED
    assert not plan.usable("a")
    assert plan.next("a", 0.0) is None
    bring_all(plan, HUB)
    assert plan.complete


def test_rule_3_without_a_list_a_differing_chunk_bans() -> None:
    plan = plan_for("a", "b")
    plan.offered("a", None, list_of(10))
    plan.offered("b", None, None)
    assert bring(plan, "b", digest=digest_of("wrong")) is Decision.BANNED
    bring_all(plan, "a")
    assert plan.complete


def test_rule_3_a_minority_waits() -> None:
    plan = plan_for("a", "b", "c")
    plan.offered("c", None, list_of(10, "other"))
    bring_all(plan, "c", "other")
    assert plan.complete
    plan.offered("a", None, list_of(10))
    plan.offered("b", None, list_of(10))
    assert len(plan.take_dropped()) == 10
    assert plan.next("c", 0.0) is None
    assert plan.usable("c")
    bring_all(plan, "a")
    assert plan.complete


def test_rule_4_the_hub_is_asked_again_and_then_right() -> None:
    plan = plan_for(HUB, "liar")
    plan.offered("liar", None, list_of(10, "wrong"))
    assert bring(plan, "liar", digest=digest_of("wrong 0")) is Decision.STORE
    assert bring(plan, HUB, 1) is Decision.DISCARD
    assert plan.has(0)
    assert bring(plan, HUB, 1) is Decision.STORE
    assert plan.why_out() == {"liar": "promised bytes that the file does not consist of"}
    assert plan.take_dropped() == (0,)
    bring_all(plan, HUB)
    assert plan.complete


def test_rule_4_a_chunk_in_dispute_is_left_to_the_hub() -> None:
    plan = plan_for(HUB, "a", streams=10)
    plan.offered("a", None, list_of(10))
    assert bring(plan, HUB, 0, digest_of("flipped")) is Decision.DISCARD
    span = plan.next("a", 0.0)
    assert span is not None
    assert span.first == 1
    plan.gone(HUB, "ill")
    assert bring(plan, "a", 0) is Decision.STORE


def test_rule_4_a_hub_that_says_something_else_each_time_is_left() -> None:
    plan = plan_for(HUB, own=list_of(10))
    for n in range(MAX_ACCOUNTS):
        assert bring(plan, HUB, 0, digest_of(f"noise {n}")) is Decision.DISCARD
    assert not plan.usable(HUB)
    assert plan.settle() is not None


def test_rule_4_own_hashes_yield_to_a_hub_that_insists() -> None:
    plan = plan_for(HUB, own=list_of(10, "stale"))
    bring_all(plan, HUB)
    assert plan.complete


def test_rule_5_what_a_banned_source_is_just_storing_does_not_count() -> None:
    plan = plan_for(HUB, "liar")
    plan.offered("liar", None, list_of(10, "wrong"))
    span = plan.next("liar", 0.0)
    assert span is not None
    assert plan.arrived(span.token, 0, digest_of("wrong 0"), 0.0) is Decision.STORE
    for _ in range(2):
        bring(plan, HUB, 4)
    plan.stored(0)
    assert not plan.has(0)
    assert plan.take_dropped() == (0,)


def test_rule_6_torn_chunks_are_brought_again_a_few_times() -> None:
    plan = plan_for(HUB)
    for _ in range(3):
        bring_all(plan, HUB)
        assert not plan.whole_failed((4,))
        assert plan.missing_bytes == CHUNK_BYTES
    bring_all(plan, HUB)
    plan.whole_failed((4,))
    assert plan.failure == "the disk does not keep what is written to it"


def test_rule_6_a_believed_list_falls_and_the_hubs_chunks_stay() -> None:
    plan = plan_for(HUB, "a")
    plan.offered("a", None, list_of(10))
    assert bring(plan, HUB, 0) is Decision.STORE
    bring_all(plan, "a")
    assert not plan.whole_failed(())
    assert plan.has(0)
    assert plan.missing_bytes == SIZE - CHUNK_BYTES
    assert not plan.usable("a")


def test_rule_6_then_everything_once_and_then_the_end() -> None:
    plan = plan_for(HUB)
    bring_all(plan, HUB)
    assert plan.whole_failed(())
    assert plan.missing_bytes == SIZE
    bring_all(plan, HUB)
    assert not plan.whole_failed(())
    assert plan.failure is not None
    assert plan.next(HUB, 0.0) is None


def test_rule_7_peers_go_first() -> None:
    plan = plan_for(HUB, "a", "b")
    assert plan.next("a", 0.0) is None, "it has not said what it has"
    plan.offered("a", None, None)
    assert plan.next(HUB, HEAD_START_S / 2) is None
    plan.gone("b", "not here")
    assert plan.next(HUB, HEAD_START_S / 2) is not None
    plan = plan_for(HUB, "a")
    assert plan.next(HUB, 0.0) is None
    assert plan.next(HUB, HEAD_START_S) is not None


def test_rule_7_a_little_is_left_to_a_peer_that_has_all() -> None:
    there = {index: right(index) for index in range(9)}
    plan = plan_for(HUB, "a", there=there)
    plan.offered("a", None, None)
    assert plan.next(HUB, HEAD_START_S) is None
    assert plan.next(HUB, HEAD_START_S + MENDING_S) is not None
    plan = plan_for(HUB, "a", there=there)
    plan.offered("a", bits(9), None)
    assert plan.next(HUB, 0.0) is not None


def test_rule_8_a_minority_is_believed_when_nobody_else_is_left() -> None:
    plan = plan_for("a", "b", "c")
    for name in ("a", "b"):
        plan.offered(name, None, list_of(10, "lost"))
    plan.offered("c", None, list_of(10))
    plan.gone("a", "died")
    plan.gone("b", "died")
    assert plan.settle() is None
    bring_all(plan, "c")
    assert plan.complete


def test_rule_8_without_sources_the_file_has_failed() -> None:
    plan = plan_for("a")
    plan.gone("a", "died")
    assert plan.settle() == "nobody can bring what is missing"
    assert plan.failure


def test_a_source_that_was_not_asked_yet_is_waited_for() -> None:
    plan = plan_for(HUB, "a")
    plan.gone(HUB, "ill")
    assert plan.settle() is None


def test_parts_of_peers_and_where_the_hub_starts_then() -> None:
    plan = plan_for(HUB, "a", lot=6)
    plan.offered("a", bits(1, 2, 9), None)
    peer, hub = plan.next("a", 0.0), plan.next(HUB, 0.0)
    assert peer is not None
    assert hub is not None
    assert (peer.first, hub.first) == (1, 6)


def test_what_a_peer_turns_out_to_lack_is_not_asked_of_it_again() -> None:
    plan = plan_for("a", streams=5)
    plan.offered("a", None, None)
    span = plan.next("a", 0.0)
    assert span is not None
    plan.lacks("a", span)
    plan.finished(span.token)
    following = plan.next("a", 0.0)
    assert following is not None
    assert following.first == 1


def test_an_idle_source_takes_half_of_what_a_slow_one_has() -> None:
    plan = Plan(5 * CHUNK_BYTES, (HUB, "a"))
    plan.offered("a", None, None)
    taken, rest = plan.next(HUB, 0.0), plan.next("a", 0.0)
    assert taken is not None
    assert (taken.first, taken.count) == (0, 3)
    assert rest is not None
    plan.finished(rest.token)
    plan.next("a", YOUNG_S / 2)
    plan.next("a", YOUNG_S / 2)
    assert plan.share("a", YOUNG_S / 2) is None
    half = plan.share("a", YOUNG_S)
    assert half is not None
    assert (half.first, half.count) == (2, 1)
    assert plan.covers(taken.token, 1)
    assert not plan.covers(taken.token, 2)


def test_one_chunk_is_brought_by_a_second_source_after_patience_and_never_by_a_third() -> None:
    plan = Plan(CHUNK_BYTES, ("a", "b", "c"))
    for name in ("a", "b", "c"):
        plan.offered(name, None, None)
    first = plan.next("a", 0.0)
    assert first is not None
    assert plan.share("b", PATIENCE_S / 2) is None
    second = plan.share("b", PATIENCE_S)
    assert second is not None
    assert plan.share("c", PATIENCE_S) is None
    assert plan.arrived(second.token, 0, right(0), 3.0) is Decision.STORE
    assert plan.arrived(first.token, 0, right(0), 3.0) is Decision.DISCARD
    plan.stored(0)
    assert plan.complete


def test_on_a_slow_line_nothing_is_brought_twice() -> None:
    plan = Plan(2 * CHUNK_BYTES, ("a", "b"))
    for name in ("a", "b"):
        plan.offered(name, None, None)
    one, two = plan.next("a", 0.0), plan.next("a", 0.0)
    assert one is not None
    assert two is not None
    plan.arrived(one.token, 0, right(0), 10.0)
    assert plan.share("b", 10.0 + PATIENCE_S) is None
    assert plan.share("b", 10.0 + PATIENCE_FACTOR * 10.0) is not None


def test_a_chunk_that_could_not_be_written_is_wanted_again() -> None:
    plan = plan_for(HUB)
    span = plan.next(HUB, 0.0)
    assert span is not None
    plan.arrived(span.token, 0, right(0), 0.0)
    plan.not_stored(0)
    plan.finished(span.token)
    assert plan.missing_bytes == SIZE


# -- any interleaving -----------------------------------------------------------------------------


@dataclass
class Actor:
    """A source and how it behaves."""

    name: str
    manner: str
    dies_at: int
    has: bytes | None = None
    flights: list[list[int]] = field(default_factory=list)
    """[token, next, stop] of each."""

    def content(self, index: int, rng: random.Random) -> bytes:
        if self.manner in ("liar", "forger"):
            return digest_of(f"wrong {index}")
        if self.manner == "noise" and rng.random() < 0.5:
            return digest_of(f"noise {rng.random()}")
        return right(index)

    def hashes(self, chunks: int) -> bytes | None:
        if self.name == HUB or self.manner in ("quiet", "noise"):
            return None
        return list_of(chunks, "wrong" if self.manner == "forger" else "right")


MANNERS = st.sampled_from(["honest", "liar", "forger", "noise", "quiet"])


@st.composite
def actors(draw: st.DrawFn) -> list[Actor]:
    found = []
    if draw(st.booleans()):
        found.append(
            Actor(HUB, draw(st.sampled_from(["honest", "honest", "liar", "noise"])), 10**9)
        )
    for n in range(draw(st.integers(0, 4))):
        has = draw(st.none() | st.binary(min_size=2, max_size=2))
        found.append(
            Actor(f"peer {n}", draw(MANNERS), draw(st.integers(0, 60) | st.just(10**9)), has)
        )
    return found


@given(actors(), st.randoms(use_true_random=False), st.booleans(), st.integers(0, 9))
def test_any_interleaving_ends_right_or_with_a_reason(
    cast: list[Actor], rng: random.Random, own: bool, before: int
) -> None:
    there = {i: right(i) if rng.random() < 0.7 else digest_of("rot") for i in range(before)}
    plan = Plan(
        SIZE,
        [a.name for a in cast],
        streams=3,
        own=list_of(10) if own else None,
        there=there,
        lot=rng.randrange(100),
    )
    disk = dict(there)
    told: set[str] = set()
    storing: list[tuple[int, bytes]] = []
    honest_hub = any(a.name == HUB and a.manner == "honest" for a in cast)
    for step in range(20_000):
        now = step * 0.3
        for index in plan.take_dropped():
            disk.pop(index, None)
        if plan.complete and not storing:
            assert sorted(disk) == list(range(10))
            if all(disk[i] == right(i) for i in range(10)):
                return
            assert not own or not honest_hub
            plan.whole_failed(())
        if plan.settle() is not None:
            assert plan.failure
            assert not honest_hub
            return
        choices = [a for a in cast if a.flights or plan.usable(a.name)]
        if storing and (not choices or rng.random() < 0.5):
            index, digest = storing.pop(rng.randrange(len(storing)))
            disk[index] = digest
            plan.stored(index)
        elif choices:
            act(plan, rng.choice(choices), rng, step, now, told, storing)
    pytest.fail("neither complete nor failed")


def act(
    plan: Plan,
    actor: Actor,
    rng: random.Random,
    step: int,
    now: float,
    told: set[str],
    storing: list[tuple[int, bytes]],
) -> None:
    if step >= actor.dies_at:
        for token, _, _ in actor.flights:
            plan.finished(token)
        actor.flights.clear()
        plan.gone(actor.name, "died")
    elif actor.name not in told:
        told.add(actor.name)
        plan.offered(actor.name, actor.has, actor.hashes(10))
    elif actor.flights and rng.random() < 0.8:
        flight = rng.choice(actor.flights)
        token, index, stop = flight
        if index == stop or not plan.covers(token, index):
            actor.flights.remove(flight)
            plan.finished(token)
            return
        flight[1] += 1
        digest = actor.content(index, rng)
        decision = plan.arrived(token, index, digest, now)
        if decision is Decision.STORE:
            storing.append((index, digest))
        elif decision is Decision.BANNED:
            for other, _, _ in actor.flights:
                plan.finished(other)
            actor.flights.clear()
    elif len(actor.flights) < 2:
        span = plan.next(actor.name, now) or (
            None if actor.flights else plan.share(actor.name, now)
        )
        if span is not None:
            actor.flights.append([span.token, span.first, span.first + span.count])
        elif actor.has is not None and not actor.flights and rng.random() < 0.05:
            plan.gone(actor.name, "has no more")


def test_what_was_there_before_is_told_from_what_came() -> None:
    plan = plan_for(HUB, there={0: right(0)})
    bring(plan, HUB, 1)
    assert plan.came_before(0)
    assert not plan.came_before(1)
    assert plan.digest(1) == right(1)
    assert BEFORE not in plan.why_out()
