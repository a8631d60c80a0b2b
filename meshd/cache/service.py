"""The cache's life in a daemon: what lies here is shown and offered, what was verified is verified
again now and then."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Final

from meshd.cache.room import CacheRoom
from meshd.cache.scrub import Damage, Scrubber
from meshd.errors import MeshdError
from meshd.kernel import Board, Service
from meshd.sizes import parse_size
from meshd.view import View

log = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 300.0
"""Other programs fill and empty the Hugging Face cache too."""
DAY_S: Final = 86_400.0


class CacheService(Service):
    name = "cache"

    def __init__(self, room: CacheRoom, board: Board[View]) -> None:
        super().__init__()
        self._room = room
        self._board = board
        self._changed = asyncio.Event()
        room.changed = self._changed.set

    async def main(self) -> None:
        self.ready.set()
        try:
            self.spawn(self._look(), name="look")
            self.spawn(self._scrub(), name="scrub")
            await self.stopping.wait()
        finally:
            self._room.close()

    async def _look(self) -> None:
        """Show and offer what lies here, whenever that may have changed."""
        for pin in self._room.settings.pins:
            try:
                self._room.identify(pin)
            except MeshdError as error:
                log.warning("`cache.pins` protects nothing by `%s`: %s", pin, error.message)
        while True:
            self._changed.clear()
            try:
                shelf = await self._room.shelf()
            except (MeshdError, OSError) as error:
                log.warning("the model cache cannot be looked through: %s", error)
            else:
                view = self._board.current
                if view.weights != shelf:
                    self._board.publish(replace(view, weights=shelf))
            try:
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _scrub(self) -> None:
        settings, store = self._room.settings, self._room.store
        if not settings.scrub_days:
            return
        scrubber = Scrubber(
            store.ledger,
            store.chunks,
            period_s=settings.scrub_days * DAY_S,
            rate=parse_size(settings.scrub_rate),
            on_damage=self._damaged,
        )
        await scrubber.run()

    def _damaged(self, damage: Damage) -> None:
        log.error(
            "%s %s (expected sha256 %s, found %s); the next load mends it, or `meshd cache repair`",
            damage.path, damage.problem, damage.expected, damage.found or "nothing readable",
        )  # fmt: skip
        self._changed.set()
