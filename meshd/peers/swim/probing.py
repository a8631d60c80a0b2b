"""Probes of this node (SWIM, section 3.1): directly, then through others, then failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from meshd.ids import NodeId
from meshd.peers.swim.agenda import Agenda
from meshd.peers.swim.alarms import Alarm, DirectTimeout, ProbeTimeout
from meshd.peers.swim.awareness import Awareness
from meshd.peers.swim.gossip import RoundTrip, Update
from meshd.peers.swim.outbox import Outbox
from meshd.peers.swim.roster import Roster
from meshd.peers.swim.timing import Timing

MOST_LEADS: Final = 16
"""Probes at once that were not this interval's turn. Full-policy: the lead is let go; the attack is
a peer that names all others dead, to have them probed by us."""


HURRY: Final = 5
"""How much sooner than in a regular probe others are asked about a lead."""


@dataclass(slots=True)
class _Probe:
    target: NodeId
    sent_at: float
    relays: list[NodeId] = field(default_factory=list)
    """Who was asked for help; those who said Nack are taken out."""
    nacks: int = 0
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    target: NodeId
    silent: tuple[NodeId, ...]
    """Relays that told us nothing: perhaps they are gone as well."""


class Probing:
    def __init__(
        self,
        roster: Roster,
        outbox: Outbox,
        agenda: Agenda[Alarm],
        awareness: Awareness,
        timing: Timing,
    ) -> None:
        self._roster = roster
        self._outbox = outbox
        self._agenda = agenda
        self._awareness = awareness
        self._timing = timing
        self._probes: dict[int, _Probe] = {}
        self._by_target: dict[NodeId, int] = {}

    def runs_for(self, node: NodeId) -> bool:
        return node in self._by_target

    def start(self, target: NodeId, now: float, *first: Update) -> None:
        """Probe `target`, unless that is under way; `first` is told to it."""
        self._start(target, now, self._timing.direct_timeout_s, first)

    def try_follow(self, target: NodeId, now: float, *first: Update) -> bool:
        """Probe `target` out of turn, because something hints that it is gone; others are asked
        soon. So a node that is cut off finds out in a few rounds of relays that do not answer."""
        if len(self._probes) >= MOST_LEADS:
            return False
        self._start(target, now, self._timing.direct_timeout_s / HURRY, first)
        return True

    def ask_others(self, seq: int, now: float) -> None:
        """No answer yet: ask once more, and have others ask."""
        probe = self._probes.get(seq)
        if probe is None:
            return
        probe.repeated = True
        probe.relays = self._roster.sample(self._timing.relays, (probe.target,))
        self._outbox.ping(probe.target, seq)
        for relay in probe.relays:
            self._outbox.ping_req(relay, seq, probe.target)
        rest_s = self._timing.probe_timeout_s - self._timing.direct_timeout_s
        self._agenda.set(ProbeTimeout(seq), now + rest_s * self._awareness.stretch)

    def give_up(self, seq: int) -> Failure | None:
        """The probe failed; None if there is none of that number any more.

        Silent relays make us doubt ourselves: if they and the target are well, we are not.
        """
        probe = self._forget(seq)
        if probe is None:
            return None
        if probe.relays or not probe.nacks:
            self._awareness.doubt()
        return Failure(probe.target, tuple(probe.relays))

    def acked(self, sender: NodeId, seq: int, now: float) -> NodeId | None:
        """Whose probe that answers, if it is one, and if `sender` may answer it."""
        probe = self._probes.get(seq)
        if probe is None or (sender != probe.target and sender not in probe.relays):
            return None
        self._forget(seq)
        self._awareness.answered()
        # After a second Ping of one number nobody knows which one was answered.
        if sender == probe.target and not probe.repeated:
            self._outbox.emit(RoundTrip(probe.target, max(0.0, now - probe.sent_at)))
        return probe.target

    def nacked(self, sender: NodeId, seq: int) -> None:
        probe = self._probes.get(seq)
        if probe is not None and sender in probe.relays:
            probe.relays.remove(sender)
            probe.nacks += 1

    def drop(self, target: NodeId) -> None:
        """It is known now how `target` is."""
        seq = self._by_target.get(target)
        if seq is not None:
            self._forget(seq)

    def _start(
        self, target: NodeId, now: float, direct_s: float, first: tuple[Update, ...]
    ) -> None:
        if target in self._by_target:
            return
        seq = self._outbox.next_seq()
        self._probes[seq] = _Probe(target, now)
        self._by_target[target] = seq
        self._outbox.ping(target, seq, *first)
        self._agenda.set(DirectTimeout(seq), now + direct_s * self._awareness.stretch)

    def _forget(self, seq: int) -> _Probe | None:
        probe = self._probes.pop(seq, None)
        if probe is not None:
            del self._by_target[probe.target]
            self._agenda.cancel(DirectTimeout(seq))
            self._agenda.cancel(ProbeTimeout(seq))
        return probe
