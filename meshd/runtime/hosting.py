"""Which models this node runs: a pure machine from wishes to engines.

One entry a model, in one of the states of `ModelState`:

    ABSENT ──LoadAsked──> VERIFYING ──WeightsAccepted──> LOADING ──> READY
                          FETCHING                          │          │
                             │  ▲                           │          │
              WeightsRejected│  │Tick, LoadAsked            │          │UnloadAsked
                             ▼  │                           ▼          ▼
                            FAILED <───engine gave up─── (engine)   DRAINING ──> ABSENT

Rules, numbered as in the code:

1. A load of a model that is not there starts with its weights: what was not checked reaches no
   engine. Making them ready may mean fetching and mending them; what it is at is said meanwhile.
2. A load of a model that is there is a retry if it failed, a restart if its options differ, and
   otherwise nothing. The same name with other weights is refused.
3. Without an engine on this machine a verified model waits, with the reason; the engine is looked
   for again every `ENGINE_RECHECK_S`.
4. Weights that were refused are tried again when whoever refused them said so, or not before
   somebody loads the model again: a file that was put back should need no command, and a hub that
   said no should not be asked for ever. A trouble that passes by itself (the hub cannot be reached)
   is waited for longer each time. The model is FAILED meanwhile: nothing is known to be better yet,
   and whoever waits for it should know.
5. An unload stops the engine after its requests; a load that comes meanwhile wins.
6. Every load asked for is answered exactly once, accepted or refused, at once.
7. Weights that nobody waits for any more are abandoned: a fetch ends with the wish for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import assert_never

from meshd.ids import ModelId
from meshd.kernel.machine import Tick
from meshd.runtime.hosting_events import (
    AbandonWeights,
    AcceptLoad,
    Effect,
    EngineFound,
    EngineNotFound,
    EngineReported,
    Event,
    FindEngine,
    LoadAsked,
    LoadOptions,
    PrepareWeights,
    RefuseLoad,
    StartEngine,
    StopEngine,
    UnloadAsked,
    WeightFacts,
    WeightsAccepted,
    WeightsMoved,
    WeightsRejected,
)
from meshd.view import ModelState, Preparing

ENGINE_RECHECK_S = 15.0
WEIGHTS_BACKOFF_S = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
"""Waits after troubles that pass, one after the other; the last one goes on."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What hosting knows of one model."""

    model: ModelId
    ref: str
    options: LoadOptions
    state: ModelState
    reason: str | None = None
    facts: WeightFacts | None = None
    wanted: bool = True
    preparation: int | None = None
    """Number of the preparation that runs; answers to any other are of the past."""
    now: Preparing | None = None
    """How far that is, once it said so."""
    setbacks: int = 0
    """Passing troubles in a row."""
    engine: bool = False
    """An engine was started and has not reported ABSENT."""
    stopping: bool = False
    """Its stop was ordered: what it reports until ABSENT is of no more interest."""
    retry_at: float | None = None


