"""One ggml-rpc-server for one loan: started, proved, watched, ended.

It listens on the loopback address, without password or encryption, on a port that has to be chosen
for it. So a port proves nothing: it is trusted when the kernel says that this very child listens
there. Where the kernel does not tell, it is trusted when the child prints that it serves there
while it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshd.errors import MeshdError, ModelFailed, UpstreamFailed
from meshd.ids import LoanId, ModelId
from meshd.runtime.lending import ports
from meshd.runtime.lending.rpc_client import probe
from meshd.runtime.orphans import write_pid_file
from meshd.runtime.output import OutputLog
from meshd.runtime.process import ChildProcess
from meshd.runtime.supervisor import EnginePlaces

log = logging.getLogger(__name__)

START_LIMIT_S = 20.0
"""Initialising drivers takes seconds on some machines."""
END_LIMIT_S = 2.0
LOOK_EVERY_S = 0.02
PORT_TRIES = 5
EVIDENCE_LINES = 20
LAST_WORDS = 8
"""Of a message, in lines. What it prints to standard error comes before what waited in the buffer
of its standard output until it ended."""
PORT_TAKEN = "Failed to create server socket"
"""All it prints if it cannot listen, whatever the cause; it exits with status 0 then."""
SERVES, RESTS = "Accepted client connection", "Client connection closed"
"""What it prints when it begins to serve a connection, and when it is done with it; nothing leaves
its buffer before. All three: ggml/src/ggml-rpc/ggml-rpc.cpp, build 0c1e570."""
REST_LIMIT_S = 0.5
"""How long it may go on serving before it is killed: whoever it serves should be gone already."""


@dataclass(frozen=True, slots=True)
class RpcSpec:
    """One RPC server to run."""

    loan: LoanId
    model: ModelId
    binary: str
    devices: tuple[str, ...]
    """As the engine calls them, in this order; none leaves the choice to the engine."""
    rpc_protocol: str
    """What it has to speak."""
    threads: int | None = None
    """For the CPU; None is the engine's default."""
    cache_dir: Path | None = None
    """Where its cache of tensors lies, in `rpc/`; a private directory. None: it has no cache."""


def rpc_argv(spec: RpcSpec, port: int) -> tuple[str, ...]:
    argv = [spec.binary, "-H", ports.LOOPBACK, "-p", str(port)]
    if spec.devices:
        argv += ["-d", ",".join(spec.devices)]
    if spec.threads is not None:
        argv += ["-t", str(spec.threads)]
    if spec.cache_dir is not None:
        argv += ["-c"]
    return tuple(argv)


