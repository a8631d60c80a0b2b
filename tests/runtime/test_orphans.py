"""Engines left over by a daemon that died."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.runtime.orphans import end_orphans, start_time, write_pid_file


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_what_still_runs_is_ended_and_the_directory_emptied(
    run_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    write_pid_file(run_dir / "a.pid", sleeper.pid)
    (run_dir / "a.sock").touch()
    (run_dir / "core").touch()
    assert end_orphans(run_dir) == 1
    assert sleeper.poll() == -signal.SIGKILL  # gone by now, not soon
    assert list(run_dir.iterdir()) == []
    assert run_dir.stat().st_mode & 0o777 == 0o700


def test_a_pid_that_now_belongs_to_somebody_else_is_left_alone(
    run_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    (run_dir / "a.pid").write_text(f"{sleeper.pid} 12345\n")
    assert end_orphans(run_dir) == 0
    assert sleeper.poll() is None


@pytest.mark.parametrize(
    "content", ["", "7", "seven 7", "0 0", "-1 0", "1 2 3", "999999999 5", "\x00\xff"]
)
def test_a_pid_file_that_makes_no_sense_is_only_removed(run_dir: Path, content: str) -> None:
    (run_dir / "a.pid").write_text(content, encoding="latin-1")
    assert end_orphans(run_dir) == 0
    assert list(run_dir.iterdir()) == []


def test_without_a_start_time_nothing_is_killed(
    run_dir: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    (run_dir / "a.pid").write_text(f"{sleeper.pid} -\n")
    assert end_orphans(run_dir) == 0
    assert sleeper.poll() is None


def test_a_directory_that_is_not_there_is_made(run_dir: Path) -> None:
    run_dir.rmdir()
    assert end_orphans(run_dir) == 0
    assert run_dir.is_dir()


def test_start_times(sleeper: subprocess.Popen[bytes]) -> None:
    mine, its = start_time(os.getpid()), start_time(sleeper.pid)
    assert mine is not None
    assert its is not None
    assert int(mine) <= int(its)
    os.kill(sleeper.pid, signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(sleeper.pid) is None  # a zombie holds no memory and needs no killing
    sleeper.wait()
    assert start_time(sleeper.pid) is None
