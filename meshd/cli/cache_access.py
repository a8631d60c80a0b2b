"""Who carries out `meshd cache …`: the daemon if it runs, else this very process.

The daemon knows which weights are in use and which other nodes have them. Without one nothing is
in use and there is nobody to fetch from but the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshd.cli.client import AdminClient
from meshd.cli.options import load_config
from meshd.errors import DaemonNotRunning

if TYPE_CHECKING:
    from meshd.cache.commands import CacheCommands, Event
    from meshd.config import Config

ASK_TIMEOUT_S = 120.0
"""Looking at a large cache on a slow disk, or removing some."""


class CacheAccess:
    """Commands and events of `meshd.cache.commands.CacheCommands`, blocking."""

    def __init__(self, data_dir: Path | None) -> None:
        self._config = load_config(data_dir)
        self._daemon = AdminClient(self._config.admin_socket, timeout_s=ASK_TIMEOUT_S)

    def ask(self, command: str, **body: Any) -> dict[str, Any]:
        """The answer to `ls`, `rm` or `prune`. Raises MeshdError."""
        answer: dict[str, Any]
        with contextlib.suppress(DaemonNotRunning):
            answer = self._daemon.post(f"/cache/{command}", body)
            return answer

        async def own(commands: CacheCommands) -> dict[str, Any]:
            asked: Coroutine[Any, Any, dict[str, Any]] = getattr(commands, command)(**body)
            return await asked

        answer = self._run(own)
        return answer

    def watch(self, command: str, sink: Callable[[Event], None], **body: Any) -> None:
        """Give `sink` the events of `pull`, `verify` or `repair`. Raises MeshdError.

        Whatever ends it early, an exception of `sink` or KeyboardInterrupt, cancels the work.
        """
        with contextlib.suppress(DaemonNotRunning):
            with contextlib.closing(self._daemon.post_lines(f"/cache/{command}", body)) as events:
                for event in events:
                    sink(event)
            return

        async def own(commands: CacheCommands) -> None:
            async with contextlib.aclosing(getattr(commands, command)(**body)) as events:
                async for event in events:
                    sink(event)

        self._run(own)

    def _run(self, work: Callable[[CacheCommands], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            async with own_commands(self._config) as commands:
                return await work(commands)

        with asyncio.Runner() as runner:
            return runner.run(main())


def own_commands(config: Config) -> contextlib.AbstractAsyncContextManager[CacheCommands]:
    """The commands carried out in this process."""
    from meshd.cache.commanding import commands_here  # late: with a daemon it is not needed
    from meshd.runtime.process import guarded

    return commands_here(config, guarded)
