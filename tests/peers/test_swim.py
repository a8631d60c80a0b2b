"""The membership machine: literal times, lists as the network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from meshd.ids import NodeId
from meshd.kernel.machine import Tick
from meshd.peers.swim.gossip import (
    Ack,
    AdvertNewer,
    Alive,
    Dead,
    DialRefused,
    Digest,
    Effect,
    Event,
    Gossip,
    LinkLost,
    MemberChanged,
    Message,
    MessageReceived,
    Nack,
    NodeMet,
    NodeRevoked,
    Ping,
    PingReq,
    RoundTrip,
    SelfImpersonated,
    SelfStated,
    Send,
    StateSelf,
    Suspect,
    Sync,
    Update,
    Why,
)
from meshd.peers.swim.members import MOST_INCARNATION
from meshd.peers.swim.swim import Swim
from meshd.peers.swim.timing import LAN
from meshd.view import PeerState

ME = NodeId("m")
A, B, C, D = (NodeId(name) for name in "abcd")
Z = NodeId("z")
FIRST = 1 << 20
E = TypeVar("E")


def word(node: NodeId, incarnation: int = FIRST, version: int = 1, *, left: bool = False) -> Alive:
    return Alive(node, incarnation, version, (f"{node}.test:9338",), left, b"s" * 64)


def heard(sender: NodeId, *updates: Update) -> MessageReceived:
    return MessageReceived(sender, Gossip(updates))


def of(effects: Sequence[Effect], kind: type[E]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(effects: Sequence[Effect], to: NodeId) -> list[Message]:
    return [effect.message for effect in of(effects, Send) if effect.to == to]


def told(effects: Sequence[Effect], to: NodeId) -> set[Update]:
    """Every update that goes to `to`."""
    messages = [m for m in sent(effects, to) if not isinstance(m, Digest)]
    return {update for message in messages for update in message.updates}


def bare(message: Message) -> Message:
    """Without the news that ride on it."""
    assert not isinstance(message, Digest | Sync)
    return replace(message, updates=())


class Run:
    """A machine that runs as its own `due` says, and what it ordered."""

    def __init__(self, *others: NodeId) -> None:
        self.swim = Swim(ME, LAN, random.Random(7))
        self.now = 100.0
        self.answering: set[NodeId] = set()
        """Who acknowledges its pings, in no time."""
        self.do(SelfStated(word(ME)))
        for node in others:
            self.do(MessageReceived(node, Sync((), (word(node),), answer=False)))

    def do(self, event: Event) -> list[Effect]:
        effects = self.swim.handle(event, self.now)
        for effect in of(effects, Send):
            if isinstance(effect.message, Ping) and effect.to in self.answering:
                effects += self.do(MessageReceived(effect.to, Ack(effect.message.seq)))
        return effects

    def until(self, end: float) -> list[Effect]:
        """Tick until `end` seconds from now; all effects."""
        stop = self.now + end
        effects: list[Effect] = []
        while (due := self.swim.due()) is not None and due <= stop:
            self.now = due
            effects += self.do(Tick())
        self.now = stop
        return effects

    def until_sent(self, kind: type[E], to: NodeId) -> E:
        for _ in range(500):
            due = self.swim.due()
            assert due is not None
            self.now = due
            for message in sent(self.do(Tick()), to):
                if isinstance(message, kind):
                    return message
        pytest.fail(f"no {kind.__name__} for {to}")

    def state(self, node: NodeId) -> PeerState | None:
        member = self.swim.members.get(node)
        return member.state if member is not None else None


# -- probing --------------------------------------------------------------------------------------


def test_every_member_is_pinged_in_each_round_and_an_answer_gives_the_round_trip() -> None:
    run = Run(A, B, C)
    pinged: set[NodeId] = set()
    start = run.now
    while run.now - start < 6 * LAN.probe_interval_s:
        due = run.swim.due()
        assert due is not None
        run.now = due
        for effect in of(run.do(Tick()), Send):
            if isinstance(effect.message, Ping):
                pinged.add(effect.to)
                run.now += 0.002
                answer = run.do(MessageReceived(effect.to, Ack(effect.message.seq)))
                (trip,) = of(answer, RoundTrip)
                assert trip.node == effect.to
                assert trip.seconds == pytest.approx(0.002)
    assert pinged == {A, B, C}
    assert {run.state(n) for n in (A, B, C)} == {PeerState.ALIVE}


def test_silence_asks_others_then_suspects_then_buries() -> None:
    run = Run(A, B)
    ping = run.until_sent(Ping, A)
    began = run.now
    assert bare(run.until_sent(PingReq, B)) == PingReq(ping.seq, A)
    assert run.now - began == pytest.approx(LAN.direct_timeout_s)
    run.do(MessageReceived(B, Nack(ping.seq)))
    run.answering = {B}
    effects: list[Effect] = []
    while run.state(A) is PeerState.ALIVE:
        effects = run.until(0.05)
    assert of(effects, MemberChanged) == [
        MemberChanged(A, PeerState.ALIVE, PeerState.SUSPECT, Why.NO_ANSWER)
    ]
    assert Suspect(A, FIRST, ME) in told(effects, B)
    assert run.swim.health == 0  # the relay was there: the fault is not ours
    suspected = run.now
    tries: list[Message] = []
    while run.state(A) is PeerState.SUSPECT:
        effects = run.until(0.05)
        tries += sent(effects, A)
    assert run.now - suspected <= LAN.suspicion_s + 0.1
    assert len(tries) >= LAN.suspicion_least_s / LAN.reprobe_interval_s
    assert all(isinstance(t, Ping) and Suspect(A, FIRST, ME) in t.updates for t in tries)
    (change,) = [c for c in of(effects, MemberChanged) if c.node == A]
    assert (change.new, change.why, change.by) == (PeerState.DEAD, Why.NO_ANSWER, None)
    assert Dead(A, FIRST, ME) in told(effects, B)


def test_an_answer_through_another_counts_but_tells_no_round_trip() -> None:
    run = Run(A, B)
    ping = run.until_sent(Ping, A)
    run.until_sent(PingReq, B)
    assert of(run.do(MessageReceived(B, Ack(ping.seq))), RoundTrip) == []
    run.until(0.3)
    assert run.state(A) is PeerState.ALIVE


def test_an_answer_from_somebody_who_was_not_asked_does_not_count() -> None:
    run = Run(A, B)
    ping = run.until_sent(Ping, A)
    run.do(MessageReceived(Z, Ack(ping.seq)))
    run.until_sent(PingReq, B)  # the probe still runs


def test_relays_that_say_nothing_are_looked_at_and_make_us_doubt_ourselves() -> None:
    run = Run(A, B, C, D)
    ping = run.until_sent(Ping, A)
    run.until_sent(PingReq, B)
    run.do(MessageReceived(B, Nack(ping.seq)))
    effects = run.until(LAN.probe_timeout_s)
    assert run.state(A) is PeerState.SUSPECT
    for relay in (C, D):
        assert any(isinstance(m, Ping) for m in sent(effects, relay))
    assert run.swim.health > 0


def test_being_woken_late_is_our_own_fault_and_moves_every_deadline() -> None:
    run = Run(A, B)
    run.until_sent(PingReq, B)
    run.now += 30.0
    effects = run.do(Tick())
    assert of(effects, MemberChanged) == []
    assert run.swim.health > 0
    ping = Run(A, B)
    assert ping.swim.health == 0


def test_a_ping_is_answered_whoever_sends_it() -> None:
    run = Run()
    assert bare(*sent(run.do(MessageReceived(Z, Ping(-5))), Z)) == Ack(-5)


# -- errands --------------------------------------------------------------------------------------


def test_a_ping_for_another_ends_in_an_ack_or_a_nack() -> None:
    run = Run(A, B)
    (ping,) = sent(run.do(MessageReceived(B, PingReq(9, A))), A)
    assert isinstance(ping, Ping)
    assert bare(*sent(run.do(MessageReceived(A, Ack(ping.seq))), B)) == Ack(9)
    run.do(MessageReceived(B, PingReq(10, A)))
    effects = run.until(LAN.relay_timeout_s + 0.01)
    assert Nack(10) in map(bare, sent(effects, B))


def test_an_errand_to_ourselves_is_an_ack_and_to_a_revoked_node_a_nack() -> None:
    run = Run(A, B)
    run.do(NodeRevoked(A))
    assert bare(*sent(run.do(MessageReceived(B, PingReq(1, ME))), B)) == Ack(1)
    assert bare(*sent(run.do(MessageReceived(B, PingReq(2, A))), B)) == Nack(2)


def test_errands_are_bounded() -> None:
    run = Run(A, B)
    answers = [sent(run.do(MessageReceived(B, PingReq(i, A))), B) for i in range(300)]
    assert answers[255] == []
    assert answers[256] == [Nack(256)]


# -- what others say ------------------------------------------------------------------------------


def test_a_mention_of_a_suspect_or_dead_node_refreshes_nothing() -> None:
    run = Run(A, B)
    run.do(heard(B, Suspect(A, FIRST, B)))
    run.do(heard(B, word(A)))
    assert run.state(A) is PeerState.SUSPECT
    run.do(heard(B, Dead(A, FIRST, B)))
    run.do(heard(B, word(A, version=2)))
    assert run.state(A) is PeerState.DEAD
    assert run.swim.members[A].version == 2


def test_a_newer_statement_revives_at_once_whoever_brings_it() -> None:
    run = Run(A, B)
    run.do(heard(B, Suspect(A, FIRST, B), Dead(A, FIRST, B)))
    assert run.state(A) is PeerState.DEAD
    effects = run.do(heard(B, word(A, FIRST + 1)))
    assert MemberChanged(A, PeerState.DEAD, PeerState.ALIVE, Why.REFUTED, B) in effects
    assert any(isinstance(m, Digest) for m in sent(effects, A))


def test_a_told_death_is_believed_of_a_suspect_and_looked_into_otherwise() -> None:
    run = Run(A, B)
    effects = run.do(heard(B, Dead(A, FIRST, B)))
    assert run.state(A) is PeerState.SUSPECT
    assert Dead(A, FIRST, B) in told(effects, A)
    run.do(heard(B, Suspect(A, FIRST, B)))
    assert run.state(A) is PeerState.DEAD


def test_a_death_nobody_suspected_is_verified_in_the_least_time() -> None:
    run = Run(A, B)
    run.do(heard(B, Dead(A, FIRST, B)))
    run.until(LAN.suspicion_least_s - 0.1)
    assert run.state(A) is PeerState.SUSPECT
    run.until(0.2)
    assert run.state(A) is PeerState.DEAD


def test_a_death_nobody_suspected_is_believed_when_a_dial_is_refused() -> None:
    run = Run(A, B)
    run.do(heard(B, Dead(A, FIRST, B)))
    effects = run.do(DialRefused(A))
    assert MemberChanged(A, PeerState.SUSPECT, PeerState.DEAD, Why.REFUSED) in effects


def test_who_only_heard_of_a_suspicion_leaves_it_to_others_then_looks_itself() -> None:
    run = Run(A, B)
    run.until_sent(Ping, B)
    effects = run.do(heard(B, Suspect(A, FIRST, B)))
    assert of(effects, MemberChanged) == [
        MemberChanged(A, PeerState.ALIVE, PeerState.SUSPECT, Why.TOLD, B)
    ]
    assert sent(effects, A) == []


def test_confirmations_shorten_a_suspicion_of_our_own() -> None:
    def buried_after(*confirmers: NodeId) -> float:
        run = Run(A, B, C)
        run.do(LinkLost(A))
        for node in confirmers:
            run.do(heard(node, Suspect(A, FIRST, node)))
        start = run.now
        while run.state(A) is PeerState.SUSPECT:
            run.until(0.02)
        return run.now - start

    alone, one, two = buried_after(), buried_after(B), buried_after(B, C)
    assert alone == pytest.approx(LAN.suspicion_s, abs=0.03)
    assert two == pytest.approx(LAN.suspicion_least_s, abs=0.03)
    assert two < one < alone
    assert buried_after(B, B) == one


def test_an_advert_that_is_newer_is_announced_once_with_its_source() -> None:
    run = Run(A, B)
    effects = run.do(heard(B, word(A, version=3)))
    assert of(effects, AdvertNewer) == [AdvertNewer(A, 3, B)]
    assert of(run.do(heard(B, word(A, version=3))), AdvertNewer) == []
    assert of(run.do(heard(B, word(A, version=2))), AdvertNewer) == []


def test_news_are_pushed_at_once_then_several_times_a_second_and_end() -> None:
    run = Run(A, B, C, D)
    run.answering = {A, B, C, D}
    run.until(5.0)
    fresh = word(A, FIRST + 9, 9)
    effects = run.do(heard(A, fresh))
    pushed = [e.to for e in of(effects, Send) if isinstance(e.message, Gossip)]
    assert len(pushed) == LAN.gossip_fanout
    total = len(pushed)
    for _ in range(40):
        effects = run.until(0.1)
        total += sum(fresh in told(effects, node) for node in (A, B, C, D))
    assert total == 9  # λ·log2(n + 1), n = 5


# -- links ----------------------------------------------------------------------------------------


def test_a_lost_link_suspects_and_dials_at_once_and_two_refusals_bury() -> None:
    run = Run(A, B)
    effects = run.do(LinkLost(A))
    assert of(effects, MemberChanged) == [
        MemberChanged(A, PeerState.ALIVE, PeerState.SUSPECT, Why.LINK_LOST)
    ]
    assert any(isinstance(m, Ping) for m in sent(effects, A))
    run.now += 0.002
    run.do(DialRefused(A))
    run.do(DialRefused(A))  # its other address
    assert run.state(A) is PeerState.SUSPECT
    again = run.until(LAN.refused_confirm_s / 2 + 0.001)
    assert any(isinstance(m, Ping) for m in sent(again, A))
    effects = run.do(DialRefused(A))
    assert of(effects, MemberChanged) == [
        MemberChanged(A, PeerState.SUSPECT, PeerState.DEAD, Why.REFUSED)
    ]


def test_one_refusal_after_a_lost_link_and_then_silence_is_a_death_soon() -> None:
    run = Run(A, B)
    run.do(LinkLost(A))
    run.do(DialRefused(A))
    run.until(LAN.refused_confirm_s + 0.001)
    assert run.state(A) is PeerState.DEAD
    assert run.swim.members[A].why is Why.REFUSED


def test_a_refusal_alone_is_a_suspicion_of_ordinary_length() -> None:
    run = Run(A, B)
    run.do(DialRefused(A))
    assert run.swim.members[A].why is Why.REFUSED
    run.until(1.0)
    run.do(DialRefused(A))
    assert run.state(A) is PeerState.SUSPECT
    run.until(LAN.suspicion_s)
    assert run.state(A) is PeerState.DEAD


def test_the_fewer_can_help_the_more_often_a_suspect_is_tried() -> None:
    def tries(*others: NodeId) -> int:
        run = Run(A, *others)
        run.answering = set(others)
        run.do(LinkLost(A))
        return len(sent(run.until(1.0), A))

    assert tries(B, C, D) == pytest.approx(1.0 / LAN.reprobe_interval_s, abs=1)
    assert tries() >= 3 * tries(B, C, D)


def test_signs_of_life_postpone_the_verdict_but_end_no_suspicion() -> None:
    run = Run(A, B)
    run.do(LinkLost(A))
    run.do(DialRefused(A))
    for _ in range(10):
        run.until(0.4)
        run.do(heard(A))
    assert run.state(A) is PeerState.SUSPECT
    run.until(LAN.suspicion_least_s + 0.01)
    assert run.state(A) is PeerState.DEAD


def test_an_answer_through_a_relay_is_a_sign_of_life() -> None:
    run = Run(A, B)
    run.do(LinkLost(A))
    request = run.until_sent(PingReq, B)
    for _ in range(10):
        run.until(0.4)
        run.do(MessageReceived(B, Ack(request.seq)))
    assert run.state(A) is PeerState.SUSPECT


def test_meeting_a_newer_run_of_a_dead_node_brings_it_back_at_once() -> None:
    run = Run(A, B)
    run.do(heard(B, Suspect(A, FIRST, B), Dead(A, FIRST, B)))
    effects = run.do(NodeMet(word(A, 2 * FIRST)))
    assert MemberChanged(A, PeerState.DEAD, PeerState.ALIVE, Why.REFUTED) in effects


def test_meeting_a_node_that_is_held_dead_tells_it_so() -> None:
    run = Run(A, B)
    run.do(heard(B, Suspect(A, FIRST, B), Dead(A, FIRST, B)))
    effects = run.do(NodeMet(word(A)))
    assert run.state(A) is PeerState.DEAD
    assert Dead(A, FIRST, B) in told(effects, A)


def test_one_of_both_compares_tables_when_a_link_comes_up() -> None:
    run = Run()
    assert not any(isinstance(m, Digest) for m in sent(run.do(NodeMet(word(A))), A))
    effects = run.do(NodeMet(word(Z)))
    assert any(isinstance(m, Digest) for m in sent(effects, Z))
    assert MemberChanged(Z, None, PeerState.ALIVE, Why.MET) in effects
    assert AdvertNewer(Z, 1, Z) in effects


@pytest.mark.parametrize("event", [LinkLost(Z), DialRefused(Z)])
def test_links_of_strangers_mean_nothing(event: Event) -> None:
    run = Run(A)
    assert run.do(event) == []


# -- ourselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accusation", [Suspect(ME, FIRST, B), Dead(ME, FIRST, B)])
def test_an_accusation_is_refuted_and_the_accusers_hear_it_first(
    accusation: Suspect | Dead,
) -> None:
    run = Run(A, B)
    effects = run.do(heard(A, accusation))
    assert StateSelf(FIRST + 1) in effects
    assert of(run.do(heard(A, accusation)), StateSelf) == []  # under way
    answer = word(ME, FIRST + 1)
    effects = run.do(SelfStated(answer))
    assert of(effects, Send)[0] == Send(A, Gossip((answer,)))
    assert answer in told(effects, B)
    assert run.swim.statement == answer


def test_a_refutation_that_never_came_is_ordered_again() -> None:
    run = Run(A)
    run.do(heard(A, Suspect(ME, FIRST, A)))
    run.until(1.1)
    assert StateSelf(FIRST + 1) in run.do(heard(A, Suspect(ME, FIRST, A)))


def test_who_missed_our_last_word_hears_it_with_the_answer() -> None:
    run = Run(A)
    run.until(10)
    current = word(ME, 5 * FIRST)
    run.do(SelfStated(current))
    run.until(10)
    stale = Suspect(ME, FIRST, B)
    (ack,) = sent(run.do(MessageReceived(A, Ping(1, (stale,)))), A)
    assert isinstance(ack, Ack)
    assert current in ack.updates
    assert of(run.do(heard(A, stale)), StateSelf) == []


@pytest.mark.parametrize(
    "stolen", [word(ME, 7 * FIRST), word(ME, version=2), replace(word(ME), addresses=("x:1",))]
)
def test_a_statement_of_ours_that_we_did_not_make_is_announced_and_refuted(stolen: Alive) -> None:
    run = Run(A)
    effects = run.do(heard(A, stolen))
    assert SelfImpersonated(stolen) in effects
    assert StateSelf(stolen.incarnation + 1) in effects
    assert run.swim.statement == word(ME)
    assert SelfImpersonated(stolen) in run.do(NodeMet(stolen))


def test_our_own_words_coming_back_are_nothing_new() -> None:
    run = Run(A)
    run.do(SelfStated(word(ME, version=2)))
    run.until(5)
    assert of(run.do(heard(A, word(ME), word(ME, version=2))), StateSelf) == []


def test_an_incarnation_beyond_belief_is_ignored() -> None:
    run = Run(A, B)
    for absurd in (MOST_INCARNATION, -1, 10**40):
        assert of(run.do(heard(A, Suspect(ME, absurd, A))), StateSelf) == []
        run.do(heard(A, Suspect(B, absurd, A), Dead(B, absurd, A)))
        run.do(heard(A, replace(word(Z), version=-1), replace(word(Z), incarnation=absurd + 2**54)))
    assert run.state(B) is PeerState.ALIVE
    assert run.state(Z) is None


def test_the_last_incarnation_cannot_be_topped() -> None:
    run = Run(A)
    run.do(SelfStated(word(ME, MOST_INCARNATION)))
    assert of(run.do(heard(A, Suspect(ME, MOST_INCARNATION, A))), StateSelf) == []


def test_an_older_word_of_ours_or_that_of_another_is_not_taken() -> None:
    run = Run(A)
    run.do(SelfStated(word(ME, FIRST - 1)))
    run.do(SelfStated(word(B, 9 * FIRST)))
    assert run.swim.statement == word(ME)


# -- leaving, revoking, forgetting ----------------------------------------------------------------


def test_leaving_says_goodbye_at_once_and_probes_nobody_any_more() -> None:
    others = [NodeId(f"n{i}") for i in range(20)]
    run = Run(*others)
    run.answering = set(others)
    run.until(3.0)
    goodbye = word(ME, version=2, left=True)
    effects = run.do(SelfStated(goodbye))
    assert len({e.to for e in of(effects, Send) if goodbye in told(effects, e.to)}) >= 8
    later = run.until(20.0)
    assert not any(isinstance(e.message, Ping | Digest) for e in of(later, Send))
    assert of(run.do(heard(A, Dead(ME, FIRST, A))), StateSelf) == []
    run.do(SelfStated(word(ME, FIRST + 1)))  # stayed after all
    assert any(isinstance(e.message, Ping) for e in of(run.until(2.0), Send))


def test_a_member_that_left_is_neither_retried_nor_taken_for_dead() -> None:
    run = Run(A, B)
    effects = run.do(heard(B, word(A, left=True)))
    assert MemberChanged(A, PeerState.ALIVE, PeerState.LEFT, Why.LEFT, B) in effects
    run.do(heard(B, Suspect(A, FIRST, B), Dead(A, FIRST, B)))
    run.do(LinkLost(A))
    assert run.state(A) is PeerState.LEFT
    later = run.until(30.0)
    assert sent(later, A) == []
    run.do(heard(B, word(A, FIRST + 1)))
    assert run.state(A) is PeerState.ALIVE


def test_the_dead_are_retried_and_told_that_they_are() -> None:
    run = Run(A, B)
    run.do(heard(B, Suspect(A, FIRST, B), Dead(A, FIRST, B)))
    retry = run.until_sent(Ping, A)
    assert retry.updates == (Dead(A, FIRST, B),)


def test_tombstones_age_out() -> None:
    run = Run(A, B)
    run.do(heard(B, Suspect(A, FIRST, B), Dead(A, FIRST, B)))
    run.do(NodeRevoked(B))
    run.swim.handle(SelfStated(word(ME, version=5, left=True)), run.now)
    effects = run.until(LAN.dead_kept_s + 1)
    assert MemberChanged(A, PeerState.DEAD, None, Why.FORGOTTEN) in effects
    assert A not in run.swim.members


def test_a_revoked_node_is_forgotten_and_ignored() -> None:
    run = Run(A, B)
    effects = run.do(NodeRevoked(A))
    assert effects[0] == MemberChanged(A, PeerState.ALIVE, None, Why.REVOKED)
    for event in (
        MessageReceived(A, Ping(1)),
        heard(B, word(A, 9 * FIRST), Dead(A, 9 * FIRST, B)),
        NodeMet(word(A, 10 * FIRST)),
        LinkLost(A),
    ):
        effects = run.do(event)
        assert sent(effects, A) == []
        assert A not in run.swim.members


# -- tables ---------------------------------------------------------------------------------------


def test_equal_tables_exchange_nothing() -> None:
    one, other = Run(A, B), Run(A, B)
    digest = one.swim._roster.buckets.values()
    assert sent(other.do(MessageReceived(A, Digest(digest, answer=True))), A) == []


def test_a_newcomer_is_told_everything_and_asked_for_itself_only() -> None:
    run = Run(*(NodeId(f"n{i}") for i in range(200)))
    newcomer = Swim(Z, LAN, random.Random(1))
    newcomer.handle(SelfStated(word(Z)), 0.0)
    digest = Digest(newcomer._roster.buckets.values(), answer=True)
    syncs = [m for m in sent(run.do(MessageReceived(Z, digest)), Z) if isinstance(m, Sync)]
    assert len(syncs) >= 3  # in parts
    assert {u.node for s in syncs for u in s.updates} == {*run.swim.members, ME}
    (asking,) = [s for s in syncs if s.answer]
    assert len(asking.buckets) == 1
    for part in syncs:
        effects = newcomer.handle(MessageReceived(ME, part), 0.1)
        if part is asking:
            (answer,) = [m for m in sent(effects, ME) if isinstance(m, Sync)]
            assert word(Z) in answer.updates
    assert len(newcomer.members) == 201


def test_tables_are_not_sent_to_one_peer_without_end() -> None:
    run = Run(A, B)
    asks = MessageReceived(A, Sync(tuple(range(16)), (), answer=True))
    assert len(sent(run.do(asks), A)) == 1
    assert sent(run.do(asks), A) == []
    run.until(0.3)
    assert any(isinstance(m, Sync) for m in sent(run.do(asks), A))


@pytest.mark.parametrize("buckets", [(), (1,), (0,) * 17])
def test_a_digest_of_another_kind_is_ignored(buckets: tuple[int, ...]) -> None:
    run = Run(A)
    assert sent(run.do(MessageReceived(A, Digest(buckets, answer=True))), A) == []
    assert sent(run.do(MessageReceived(A, Sync((-1, 99), (), answer=True))), A) == []


def test_a_death_in_a_sync_is_a_lead_that_the_accused_hears_of() -> None:
    run = Run(A, B)
    effects = run.do(MessageReceived(B, Sync((), (Dead(A, FIRST, B),), answer=False)))
    assert run.state(A) is PeerState.ALIVE
    (ping,) = sent(effects, A)
    assert isinstance(ping, Ping)
    assert Dead(A, FIRST, B) in ping.updates


def test_a_sync_brings_no_tombstones_of_strangers() -> None:
    run = Run(A)
    strange = (Dead(Z, FIRST, A), word(B, left=True))
    run.do(MessageReceived(A, Sync((), strange, answer=False)))
    assert set(run.swim.members) == {A}


def test_the_table_is_bounded_and_tombstones_make_room() -> None:
    run = Run()
    for i in range(4200):
        run.do(MessageReceived(A, Sync((), (word(NodeId(f"n{i}")),), answer=False)))
    assert len(run.swim.members) == 4096
    run.do(heard(A, Suspect(NodeId("n7"), FIRST, A), Dead(NodeId("n7"), FIRST, A)))
    effects = run.do(heard(Z, word(Z)))
    assert MemberChanged(NodeId("n7"), PeerState.DEAD, None, Why.FORGOTTEN) in effects
    assert run.state(Z) is PeerState.ALIVE
    assert len(run.swim.members) == 4096
