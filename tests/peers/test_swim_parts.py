"""The ideas of membership one by one."""

from __future__ import annotations

import itertools
import random
from dataclasses import fields

import pytest

from meshd.ids import NodeId
from meshd.peers.swim.agenda import Agenda
from meshd.peers.swim.awareness import MOST as MOST_SCORE
from meshd.peers.swim.awareness import Awareness
from meshd.peers.swim.broadcasts import MESSAGE_BYTES, MESSAGE_UPDATES, Broadcasts
from meshd.peers.swim.broadcasts import MOST as MOST_NEWS
from meshd.peers.swim.digests import BUCKETS, SYNC_BYTES, Buckets, bucket_of, chunks
from meshd.peers.swim.gossip import Alive, Dead, Suspect, Update, Why, encoded_size
from meshd.peers.swim.members import (
    BELIEVABLE_FIRST,
    BELIEVABLE_STEP,
    MOST_INCARNATION,
    Member,
    believable,
    joined,
    same_run,
)
from meshd.peers.swim.roster import Roster
from meshd.peers.swim.suspicion import Suspicion
from meshd.peers.swim.throttle import Throttle
from meshd.peers.swim.timing import LAN, WAN, Timing
from meshd.view import PeerState

A, B, C = (NodeId(name) for name in "abc")


def word(node: NodeId, incarnation: int = 1, version: int = 1, *, left: bool = False) -> Alive:
    return Alive(node, incarnation, version, ("h:1",), left, b"s" * 64)


def names(count: int) -> list[NodeId]:
    return [NodeId(f"n{i}") for i in range(count)]


# -- agenda ---------------------------------------------------------------------------------------


def test_alarms_come_in_order_once_and_move_when_set_again() -> None:
    agenda: Agenda[str] = Agenda()
    agenda.set("b", 2.0)
    agenda.set("a", 1.0)
    agenda.set("b", 3.0)
    agenda.set("c", 1.0)
    agenda.cancel("c")
    assert agenda.due() == 1.0
    assert agenda.try_take(0.9) is None
    assert agenda.try_take(5.0) == "a"
    assert agenda.due() == 3.0
    assert agenda.try_take(5.0) == "b"
    assert agenda.due() is None
    assert agenda.try_take(5.0) is None


def test_an_alarm_set_back_to_an_earlier_time_is_taken_once() -> None:
    agenda: Agenda[str] = Agenda()
    for at in (2.0, 1.0, 2.0):
        agenda.set("a", at)
    assert agenda.try_take(3.0) == "a"
    assert agenda.try_take(3.0) is None


def test_an_agenda_that_is_set_without_end_stays_small() -> None:
    agenda: Agenda[str] = Agenda()
    for i in range(10_000):
        agenda.set("a", float(i))
    assert len(agenda._heap) < 100
    assert agenda.due() == 9999.0


def test_postponing_moves_all() -> None:
    agenda: Agenda[str] = Agenda()
    agenda.set("a", 1.0)
    agenda.set("b", 2.0)
    agenda.postpone(10.0)
    assert agenda.try_take(11.0) == "a"
    assert agenda.due() == 12.0


# -- awareness, throttle --------------------------------------------------------------------------


def test_doubt_stretches_up_to_a_limit_and_answers_end_it() -> None:
    awareness = Awareness()
    assert awareness.stretch == 1.0
    awareness.doubt(100)
    assert (awareness.score, awareness.stretch) == (MOST_SCORE, 2.0)
    awareness.doubt(-5)
    assert awareness.score == MOST_SCORE
    for _ in range(20):
        awareness.answered()
    assert awareness.stretch == 1.0


def test_a_throttle_passes_each_peer_once_in_its_gap_and_holds_few() -> None:
    throttle = Throttle(1.0, 2)
    assert throttle.try_pass(A, 0.0)
    assert not throttle.try_pass(A, 0.9)
    assert throttle.try_pass(A, 1.0)
    assert throttle.try_pass(B, 1.0)
    assert not throttle.try_pass(C, 1.5)  # full
    assert throttle.try_pass(C, 2.0)


# -- suspicion ------------------------------------------------------------------------------------


