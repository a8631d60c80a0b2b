"""Bounded pools of threads for calls that block (NVML, hashing, fsync, scandir)."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from meshd.errors import MeshdError

P = ParamSpec("P")
R = TypeVar("R")


class PoolFull(MeshdError):
    """More work waits than the pool admits. Full-policy of every pool: refuse, do not queue."""

    code, status, retryable = "pool_full", 503, True


class Pool:
    """At most `workers` calls at once and `backlog` waiting; one more raises `PoolFull`.

    A call cannot be interrupted: cancelling the awaiting task abandons its result, and the thread
    is free again only when the call returns.
    """

    def __init__(self, name: str, *, workers: int, backlog: int = 64) -> None:
        self.name = name
        self._limit = workers + backlog
        self._admitted = 0
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=f"meshd-{name}")

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._admitted >= self._limit:
            raise PoolFull(f"pool {self.name} has {self._admitted} calls waiting; try again later")
        self._admitted += 1
        future = self._executor.submit(functools.partial(call, *args, **kwargs))
        loop = asyncio.get_running_loop()

        def release(_: object) -> None:
            # The thread may end after the loop did, at shutdown.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._release)

        future.add_done_callback(release)
        return await asyncio.wrap_future(future)

    def _release(self) -> None:
        self._admitted -= 1

    def close(self) -> None:
        """Take no more calls; calls not begun are dropped, running ones are not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
