"""Feeds the service manager's watchdog, if and only if the process has just been seen to work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from meshd.kernel.clock import Clock
from meshd.kernel.notify import Notifier
from meshd.kernel.pulse import PulseJudge
from meshd.kernel.service import Service

log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[str | None]]
"""One line on what is wrong, or None. It raises nothing."""


class Watchdog(Service):
    """Looks four times within `limit_s` and tells `notifier` of each look that found no fault.

    A check that has no answer when the next look is due has failed. A process that is stopped, or
    whose loop hangs, does not get here at all, and so is not fed either.
    """

    name = "watchdog"

    def __init__(
        self, notifier: Notifier, limit_s: float, checks: Mapping[str, Check], *, clock: Clock
    ) -> None:
        super().__init__()
        self._notifier = notifier
        self._judge = PulseJudge(limit_s)
        self._checks = checks
        self._clock = clock

    async def main(self) -> None:
        self.ready.set()
        self._notifier.alive()
        while not await self._told_to_stop(self._judge.period_s):
            pass

    async def _told_to_stop(self, period_s: float) -> bool:
        """Wait for the next look and take it; True if there is none."""
        planned = self._clock.now() + period_s
        try:
            async with asyncio.timeout(period_s):
                await self.stopping.wait()
        except TimeoutError:
            await self._look(max(0.0, self._clock.now() - planned))
            return False
        return True

    async def _look(self, lag_s: float) -> None:
        found = {name: await self._ask(check) for name, check in self._checks.items()}
        pulse = self._judge.judge(lag_s, found)
        if pulse.alive:
            self._notifier.alive()
        if pulse.changed and pulse.alive:
            log.info("healthy again; the watchdog is fed")
        elif pulse.changed:
            log.error("not healthy, the watchdog is not fed: %s", "; ".join(pulse.faults))

    async def _ask(self, check: Check) -> str | None:
        limit_s = self._judge.period_s / len(self._checks)
        try:
            async with asyncio.timeout(limit_s):
                return await check()
        except TimeoutError:
            return f"no answer within {limit_s:g} s"