class Hosting:
    """See the module's docstring. `restart_drain_s`: drain of an engine whose options changed."""

    def __init__(self, *, restart_drain_s: float) -> None:
        self._restart_drain_s = restart_drain_s
        self._entries: dict[ModelId, Entry] = {}
        self._preparations = 0
        self._engine_known = False
        self._engine_reason = "looking for an engine on this machine"
        self._engine_recheck_at: float | None = None

    @property
    def entries(self) -> Mapping[ModelId, Entry]:
        return MappingProxyType(self._entries)

    def due(self) -> float | None:
        times = [e.retry_at for e in self._entries.values() if e.retry_at is not None]
        if self._engine_recheck_at is not None:
            times.append(self._engine_recheck_at)
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case LoadAsked():
                return self._load(event)
            case UnloadAsked():
                return self._unload(event)
            case WeightsMoved():
                return self._moved(event)
            case WeightsAccepted():
                return self._verified(event)
            case WeightsRejected():
                return self._rejected(event, now)
            case EngineFound():
                self._engine_known, self._engine_recheck_at = True, None
                return self._for_each(self._launch)
            case EngineNotFound():
                return self._no_engine(event.reason, now)
            case EngineReported():
                return self._reported(event)
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    # -- wishes -----------------------------------------------------------------------------------

    def _load(self, event: LoadAsked) -> list[Effect]:
        entry = self._entries.get(event.model)
        if entry is not None and entry.ref != event.ref:  # 2
            reason = (
                f"`{event.model}` is the name of {entry.ref} here; unload that first, or give the "
                "file another name"
            )
            return [RefuseLoad(event.ticket, reason)]
        accept = AcceptLoad(event.ticket)  # 6
        if entry is None:  # 1
            return [accept, self._verify(Entry(event.model, event.ref, event.options, _VERIFYING))]
        if entry.engine and (not entry.wanted or entry.options != event.options):  # 2, 5
            stopping = replace(entry, wanted=True, options=event.options)
            return [accept, self._end(stopping, "restarting with other options")]
        retry = replace(entry, wanted=True, options=event.options)
        if entry.state is ModelState.FAILED and entry.engine:  # 2
            return [accept, self._end(retry, "trying again", drain_s=0.0)]
        if entry.preparation is None and entry.state is ModelState.FAILED:
            return [accept, self._verify(retry)]
        self._entries[entry.model] = retry
        return [accept]

    def _unload(self, event: UnloadAsked) -> list[Effect]:
        entry = self._entries.get(event.model)
        if entry is None:
            return []
        if not entry.engine:
            del self._entries[event.model]
            if entry.preparation is not None:
                return [AbandonWeights(entry.model, entry.preparation)]  # 7
            return []
        return [self._end(replace(entry, wanted=False), "unloading", drain_s=event.drain_s)]  # 5

    def _end(self, entry: Entry, reason: str, *, drain_s: float | None = None) -> Effect:
        self._put(replace(entry, stopping=True), ModelState.DRAINING, reason)
        return StopEngine(entry.model, self._restart_drain_s if drain_s is None else drain_s)

    # -- weights ----------------------------------------------------------------------------------

    def _verify(self, entry: Entry) -> Effect:
        self._put(replace(entry, setbacks=0), _VERIFYING, "checking the weights")
        return self._prepare(self._entries[entry.model])

    def _prepare(self, entry: Entry) -> Effect:
        self._preparations += 1
        number = self._preparations
        self._entries[entry.model] = replace(entry, preparation=number, facts=None, retry_at=None)
        return PrepareWeights(entry.model, entry.ref, number)

    def _moved(self, event: WeightsMoved) -> list[Effect]:
        entry = self._entries.get(event.model)
        if entry is not None and entry.preparation == event.preparation:
            self._put(replace(entry, now=event.now), event.now.state, event.now.reason)
        return []

    def _verified(self, event: WeightsAccepted) -> list[Effect]:
        entry = self._entries.get(event.model)
        if entry is None or entry.preparation != event.preparation:
            return []
        ready = replace(entry, facts=event.facts, preparation=None, now=None, setbacks=0)
        self._put(ready, _VERIFYING, None)
        return self._launch(self._entries[event.model])

    def _rejected(self, event: WeightsRejected, now: float) -> list[Effect]:
        entry = self._entries.get(event.model)
        if entry is None or entry.preparation != event.preparation:
            return []
        wait_s, setbacks = event.retry_after_s, 0
        if event.passing:
            setbacks = entry.setbacks + 1
            last = len(WEIGHTS_BACKOFF_S) - 1
            wait_s = max(wait_s or 0.0, WEIGHTS_BACKOFF_S[min(entry.setbacks, last)])
        refused = replace(entry, preparation=None, now=None, setbacks=setbacks)
        retry_at = None if wait_s is None else now + wait_s
        self._put(refused, ModelState.FAILED, event.reason, retry_at=retry_at)  # 4
        return []

    # -- engines ----------------------------------------------------------------------------------

    def _launch(self, entry: Entry) -> list[Effect]:
        if entry.facts is None or entry.engine or entry.preparation is not None:
            return []
        if entry.state not in (_VERIFYING, _WAITING):
            return []
        if not self._engine_known:  # 3
            self._put(entry, ModelState.WAITING, self._engine_reason)
            return [FindEngine()] if self._engine_recheck_at is None else []
        started = replace(entry, engine=True)
        self._put(started, ModelState.LOADING, "starting the engine")
        return [StartEngine(entry.model, entry.facts, entry.options)]

    def _no_engine(self, reason: str, now: float) -> list[Effect]:
        self._engine_known, self._engine_reason = False, reason
        self._engine_recheck_at = now + ENGINE_RECHECK_S  # 3
        for entry in tuple(self._entries.values()):
            if entry.state is _WAITING and entry.preparation is None:
                self._put(entry, _WAITING, reason)
        return []

    def _reported(self, event: EngineReported) -> list[Effect]:
        entry = self._entries.get(event.model)
        if entry is None or not entry.engine:
            return []
        if event.state is not ModelState.ABSENT:
            if not entry.stopping:
                self._put(entry, event.state, event.reason)
            return []
        stopped = replace(entry, engine=False, stopping=False)
        if entry.wanted:  # 2, 5
            return [self._verify(stopped)]
        del self._entries[event.model]
        return []

    # -- time -------------------------------------------------------------------------------------

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._engine_recheck_at is not None and self._engine_recheck_at <= now:
            self._engine_recheck_at = None
            effects.append(FindEngine())
        overdue = [
            e for e in self._entries.values() if e.retry_at is not None and e.retry_at <= now
        ]
        effects.extend(self._prepare(entry) for entry in overdue)  # 4
        return effects

    def _for_each(self, rule: Callable[[Entry], list[Effect]]) -> list[Effect]:
        return [effect for entry in tuple(self._entries.values()) for effect in rule(entry)]

    def _put(
        self,
        entry: Entry,
        state: ModelState,
        reason: str | None,
        *,
        retry_at: float | None = None,
    ) -> None:
        self._entries[entry.model] = replace(entry, state=state, reason=reason, retry_at=retry_at)


_VERIFYING = ModelState.VERIFYING
_WAITING = ModelState.WAITING
