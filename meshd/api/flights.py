"""How many requests are at each engine, and when there was the last one."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Mapping
from types import MappingProxyType

from meshd.api.usage import Usage
from meshd.ids import InstanceId
from meshd.kernel import Clock
from meshd.view import Target


class Flights:
    """Every `engage` is followed by one `release` of the same target."""

    def __init__(self, clock: Clock, usage: Usage | None) -> None:
        self._clock = clock
        self._usage = usage
        self._counts: dict[InstanceId, int] = {}
        self.counts: Mapping[InstanceId, int] = MappingProxyType(self._counts)
        """Requests at each engine; those without any are missing."""
        self._last_request_at: dict[InstanceId, float] = {}
        self._idle_waiters: dict[InstanceId, list[asyncio.Future[None]]] = {}

    def engage(self, target: Target) -> None:
        instance = target.instance
        self._counts[instance] = self._counts.get(instance, 0) + 1
        self._last_request_at[instance] = self._clock.now()
        if self._usage is not None and target.local:
            self._usage.began(target.model)

    def release(self, target: Target) -> None:
        instance = target.instance
        left = self._counts[instance] - 1
        self._last_request_at[instance] = self._clock.now()
        if left:
            self._counts[instance] = left
        else:
            del self._counts[instance]
            for waiter in self._idle_waiters.pop(instance, ()):
                if not waiter.done():
                    waiter.set_result(None)
        if self._usage is not None and target.local:
            self._usage.ended(target.model)

    def last_request_at(self, instance: InstanceId) -> float | None:
        """Monotonic time of the last begin or end of a request there; None if there was none."""
        return self._last_request_at.get(instance)

    async def wait_idle(self, instance: InstanceId) -> None:
        while instance in self._counts:
            waiter = asyncio.get_running_loop().create_future()
            self._idle_waiters.setdefault(instance, []).append(waiter)
            await waiter

    def keep(self, live: Container[InstanceId]) -> None:
        """Forget the engines that are neither `live` nor at work."""
        for instance in [i for i in self._last_request_at if i not in live]:
            if instance not in self._counts:
                del self._last_request_at[instance]
