"""Rounds of the benchmark of splits: every way once, in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.measure import ATTEMPT_PAUSE_S, ATTEMPTS, PEACE
from bench.processes import BenchError, Stable, family_cpu_s, machine_cpu_s
from bench.split_engines import (
    Engines,
    Lender,
    plain_recipe,
    received_bytes,
    recipe_of,
    speeds,
)
from bench.split_nodes import LENDERS, LONER, OWNER, Lost, SplitNodes
from meshd.election.hosted import REPLANS
from tests.mesh.network import Host, Network

ALONE, LOOPBACK, WIRE, MESHD = "alone", "loopback", "wire", "meshd"
FRONTS = (ALONE, LOOPBACK, WIRE, MESHD)
ONE_NODE = "meshd, one node"
EMPTY, FILLED = ", empty caches", ", full caches"
"""Of a way that is split."""

Figures = dict[str, dict[str, dict[str, float]]]
"""Way → kind → figure → value, of one round."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rounds; 0 leaves the part out."""

    speeds: int
    loads: int
    recovery: int


@dataclass(slots=True)
class Measured:
    speeds: list[Figures] = field(default_factory=list)
    loads: list[Figures] = field(default_factory=list)
    recovery: list[Lost] = field(default_factory=list)
    cut_short: str = ""
    """Why there are fewer losses than were asked for; empty if there are not."""


@dataclass(frozen=True, slots=True)
class Lab:
    """Where it all happens."""

    stable: Stable
    lan: Network
    work: Path
    engine_dir: Path
    weights: Path


def measure(lab: Lab, sizes: Sizes, say: Say, *, nodes: bool) -> Measured:
    """All rounds. Without `nodes` only stock engines are measured."""
    for name in (OWNER, *LENDERS, LONER):
        lab.lan.add(name)
    recipe, mesh = plain_recipe(lab.engine_dir, lab.weights), None
    if nodes:
        mesh = SplitNodes(lab.stable, lab.lan, lab.work, lab.engine_dir, lab.weights)
        mesh.begin()
        mesh.load()
        recipe = recipe_of(*mesh.command_lines())
    turns = Turns(lab, Engines(lab.stable, lab.work, recipe), mesh)
    measured = Measured()
    if sizes.speeds:
        measured.speeds = turns.speeds(sizes.speeds, say)
    if sizes.loads:
        measured.loads = turns.loads(sizes.loads, say)
    if sizes.recovery and mesh is not None:
        mesh.complete()
        measured.recovery, measured.cut_short = losses(mesh, sizes.recovery, say)
    return measured


class Losing(Protocol):
    """Nodes that can lose a worker; see `SplitNodes`."""

    def load(self) -> float: ...

    def unload(self) -> None: ...

    def lose_worker(self, number: int) -> Lost: ...


def losses(mesh: Losing, count: int, say: Say) -> tuple[list[Lost], str]:
    """Lose that many workers, one after the other; also why it ended before, or nothing.

    A host that has planned anew `REPLANS` times in a row pauses at the next loss, and is meant to.
    That pause is no part of a recovery: before it would come, the model is unloaded, with which the
    count of losses is forgotten, and loaded again.
    """
    found: list[Lost] = []
    try:
        for number in range(count):
            if number % REPLANS == 0:
                mesh.unload()
                mesh.load()
            found.append(mesh.lose_worker(number))
            say(f"recovery {number + 1} of {count}: {found[-1]}")
    except BenchError as error:
        say(f"recovery ends after {len(found)} of {count}: {error}")
        return found, str(error).partition("\n")[0]
    return found, ""


