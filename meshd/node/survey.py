"""A look at devices and disk now and then.

A device that goes or comes back is a line in the log, with its driver's reason. How fast main
memory is no driver tells: if it is not configured it is measured once, when the node has an engine
that takes part in splits and neither the node nor a model of it is starting.
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
from meshd.sizes import format_size, parse_size
from meshd.view import DeviceView, ModelState, NodeState, RuntimeView, View

if TYPE_CHECKING:
    from meshd.runtime.devices import EngineList

log = logging.getLogger(__name__)

SURVEY_INTERVAL_S = 30.0
UNDISTURBED_S = 2.0
"""From the start of this service: what starts with it is not to wait for a measurement."""


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
        self._runtime: RuntimeView | None = None
        """As last seen; with the list it changes as well."""
        self._wake = asyncio.Event()
        stated = config.engine.memory_speed
        self._stated = stated is not None
        self._memory_speed = None if stated is None else parse_size(stated) or None
        """Bytes per second of main memory; None if it is not known."""

    def look_now(self) -> None:
        """Something changed that a look would show."""
        self._wake.set()

    async def main(self) -> None:
        from meshd.cache.usage import read_usage
        from meshd.runtime.devices import agree, changes, take_reading, told

        last = None
        self._board.subscribe(self._look_if_listed_anew)
        self.ready.set()
        if not self._stated:
            self.spawn(self._measure_memory(), name="speed of memory")
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
                devices = tuple(map(self._with_speed, shown.devices))
                self._board.publish(replace(view, devices=devices, cache=cache))
                for change in changes(last or reading, reading):
                    log.warning("%s", told(change))
                last = reading
            await self._rest()

    def _with_speed(self, device: DeviceView) -> DeviceView:
        if device.backend != "cpu":
            return device
        return replace(device, memory_bytes_per_s=self._memory_speed)

    async def _measure_memory(self) -> None:
        from meshd.runtime.devices import measure_memory_speed

        await asyncio.sleep(UNDISTURBED_S)
        await self._calm()
        machine = next(d for d in self._board.current.devices if d.backend == "cpu")
        try:
            speed = await self._pool.run(measure_memory_speed, machine.memory_free_bytes)
        except MeshdError as error:
            log.info("the speed of main memory is not known: %s", error.message)
            return
        if speed is not None:
            log.info("main memory is read at %s/s", format_size(speed))
            self._memory_speed = speed
            self.look_now()

    async def _calm(self) -> None:
        calm = asyncio.Event()

        def look(view: View) -> None:
            if _is_calm(view):
                calm.set()

        unsubscribe = self._board.subscribe(look)
        try:
            look(self._board.current)
            await calm.wait()
        finally:
            unsubscribe()

    def _look_if_listed_anew(self, view: View) -> None:
        """What a device is called by the engine, models are placed by."""
        if view.runtime is self._runtime:
            return
        self._runtime = view.runtime
        if _names(self._listing()) != self._listed:
            self.look_now()

    async def _rest(self) -> None:
        woken = self.spawn(_set(self._wake), name="wake")
        stopping = self.spawn(_set(self.stopping), name="stop")
        await asyncio.wait(
            {woken, stopping}, timeout=SURVEY_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
        )
        woken.cancel()
        stopping.cancel()


def _is_calm(view: View) -> bool:
    """Whether the speed of main memory matters here, and nothing would suffer that is starting."""
    if view.runtime is None or view.runtime.rpc_protocol is None or not view.devices:
        return False
    loading = any(model.state is ModelState.LOADING for model in view.local.values())
    return view.node.state is NodeState.READY and not loading


def _names(listing: EngineList | None) -> tuple[str, ...]:
    return () if listing is None else tuple(device.name for device in listing.devices)


async def _set(event: asyncio.Event) -> None:
    await event.wait()
