"""Membership: which other nodes there are and how they are; a pure machine.

SWIM (Das, Gupta, Motivala 2002) with suspicion, Lifeguard (Dadgar, Phillips, Currey 2018), and
anti-entropy. The shell checks signatures before it posts, sends what it is told to, and may lose
any of it. Rules, numbered as in the code:

1. Every `probe_interval_s` one member is probed: directly, then through others (`probing`).
2. Nobody answered: we suspect it, tell everyone and it too, and try it several times a second until
   the suspicion ends in its refutation or its death (`suspicions`). Who only hears of a suspicion
   leaves that work to whoever raised it, and looks for itself if nothing follows.
3. A lost link is a suspicion at once; a refused dial after it, twice, is a death.
4. Liveness comes from a node itself only: its answers, its link, its newer statements. What a third
   party mentions refreshes nothing. Answers postpone a verdict; only a statement of a higher
   incarnation ends a suspicion or a death, and does so at once.
5. Whoever is wrong about us is refuted (`own_word`), the accuser first.
6. News ride on every message and, while there are any, are pushed to a few members several times a
   second (`broadcasts`); what is missed on the way is found by digests (`digests`).
7. The dead are tried again, and told that they are held dead: that heals partitions. Those that
   left are not. Both are forgotten with age.
8. A node that leaves says so to some members at once, and probes nobody of its own accord any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, assert_never

from meshd.ids import NodeId
from meshd.kernel.machine import Tick
from meshd.peers.swim import alarms
from meshd.peers.swim.agenda import Agenda
from meshd.peers.swim.alarms import Alarm
from meshd.peers.swim.awareness import Awareness
from meshd.peers.swim.beliefs import Beliefs
from meshd.peers.swim.errands import Errands
from meshd.peers.swim.exchange import Exchange
from meshd.peers.swim.gossip import (
    Ack,
    Alive,
    DialRefused,
    Digest,
    Effect,
    Event,
    Gossip,
    LinkLost,
    Message,
    MessageReceived,
    Nack,
    NodeMet,
    NodeRevoked,
    Ping,
    PingReq,
    SelfStated,
    Sync,
    Update,
    Why,
)
from meshd.peers.swim.members import Member
from meshd.peers.swim.outbox import Outbox
from meshd.peers.swim.own_word import OwnWord
from meshd.peers.swim.probing import Probing
from meshd.peers.swim.roster import Chance, Roster
from meshd.peers.swim.suspicions import End, Suspicions
from meshd.peers.swim.throttle import Throttle
from meshd.peers.swim.timing import Timing
from meshd.view import PeerState

FAREWELLS: Final = 8
FORWARDS: Final = 64
"""How many of those that one Sync calls dead are told so beyond those that are probed: after a
partition the other side lists us all."""
TELL_AGAIN_S: Final = 0.5
"""Between two messages to one node whose only purpose is to say that it is suspected or dead."""


class Swim:
    """See the module's docstring. Equal chance and equal events give equal effects."""

    def __init__(self, self_id: NodeId, timing: Timing, chance: Chance) -> None:
        self._self_id = self_id
        self._timing = timing
        self._chance = chance
        self._agenda: Agenda[Alarm] = Agenda()
        self._awareness = Awareness()
        self._roster = Roster(self_id, chance)
        self._out = Outbox(self._roster)
        self._own = OwnWord(self_id, self._roster, self._out, self._awareness)
        self._probing = Probing(self._roster, self._out, self._agenda, self._awareness, timing)
        self._errands = Errands(self._out, self._agenda, timing.relay_timeout_s)
        self._suspicions = Suspicions(self._roster, self._out, self._agenda, timing)
        self._exchange = Exchange(self_id, self._roster, self._out)
        self._beliefs = Beliefs(
            self_id,
            self._roster,
            self._out,
            self._agenda,
            self._suspicions,
            self._probing,
            self._exchange,
            timing,
        )
        self._tells = Throttle(TELL_AGAIN_S, 1024)
        self._push_at = 0.0
        self._started = False

    @property
    def members(self) -> Mapping[NodeId, Member]:
        """All other nodes that are known, tombstones included; read only, changes under way."""
        return self._roster.members

    @property
    def statement(self) -> Alive | None:
        """Our own last word."""
        return self._own.statement

    @property
    def health(self) -> int:
        """0: well; more: we have reasons to doubt our own probes."""
        return self._awareness.score

    def due(self) -> float | None:
        return self._agenda.due()

    def handle(self, event: Event, now: float) -> list[Effect]:
        self._forgive_stall(now)
        if not self._started and not self._own.left:
            self._start(now)
        match event:
            case MessageReceived():
                self._receive(event.sender, event.message, now)
            case NodeMet():
                self._meet(event.statement, now)
            case LinkLost():
                self._lose_link(event.node, now)
            case DialRefused():
                self._refuse(event.node, now)
            case SelfStated():
                self._state(event.statement, now)
            case NodeRevoked():
                self._beliefs.revoke(event.node)
            case Tick():
                pass
            case _:
                assert_never(event)
        while (alarm := self._agenda.try_take(now)) is not None:
            self._ring(alarm, now)
        self._push(now)
        return self._out.take()

    # -- time -------------------------------------------------------------------------------------

    def _forgive_stall(self, now: float) -> None:
        due = self._agenda.due()
        if due is None or now - due <= self._timing.stall_s:
            return
        self._agenda.postpone(now - due)
        self._suspicions.postpone(now - due)
        self._awareness.doubt(2)

    def _start(self, now: float) -> None:
        """Everyone at a phase of its own: nodes started together must not probe together."""
        self._started = True
        timing, random = self._timing, self._chance.random
        self._agenda.set(alarms.NextProbe(), now + timing.probe_interval_s * random())
        self._agenda.set(alarms.NextDigest(), now + timing.digest_interval_s * random())
        self._agenda.set(alarms.NextRetry(), now + timing.retry_interval_s * random())

    def _ring(self, alarm: Alarm, now: float) -> None:
        match alarm:
            case alarms.NextProbe():
                self._probe(now)
            case alarms.DirectTimeout(seq):
                self._probing.ask_others(seq, now)
            case alarms.ProbeTimeout(seq):
                self._fail_probe(seq, now)
            case alarms.ErrandTimeout(seq):
                self._errands.give_up(seq)
            case alarms.NextReprobe(node):
                self._suspicions.reprobe(node, now)
            case alarms.SuspicionEnds(node):
                self._end_suspicion(node, now)
            case alarms.NextDigest():
                self._agenda.set(alarm, now + self._timing.digest_interval_s)
                self._exchange.compare_with_any()
            case alarms.NextRetry():
                self._retry(now)
            case alarms.TombstoneAges(node):
                self._beliefs.forget(node, Why.FORGOTTEN)
            case alarms.NextPush():
                pass  # every event ends with it
            case _:
                assert_never(alarm)

    def _probe(self, now: float) -> None:  # 1
        self._agenda.set(alarms.NextProbe(), now + self._timing.probe_interval_s)
        target = self._roster.try_next(
            lambda n: self._suspicions.is_own(n) or self._probing.runs_for(n)
        )
        if target is not None:
            self._probing.start(target, now)

    def _fail_probe(self, seq: int, now: float) -> None:
        failure = self._probing.give_up(seq)
        if failure is not None:
            self._beliefs.suspect(failure.target, Why.NO_ANSWER, now)  # 2
            for relay in failure.silent:
                if not self._suspicions.is_own(relay):
                    self._probing.try_follow(relay, now)

    def _end_suspicion(self, node: NodeId, now: float) -> None:
        end, why = self._suspicions.end(node, now)
        if end is End.DEATH:
            self._beliefs.bury(node, why, now)
        elif end is End.LOOK:
            self._probing.try_follow(node, now)

    def _retry(self, now: float) -> None:  # 7
        self._agenda.set(alarms.NextRetry(), now + self._timing.retry_interval_s)
        dead = self._roster.dead()
        share = self._timing.retries_per_dead * len(dead) / (self._roster.living() + 1)
        if dead and self._chance.random() < share:
            node = dead[int(self._chance.random() * len(dead))]
            self._out.ping(node, self._out.next_seq())

    def _push(self, now: float) -> None:  # 6
        if not self._out.news:
            return
        if now >= self._push_at:
            self._push_at = now + self._timing.gossip_interval_s
            for node in self._roster.sample(self._timing.gossip_fanout):
                self._out.gossip(node)
        if self._out.news and self._roster.living():
            self._agenda.set(alarms.NextPush(), self._push_at)

    # -- messages ---------------------------------------------------------------------------------

    def _receive(self, sender: NodeId, message: Message, now: float) -> None:
        if sender == self._self_id or self._beliefs.is_revoked(sender):
            return
        self._suspicions.live(sender, now)  # 4
        outdated = False
        match message:
            case Sync():
                outdated = self._learn_all(sender, message.updates, now)
                self._exchange.answer_sync(sender, message, self._own.statement, now)
            case Digest():
                self._exchange.answer_digest(sender, message, self._own.statement, now)
            case Ping() | Ack() | PingReq() | Nack() | Gossip():
                outdated = self._hear_all(sender, message.updates, now)
            case _:
                assert_never(message)
        own = (self._own.statement,) if outdated and self._own.statement is not None else ()
        match message:
            case Ping():
                self._out.ack(sender, message.seq, *own)
                return
            case Ack():
                self._probing.acked(sender, message.seq, now)
                self._suspicions.acked(sender, message.seq, now)
                self._errands.acked(sender, message.seq)
            case Nack():
                self._probing.nacked(sender, message.seq)
            case PingReq() if message.target == self._self_id:
                self._out.ack(sender, message.seq)
            case PingReq() if self._beliefs.is_revoked(message.target):
                self._out.nack(sender, message.seq)
            case PingReq():
                self._errands.run(sender, message.seq, message.target, now)
            case _:
                pass
        if own:
            self._out.gossip(sender, *own)
        else:
            self._tell(sender, now)

    def _tell(self, node: NodeId, now: float) -> None:
        """It lives, and may not know what is held against it."""
        member = self._roster.get(node)
        if member is not None and member.accusation() and self._tells.try_pass(node, now):
            self._out.gossip(node)

    def _hear_all(self, sender: NodeId, updates: tuple[Update, ...], now: float) -> bool:
        """Take news; whether some were outdated words about us."""
        outdated = False
        for update in updates:
            if update.node == self._self_id:
                outdated |= self._own.answer(update, sender, now)
            else:
                self._beliefs.learn(update, sender, Why.TOLD, now)
        return outdated

    def _learn_all(self, sender: NodeId, updates: tuple[Update, ...], now: float) -> bool:
        """Take what a Sync holds. The same as news, but: a death is a lead, and who learns of a
        node in this way tells nobody, for the list that a newcomer gets is news only to it."""
        outdated = False
        forwards = FORWARDS
        for update in updates:
            if update.node == self._self_id:
                outdated |= self._own.answer(update, sender, now)
            elif isinstance(update, Alive):
                known = update.node in self._roster.members
                if known or not update.left:
                    self._beliefs.learn(update, sender, Why.TOLD, now, tell=known)
            else:
                member = self._roster.get(update.node)
                alive = member is not None and member.state is PeerState.ALIVE
                if member is None or not alive or update.incarnation < member.incarnation:
                    continue
                if not self._probing.try_follow(update.node, now, update) and forwards:
                    forwards -= 1
                    self._out.gossip(update.node, update)
        return outdated

    # -- links ------------------------------------------------------------------------------------

    def _meet(self, statement: Alive, now: float) -> None:
        node = statement.node
        if node == self._self_id:
            self._own.answer(statement, node, now)
        elif not self._beliefs.is_revoked(node):
            self._beliefs.learn(statement, node, Why.MET, now)
            self._suspicions.live(node, now)  # 4
            self._tell(node, now)
            if self._self_id < node:  # one of both is enough
                self._exchange.compare_with(node)

    def _lose_link(self, node: NodeId, now: float) -> None:  # 3
        self._probing.drop(node)
        self._beliefs.suspect(node, Why.LINK_LOST, now, link_lost=True)

    def _refuse(self, node: NodeId, now: float) -> None:  # 3
        self._probing.drop(node)
        if not self._suspicions.is_own(node):
            self._beliefs.suspect(node, Why.REFUSED, now)
        if self._suspicions.refuse(node, now):
            self._beliefs.bury(node, Why.REFUSED, now)

    # -- ourselves --------------------------------------------------------------------------------

    def _state(self, statement: Alive, now: float) -> None:  # 5
        if not self._own.try_state(statement):
            return
        if statement.left:  # 8
            self._started = False
            for alarm in (alarms.NextProbe(), alarms.NextDigest(), alarms.NextRetry()):
                self._agenda.cancel(alarm)
            for node in self._roster.sample(FAREWELLS):
                self._out.gossip(node, statement)
        elif not self._started:
            self._start(now)
