"""Where a request goes: a pure function of the view, our own counts and chance."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from meshd.api.breaker import NONE_SHUT, Shut
from meshd.ids import InstanceId, ModelId
from meshd.view import ModelState, ModelView, Target, exact_name

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


@dataclass(frozen=True, slots=True)
class Broken:
    """All its engines failed lately, and none is due to be tried again."""

    model: ModelId
    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Nodes mean different weights by that name."""

    model: ModelId
    reason: str


Route: TypeAlias = Target | NotFound | NotReady | Failed | Broken | Ambiguous

NOTHING: frozenset[InstanceId] = frozenset()


def route(
    name: str,
    models: Mapping[ModelId, ModelView],
    inflight: Mapping[InstanceId, int],
    rng: Chance,
    avoid: frozenset[InstanceId] = NOTHING,
    shut: Mapping[InstanceId, Shut] = NONE_SHUT,
) -> Route:
    """The engine for a request that names `name`, or why there is none.

    1. Nobody has the model: NotFound. A model is never answered by another one, and a name that
       means several is answered by none: Ambiguous, with their exact names.
    2. It has targets: one of them, by `choose`. Any state with a target can be served.
       a. Those whose circuit is open are left out.
       b. If that leaves none, those of them that do answer, though with errors, are taken.
       c. If there are none of those either: Broken, until the first may be tried again.
    3. It failed: Failed, with the reason.
    4. Nobody was told to load it: NotFound. "Try again later" would be a lie.
    5. NotReady, with what it waits for.

    `avoid`: engines that just broke under this very request; used only if there is no other.
    `shut`: engines with an open circuit.
    """
    model = find(name, models)
    if model is None:  # 1
        names = list(models)
        close = difflib.get_close_matches(name[:256], names, n=CLOSE_NAMES, cutoff=0.5)
        return NotFound(tuple(close), bool(names))
    if model.ambiguous:  # 1
        return Ambiguous(model.id, model.reason or "say which")
    targets = model.targets
    if targets:  # 2
        if shut:
            targets = _usable(targets, shut)
            if not targets:
                return _broken(model, shut)
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


def on_its_way(model: ModelId) -> NotReady:
    """For a model that the next view will have."""
    return NotReady(model, ModelState.WAITING, None, None, DEFAULT_RETRY_AFTER_S)


def find(name: str, models: Mapping[ModelId, ModelView]) -> ModelView | None:
    """The model called `name`, which may be exact (`NAME@DIGITS`) where the name alone would do."""
    model = models.get(ModelId(name))
    if model is None and "@" in name:
        candidate = models.get(ModelId(name.rpartition("@")[0]))
        if candidate is not None and candidate.digest is not None:
            return candidate if name == exact_name(candidate.id, candidate.digest) else None
    return model


def plain_name(model: ModelView) -> ModelId:
    """The name of `model` without the digest that an exact one has."""
    if model.digest is not None:
        plain = ModelId(model.id.rpartition("@")[0])
        if model.id == exact_name(plain, model.digest):
            return plain
    return model.id


def choose(
    targets: tuple[Target, ...],
    inflight: Mapping[InstanceId, int],
    rng: Chance,
    avoid: frozenset[InstanceId] = NOTHING,
) -> Target:
    """Power of two choices: of two at random, one with a free slot before one without, then the
    one with less work per slot; the local one wins ties, and chance those among remote ones.

    Taking the least busy of all would herd every node onto the same engine.
    """
    able = [t for t in targets if t.instance not in avoid] or list(targets)
    pair = able if len(able) == 1 else rng.sample(able, 2)
    return min(pair, key=lambda t: _burden(t, inflight.get(t.instance, 0)))


def _burden(target: Target, in_flight: int) -> tuple[bool, float, bool]:
    """Of a remote engine we know two things, our own requests there and the slots its node saw
    free a moment ago, which include some of ours: the larger burden is the better guess."""
    slots = max(1, target.slots)
    busy = in_flight
    if target.slots_free is not None:
        busy = max(busy, slots - target.slots_free)
    return (busy >= slots, busy / slots, not target.local)


def _usable(targets: tuple[Target, ...], shut: Mapping[InstanceId, Shut]) -> tuple[Target, ...]:
    sound = tuple(t for t in targets if t.instance not in shut)  # 2a
    return sound or tuple(t for t in targets if shut[t.instance].answers)  # 2b


def _broken(model: ModelView, shut: Mapping[InstanceId, Shut]) -> Broken:  # 2c
    first = min((shut[t.instance] for t in model.targets), key=lambda s: s.retry_after_s)
    return Broken(model.id, first.reason, first.retry_after_s)
