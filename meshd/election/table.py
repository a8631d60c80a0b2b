"""The shell around the book of deployments: shown, kept on the disk, told to the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from meshd.election.deployments import DeploymentBook, Rejected, Written
from meshd.election.sharing import SharedDeployments
from meshd.election.store import ElectionStore
from meshd.errors import InvalidRequest, MeshdError
from meshd.ids import ModelId
from meshd.kernel import Board, Pool
from meshd.view import Deployment, View

log = logging.getLogger(__name__)


class Table:
    """`spread(models)`: tell other nodes; called once they are on the disk, or cannot be."""

    def __init__(
        self,
        store: ElectionStore,
        records: Iterable[Deployment],
        board: Board[View],
        pool: Pool,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        spread: Callable[[Collection[ModelId]], None],
        changed: Callable[[], None],
    ) -> None:
        self.book = DeploymentBook(records)
        self.shared = SharedDeployments(self.book, self._merged)
        self._store = store
        self._board = board
        self._pool = pool
        self._spawn = spawn
        self._spread = spread
        self._changed = changed
        self._unsaved: set[ModelId] = set()
        """Written here since the disk was last written to."""
        self._saving = False
        self._stale = False

    def written(self, result: Written | Rejected) -> Deployment:
        """Show, keep and spread what was written to the book. Raises InvalidRequest."""
        if isinstance(result, Rejected):
            raise InvalidRequest(result.reason)
        if result.changed:
            self._unsaved.add(result.record.model)
            self._show()
        return result.record

    def _merged(self, records: tuple[Deployment, ...]) -> None:
        self._show()

    def _show(self) -> None:
        view = self._board.current
        self._board.publish(replace(view, deployments=self.book.records))
        self._stale = True
        if not self._saving:
            self._saving = True
            self._spawn(self._save())
        self._changed()

    async def _save(self) -> None:
        """Until the disk has what the book says."""
        try:
            while self._stale:
                self._stale = False
                told, self._unsaved = self._unsaved, set()
                try:
                    await self._pool.run(self._store.save_deployments, self.book.records)
                except MeshdError as error:
                    log.error("deployments are not kept: %s", error.message)
                if told:
                    self._spread(told)
        finally:
            self._saving = False