class Turns:
    """Stock engines, and nodes if there are any, on the same hosts."""

    def __init__(self, lab: Lab, engines: Engines, mesh: SplitNodes | None) -> None:
        self._lab = lab
        self._engines = engines
        self._mesh = mesh
        self._host, *others = (lab.lan.hosts[name] for name in (OWNER, *LENDERS[:2]))
        self._ends: Mapping[str, tuple[Lender, ...]] = {
            ALONE: (),
            LOOPBACK: ((self._host, "127.0.0.1"),) * 2,
            WIRE: tuple((host, str(host.address)) for host in others),
        }

    def speeds(self, count: int, say: Say) -> list[Figures]:
        """All engines stay loaded; one answers at a time, and who begins rotates."""
        started = {
            way: self._engines.start(way, self._host, *ends) for way, ends in self._ends.items()
        }
        where = {way: engine.where for way, engine in started.items()}
        if self._mesh is not None:
            where[MESHD] = self._mesh.engine_socket()
        for front in where.values():
            speeds(front, -1)  # the first answer is slower than others
        found = []
        for number in range(count):
            found.append(_speeds(where, number))
            say(f"speeds {number + 1} of {count}: {found[-1]}")
        for engine in started.values():
            self._engines.end(engine)
        return found

    def loads(self, count: int, say: Say) -> list[Figures]:
        """Every engine is ended before the next one loads."""
        if self._mesh is not None:
            self._mesh.unload()
        found = []
        for number in range(count):
            found.append(self._loads())
            say(f"loads {number + 1} of {count}: {found[-1]}")
        return found

    def _loads(self) -> Figures:
        figures = {ALONE: self._stock_load(ALONE)}
        self._engines.forget_tensors(WIRE)
        figures[WIRE + EMPTY] = self._stock_load(WIRE)
        figures[WIRE + FILLED] = self._stock_load(WIRE)
        if self._mesh is not None:
            figures[ONE_NODE] = self._counted(self._mesh.load_alone)
            self._mesh.unload()
            self._mesh.forget_tensors()
            for state in (EMPTY, FILLED):
                figures[MESHD + state] = self._counted(self._mesh.load)
                self._mesh.unload()
        return {way: {"load": values} for way, values in figures.items()}

    def _stock_load(self, way: str) -> dict[str, float]:
        def load() -> float:
            engine = self._engines.start(way, self._host, *self._ends[way])
            self._engines.end(engine)
            return engine.load_s

        return self._counted(load)

    def _counted(self, load: Callable[[], float]) -> dict[str, float]:
        """Seconds it says it took, and what came to the other hosts meanwhile."""
        others: tuple[Host, ...] = tuple(self._lab.lan.hosts[name] for name in LENDERS)
        before = received_bytes(*others)
        seconds = load()
        pushed = received_bytes(*others) - before
        percent = round(100 * pushed / self._lab.weights.stat().st_size, 3)
        return {"seconds": round(seconds, 3), "pushed_bytes": pushed, "pushed_percent": percent}


def _speeds(where: Mapping[str, Path], number: int) -> Figures:
    """One round. Of each way also whether it said something else than one engine alone."""
    ways = list(where)
    turn = number % len(ways)
    figures: Figures = {}
    texts = {}
    for way in ways[turn:] + ways[:turn]:
        values, texts[way] = _calmest(where[way], number)
        figures[way] = {"speed": values}
    for way in ways:
        figures[way]["speed"]["differs"] = float(texts[way] != texts[ALONE])
    return {way: figures[way] for way in ways}


def _calmest(where: Path, number: int) -> tuple[dict[str, float], list[int]]:
    """`speeds`, measured again while others disturb it: the least disturbed of `ATTEMPTS`."""
    attempts = []
    while True:
        began, ours, everything = time.monotonic(), family_cpu_s(os.getpid()), machine_cpu_s()
        values, text = speeds(where, number)
        foreign_s = (machine_cpu_s() - everything) - (family_cpu_s(os.getpid()) - ours)
        foreign = max(0.0, foreign_s) / (time.monotonic() - began)
        attempts.append((foreign, values | {"foreign": round(foreign, 3)}, text))
        if foreign <= PEACE or len(attempts) == ATTEMPTS:
            _, values, text = min(attempts, key=lambda attempt: attempt[0])
            return values | {"attempts": len(attempts)}, text
        time.sleep(ATTEMPT_PAUSE_S)
