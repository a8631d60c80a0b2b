"""The engines of one simulated node: they load slowly, fail, crash, and take what they take.

Stands in for the runtime: what was started ends in exactly one ABSENT, and never before it was
stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from meshd.ids import ModelId
from meshd.view import Deployment, ModelState


@dataclass(slots=True)
class Luck:
    """How engines behave; chances are per load, and 0 once the faults are over."""

    slow: float = 0.1
    fail: float = 0.1
    crash: float = 0.1
    """Soon after it was ready."""
    swell: float = 0.3
    """That it takes another amount of memory than was estimated."""


@dataclass(slots=True)
class Engine:
    deployment: Deployment
    epoch: int
    memory: Mapping[str, int]
    """What it takes, by device."""
    state: ModelState = ModelState.VERIFYING
    stopping: bool = False
    load: int = 0
    """Number of the load that runs; what belongs to any other is of the past."""


class Reports(Protocol):
    def reported(self, model: ModelId, state: ModelState, reason: str | None) -> None: ...

    def measured(self, model: ModelId, memory: Mapping[str, int]) -> None: ...


class Engines:
    """`after(delay, action)`: of the node's present run; `doomed`: models that cannot be loaded
    here, whatever was promised."""

    def __init__(
        self,
        after: Callable[[float, Callable[[], object]], None],
        reports: Reports,
        luck: Luck,
        chance: random.Random,
        doomed: Callable[[ModelId], bool],
    ) -> None:
        self.running: dict[ModelId, Engine] = {}
        self._after = after
        self._reports = reports
        self._luck = luck
        self._chance = chance
        self._doomed = doomed
        self._loads = 0

    def start(self, deployment: Deployment, epoch: int, memory: Mapping[str, int]) -> None:
        """One that is there is restarted with what is new; one that is being stopped may not be."""
        there = self.running.get(deployment.model)
        assert there is None or not there.stopping, f"started before it was gone: {deployment}"
        if there is not None:
            there.load = 0
        engine = Engine(deployment, epoch, memory)
        self.running[deployment.model] = engine
        self._load(engine)

    def stop(self, model: ModelId, *, drain: bool) -> None:
        """What is not there is gone already, and says so."""
        engine = self.running.get(model)
        if engine is None:
            self._after(0.001, lambda: self._gone(model, None))
            return
        if engine.stopping:
            return
        engine.stopping = True
        engine.load = 0
        serves = engine.state is ModelState.READY and drain
        self._say(engine, ModelState.DRAINING)
        drain_s = self._chance.uniform(0.05, 4.0) if serves else self._chance.uniform(0.01, 0.5)
        self._after(drain_s, lambda: self._gone(model, engine))

    def crash(self, model: ModelId) -> None:
        """It is started again, or given up."""
        engine = self.running.get(model)
        if engine is None or engine.stopping or engine.state is not ModelState.READY:
            return
        if self._chance.random() < 0.5:
            self._fail(engine, "it crashed too often")
        else:
            self._say(engine, ModelState.LOADING, "restarted after a crash")
            if not engine.stopping:  # as an answer to that
                self._load(engine)

    def lose(self, device: str) -> None:
        for engine in list(self.running.values()):
            if not engine.stopping and engine.memory.get(device):
                self._fail(engine, f"{device} was lost")

    def _load(self, engine: Engine) -> None:
        self._loads += 1
        load = engine.load = self._loads
        slow = self._chance.random() < self._luck.slow
        seconds = self._chance.uniform(5.0, 20.0) if slow else self._chance.uniform(0.2, 3.0)

        def step(done: Callable[[], None]) -> Callable[[], None]:
            return lambda: done() if engine.load == load else None

        self._after(seconds * 0.3, step(lambda: self._say(engine, ModelState.LOADING)))
        self._after(seconds, step(lambda: self._loaded(engine, load)))

    def _loaded(self, engine: Engine, load: int) -> None:
        model = engine.deployment.model
        if self._doomed(model) or self._chance.random() < self._luck.fail:
            self._fail(engine, "out of memory while loading")
            return
        if self._chance.random() < self._luck.swell:
            factor = self._chance.uniform(0.9, 1.15)
            engine.memory = {d: int(size * factor) for d, size in engine.memory.items()}
        self._reports.measured(model, engine.memory)
        self._say(engine, ModelState.READY)
        if self._chance.random() < self._luck.crash:
            due_s = self._chance.expovariate(1 / 10.0)
            self._after(due_s, lambda: self.crash(model) if engine.load == load else None)

    def _fail(self, engine: Engine, reason: str) -> None:
        engine.load = 0
        self._say(engine, ModelState.FAILED, reason)

    def _say(self, engine: Engine, state: ModelState, reason: str | None = None) -> None:
        engine.state = state
        self._reports.reported(engine.deployment.model, state, reason)

    def _gone(self, model: ModelId, engine: Engine | None) -> None:
        if self.running.get(model) is engine:
            self.running.pop(model, None)
            self._reports.reported(model, ModelState.ABSENT, None)
