"""The shell that finds out what deployed models need of memory.

A shape is read by the node that wrote the record, or where the weights lie, and travels with the
record from then on. Where the headers cannot be read the weights are made whole first: that ends
in the shape, or in the words that say what is wrong with them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final

from meshd.election.standings import REACHABLE
from meshd.errors import MeshdError
from meshd.ids import ModelId
from meshd.kernel import Clock
from meshd.view import Deployment, Preparing, Role, View
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
    here. Both raise MeshdError. `found(deployment, shape)`: of the record it was looked for;
    `changed()`: news of how far it is, or why it is not known."""

    def __init__(
        self,
        find: Callable[[str], Awaitable[ModelShape]],
        prepare: Callable[[str, Callable[[Preparing], None]], Awaitable[object]],
        *,
        clock: Clock,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        found: Callable[[Deployment, ModelShape], None],
        changed: Callable[[], None],
    ) -> None:
        self.find = find
        self._prepare = prepare
        self._clock = clock
        self._spawn = spawn
        self._found = found
        self._changed = changed
        self._looking: dict[ModelId, tuple[str, asyncio.Task[None]]] = {}
        """(REF, who looks) of models whose shape is being found."""
        self._problems: dict[ModelId, Problem] = {}
        self.changes = 0
        """Times that problems changed."""
        self._preparing: dict[ModelId, Preparing] = {}

    def problem(self, deployment: Deployment) -> Problem | None:
        """Why its shape is not known here."""
        found = self._problems.get(deployment.model)
        return found if found is not None and found.stamp == deployment.stamp else None

    def preparing(self, model: ModelId) -> Preparing | None:
        """How far its weights are on their way to being whole here, if that comes first."""
        return self._preparing.get(model)

    def look(self, records: Iterable[Deployment], view: View) -> None:
        """Find those that records lack: by who is to host it alone, or wrote it, or has the
        weights; by the first node of all if those are gone. A client reads nothing."""
        own = view.node.id
        unknown = [r for r in records if not r.removed and r.shape is None]
        self._keep_only(unknown)
        if not unknown or view.node.role == Role.CLIENT.value:
            return
        members = (p.id for p in view.peers if p.state in REACHABLE and p.role is Role.MEMBER)
        alive = {own, *members}
        on_disk = {weights.model for weights in view.weights}
        for record in unknown:
            readers = (record.host, record.origin, min(alive))
            reader = next(node for node in readers if node in alive)
            if reader == own or record.model in on_disk:
                self.want(record)

    def want(self, deployment: Deployment) -> None:
        """Look for its shape, unless that is under way or was in vain a moment ago."""
        model = deployment.model
        before = self.problem(deployment)
        if model in self._looking or (before is not None and self._rests(before)):
            return
        self._looking[model] = deployment.ref, self._spawn(self._look(deployment))

    def _keep_only(self, unknown: Iterable[Deployment]) -> None:
        """Weights are fetched for hours: not for what was unloaded, means others, or is known."""
        refs = {record.model: record.ref for record in unknown}
        for model, (ref, task) in tuple(self._looking.items()):
            if refs.get(model) != ref:
                task.cancel()
                del self._looking[model]
                self._preparing.pop(model, None)
        for model in [m for m in self._problems if m not in refs]:
            del self._problems[model]

    def _rests(self, problem: Problem) -> bool:
        return problem.retry_at is None or problem.retry_at > self._clock.now()

    async def _look(self, deployment: Deployment) -> None:
        model = deployment.model
        try:
            shape = await self._read(model, deployment.ref)
        except MeshdError as error:
            self._looking.pop(model, None)
            self._failed(deployment, error)
            self._changed()
        else:
            self._looking.pop(model, None)
            self._problems.pop(model, None)
            self._found(deployment, shape)

    def _failed(self, deployment: Deployment, error: MeshdError) -> None:
        before = self.problem(deployment)
        attempts = 1 if before is None else before.attempts + 1
        wait_s = error.retry_after_s
        if error.retryable:
            wait_s = max(wait_s or 0.0, BACKOFF_S[min(attempts, len(BACKOFF_S)) - 1])
        retry_at = None if wait_s is None else self._clock.now() + wait_s
        log.warning("model %s cannot be loaded: %s", deployment.model, error.message)
        self._problems[deployment.model] = Problem(
            deployment.stamp, error.message, attempts, retry_at
        )
        self.changes += 1

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