class RpcServer:
    """A server that runs. `on_exit` is told why, once, if it ends before `stop` is called."""

    def __init__(
        self, spec: RpcSpec, *, places: EnginePlaces, log_bytes: int, on_exit: Callable[[str], None]
    ) -> None:
        """Use `start`."""
        self.spec = spec
        self.port = 0
        self._run_dir = places.run_dir
        self._on_exit = on_exit
        self._output = OutputLog(places.log_dir / f"rpc-{spec.model}.log", limit_bytes=log_bytes)
        self._said: deque[str] = deque(maxlen=EVIDENCE_LINES)
        self._process: ChildProcess | None = None
        self._status: int | None = None
        self._running = False
        self._resting = asyncio.Event()
        self._ended_at_rest = False

    @classmethod
    async def start(
        cls, spec: RpcSpec, *, places: EnginePlaces, log_bytes: int, on_exit: Callable[[str], None]
    ) -> RpcServer:
        """A server that listens and was asked what it speaks.

        Raises MeshdError, with its last words, if that does not come within `START_LIMIT_S`;
        nothing of it is left then.
        """
        server = cls(spec, places=places, log_bytes=log_bytes, on_exit=on_exit)
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await server._start()
        except BaseException as error:
            await server.stop()
            if isinstance(error, TimeoutError):
                raise server._failed(f"did not listen within {START_LIMIT_S:g} s") from None
            raise
        log.info("rpc-server of %s serves on port %d (pid %d)", spec.model, server.port, server.pid)
        return server

    @property
    def pid(self) -> int:
        assert self._process is not None, "whoever has a server has one that was started"
        return self._process.pid

    @property
    def endpoint(self) -> str:
        return f"{ports.LOOPBACK}:{self.port}"

    def evidence(self) -> tuple[str, ...]:
        """Its last lines."""
        return tuple(self._said)

    def strangers(self) -> frozenset[int]:
        """Users other than this process's that are connected to its port, by number: a reason to
        end the loan. Blocks for less than a millisecond, more on a machine with very many
        connections. Empty where the platform does not tell."""
        return ports.users_connected(self.port) - {os.getuid()}

    async def stop(self, *, at_once: bool = False) -> bool:
        """End it and all it started; it knows no gentler way than to be killed. Gone within
        `END_LIMIT_S`, unless a driver holds it. Calling it again does no harm.

        `at_once`: do not let it come to rest. It takes the next connection as soon as one ends, and
        would answer a stranger who waits for his turn.

        Returns whether it was at rest then, serving nobody: all files it wrote to its cache are
        whole, unless the disk was full.
        """
        try:
            if self._running:
                self._running = False
                self._ended_at_rest = not at_once and await self._rests()
        finally:  # also if whoever stops it is cancelled
            if self._process is not None:
                self._process.signal_group(signal.SIGKILL)
        if self._process is not None and not await self._process.wait_exit(END_LIMIT_S):
            log.warning("rpc-server %d was killed and does not end", self._process.pid)
        self._output.close()
        return self._ended_at_rest

    async def _start(self) -> None:
        for _ in range(PORT_TRIES):
            process = await self._spawn(ports.free_port())
            if await self._listens(process):
                await self._ask(process)
                self._running = True
                return
            if not any(PORT_TAKEN in line for line in self._said):
                raise self._failed(f"ended with status {self._status}")
        raise self._failed(f"found no port to listen on, {PORT_TRIES} times")

    async def _spawn(self, port: int) -> ChildProcess:
        self.port = port
        self._status = None
        self._said.clear()
        self._resting.set()
        environment = {"GGML_RPC_NO_RDMA": "1"}
        if self.spec.cache_dir is not None:
            environment["LLAMA_CACHE"] = str(self.spec.cache_dir)
        try:
            process = self._process = await ChildProcess.spawn(
                rpc_argv(self.spec, port),
                cwd=self._run_dir,
                environment=environment,
                on_line=self._line,
                on_exit=self._exited,
            )
        except OSError as error:
            raise ModelFailed(
                f"no process could be started for {self.spec.binary}: {error.strerror or error}"
            ) from None
        try:
            if self._status is None:  # it may have been faster than we
                write_pid_file(self._pid_file, process.pid)
        except OSError as error:  # a full disk; the process runs, and the parent-death signal holds
            log.warning("no pid file for the rpc-server of %s: %s", self.spec.model, error.strerror)
        return process

    async def _listens(self, process: ChildProcess) -> bool:
        """Wait until the child listens; False if it ended instead."""
        while not await process.wait_exit(LOOK_EVERY_S):
            proved = ports.listens(process.pid, self.port)
            if proved is None:
                proved = await self._says_it_serves()
            if proved:
                return True
        return False

    async def _says_it_serves(self) -> bool:
        with contextlib.suppress(UpstreamFailed):  # not yet, or not ours
            await probe(self.endpoint, self.spec.rpc_protocol)
        return any(SERVES in line for line in self._said)

    async def _ask(self, process: ChildProcess) -> None:
        try:
            await probe(self.endpoint, self.spec.rpc_protocol)
        except UpstreamFailed as error:
            raise self._failed(f"is of no use: {error.message}") from None
        if await process.wait_exit(0):
            raise self._failed(f"ended with status {self._status}")

    async def _rests(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REST_LIMIT_S):
                await self._resting.wait()
        return self._resting.is_set() and self._status is None

    def _line(self, line: str) -> None:
        self._said.append(line)
        if SERVES in line:
            self._resting.clear()
        elif RESTS in line:
            self._resting.set()
        self._output.add(line, time.time())

    def _exited(self, status: int) -> None:
        self._status = status
        with contextlib.suppress(OSError):
            self._pid_file.unlink(missing_ok=True)
        if self._running:
            self._running = False
            self._on_exit(self._ended(status))

    @property
    def _pid_file(self) -> Path:
        return self._run_dir / f"{self.spec.loan}.pid"

    def _ended(self, status: int) -> str:
        what = f"ended with status {status}"
        if status == -signal.SIGKILL:  # what it said before has nothing to do with it
            return f"the rpc-server of {self.spec.model} {what}"
        return self._failed(what).message

    def _failed(self, what: str) -> MeshdError:
        words = " / ".join(self._last_words()) or "nothing"
        return ModelFailed(f"the rpc-server of {self.spec.model} {what}; its last words: {words}")

    def _last_words(self) -> list[str]:
        return [line.strip() for line in self._said if line.strip()][-LAST_WORDS:]
