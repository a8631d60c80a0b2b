"""Stations and what lies between them: who reaches whom, who believes whom alive, what they tell.

Membership is modelled by its results: an observer learns of a change within the times that SWIM
keeps to (`tests/sim/scenarios.py`), and for as long believes what was. A node is dead to another
when no way leads there and back, also through others; a cut in one direction that others can go
around kills nobody. Adverts go from their node to all it reaches; what is lost on the way comes
with one of the exchanges that every node has with a random other now and then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from meshd.election.words import Effect, Event
from meshd.ids import ModelId
from meshd.view import Deployment
from tests.sim.placement.agenda import Agenda
from tests.sim.placement.engines import Luck
from tests.sim.placement.judge import Judge
from tests.sim.placement.station import Station, node_id

GIB = 2**30
CAPACITIES_GIB = ((24,), (48,), (24, 24), (80,))
SIZES_GIB = (5, 9, 14, 20, 30, 44)


@dataclass(slots=True)
class Paths:
    """Of messages; chances are independent."""

    latency_s: float = 0.001
    jitter_s: float = 0.005
    """Mean of the exponential part of the latency, so that messages overtake each other."""
    loss: float = 0.0
    duplication: float = 0.0


class World:
    """`look_s`, `exchange_s`: how long a node gathers news, and how often it asks another."""

    def __init__(
        self, seed: int, size: int, *, look_s: float = 0.02, exchange_s: float = 2.0
    ) -> None:
        self.agenda = Agenda()
        self.chance = random.Random(seed)
        self.luck = Luck()
        self.paths = Paths()
        self.look_s, self.exchange_s = look_s, exchange_s
        self.late = 0.02
        self.judge = Judge(self.agenda)
        self.stations = [Station(i, node_id(i), self._devices(), self) for i in range(size)]
        self._cut: set[tuple[int, int]] = set()
        self._reach: list[int] = []
        self._silent: set[int] = set()
        """Whose death only silence tells."""

    def begin(self, *, met: bool = False) -> None:
        """`met`: they know each other already, as after a while without trouble."""
        for station in self.stations:
            self._start(station)
        if met:
            words = {station.index: station.word for station in self.stations}
            for station in self.stations:
                station.meet(words)
        self._changed()

    def run(self, seconds: float) -> None:
        self.agenda.run(seconds)

    def model(self, number: int) -> ModelId:
        return ModelId(f"m{number}")

    # -- what happens to the nodes ----------------------------------------------------------------

    def crash(self, station: Station, *, silent: bool) -> None:
        station.crash()
        (self._silent.add if silent else self._silent.discard)(station.index)
        self.judge.crashed(station)
        self._changed()

    def restart(self, station: Station) -> None:
        self._silent.discard(station.index)
        self._start(station)
        self._changed()

    def cut(self, senders: Iterable[int], receivers: Iterable[int]) -> None:
        """All that goes from `senders` to `receivers` is lost; one way."""
        receivers = list(receivers)
        self._cut.update((a, b) for a in senders for b in receivers if a != b)
        self._changed()

    def split(self, one: Iterable[int]) -> None:
        one = list(one)
        other = [s.index for s in self.stations if s.index not in one]
        self.cut(one, other)
        self.cut(other, one)

    def heal(self) -> None:
        self._cut.clear()
        self._changed()

    def slander(self, observer: Station, subject: Station) -> None:
        """`observer` believes for a while that `subject` is dead, though it lives."""
        if subject.index in observer.alive:
            observer.alive.discard(subject.index)
            observer.look()
            self._recheck(observer, subject, self.chance.uniform(0.5, 5.0))

    # -- what a test asks -------------------------------------------------------------------------

    def up(self) -> list[Station]:
        return [station for station in self.stations if station.up]

    def components(self) -> list[list[Station]]:
        """Running nodes that can talk with each other, in either direction."""
        found: list[list[Station]] = []
        for station in self.up():
            for group in found:
                if self._together(station, group[0]):
                    group.append(station)
                    break
            else:
                found.append([station])
        return found

    # -- what stations need -----------------------------------------------------------------------

    def needs(self, deployment: Deployment) -> int:
        base = SIZES_GIB[int(deployment.model[1:]) % len(SIZES_GIB)] * GIB
        return base + (deployment.context or 0) * 2**20

    def said(self, station: Station) -> None:
        word = station.word
        for other in self.up():
            if other is not station:
                self._send(station, other, partial(other.heard, station.index, word))

    def wrote(self, station: Station) -> None:
        records = station.book.records
        for other in self.up():
            if other is not station:
                self._send(station, other, partial(other.merged, records))

    def ordered(self, station: Station, event: Event, effects: Sequence[Effect]) -> None:
        self.judge.ordered(station, event, effects)

    def handled(self, station: Station, event: Event, effects: Sequence[Effect]) -> None:
        self.judge.handled(station, event, effects)

    # -- the machinery ----------------------------------------------------------------------------

    def _devices(self) -> dict[str, int]:
        sizes = self.chance.choice(CAPACITIES_GIB)
        return {f"CUDA{i}": size * GIB for i, size in enumerate(sizes)}

    def _start(self, station: Station) -> None:
        station.start()
        self.judge.started(station)
        station.after(self.chance.uniform(0.0, self.exchange_s), lambda: self._exchange(station))

    def _exchange(self, station: Station) -> None:
        """Both ways with a random other, as far as a way leads; and one request is served."""
        if station.alive:
            other = self.stations[self.chance.choice(sorted(station.alive))]
            self._catch_up(station, other)
            self._catch_up(other, station)
            self.judge.works(station, other)
        pause_s = self.exchange_s * self.chance.uniform(0.5, 1.5)
        station.after(pause_s, lambda: self._exchange(station))

    def _catch_up(self, teller: Station, hearer: Station) -> None:
        """What `teller` knows better, of everybody."""
        if not (teller.up and hearer.up and self._flows(teller, hearer)):
            return
        hears, own = hearer.known.get, (teller.index, teller.word)
        differs = [(i, word) for i, word in teller.known.items() if hears(i) is not word]
        for index, word in [*differs, own]:
            known = hears(index)
            if known is word or index == hearer.index:
                continue
            if known is None or known.stamp < word.stamp:
                self._deliver(hearer, partial(hearer.heard, index, word))
        if teller.book.digest != hearer.book.digest:
            self._deliver(hearer, partial(hearer.merged, teller.book.records))

    def _send(self, sender: Station, to: Station, arrive: Callable[[], object]) -> None:
        if not self._flows(sender, to) or self.chance.random() < self.paths.loss:
            return
        self._deliver(to, arrive)
        if self.chance.random() < self.paths.duplication:
            self._deliver(to, arrive)

    def _deliver(self, to: Station, arrive: Callable[[], object]) -> None:
        delay = self.paths.latency_s + self.chance.expovariate(1 / self.paths.jitter_s)
        to.after(delay, arrive)

    def _changed(self) -> None:
        """Somebody came, went, or is reached otherwise: everybody learns of it in time."""
        self._reach = self._reached()
        for observer in self.up():
            for subject in self.stations:
                if subject is observer:
                    continue
                there = self._together(observer, subject)
                if there != (subject.index in observer.alive):
                    self._recheck(observer, subject, self._notice_s(subject, there))

    def _notice_s(self, subject: Station, there: bool) -> float:
        if there:
            return self.chance.uniform(0.02, 1.0)
        reset = not subject.up and subject.index not in self._silent
        return self.chance.uniform(0.05, 1.5) if reset else self.chance.uniform(1.0, 4.0)

    def _recheck(self, observer: Station, subject: Station, delay_s: float) -> None:
        def notice() -> None:
            there = self._together(observer, subject)
            if there == (subject.index in observer.alive):
                return
            (observer.alive.add if there else observer.alive.discard)(subject.index)
            observer.look()
            if there:
                self._catch_up(subject, observer)

        observer.after(delay_s, notice)

    def _together(self, one: Station, other: Station) -> bool:
        return self._flows(one, other) and self._flows(other, one)

    def _flows(self, sender: Station, to: Station) -> bool:
        return bool(self._reach[sender.index] >> to.index & 1)

    def _reached(self) -> list[int]:
        """Of each node the set of those that something from it reaches, through others too; as
        bits."""
        running = sum(1 << s.index for s in self.stations if s.up)
        if not self._cut:
            return [running if s.up else 0 for s in self.stations]
        direct = [running if s.up else 0 for s in self.stations]
        for a, b in self._cut:
            direct[a] &= ~(1 << b)
        reach = []
        for start in direct:
            seen, fresh = start, start
            while fresh:
                bit = fresh & -fresh
                fresh ^= bit
                more = direct[bit.bit_length() - 1] & ~seen
                seen |= more
                fresh |= more
            reach.append(seen)
        return reach