def test_each_confirmation_counts_once_and_less_than_the_one_before() -> None:
    timing = Timing(**{f.name: getattr(LAN, f.name) for f in fields(LAN)} | {"confirmations": 3})
    suspicion = Suspicion(timing, 0.0)
    suspicion.adopt(0.0)
    ends = [suspicion.ends_at()]
    for by in (A, B, C):
        assert suspicion.try_confirm(by)
        assert not suspicion.try_confirm(by)
        ends.append(suspicion.ends_at())
    assert not suspicion.try_confirm(NodeId("d"))
    steps = [first - second for first, second in itertools.pairwise(ends)]
    assert steps == sorted(steps, reverse=True)
    assert ends[0] == LAN.suspicion_s
    assert ends[-1] == pytest.approx(LAN.suspicion_least_s)


def test_an_own_suspicion_starts_when_it_becomes_our_own() -> None:
    suspicion = Suspicion(LAN, 0.0)
    assert suspicion.ends_at() == LAN.heard_suspicion_s
    suspicion.wait_again(1.0)
    assert suspicion.ends_at() == 1.0 + LAN.heard_suspicion_s
    suspicion.adopt(3.0)
    suspicion.adopt(4.0)
    assert suspicion.ends_at() == 3.0 + LAN.suspicion_s
    suspicion.confirm_fully()
    assert suspicion.ends_at() == pytest.approx(3.0 + LAN.suspicion_least_s)


def test_refusals_settle_only_after_a_lost_link_and_only_when_apart() -> None:
    suspicion = Suspicion(LAN, 0.0)
    suspicion.adopt(0.0)
    assert not suspicion.refuse(0.0)
    assert not suspicion.refuse(1.0)
    suspicion.link_lost = True
    assert suspicion.ends_at() == LAN.refused_confirm_s
    suspicion.live(0.1)
    assert suspicion.ends_at() == LAN.suspicion_s
    suspicion.live(1.0)
    assert suspicion.ends_at() == 1.0 + LAN.suspicion_least_s
    suspicion.link_lost = True
    assert not suspicion.refuse(2.0)
    assert not suspicion.refuse(2.01)
    assert suspicion.refuse(2.3)


def test_postponing_moves_all_times_of_a_suspicion() -> None:
    suspicion = Suspicion(LAN, 0.0)
    suspicion.adopt(0.0)
    suspicion.live(1.5)
    suspicion.refuse(1.6)
    before = suspicion.ends_at()
    suspicion.postpone(10.0)
    assert suspicion.ends_at() == before + 10.0
    assert suspicion.refused_at == 11.6


def test_both_presets_leave_time_for_what_they_wait_for() -> None:
    for timing in (LAN, WAN):
        assert timing.direct_timeout_s + timing.relay_timeout_s < timing.probe_timeout_s
        assert timing.suspicion_least_s < timing.suspicion_s < timing.heard_suspicion_s
        assert timing.suspicion_least_s >= 5 * timing.reprobe_interval_s
    assert WAN.probe_interval_s == 5 * LAN.probe_interval_s


# -- members --------------------------------------------------------------------------------------


def after(*updates: Update) -> Member:
    member: Member | None = None
    for update in updates:
        member = joined(member, update, 1.0, Why.TOLD, None) or member
    assert member is not None
    return member


@pytest.mark.parametrize(
    ("updates", "state"),
    [
        ((word(A),), PeerState.ALIVE),
        ((word(A), Suspect(A, 0, B)), PeerState.ALIVE),
        ((word(A), Suspect(A, 1, B)), PeerState.SUSPECT),
        ((word(A), Dead(A, 1, B)), PeerState.SUSPECT),
        ((word(A), Suspect(A, 1, B), Dead(A, 1, C)), PeerState.DEAD),
        ((word(A), Suspect(A, 2, B), Dead(A, 1, C)), PeerState.SUSPECT),
        ((word(A), Suspect(A, 1, B), Dead(A, 1, C), word(A, 2)), PeerState.ALIVE),
        ((word(A), Suspect(A, 1, B), Dead(A, 1, C), word(A, 1, 9)), PeerState.DEAD),
        ((word(A), word(A, left=True)), PeerState.LEFT),
        ((word(A, left=True), word(A, 1, 9)), PeerState.LEFT),
        ((word(A, left=True), Suspect(A, 1, B), Dead(A, 1, B)), PeerState.LEFT),
        ((word(A, left=True), word(A, 2)), PeerState.ALIVE),
        ((Suspect(A, 1, B),), PeerState.SUSPECT),
        ((Suspect(A, 1, B), Dead(A, 1, B)), PeerState.DEAD),
    ],
)
def test_a_member_is_what_all_it_was_told_amounts_to(
    updates: tuple[Update, ...], state: PeerState
) -> None:
    for order in itertools.permutations(updates):
        assert after(*order).state is state


