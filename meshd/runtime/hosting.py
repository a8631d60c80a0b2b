"""Which models this node runs: a pure machine from wishes to engines.

One entry a model, in one of the states of `ModelState`:

    ABSENT ──LoadAsked──> VERIFYING ──WeightsAccepted──> LOADING ──> READY
                          FETCHING                          │          │
                             │  ▲                           │          │
              WeightsRejected│  │LoadAsked                  │          │UnloadAsked
                             ▼  │                           ▼          ▼
                            FAILED <───engine gave up─── (engine)   DRAINING ──> ABSENT

Rules, numbered as in the code:

1. A load of a model that is not there starts with its weights: what was not checked reaches no
   engine. Making them ready may mean fetching and mending them; what it is at is said meanwhile.
2. A load of a model that is there is a retry if it failed, a restart if its options differ, and
   otherwise nothing. The same name with other weights is refused.
3. Without an engine on this machine a verified model has FAILED, with the reason.
4. So has one whose weights were refused; when to try again, if whoever refused them said so, is
   kept for whoever tries. Nothing FAILED is tried again from here: the election does that, on this
   node or on another one.
5. An unload stops the engine after its requests; a load that comes meanwhile wins.
6. Every load asked for is answered exactly once, accepted or refused, at once.
7. Weights that nobody waits for any more are abandoned: a fetch ends with the wish for it.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    engine: bool = False
    """An engine was started and has not reported ABSENT."""
    stopping: bool = False
    """Its stop was ordered: what it reports until ABSENT is of no more interest."""
    retry_at: float | None = None
    """Of FAILED: trying earlier is known to be in vain, or unwelcome. Monotonic."""


class Hosting:
    """See the module's docstring. `restart_drain_s`: drain of an engine whose options changed."""

    def __init__(self, *, restart_drain_s: float) -> None:
        self._restart_drain_s = restart_drain_s
        self._entries: dict[ModelId, Entry] = {}
        self._preparations = 0
        self._without_engine: str | None = "looking for an engine on this machine"
        """Why nothing can run; None once an engine is known."""

    @property
    def entries(self) -> Mapping[ModelId, Entry]:
        return MappingProxyType(self._entries)

    def due(self) -> float | None:
        return None

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
                self._without_engine = None
                return []
            case EngineNotFound():
                self._without_engine = event.reason
                return []
            case EngineReported():
                return self._reported(event)
            case Tick():
                return []
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
            return [
                accept,
                self._verify(Entry(event.model, event.ref, event.options, ModelState.VERIFYING)),
            ]
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
        self._preparations += 1
        number = self._preparations
        begun = replace(entry, preparation=number, facts=None)
        self._put(begun, ModelState.VERIFYING, "checking the weights")
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
        ready = replace(entry, facts=event.facts, preparation=None, now=None)
        if self._without_engine is not None:  # 3
            self._put(ready, ModelState.FAILED, self._without_engine)
            return []
        self._put(replace(ready, engine=True), ModelState.LOADING, "starting the engine")
        return [StartEngine(entry.model, event.facts, entry.options)]

    def _rejected(self, event: WeightsRejected, now: float) -> list[Effect]:
        entry = self._entries.get(event.model)
        if entry is None or entry.preparation != event.preparation:
            return []
        refused = replace(entry, preparation=None, now=None)
        retry_at = None if event.retry_after_s is None else now + event.retry_after_s
        self._put(refused, ModelState.FAILED, event.reason, retry_at=retry_at)  # 4
        return []

    # -- engines ----------------------------------------------------------------------------------

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

    def _put(
        self,
        entry: Entry,
        state: ModelState,
        reason: str | None,
        *,
        retry_at: float | None = None,
    ) -> None:
        self._entries[entry.model] = replace(entry, state=state, reason=reason, retry_at=retry_at)
