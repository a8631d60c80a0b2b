from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.processes import (
    BenchError,
    Stable,
    argv_of,
    children_of,
    cpu_s,
    end,
    place,
    placed_here,
    rss_bytes,
    wait_for,
)

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_all_processes_end_with_the_block(tmp_path: Path) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def fail() -> None:
        with Stable(tmp_path) as stable:
            children.extend(stable.start(f"child{i}", SLEEPER) for i in range(2))
            raise BenchError("something went wrong")

    with pytest.raises(BenchError):
        fail()
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2


def test_sigterm_ends_them_too(tmp_path: Path) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def be_told() -> None:
        with Stable(tmp_path) as stable:
            children.append(stable.start("child", SLEEPER))
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()  # the handler leaves

    with pytest.raises(SystemExit) as leaving:
        be_told()
    assert leaving.value.code == 128 + signal.SIGTERM
    assert children[0].returncode == -signal.SIGTERM


def test_process_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.processes.STOP_LIMIT_S", 0.05)
    deaf = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
    end(child)
    assert child.returncode == -signal.SIGKILL


def test_settings_of_meshd_do_not_leak_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_LISTEN", "127.0.0.1:1")
    show = "import os; print([k for k in os.environ if k.startswith('MESHD_')])"
    with Stable(tmp_path) as stable:
        stable.start("child", [sys.executable, "-c", show], env={"MESHD_NAME": "x"}).wait(10)
        assert stable.log_of("child") == "['MESHD_NAME']"


def test_reads_of_proc_are_plausible() -> None:
    pid = os.getpid()
    before = cpu_s(pid)
    wait_for(lambda: cpu_s(pid) > before, limit_s=10, what="CPU time passes", step_s=0)
    assert 1e6 < rss_bytes(pid) < 1e10
    assert argv_of(pid)[0]


def test_children_and_their_cores(tmp_path: Path) -> None:
    core = frozenset({max(os.sched_getaffinity(0))})
    with Stable(tmp_path) as stable:
        child = stable.start("child", SLEEPER)
        assert child.pid in children_of(os.getpid())
        place(child.pid, core)
        assert os.sched_getaffinity(child.pid) == core


def test_placing_oneself_is_undone() -> None:
    before = os.sched_getaffinity(0)
    with placed_here(frozenset({min(before)})):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_wait_names_what_did_not_come() -> None:
    with pytest.raises(BenchError, match=r"not within 0\.01 s: the moon"):
        wait_for(lambda: False, limit_s=0.01, what="the moon", step_s=0.001)