def test_a_change_keeps_its_reason_and_no_change_the_old_one() -> None:
    first = joined(None, word(A), 1.0, Why.MET, None)
    assert first is not None
    second = joined(first, word(A, 1, 2), 2.0, Why.TOLD, B)
    assert second is not None
    assert (second.since, second.why, second.by, second.version) == (1.0, Why.MET, None, 2)
    third = joined(second, Suspect(A, 1, C), 3.0, Why.TOLD, C)
    assert third is not None
    assert (third.since, third.why, third.by) == (3.0, Why.TOLD, C)
    assert joined(third, Suspect(A, 1, B), 4.0, Why.TOLD, B) is None
    assert joined(third, word(A), 4.0, Why.TOLD, B) is None


def test_an_accusation_is_what_the_accused_has_to_answer() -> None:
    assert after(word(A)).accusation() is None
    assert after(word(A), Suspect(A, 1, B)).accusation() == Suspect(A, 1, B)
    assert after(word(A), Suspect(A, 1, B), Dead(A, 1, C)).accusation() == Dead(A, 1, C)
    assert after(word(A), Suspect(A, 1, B), word(A, 2)).accusation() is None


def test_nobody_can_be_accused_out_of_reach() -> None:
    assert believable(Suspect(A, 5, B), 5)
    assert believable(Suspect(A, BELIEVABLE_FIRST, B), -1)
    assert not believable(Suspect(A, BELIEVABLE_FIRST + BELIEVABLE_STEP + 1, B), -1)
    assert not believable(Suspect(A, MOST_INCARNATION, B), 5)
    assert believable(word(A, MOST_INCARNATION), 5)
    assert not believable(word(A, MOST_INCARNATION + 1), 5)
    assert not believable(word(A, 1, -1), -1)
    assert not believable(Dead(A, -1, B), -1)


def test_refutations_stay_within_one_run() -> None:
    assert same_run(3 << 20, (3 << 20) + 9)
    assert not same_run(3 << 20, 4 << 20)


# -- news -----------------------------------------------------------------------------------------


def test_news_are_told_a_bounded_number_of_times_the_newest_and_least_told_first() -> None:
    news = Broadcasts()
    for node in names(MESSAGE_UPDATES + 2):
        news.put(Suspect(node, 1, A))
    first = [u.node for u in news.take(3)]
    assert first == [NodeId(f"n{i}") for i in range(MESSAGE_UPDATES + 1, 1, -1)]
    assert [u.node for u in news.take(3)][:2] == [NodeId("n1"), NodeId("n0")]
    told = 2 * MESSAGE_UPDATES
    while taken := news.take(3):
        told += len(taken)
    assert told == (MESSAGE_UPDATES + 2) * 3 * 2  # λ·log2(3 + 1)
    assert len(news) == 0


def test_news_fit_the_budget_and_a_smaller_one_may_pass_a_larger() -> None:
    news = Broadcasts()
    big = Alive(A, 1, 1, ("x" * 1300,), False, b"")
    news.put(Suspect(B, 1, C))
    news.put(big)
    assert news.take(100, skip={A}) == (Suspect(B, 1, C),)
    assert news.take(100, skip={B}) == (big,)
    news.drop(A)
    for node in names(20):
        news.put(word(node))
    taken = news.take(100)
    assert sum(map(encoded_size, taken)) <= MESSAGE_BYTES
    assert len(taken) == MESSAGE_UPDATES
    assert news.take(100, budget_bytes=10) == ()


