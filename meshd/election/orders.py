"""The shell that carries out what the election orders, by way of `Needs`, board and disk."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import replace
from typing import Any, Final, assert_never

from meshd.election.appraisal import Appraiser
from meshd.election.claims import highest_epoch
from meshd.election.needs import Needs
from meshd.election.store import ElectionStore
from meshd.election.table import SAVE_AGAIN_S, Table
from meshd.election.words import (
    Effect,
    EndLoan,
    EpochSaved,
    Event,
    HostChanged,
    HostReported,
    LeasesChanged,
    LoanAnswered,
    PublishClaims,
    PutToSleep,
    SaveEpoch,
    Standing,
    StartHost,
    StopHost,
)
from meshd.errors import MeshdError, ModelNotFound
from meshd.ids import LoanId, ModelId
from meshd.kernel import Board, Pool
from meshd.view import ModelState, View

PLAUSIBLE_EPOCH: Final = 1 << 40
"""More than are ever reached; higher ones were made up, and must not outlive who did."""

log = logging.getLogger(__name__)


class Orders:
    """`post`: to the driver of the election; `started(model)`: its engine was ordered;
    `leases_changed`: offers are to be made anew, at once; `look_again`: soon."""

    def __init__(
        self,
        board: Board[View],
        needs: Needs,
        store: ElectionStore,
        table: Table,
        appraiser: Appraiser,
        pool: Pool,
        *,
        post: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        started: Callable[[ModelId], None],
        leases_changed: Callable[[], None],
        look_again: Callable[[], None],
    ) -> None:
        self._board = board
        self._needs = needs
        self._store = store
        self._table = table
        self._appraiser = appraiser
        self._pool = pool
        self._post = post
        self._spawn = spawn
        self._started = started
        self._leases_changed = leases_changed
        self._look_again = look_again
        self.answers: dict[LoanId, str | None] = {}
        """To loans that were asked for, until who asked takes them."""
        self.disk_problem: str | None = None
        """Why no epoch can be saved, so that nothing may be claimed."""
        self._kept: dict[ModelId, int] = {}
        """Epochs of other nodes that are on the disk."""
        self.host_changes: Counter[tuple[ModelId, str]] = Counter()
        """By model and cause."""

    def run(self, effect: Effect) -> None:
        match effect:
            case SaveEpoch():
                self._spawn(self._save_epoch(effect))
            case StartHost():
                self._start(effect)
            case StopHost():
                self._stop(effect)
            case PublishClaims():
                self._board.publish(replace(self._board.current, claims=effect.claims))
            case LeasesChanged():
                self._leases_changed()
            case PutToSleep():
                why = f"its memory is needed for {effect.wanted_for}"
                self._table.put_to_sleep(effect.model, why)
            case HostChanged():
                log.info("%s: %s", effect.model, effect.why)
                self.host_changes[effect.model, effect.cause] += 1
            case LoanAnswered():
                self.answers[effect.loan] = effect.refusal
            case EndLoan():
                self._needs.end_loan(effect.loan, effect.reason)
            case _:
                assert_never(effect)
        self._look_again()

    async def _save_epoch(self, order: SaveEpoch) -> None:
        """Until it is saved; meanwhile nothing else is claimed either."""
        while True:
            try:
                await self._pool.run(self._store.save_epoch, order.model, order.epoch)
            except MeshdError as error:
                if self.disk_problem is None:
                    log.error("nothing is claimed any more: %s", error.message)
                self.disk_problem = error.message
                self._look_again()
                await asyncio.sleep(SAVE_AGAIN_S)
            else:
                self.disk_problem = None
                self._post(EpochSaved(order.model, order.epoch))
                self._look_again()
                return

    async def keep_heard(self, nodes: Collection[Standing], models: Iterable[ModelId]) -> None:
        """Write down what epochs others claim these models with. Nothing waits for it: it counts
        when all nodes start anew, and those that claimed last come back last."""
        heard = {model: highest_epoch(model, nodes) for model in models}
        news = {
            model: epoch
            for model, epoch in heard.items()
            if self._kept.get(model, 0) < epoch < PLAUSIBLE_EPOCH
        }
        if not news:
            return
        try:
            await self._pool.run(self._store.save_epochs, news)
        except MeshdError as error:
            log.info("epochs of other nodes are not kept: %s", error.message)
        else:
            self._kept.update(news)

    def _start(self, order: StartHost) -> None:
        model = order.deployment.model
        self._started(model)
        counted = self._appraiser.counted(order.deployment)
        try:
            self._needs.start(order, None if counted is None else counted.prompts)
        except MeshdError as error:
            self._post(HostReported(model, ModelState.FAILED, error.message))

    def _stop(self, order: StopHost) -> None:
        try:
            self._needs.stop(order.model, order.drain)
        except ModelNotFound:
            self._post(HostReported(order.model, ModelState.ABSENT))
