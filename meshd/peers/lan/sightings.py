"""What the LAN proposed to a node that may not be in a mesh yet, and joining that heeds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Final, TypeVar

from meshd.ids import MeshId, NodeId

MAX_SIGHTINGS: Final = 256
"""Nodes anybody on the LAN may have announced. Full-policy: one more is not kept."""
MAX_ADDRESSES: Final = 8
HEAD_START_S: Final = 0.25
"""What each attempt has to itself before news may replace it: whoever announces new addresses all
the time keeps nobody from a member that answers."""

T = TypeVar("T")


class Sightings:
    """Addresses that discovery proposed, by mesh and node."""

    def __init__(self) -> None:
        self._found: dict[tuple[MeshId, NodeId], tuple[str, ...]] = {}
        self._news = asyncio.Event()

    def __iter__(self) -> Iterator[tuple[MeshId, NodeId, tuple[str, ...]]]:
        return iter([(mesh, node, found) for (mesh, node), found in self._found.items()])

    def add(self, mesh: MeshId, node: NodeId, addresses: tuple[str, ...]) -> None:
        key = (mesh, node)
        if self._found.get(key) == addresses:
            return
        if key in self._found or len(self._found) < MAX_SIGHTINGS:
            self._found[key] = addresses
            self._news.set()

    def of(self, mesh: MeshId) -> tuple[str, ...]:
        """At most `MAX_ADDRESSES`, without repetition."""
        seen = [a for m, _, addresses in self for a in addresses if m == mesh]
        return tuple(dict.fromkeys(seen))[:MAX_ADDRESSES]

    async def heeding(
        self, mesh: MeshId, attempt: Callable[[tuple[str, ...]], Coroutine[None, None, T]]
    ) -> T:
        """`attempt(of(mesh))`, begun anew, and the one before cancelled, whenever `of(mesh)` has
        changed: an address that is silent for long does not keep one waiting that was seen since.
        """
        while True:
            known = self.of(mesh)
            trying = asyncio.create_task(attempt(known), name="sightings:attempt")
            changed = asyncio.create_task(self._wait_other(mesh, known), name="sightings:news")
            try:
                await asyncio.wait({trying}, timeout=HEAD_START_S)
                await asyncio.wait({trying, changed}, return_when=asyncio.FIRST_COMPLETED)
                if trying.done():
                    return trying.result()
            finally:
                for task in (trying, changed):
                    task.cancel()
                await asyncio.gather(trying, changed, return_exceptions=True)

    async def pause(self, mesh: MeshId, seconds: float) -> None:
        """That long, or until `of(mesh)` changes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wait_other(mesh, self.of(mesh))

    async def _wait_other(self, mesh: MeshId, known: tuple[str, ...]) -> None:
        while self.of(mesh) == known:
            self._news.clear()
            await self._news.wait()
