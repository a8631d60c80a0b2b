"""A service: something that runs from a ready event to a bounded stop.

`ServiceStack` starts services in order, each when the one before is ready, and stops them in
reverse, each within its own limit. Every task of meshd is born in the TaskGroup of a service.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Service(ABC):
    """Subclasses implement `main`; they call `ready.set()` when others may rely on them."""

    name: str = "service"
    start_limit_s: float = 10.0
    stop_limit_s: float = 5.0

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.stopping = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._children: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def main(self) -> None:
        """Runs until `stopping` is set (or it is cancelled, when it overran its stop limit)."""

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` in this service's TaskGroup. An exception in it takes the node down."""
        if self._group is None:
            work.close()
            raise RuntimeError(f"{self.name}: no task can be started outside main()")
        task = self._group.create_task(work, name=f"{self.name}:{name}")
        self._children.add(task)
        task.add_done_callback(self._children.discard)
        return task

    async def run(self) -> None:
        """`main` inside a TaskGroup; tasks still running when it returns are cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await self.main()
            finally:
                self._group = None
                for task in tuple(self._children):
                    task.cancel()


class ServiceStack:
    """Runs services as one: if any of them fails, all are stopped and the failure is raised."""

    def __init__(self) -> None:
        self._running: list[tuple[Service, asyncio.Task[None]]] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done with the exception of the first service that ended before it was told to."""

    async def start(self, service: Service) -> None:
        """Start `service` and wait until it is ready; raises what it raised, or TimeoutError."""
        task = asyncio.create_task(service.run(), name=service.name)
        self._running.append((service, task))
        task.add_done_callback(lambda t: self._ended(service, t))
        ready = asyncio.create_task(service.ready.wait(), name=f"{service.name}:ready")
        try:
            async with asyncio.timeout(service.start_limit_s):
                await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if task.done():
            await task
            raise RuntimeError(f"{service.name} ended before it was ready")

    async def stop(self) -> None:
        """Stop all, last started first. A service over its limit is cancelled and named."""
        for service, task in reversed(self._running):
            service.stopping.set()
            done, _ = await asyncio.wait({task}, timeout=service.stop_limit_s)
            if not done:
                log.warning("%s did not stop within %.1f s", service.name, service.stop_limit_s)
                task.cancel()
                await asyncio.wait({task}, timeout=service.stop_limit_s)
        self._running.clear()
        if not self.failed.done():
            self.failed.cancel()

    def _ended(self, service: Service, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self.failed.done():
            return
        error = task.exception()
        if error is not None:
            self.failed.set_exception(error)
        elif not service.stopping.is_set():
            self.failed.set_exception(RuntimeError(f"{service.name} ended on its own"))
        if self.failed.done():
            # Read once, so that asyncio does not complain when nobody waits for it.
            self.failed.exception()
