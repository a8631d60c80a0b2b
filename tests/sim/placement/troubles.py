"""One seed, one run: operators and faults in any order, then rest, then nothing more may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshd.ids import ModelId
from meshd.view import ModelState
from tests.sim.placement.judge import complaints
from tests.sim.placement.station import Station
from tests.sim.placement.world import Paths, World

TROUBLE_S = 90.0
REST_S = 390.0
"""Until all is as wished after the last fault: the longest back-off (300 s), and then a few slow
loads one after the other."""
CALM_S = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did, for the table."""

    seed: int
    size: int
    rest_s: float
    """From the last fault, or the last heal, to the last change."""
    starts: int
    events: int
    trace: str
    """Over all that happened."""


class Failure(AssertionError):
    """Says which run it was and what came last."""


class Troubles:
    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.world = World(seed, size)
        self.chance = self.world.chance
        self.models = [ModelId(f"m{i}") for i in range(self.chance.randint(1, 6))]
        self.demand: dict[ModelId, int] = {}

    def play(self) -> Outcome:
        try:
            return self._play()
        except AssertionError as error:
            raise Failure(
                f"seed {self.seed}, {self.size} nodes: {error}\n{self.story()}"
            ) from error

    def story(self, lines: int = 60) -> str:
        """The last that happened, of all nodes."""
        told = [
            (float(line.split(" ", 1)[0]), s.name, line)
            for s in self.world.stations
            for line in s.log
        ]
        return "\n".join(f"{name} {line}" for _, name, line in sorted(told)[-lines:])

    def _play(self) -> Outcome:
        world, chance = self.world, self.chance
        if self.size >= 8:
            world.stations[-1].member = False
        world.paths = Paths(loss=chance.choice((0.0, 0.05, 0.2)), duplication=0.05)
        world.begin()
        world.run(chance.uniform(0.0, 2.0))
        for model in self.models:
            self._load(model)
        end = world.agenda.now + TROUBLE_S
        while world.agenda.now < end:
            chance.choices(*zip(*self._happenings(), strict=True))[0]()
            world.run(chance.choice((0.1, 1.0, 5.0)) * chance.random())
        self._end_faults()
        rest_s = 0.0
        if chance.random() < 0.3 and self.size > 2:
            world.split(chance.sample(range(self.size), chance.randint(1, self.size // 2)))
            rest_s = self._rest()
            world.heal()
        rest_s = max(rest_s, self._rest())
        judge = world.judge
        return Outcome(
            self.seed,
            self.size,
            rest_s,
            judge.starts,
            world.agenda.done,
            judge.trace.hexdigest(),
        )

    def _rest(self) -> float:
        """All is as wished in time, and stays. How long that took, in seconds."""
        world = self.world
        since = world.agenda.now
        world.run(REST_S)
        self._assert_right("not at rest")
        changed_at = world.judge.changed_at
        world.run(CALM_S)
        self._assert_right("no more at rest")
        assert world.judge.changed_at == changed_at, "it changed its mind while all rested"
        return max(0.0, changed_at - since)

    def _assert_right(self, what: str) -> None:
        world = self.world
        wrong = [
            line
            for group in world.components()
            for line in complaints(group, world.judge, demand=self.demand)
        ]
        assert not wrong, f"{what}: {'; '.join(wrong[:5])}"

    def _end_faults(self) -> None:
        world = self.world
        world.heal()
        for field in ("slow", "fail", "crash", "swell"):
            setattr(world.luck, field, 0.0)
        world.paths = Paths()
        self.demand = dict(self.demand)
        for station in world.stations:
            station.demands(self.demand, set())
            if not station.up and self.chance.random() < 0.7:
                world.restart(station)
            elif station.up and station.draining and self.chance.random() < 0.5:
                station.drain(on=False)

    # -- what may happen --------------------------------------------------------------------------

    def _happenings(self) -> list[tuple[Callable[[], None], int]]:
        return [
            (self._operator, 10),
            (self._crash, 6),
            (self._restart, 6),
            (self._partition, 4),
            (self._deafen, 2),
            (self.world.heal, 4),
            (self._slander, 4),
            (self._drain, 2),
            (self._engine_crash, 3),
            (self._doom, 1),
            (self._mute, 1),
            (self._device, 1),
            (self._demand, 3),
        ]

    def _operator(self) -> None:
        up = self.world.up()
        if not up:
            return
        station, model = self.chance.choice(up), self.chance.choice(self.models)
        record = station.book.get(model)
        if record is None or record.removed or record.asleep or self.chance.random() < 0.3:
            self._load(model)
        else:
            station.write(lambda book: book.unload(model, station.id))

    def _load(self, model: ModelId) -> None:
        """Anew, or with other wishes; sometimes for one node only."""
        up, chance = self.world.up(), self.chance
        if not up:
            return
        host = chance.choice(self.world.stations).id if chance.random() < 0.15 else None
        wanted = 1 if host is not None else chance.choice((1, 1, 1, 2, 3, None))
        context = chance.choice((None, None, 1024, 2048))
        station = chance.choice(up)
        station.write(
            lambda book: book.load(
                model, model, station.id, replicas=wanted, context=context, host=host
            )
        )

    def _crash(self) -> None:
        up = self.world.up()
        if len(up) > 1:
            self.world.crash(self.chance.choice(up), silent=self.chance.random() < 0.5)

    def _restart(self) -> None:
        """Of one that is down; or so fast after a crash that nobody noticed."""
        down = [s for s in self.world.stations if not s.up]
        if down:
            self.world.restart(self.chance.choice(down))
        else:
            station = self.chance.choice(self.world.stations)
            self.world.crash(station, silent=False)
            self.world.run(self.chance.uniform(0.01, 0.3))
            self.world.restart(station)

    def _partition(self) -> None:
        self.world.split(
            self.chance.sample(range(self.size), self.chance.randint(1, max(1, self.size // 2)))
        )

    def _deafen(self) -> None:
        some = self.chance.sample(range(self.size), 2)
        everyone = range(self.size)
        self.world.cut(some[:1], everyone if self.chance.random() < 0.5 else some[1:])

    def _slander(self) -> None:
        up = self.world.up()
        subject = self.chance.choice(self.world.stations)
        observers = up if self.chance.random() < 0.3 else self.chance.sample(up, 1) if up else []
        for observer in observers:
            if observer is not subject:
                self.world.slander(observer, subject)

    def _drain(self) -> None:
        if up := self.world.up():
            station = self.chance.choice(up)
            station.drain(on=not station.draining)

    def _engine_crash(self) -> None:
        running = [
            (station, model)
            for station in self.world.up()
            for model, engine in sorted(station.engines.running.items())
            if engine.state is ModelState.READY
        ]
        if running:
            station, model = self.chance.choice(running)
            station.engines.crash(model)

    def _doom(self) -> None:
        station = self.chance.choice(self.world.stations)
        model = self.chance.choice(self.models)
        station.doomed.add(model)
        self.world.judge.doomed.add(model)
        if station.up:
            station.reoffer()

    def _mute(self) -> None:
        station = self.chance.choice(self.world.stations)
        model = self.chance.choice(self.models)
        station.mute.add(model)
        self.world.judge.mute.add((station.id, model))
        if station.up:
            station.reoffer()

    def _device(self) -> None:
        """One is lost, or all are back."""
        station = self.chance.choice(self.world.stations)
        if len(station.capacity) > 1:
            kept = dict(station.capacity)
            kept.pop(self.chance.choice(sorted(kept)))
            whole = dict(station.capacity)
            station.recapacitate(kept)
            self.world.agenda.after(
                self.chance.uniform(1.0, 30.0), lambda: station.recapacitate(whole)
            )

    def _demand(self) -> None:
        self.demand = {model: self.chance.randint(1, 3) for model in self.models}
        for station in self.world.stations:
            busy = {m for m in self.models if self.chance.random() < 0.3}
            self.world.agenda.after(
                self.chance.uniform(0.0, 3.0), self._demander(station, self.demand, busy)
            )

    def _demander(
        self, station: Station, demand: dict[ModelId, int], busy: set[ModelId]
    ) -> Callable[[], None]:
        """Unless something newer was said by then."""
        return lambda: station.demands(demand, busy) if demand is self.demand else None


def play(seed: int, size: int) -> Outcome:
    return Troubles(seed, size).play()
