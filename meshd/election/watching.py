"""The shell that tells the election what became of its orders, and what memory there is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from meshd.election.appraisal import Appraiser
from meshd.election.demand import Demand
from meshd.election.election import Election
from meshd.election.fit import HOST, Corrections
from meshd.election.hosted import Phase
from meshd.election.memory import Memory, untried
from meshd.election.needs import Needs
from meshd.election.words import CapacityMeasured, Event, HostMeasured, HostReported
from meshd.errors import MeshdError
from meshd.ids import ModelId
from meshd.kernel import Board, Clock, Pool, write_atomic
from meshd.view import ModelState, ModelView, View

log = logging.getLogger(__name__)


class Watching:
    """`post`: to the driver of `machine`, which is only looked at here."""

    def __init__(
        self,
        board: Board[View],
        needs: Needs,
        machine: Election,
        appraiser: Appraiser,
        memory: Memory,
        demand: Demand,
        *,
        corrections: Path,
        post: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        clock: Clock,
        pool: Pool,
    ) -> None:
        self._board = board
        self._needs = needs
        self._machine = machine
        self._appraiser = appraiser
        self._memory = memory
        self._demand = demand
        self._corrections = corrections
        self._post = post
        self._spawn = spawn
        self._clock = clock
        self._pool = pool
        self.failed: dict[ModelId, ModelView] = {}
        """How own attempts looked when they failed."""
        self._reported: dict[ModelId, ModelState] = {}
        """Of those whose engine was ordered: the state the machine was told last."""
        self._unkept = False
        self._keeping = False

    def started(self, model: ModelId) -> None:
        """StartHost was ordered: what is seen from now on is of the new engine."""
        self._reported.pop(model, None)

    def look(self) -> None:
        """At what this node was told to host. The view and the machine are read anew for each:
        what is reported of one model may start another."""
        for model in tuple(self._machine.hosted):
            hosted = self._machine.hosted.get(model)
            if hosted is None or not hosted.engine:
                continue
            seen = self._board.current.local.get(model)
            state = ModelState.ABSENT if seen is None else seen.state
            if self._reported.get(model) is not state:
                self._reported[model] = state
                self._report(model, state, seen)
        for model in [m for m in self._reported if m not in self._machine.hosted]:
            del self._reported[model]

    def forget_failures(self, but: frozenset[ModelId]) -> None:
        """Of models that are deployed no more."""
        for model in [m for m in self.failed if m not in but]:
            del self.failed[model]

    def look_at_memory(self) -> None:
        view = self._board.current
        if untried(view.runtime, view.devices, self._needs.engine()[1]) is not None:
            return
        held: Counter[str] = Counter()
        for model in view.local:
            for device, parts in (self._needs.taken(model) or {}).items():
                held[device] += parts.private
        hosted = self._machine.hosted.values()
        calm = not any(h.engine and h.phase is not Phase.READY for h in hosted)
        calm = calm and not self._machine.lent  # what an RPC server holds nobody tells
        if self._memory.measure(view.devices, self._memory.counted(held), calm=calm):
            self._post(CapacityMeasured(self._memory.capacity))

    def _report(self, model: ModelId, state: ModelState, seen: ModelView | None) -> None:
        if state is ModelState.READY and seen is not None:
            self.failed.pop(model, None)
            self._demand.became_ready(model, self._clock.now())
            self._learn(model, seen)
        elif state is ModelState.FAILED and seen is not None:
            self.failed[model] = seen
        elif state is ModelState.ABSENT:
            self._demand.stopped(model)
            self._needs.look_at_devices()
        reason, wait_s = (None, None) if seen is None else (seen.reason, seen.retry_after_s)
        lost = state is ModelState.FAILED and self._needs.worker_lost(model)
        self._post(HostReported(model, state, reason, wait_s, lost))

    def _learn(self, model: ModelId, local: ModelView) -> None:
        """Its engine is loaded: lease what it took, and remember how that differs."""
        self._needs.look_at_devices()
        seen = self._needs.taken(model)
        hosted = self._machine.hosted.get(model)
        if not seen or hosted is None:
            return
        counted = self._appraiser.counted(hosted.deployment)
        total = Counter({device: parts.total for device, parts in seen.items()})
        total[HOST] += 0 if counted is None else counted.prompts  # taken by and by
        self._post(HostMeasured(model, self._memory.counted(total)))
        if hosted.plan is not None:
            return  # its part says nothing of the whole
        engine, _ = self._needs.engine()
        if local.digest and self._appraiser.learn(hosted.deployment, local.digest, engine, seen):
            self._unkept = True
            if not self._keeping:
                self._keeping = True
                self._spawn(self._keep_corrections())

    async def _keep_corrections(self) -> None:
        """One writer at a time: an older file must not replace a newer one."""
        try:
            while self._unkept:
                self._unkept = False
                await self._pool.run(write_atomic, self._corrections, self._appraiser.to_json())
        except (OSError, MeshdError) as error:
            log.warning("%s cannot be written: %s", self._corrections, error)
        finally:
            self._keeping = False


def read_corrections(path: Path) -> Corrections:
    """What earlier runs learned. Blocking; a file that cannot be read costs accuracy, no start."""
    try:
        return Corrections.from_json(path.read_bytes())
    except FileNotFoundError:
        return Corrections()
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror)
        return Corrections()
