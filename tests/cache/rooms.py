"""A cache room of a test: a private cache, the local hub, and real fetch children."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from meshd.cache.commanding import CacheCommander
from meshd.cache.commands import Event, Events
from meshd.cache.room import CacheRoom
from meshd.config import load
from meshd.kernel import Pool
from meshd.runtime.process import guarded
from meshd.view import ModelState, Preparing
from tests.hub import LocalHub

REPO = "acme/model-GGUF"


@dataclass
class Moves:
    """What was said of a preparation."""

    all: list[Preparing] = field(default_factory=list)

    def __call__(self, now: Preparing) -> None:
        self.all.append(now)

    @property
    def states(self) -> list[ModelState]:
        """Without repetitions."""
        found: list[ModelState] = []
        for move in self.all:
            if not found or found[-1] is not move.state:
                found.append(move.state)
        return found


class RoomMaker:
    """Rooms over one Hugging Face cache; each has a book-keeping of its own only if asked."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch, hub: LocalHub | None) -> None:
        self.home = home
        self._patch = patch
        self._open: list[tuple[CacheRoom, Pool]] = []
        if hub is not None:
            self.use(hub)

    def use(self, hub: LocalHub) -> None:
        """Have fetch children, and this process, talk to `hub`."""
        environment = hub.environment(self.home)
        for name, value in environment.items():
            self._patch.setenv(name, value)

    def use_none(self) -> None:
        """From now on the hub cannot be reached."""
        self._patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    def make(self, *, in_use: Callable[[], frozenset[str]] = frozenset, **cache: Any) -> CacheRoom:
        """`cache`: settings of [cache]."""
        flags = {f"cache.{key}": value for key, value in cache.items()}
        flags |= {"data_dir": str(self.home / "data"), "cache_dir": str(self.home / "xdg")}
        config = load(flags, environ={}).config
        pool = Pool("test", workers=2)
        room = CacheRoom(config, pool, guarded=guarded, in_use=in_use)
        self._open.append((room, pool))
        return room

    def commands(self, **cache: Any) -> CacheCommander:
        return CacheCommander(self.make(**cache))

    def close(self) -> None:
        for room, pool in self._open:
            room.close()
            pool.close()


async def told(events: Events) -> list[Event]:
    return [event async for event in events]


def by_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["t"] == kind]
