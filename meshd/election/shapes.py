"""The shell that finds out what deployed models need of memory.

A shape is read by the node that wrote the record, or where the weights lie, and travels with the
record from then on. Where the headers cannot be read the weights are made whole first: that ends
in the shape, or in the words that say what is wrong with them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from meshd.errors import MeshdError
from meshd.ids import ModelId
from meshd.kernel import Clock
from meshd.view import Deployment, Preparing
from meshd.view.shape import ModelShape

log = logging.getLogger(__name__)

BACKOFF_S: Final = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
"""Waits between attempts; the last one goes on."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a shape is not known."""

    stamp: tuple[int, str]
    """Of the record it was looked for."""
    words: str
    attempts: int
    retry_at: float | None
    """None: not before the record is written anew."""


class Shapes:
    """`find(ref)`: read it from headers, here or elsewhere; `prepare(ref)`: make the weights whole
    here. Both raise MeshdError. `found(model, shape)`: for the record; `changed()`: news of how
    far it is, or why it is not known."""

    def __init__(
        self,
        find: Callable[[str], Awaitable[ModelShape]],
        prepare: Callable[[str, Callable[[Preparing], None]], Awaitable[object]],
        *,
        clock: Clock,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        found: Callable[[ModelId, ModelShape], None],
        changed: Callable[[], None],
    ) -> None:
        self.find = find
        self._prepare = prepare
        self._clock = clock
        self._spawn = spawn
        self._found = found
        self._changed = changed
        self._looking: set[ModelId] = set()
        self._problems: dict[ModelId, Problem] = {}
        self._preparing: dict[ModelId, Preparing] = {}

    def problem(self, deployment: Deployment) -> Problem | None:
        """Why its shape is not known here."""
        found = self._problems.get(deployment.model)
        return found if found is not None and found.stamp == deployment.stamp else None

    def preparing(self, model: ModelId) -> Preparing | None:
        """How far its weights are on their way to being whole here, if that comes first."""
        return self._preparing.get(model)

    def want(self, deployment: Deployment) -> None:
        """Look for its shape, unless that is under way or was in vain a moment ago."""
        model = deployment.model
        before = self._problems.get(model)
        if model in self._looking:
            return
        if before is not None and before.stamp == deployment.stamp and self._rests(before):
            return
        self._looking.add(model)
        self._spawn(self._look(deployment))

    def _rests(self, problem: Problem) -> bool:
        return problem.retry_at is None or problem.retry_at > self._clock.now()

    async def _look(self, deployment: Deployment) -> None:
        model = deployment.model
        try:
            shape = await self._read(model, deployment.ref)
        except MeshdError as error:
            before = self._problems.get(model)
            same = before is not None and before.stamp == deployment.stamp
            attempts = before.attempts + 1 if before is not None and same else 1
            wait_s = error.retry_after_s
            if error.retryable:
                backoff = BACKOFF_S[min(attempts, len(BACKOFF_S)) - 1]
                wait_s = max(wait_s or 0.0, backoff)
            retry_at = None if wait_s is None else self._clock.now() + wait_s
            log.warning("model %s cannot be loaded: %s", model, error.message)
            self._problems[model] = Problem(deployment.stamp, error.message, attempts, retry_at)
            self._looking.discard(model)
            self._changed()
        else:
            self._problems.pop(model, None)
            self._looking.discard(model)
            self._found(model, shape)

    async def _read(self, model: ModelId, ref: str) -> ModelShape:
        try:
            return await self.find(ref)
        except MeshdError as error:
            log.info("the headers of %s cannot be read: %s", ref, error.message)

        def moved(now: Preparing) -> None:
            self._preparing[model] = now
            self._changed()

        try:
            await self._prepare(ref, moved)
        finally:
            self._preparing.pop(model, None)
        return await self.find(ref)
