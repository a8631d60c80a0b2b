"""An engine's process that says and ends what and when a test wants."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path


class ScriptedProcess:
    """In place of `ChildProcess`: says and ends what and when the test wants."""

    made: list[ScriptedProcess] = []  # noqa: RUF012 (emptied by the fixture `scripted`)
    exit_before_spawned: list[int] = []  # noqa: RUF012 (statuses, one for each spawn to come)

    def __init__(
        self,
        argv: Sequence[str],
        on_line: Callable[[str], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self.argv = argv
        self.pid = os.getpid()  # a process whose activity can be read
        self.say = on_line
        self.signals: list[signal.Signals] = []
        self._on_exit = on_exit
        self._exited = asyncio.Event()
        ScriptedProcess.made.append(self)

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        *,
        cwd: Path,
        on_line: Callable[[str], None],
        on_exit: Callable[[int], None],
    ) -> ScriptedProcess:
        process = cls(argv, on_line, on_exit)
        await asyncio.sleep(0)
        if cls.exit_before_spawned:
            process.exit(cls.exit_before_spawned.pop())
            await asyncio.sleep(0)
        return process

    async def wait_exit(self, timeout_s: float) -> bool:
        await self._exited.wait()
        return True

    def signal_group(self, number: signal.Signals) -> None:
        self.signals.append(number)
        self.exit(-number)

    def exit(self, status: int) -> None:
        self._exited.set()
        self._on_exit(status)
