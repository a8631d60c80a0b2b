"""A look at devices and disk now and then, for `meshd status`; nothing is decided from it.

A device that goes or comes back is a line in the log, with its driver's reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from meshd.config import Config
from meshd.errors import MeshdError
from meshd.kernel import Board, Pool, Service
from meshd.view import View

if TYPE_CHECKING:
    from meshd.runtime.devices import EngineList

log = logging.getLogger(__name__)

SURVEY_INTERVAL_S = 30.0


class Survey(Service):
    name = "survey"

    def __init__(
        self,
        config: Config,
        board: Board[View],
        pool: Pool,
        listing: Callable[[], EngineList | None],
    ) -> None:
        """`listing`: what the engine's own binary lists, if that is known."""
        super().__init__()
        self._config = config
        self._board = board
        self._pool = pool
        self._listing = listing

    async def main(self) -> None:
        from meshd.cache.usage import read_usage
        from meshd.runtime.devices import agree, changes, take_reading, told

        last = None
        self.ready.set()
        while not self.stopping.is_set():
            try:
                reading = await self._pool.run(take_reading)
                cache = await self._pool.run(read_usage, budget=self._config.cache.budget)
            except MeshdError as error:
                log.warning("%s", error.message)
            else:
                view, listing = self._board.current, self._listing()
                shown = reading if listing is None else agree(reading, listing, os.environ)
                self._board.publish(replace(view, devices=shown.devices, cache=cache))
                for change in changes(last or reading, reading):
                    log.warning("%s", told(change))
                last = reading
            await _wait_at_most(self.stopping, SURVEY_INTERVAL_S)


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
