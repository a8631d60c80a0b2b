"""One child process: started through the guard, heard line by line, ended as a group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

from meshd.config import environment_of_children
from meshd.runtime.output import LineSplitter

GUARD = Path(__file__).with_name("guard.py")
OOM_SCORE_ADJ = 300
"""The kernel ends engines before the daemon: those can be started again."""
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}
"""llama.cpp starts a debugger on itself when it aborts: that keeps the memory of a dead engine for
as long as it reads its symbols, and its own complaints would be taken for the engine's."""
LAST_WORDS_S = 0.5
"""How long after the exit its output may still come; a grandchild can hold the pipe open."""


class ChildProcess:
    """A running child. `on_line` gets each line of its output, `on_exit` its status, last.

    Status as in `subprocess`: the exit code, or minus the number of the signal.
    """

    def __init__(self, transport: asyncio.SubprocessTransport, exited: asyncio.Event) -> None:
        self._transport = transport
        self._exited = exited
        pid = transport.get_pid()
        assert pid is not None, "a transport that was just made has a process"
        self.pid = pid

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        *,
        cwd: Path,
        on_line: Callable[[str], None],
        on_exit: Callable[[int], None],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> ChildProcess:
        """Start `argv` in a session of its own, with `environment` added to ours. Raises OSError if
        no process can be made; a program that cannot be executed is an exit with status 127 and a
        line that says why."""
        transport, protocol = await asyncio.get_running_loop().subprocess_exec(
            lambda: _Output(on_line, on_exit),
            *guarded(argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=cwd,
            env=environment_of_children({**ENVIRONMENT, **environment}),
            start_new_session=True,
        )
        return cls(transport, protocol.exited)

    async def wait_exit(self, timeout_s: float) -> bool:
        """Whether the process ended, and `on_exit` was told, within `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        return self._exited.is_set()

    def signal_group(self, number: signal.Signals) -> None:
        """Send `number` to the child and all it started; nothing if they are gone."""
        if self._transport.get_returncode() is None:
            send_to_group(self.pid, number)


def guarded(argv: Sequence[str], death_signal: int = signal.SIGKILL) -> list[str]:
    """The command line of a child that gets `death_signal` when this process ends, however it
    does; see guard.py."""
    guard = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), str(OOM_SCORE_ADJ)]
    return [*guard, str(int(death_signal)), "--", *argv]


def send_to_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass  # it was faster
    except PermissionError:
        pass  # macOS says so of a group of zombies


class _Output(asyncio.SubprocessProtocol):
    """Tells lines in order and the exit once, after the last line."""

    def __init__(self, on_line: Callable[[str], None], on_exit: Callable[[int], None]) -> None:
        self._on_line = on_line
        self._on_exit = on_exit
        self._splitter = LineSplitter()
        self._transport: asyncio.SubprocessTransport | None = None
        self._pipe_open = True
        self._process_gone = False
        self.exited = asyncio.Event()
        """Set when the exit has been told."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transport has the methods but not the base class.
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        for line in self._splitter.feed(data):
            self._on_line(line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd != 1:
            return
        self._pipe_open = False
        for line in self._splitter.end():
            self._on_line(line)
        if self._process_gone:
            self._tell()

    def process_exited(self) -> None:
        self._process_gone = True
        if self._transport is not None and (pid := self._transport.get_pid()) is not None:
            send_to_group(pid, signal.SIGKILL)  # what it started ends with it
        if self._pipe_open:
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._tell)
        else:
            self._tell()

    def _tell(self) -> None:
        if self.exited.is_set() or self._transport is None:
            return
        self.exited.set()
        status = self._transport.get_returncode()
        self._transport.close()
        self._on_exit(-1 if status is None else status)
