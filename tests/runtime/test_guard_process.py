"""Real children: started through the guard, heard line by line, ended as a group."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import uvloop

from meshd.runtime.process import ENVIRONMENT, GUARD, ChildProcess
from tests.conftest import wait_until
from tests.runtime.conftest import wait_for


class Heard:
    """Output and exit of a child, in the order they were told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.status: int | None = None
        self.lines_at_exit = 0

    def line(self, line: str) -> None:
        self.lines.append(line)

    def exit(self, status: int) -> None:
        assert self.status is None
        self.status = status
        self.lines_at_exit = len(self.lines)

    async def spawn(self, *argv: str, cwd: Path) -> ChildProcess:
        return await ChildProcess.spawn(argv, cwd=cwd, on_line=self.line, on_exit=self.exit)

    async def shell(self, script: str, cwd: Path) -> ChildProcess:
        return await self.spawn("/bin/sh", "-c", script, cwd=cwd)

    async def wait(self) -> int:
        await wait_for(lambda: self.status is not None, "exit")
        assert self.status is not None
        return self.status


@pytest.fixture
def heard() -> Heard:
    return Heard()


async def test_lines_of_both_streams_come_before_the_exit(heard: Heard, tmp_path: Path) -> None:
    child = await heard.shell("echo one; echo two >&2; pwd; printf three; exit 3", tmp_path)
    assert await heard.wait() == 3
    assert heard.lines == ["one", "two", str(tmp_path), "three"]
    assert heard.lines_at_exit == 4
    assert await child.wait_exit(0.0)


async def test_a_signal_is_a_negative_status(heard: Heard, tmp_path: Path) -> None:
    child = await heard.shell("echo up; exec sleep 60", tmp_path)
    await wait_for(lambda: heard.lines, "first line")
    assert not await child.wait_exit(0.0)
    child.signal_group(signal.SIGTERM)
    assert await heard.wait() == -signal.SIGTERM
    child.signal_group(signal.SIGKILL)  # to nobody: no error


async def test_what_the_child_started_ends_with_it(heard: Heard, tmp_path: Path) -> None:
    await heard.shell("sleep 60 & echo $!; exit 0", tmp_path)
    assert await heard.wait() == 0
    grandchild = int(heard.lines[0])
    await wait_for(lambda: not _runs(grandchild), "end of the grandchild")


async def test_the_group_gets_the_signal(heard: Heard, tmp_path: Path) -> None:
    child = await heard.shell("sleep 60 & echo $!; wait", tmp_path)
    await wait_for(lambda: heard.lines, "first line")
    child.signal_group(signal.SIGKILL)
    assert await heard.wait() == -signal.SIGKILL
    await wait_for(lambda: not _runs(int(heard.lines[0])), "end of the grandchild")


async def test_a_child_that_prints_without_end_is_not_held_up(heard: Heard, tmp_path: Path) -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo done"
    await heard.shell(script, tmp_path)
    assert await heard.wait() == 0
    assert heard.lines[-1] == "done"
    assert sum(map(len, heard.lines[:-1])) == 3_000_000
    assert max(map(len, heard.lines)) <= 4096


async def test_the_child_is_set_up_as_an_engine_should_be(heard: Heard, tmp_path: Path) -> None:
    program = (
        "import os, resource, signal, sys;"
        "print(os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid());"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0]);"
        "print(open('/proc/self/oom_score_adj').read().strip());"
        "print(os.environ['GGML_NO_BACKTRACE'], 'MESHD_API_KEY' in os.environ);"
        "print(sorted(int(f) for f in os.listdir('/proc/self/fd'))[:3], sys.stdin.read() == '');"
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('SigBlk')])"
    )
    os.environ["MESHD_API_KEY"] = "secret-of-the-daemon"
    try:
        await heard.spawn(sys.executable, "-I", "-S", "-c", program, cwd=tmp_path)
    finally:
        del os.environ["MESHD_API_KEY"]
    assert await heard.wait() == 0
    session, core, oom, environment, files, blocked = heard.lines
    assert session == "True True"
    assert core == "0"
    assert int(oom) == 300
    assert environment == f"{ENVIRONMENT['GGML_NO_BACKTRACE']} False"
    assert files == "[0, 1, 2] True"
    assert blocked == "['0000000000000000']"


async def test_no_descriptor_of_the_daemon_reaches_the_child(heard: Heard, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        await heard.shell("ls -l /proc/self/fd", tmp_path)
        assert await heard.wait() == 0
    assert not any("secret" in line for line in heard.lines)


@pytest.mark.parametrize("name", ["missing", "not_executable"])
async def test_what_cannot_be_executed_is_said(heard: Heard, tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    if name == "not_executable":
        program.write_text("no")
    await heard.spawn(str(program), cwd=tmp_path)
    assert await heard.wait() == 127
    assert len(heard.lines) == 1
    assert heard.lines[0].startswith(f"meshd guard: {program} cannot be executed: ")


async def test_no_process_at_all_is_an_error(heard: Heard, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await heard.shell("true", tmp_path / "no such directory")
    assert heard.status is None


def test_the_transports_of_uvloop_do_the_same(tmp_path: Path) -> None:
    """The daemon runs on uvloop."""

    async def main() -> None:
        for check in (
            test_lines_of_both_streams_come_before_the_exit,
            test_a_signal_is_a_negative_status,
            test_what_the_child_started_ends_with_it,
            test_the_group_gets_the_signal,
            test_a_child_that_prints_without_end_is_not_held_up,
            test_no_descriptor_of_the_daemon_reaches_the_child,
            test_no_process_at_all_is_an_error,
            test_many_children_leave_nothing,
        ):
            await check(Heard(), tmp_path)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from meshd.runtime.process import ChildProcess\n"
        "async def main():\n"
        "    child = await ChildProcess.spawn(['/bin/sleep', '60'], cwd=pathlib.Path('/'),\n"
        "        on_line=print, on_exit=print)\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        wait_until(lambda: psutil.Process(pid).name() == "sleep", what="the guard to be over")
        parent.kill()
        parent.wait()
    killed_at = time.monotonic()
    wait_until(lambda: not _runs(pid), timeout_s=2.0, what="end of the child")
    assert time.monotonic() - killed_at < 2.0


def test_a_guard_without_its_parent_does_not_start_anything(tmp_path: Path) -> None:
    stranger = os.getppid()
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(GUARD), str(stranger), "0", "--", "/bin/echo", "hi"],
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (125, b"")


def test_the_guard_keeps_the_hard_limit_of_core_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    program = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[1])"
    done = subprocess.run(
        [
            *(sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), "0", "--"),
            *(sys.executable, "-I", "-S", "-c", program),
        ],
        capture_output=True,
        check=True,
    )
    assert int(done.stdout) == hard


def test_the_guard_costs_little(tmp_path: Path) -> None:
    """The best of several: the machine may be busy, and what is measured is the guard."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), "0", "--", "/bin/true"],
            check=True,
        )
        times.append(time.perf_counter() - began)
    assert min(times) < 0.06, times


async def test_many_children_leave_nothing(heard: Heard, tmp_path: Path) -> None:
    me = psutil.Process()
    descriptors = me.num_fds()
    for _ in range(20):
        one = Heard()
        await one.shell("echo hi", tmp_path)
        await one.wait()
    await asyncio.sleep(0)
    assert me.num_fds() <= descriptors + 1  # the loop may keep one of its own
    assert me.children() == []


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
