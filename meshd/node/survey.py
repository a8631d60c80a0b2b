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
        self._listed: tuple[str, ...] = ()
        """Devices of the engine's list that the last look went by."""
        self._wake = asyncio.Event()

    def look_now(self) -> None:
        """Something changed that a look would show."""
        self._wake.set()

    async def main(self) -> None:
        from meshd.cache.usage import read_usage
        from meshd.runtime.devices import agree, changes, take_reading, told

        last = None
        self._board.subscribe(self._look_if_listed_anew)
        self.ready.set()
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                reading = await self._pool.run(take_reading)
                cache = await self._pool.run(read_usage, budget=self._config.cache.budget)
            except MeshdError as error:
                log.warning("%s", error.message)
            else:
                view, listing = self._board.current, self._listing()
                self._listed = _names(listing)
                shown = reading if listing is None else agree(reading, listing, os.environ)
                self._board.publish(replace(view, devices=shown.devices, cache=cache))
                for change in changes(last or reading, reading):
                    log.warning("%s", told(change))
                last = reading
            await self._rest()

    def _look_if_listed_anew(self, view: View) -> None:
        """What a device is called by the engine, models are placed by."""
        if view.runtime is not None and _names(self._listing()) != self._listed:
            self.look_now()

    async def _rest(self) -> None:
        woken = self.spawn(_set(self._wake), name="wake")
        stopping = self.spawn(_set(self.stopping), name="stop")
        await asyncio.wait(
            {woken, stopping}, timeout=SURVEY_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
        )
        woken.cancel()
        stopping.cancel()


def _names(listing: EngineList | None) -> tuple[str, ...]:
    return () if listing is None else tuple(device.name for device in listing.devices)


async def _set(event: asyncio.Event) -> None:
    await event.wait()
