"""Processes of a benchmark: started, placed on cores, read from /proc, and always ended by pid."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STOP_LIMIT_S = 10.0


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


class Stable:
    """The processes of one benchmark; a context manager that ends them all, last started first.

    SIGTERM and SIGINT become SystemExit while it is open, so that they end them as well.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._children: list[subprocess.Popen[bytes]] = []
        self._handlers: list[tuple[signal.Signals, object]] = []

    def __enter__(self) -> Stable:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers.append((number, signal.signal(number, _leave)))
        return self

    def __exit__(self, *_: object) -> None:
        for number, _handler in self._handlers:
            signal.signal(number, signal.SIG_IGN)  # the clean-up itself is not interrupted
        for child in reversed(self._children):
            end(child)
        for number, handler in self._handlers:
            signal.signal(number, handler)  # type: ignore[arg-type]

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start `argv`; its output goes to `<log_dir>/<name>.log`. `env` is added to ours, less
        what would configure meshd behind the benchmark's back, or have it compiled at each start.
        """
        inherited = {k: v for k, v in os.environ.items() if not _meddles(k)}
        with (self._log_dir / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                list(argv),
                cwd=cwd,
                env={**inherited, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._children.append(child)
        return child

    def end(self, child: subprocess.Popen[bytes]) -> None:
        end(child)
        self._children.remove(child)

    def log_of(self, name: str) -> str:
        """The last lines a process wrote, for the message that it failed."""
        try:
            text = (self._log_dir / f"{name}.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-15:])


def end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL after `STOP_LIMIT_S`; returns when it is gone."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(
    condition: Callable[[], object], *, limit_s: float, what: str, step_s: float = 0.01
) -> None:
    """Poll until `condition` is true. Raises BenchError naming `what` after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"not within {limit_s:g} s: {what}")
        time.sleep(step_s)


def free_port() -> int:
    """A port that was free a moment ago; the benchmark fails loudly if another takes it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


# -- /proc ----------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """User and system time of a process, all threads, in seconds; a resolution of one tick."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def family_cpu_s(pid: int) -> float:
    """The same of a process and all it started, those included that it has waited for; 0 of one
    that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = children_of(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) * TICK_S + sum(map(family_cpu_s, children))


def machine_cpu_s() -> float:
    """CPU time all processes together have had, and what the hypervisor took."""
    line = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) * TICK_S


def own_cpu_s() -> float:
    """CPU time of this process and of the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def children_of(pid: int) -> tuple[int, ...]:
    """Direct children, oldest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += map(int, (task / "children").read_text().split())
    return tuple(sorted(found))


def argv_of(pid: int) -> tuple[str, ...]:
    try:
        return tuple(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1])
    except (FileNotFoundError, ProcessLookupError):
        return ()  # it has just ended


def place(pid: int, cores: frozenset[int]) -> None:
    """Let every thread of `pid` run on `cores` only. Threads of the future inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


@contextlib.contextmanager
def placed_here(cores: frozenset[int]) -> Iterator[None]:
    """This process, and what it starts meanwhile, on `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _meddles(variable: str) -> bool:
    return variable.startswith("MESHD_") or variable == "PYTHONDONTWRITEBYTECODE"


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
