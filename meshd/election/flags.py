"""The shell that deploys what a node was started with: `--model` and `--auto`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import orjson

from meshd.config import Config
from meshd.election.desk import Desk, Wish
from meshd.election.memory import Memory
from meshd.election.needs import Needs
from meshd.election.table import Table
from meshd.errors import MeshdError
from meshd.ids import ModelId, NodeId
from meshd.kernel import Pool, write_atomic
from meshd.view import Cause

log = logging.getLogger(__name__)

LAST: Final = "flags.json"
"""Models this node was started with last."""


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
        self._path = config.data_dir / LAST
        self._chosen = False

    async def take(self, own: NodeId) -> None:
        """`--model`: deploy those of now, unload those of this node's last start that are gone.
        What cannot be deployed is said, and keeps nothing else from it.

        Who wrote a record last does not tell whose flag it was: any node may have woken it."""
        wanted = set()
        for ref in self._config.model:
            try:
                wanted.add(self._needs.identify(ref)[0])
            except MeshdError as error:
                log.error("--model %s: %s", ref, error.message)
        for model in await self._replace_last(wanted):
            record = self._table.book.get(model)
            if record is None or record.removed:
                continue
            if record.origin == own and record.cause is Cause.FLAG:
                self._table.unload(model, "its --model is gone")
        loads = (self._deploy(ref, Cause.FLAG, "--model") for ref in self._config.model)
        await asyncio.gather(*loads)

    async def _replace_last(self, wanted: Collection[ModelId]) -> Sequence[ModelId]:
        """Write down the models of now; those of the last start that are not among them."""
        try:
            last = await self._pool.run(_read, self._path)
            if set(last) != set(wanted):
                await self._pool.run(write_atomic, self._path, orjson.dumps(sorted(wanted)))
        except (OSError, MeshdError) as error:
            log.warning("%s: what --model said is not kept: %s", self._path, error)
            return ()
        return [model for model in last if model not in wanted]

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


def _read(path: Path) -> Sequence[ModelId]:
    """What is no list of names is none: then nothing is unloaded. Raises OSError."""
    try:
        found = orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return ()
    return [ModelId(name) for name in found] if isinstance(found, list) else ()