def test_only_the_newest_about_a_node_is_told_and_never_to_those_who_know() -> None:
    news = Broadcasts()
    news.put(Suspect(A, 1, B))
    news.put(Dead(A, 1, B))
    news.put(word(C))
    assert set(news.take(9)) == {Dead(A, 1, B), word(C)}
    assert news.take(9, skip={A, C}) == ()
    news.drop_deaths()
    assert news.take(9) == (word(C),)
    news.drop(C)
    news.drop(C)
    assert news.take(9) == ()


def test_news_are_bounded_and_what_was_told_most_makes_room() -> None:
    news = Broadcasts()
    for node in names(MOST_NEWS):
        news.put(Suspect(node, 1, A))
    told = {u.node for u in news.take(1000)}
    for i in range(MESSAGE_UPDATES):
        news.put(Suspect(NodeId(f"x{i}"), 1, A))
    assert len(news) == MOST_NEWS
    assert not told & set(news._tier_of)


# -- digests --------------------------------------------------------------------------------------


def test_a_digest_depends_on_what_is_held_and_not_on_the_way_there() -> None:
    one, other = Buckets(), Buckets()
    one.toggle(word(A))
    one.toggle(word(B))
    other.toggle(word(B))
    other.toggle(word(A, 7))
    other.toggle(word(A, 7))
    assert one.differing(other.values()) == (bucket_of(A),)
    other.toggle(word(A))
    assert one.values() == other.values()
    assert all(0 <= value < 2**64 for value in one.values())
    assert one.differing((0,) * (BUCKETS + 1)) == ()


def test_chunks_keep_order_and_size() -> None:
    updates = [word(node) for node in names(300)]
    parts = list(chunks(updates))
    assert [u for part in parts for u in part] == updates
    assert all(sum(map(encoded_size, part)) <= SYNC_BYTES for part in parts)
    assert len(parts) > 1
    assert list(chunks([])) == [()]
    assert len(list(chunks(updates[:3], limit_bytes=1))) == 3


# -- roster ---------------------------------------------------------------------------------------


def roster(count: int) -> Roster:
    made = Roster(NodeId("me"), random.Random(3))
    for node in names(count):
        made.put(after(word(node)))
    return made


def test_everyone_is_next_within_two_rounds_and_the_successor_every_second_time() -> None:
    made = roster(10)
    chosen = [made.try_next(lambda _: False) for _ in range(40)]
    assert set(chosen[:20]) >= set(names(10))
    ring = sorted(names(10))
    assert set(chosen[0::2]) == {ring[0]}  # all follow "me"


def test_nobody_is_next_if_nobody_is_wanted() -> None:
    assert roster(5).try_next(lambda _: True) is None
    assert roster(0).try_next(lambda _: False) is None
    assert roster(5).try_next(lambda n: n != NodeId("n3")) == NodeId("n3")


@pytest.mark.parametrize("count", [4, 200])
def test_a_sample_holds_different_living_members_and_none_unwanted(count: int) -> None:
    made = roster(count)
    made.put(after(word(NodeId("n0")), Suspect(NodeId("n0"), 1, B)))
    for _ in range(100):
        drawn = made.sample(3, (NodeId("n1"),))
        assert len(set(drawn)) == len(drawn) == (2 if count == 4 else 3)
        assert not {NodeId("n0"), NodeId("n1")} & set(drawn)


def test_a_table_full_of_the_living_takes_nobody_in() -> None:
    made = roster(4096)
    assert made.try_make_room(A) == (None, False)
    assert made.try_make_room(NodeId("n1")) == (None, True)


def test_a_node_that_comes_and_goes_does_not_fill_the_round() -> None:
    made = roster(3)
    node = NodeId("n0")
    for incarnation in range(2, 200):
        made.put(after(Suspect(node, incarnation, B), Dead(node, incarnation, B)))
        made.put(after(word(node, incarnation + 1)))
    assert len(made._order) <= 6
    assert made.living() == 3
    assert made.remove(node) is not None
    assert made.remove(node) is None
    assert made.living() == 2


def test_a_death_by_word_of_others_alone_is_not_retried() -> None:
    made = roster(1)
    made.put(after(Suspect(A, 1, B), Dead(A, 1, B)))
    assert made.dead() == []
    made.put(after(word(A), Suspect(A, 1, B), Dead(A, 1, B)))
    assert made.dead() == [A]
    assert made.knowledge(range(BUCKETS)) == [word(NodeId("n0")), Dead(A, 1, B)]
