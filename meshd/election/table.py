"""The shell around the book of deployments: shown, kept on the disk, told to the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Final

from meshd.election.deployments import DeploymentBook, Rejected, Written
from meshd.election.sharing import SharedDeployments
from meshd.election.store import ElectionStore
from meshd.errors import InvalidRequest, MeshdError
from meshd.ids import ModelId
from meshd.kernel import Board, Pool
from meshd.view import Deployment, View
from meshd.view.shape import ModelShape

log = logging.getLogger(__name__)


SAVE_AGAIN_S: Final = 2.0
"""From a disk that refuses to the next attempt."""


class Table:
    """`spread(models)`: tell other nodes; called once they are on the disk, or cannot be. Records
    may be written and merged before `keep` runs and after it; it saves them when it runs."""

    def __init__(
        self,
        store: ElectionStore,
        records: Iterable[Deployment],
        board: Board[View],
        pool: Pool,
        *,
        spread: Callable[[Collection[ModelId]], None],
        changed: Callable[[], None],
    ) -> None:
        self.book = DeploymentBook(records)
        self.shared = SharedDeployments(self.book, self._merged)
        self._store = store
        self._board = board
        self._pool = pool
        self._spread = spread
        self._changed = changed
        self._unsaved: set[ModelId] = set()
        """Written here since the disk was last written to."""
        self._stale = asyncio.Event()
        """The book says what the disk does not."""
        self._saving = asyncio.Lock()
        self.records = self.book.records
        """All of the book, as it was last shown; the same tuple until that changes."""

    async def keep(self) -> None:
        """Save and spread what changes, until it is cancelled."""
        while True:
            await self._stale.wait()
            if not await self.save():
                await asyncio.sleep(SAVE_AGAIN_S)

    async def save(self) -> bool:
        """Bring the disk up to date; whether that worked."""
        async with self._saving:  # whoever saves last must not return while another is at it
            if not self._stale.is_set():
                return True
            self._stale.clear()
            told, self._unsaved = self._unsaved, set()
            try:
                await self._pool.run(self._store.save_deployments, self.records)
            except MeshdError as error:
                log.error("deployments are not kept: %s", error.message)
                self._stale.set()
            if told:
                self._spread(told)
            return not self._stale.is_set()

    def written(self, result: Written | Rejected) -> Deployment:
        """Show, keep and spread what was written to the book. Raises InvalidRequest."""
        if isinstance(result, Rejected):
            raise InvalidRequest(result.reason)
        if result.changed:
            self._unsaved.add(result.record.model)
            self._show()
        return result.record

    def complete(self, sought: Deployment, shape: ModelShape) -> None:
        """The shape was found that `sought` lacks, if what it says still stands."""
        record = self.book.get(sought.model)
        if record is None or record.removed or record.shape is not None or record.ref != sought.ref:
            return
        own = self._board.current.node.id
        self._write("completed", record.model, self.book.change(record.model, own, shape=shape))

    def put_to_sleep(self, model: ModelId, why: str) -> None:
        log.info("%s goes to sleep: %s", model, why)
        own = self._board.current.node.id
        self._write("put to sleep", model, self.book.put_to_sleep(model, own))

    def unload(self, model: ModelId, why: str) -> None:
        log.info("%s is unloaded: %s", model, why)
        own = self._board.current.node.id
        self._write("unloaded", model, self.book.unload(model, own))

    def _write(self, what: str, model: ModelId, result: Written | Rejected) -> None:
        """What nobody waits for to be told that it was refused."""
        try:
            self.written(result)
        except InvalidRequest as error:
            log.warning("%s cannot be %s: %s", model, what, error.message)

    def _merged(self, records: tuple[Deployment, ...]) -> None:
        self._show()

    def _show(self) -> None:
        self.records = self.book.records
        self._board.publish(replace(self._board.current, deployments=self.records))
        self._stale.set()
        self._changed()
