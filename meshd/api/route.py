"""Where a request goes: a pure function of the view, our own counts and chance."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from meshd.ids import InstanceId, ModelId
from meshd.view import ModelState, ModelView, Target

DEFAULT_RETRY_AFTER_S = 5.0
CLOSE_NAMES = 3


class Chance(Protocol):
    """The one method of `random.Random` that is needed."""

    def sample(self, population: list[Target], k: int) -> list[Target]: ...


@dataclass(frozen=True, slots=True)
class NotFound:
    close: tuple[str, ...]
    """Names like the one asked for, nearest first."""
    known: bool
    """Whether this node knows any model at all."""
    reason: str | None = None
    """Set for a model that is known but that nobody was told to load."""


@dataclass(frozen=True, slots=True)
class NotReady:
    model: ModelId
    state: ModelState
    reason: str | None
    progress: float | None
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    model: ModelId
    reason: str


Route: TypeAlias = Target | NotFound | NotReady | Failed


def route(
    name: str,
    models: Mapping[ModelId, ModelView],
    inflight: Mapping[InstanceId, int],
    rng: Chance,
    avoid: frozenset[InstanceId] = frozenset(),
) -> Route:
    """The engine for a request that names `name`, or why there is none.

    1. Nobody has the model: NotFound. A model is never answered by another one.
    2. It has targets: one of them, by `choose`. Any state with a target can be served.
    3. It failed: Failed, with the reason.
    4. Nobody was told to load it: NotFound. "Try again later" would be a lie.
    5. NotReady, with what it waits for.

    `avoid`: engines that just broke under this very request; used only if there is no other.
    """
    model = models.get(ModelId(name))
    if model is None:  # 1
        names = list(models)
        close = difflib.get_close_matches(name[:256], names, n=CLOSE_NAMES, cutoff=0.5)
        return NotFound(tuple(close), bool(names))
    targets = model.targets
    if targets:  # 2
        if len(targets) == 1:
            return targets[0]
        return choose(targets, inflight, rng, avoid)
    if model.state is ModelState.FAILED:  # 3
        return Failed(model.id, model.reason or "loading failed; `meshd logs` has the lines")
    if model.state is ModelState.ABSENT:  # 4
        return NotFound((), True, model.reason or "not loaded")
    return NotReady(  # 5
        model.id,
        model.state,
        model.reason,
        model.progress,
        DEFAULT_RETRY_AFTER_S if model.retry_after_s is None else model.retry_after_s,
    )


def choose(
    targets: tuple[Target, ...],
    inflight: Mapping[InstanceId, int],
    rng: Chance,
    avoid: frozenset[InstanceId] = frozenset(),
) -> Target:
    """Power of two choices: of two at random, one with a free slot before one without, then the
    one with less in flight per slot; the local one wins ties.

    Taking the least busy of all would herd every node onto the same engine.
    """
    able = [t for t in targets if t.instance not in avoid] or list(targets)
    pair = able if len(able) <= 2 else rng.sample(able, 2)
    return min(pair, key=lambda t: _burden(t, inflight.get(t.instance, 0)))


def _burden(target: Target, in_flight: int) -> tuple[bool, float, bool]:
    slots = max(1, target.slots)
    return (in_flight >= slots, in_flight / slots, not target.local)
