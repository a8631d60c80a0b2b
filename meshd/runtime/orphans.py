"""Engines left over by a daemon that died: the second net below the parent-death signal.

A pid file holds pid and start time: a pid alone may since belong to somebody else.
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from pathlib import Path

from meshd.runtime.process import send_to_group

log = logging.getLogger(__name__)

DEATH_LIMIT_S = 2.0
"""How long to wait for the killed to be gone: a new engine may need the memory they hold."""
POLL_S = 0.01


def write_pid_file(path: Path, pid: int) -> None:
    path.write_text(f"{pid} {start_time(pid) or '-'}\n")


def start_time(pid: int) -> str | None:
    """When `pid` began, in clock ticks since boot; None if no such process runs (or no /proc).

    Source: field 22 of proc_pid_stat(5); the name in field 2 may hold blanks and brackets.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def end_orphans(run_dir: Path) -> int:
    """Kill what the pid files in `run_dir` still name, and empty the directory. Blocking.

    Call it with the data directory locked. Returns how many were killed.
    """
    killed: list[tuple[int, str]] = []
    for path in sorted(run_dir.glob("*.pid")):
        try:
            pid_text, started = path.read_text().split()
            pid = int(pid_text)
        except (OSError, ValueError):
            continue  # half-written: its process was not yet trusted with anything
        if pid > 1 and start_time(pid) == started:
            log.warning("ending engine %d, left over by a daemon that died", pid)
            send_to_group(pid, signal.SIGKILL)
            killed.append((pid, started))
    _wait_gone(killed)
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return len(killed)


def _wait_gone(killed: list[tuple[int, str]]) -> None:
    deadline = time.monotonic() + DEATH_LIMIT_S
    while any(start_time(pid) == started for pid, started in killed):
        if time.monotonic() > deadline:
            log.warning("engines left over by a daemon that died do not end: %s", killed)
            return
        time.sleep(POLL_S)
