"""The shell that deploys what a node was started with: `--model` and `--auto`."""

from __future__ import annotations

import asyncio
import logging

from meshd.config import Config
from meshd.election.desk import Desk, Wish
from meshd.election.memory import Memory
from meshd.election.needs import Needs
from meshd.election.table import Table
from meshd.errors import MeshdError
from meshd.ids import NodeId
from meshd.kernel import Pool
from meshd.view import Cause

log = logging.getLogger(__name__)


class Flags:
    def __init__(
        self, config: Config, needs: Needs, table: Table, desk: Desk, memory: Memory, pool: Pool
    ) -> None:
        self._config = config
        self._needs = needs
        self._table = table
        self._desk = desk
        self._memory = memory
        self._pool = pool
        self._chosen = False

    async def take(self, own: NodeId) -> None:
        """`--model`: deploy those of now, unload those of this node's last start that are gone.
        What cannot be deployed is said, and keeps nothing else from it."""
        wanted = set()
        for ref in self._config.model:
            try:
                wanted.add(self._needs.identify(ref)[0])
            except MeshdError as error:
                log.error("--model %s: %s", ref, error.message)
        for record in self._table.records:
            mine = record.origin == own and record.cause is Cause.FLAG and not record.removed
            if mine and record.model not in wanted:
                self._table.written(self._table.book.unload(record.model, own))
        loads = (self._deploy(ref, Cause.FLAG, "--model") for ref in self._config.model)
        await asyncio.gather(*loads)

    async def choose(self) -> None:
        """`--auto`: if nothing is deployed, something is chosen, once a start. To be called again
        and again, since the memory may not be known yet."""
        if not self._config.auto or self._chosen:
            return
        if not self._memory.budgets or self._any_deployed():
            return
        try:
            ref = await self._pool.run(self._needs.auto, self._memory)
        except MeshdError as error:
            log.warning("--auto: nothing can be chosen now: %s", error.message)
            return
        if self._any_deployed():
            return  # by another node, meanwhile
        self._chosen = True
        if ref is None:
            log.warning("--auto: no model of the catalog fits on this node")
            return
        log.info("--auto chooses %s", ref)
        await self._deploy(ref, Cause.AUTO, "--auto")

    async def _deploy(self, ref: str, cause: Cause, flag: str) -> None:
        try:
            await self._desk.load(Wish(ref), cause)
        except MeshdError as error:
            log.error("%s: %s cannot be deployed: %s", flag, ref, error.message)

    def _any_deployed(self) -> bool:
        return any(not record.removed for record in self._table.records)
