"""What the kernel says a process does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from meshd.runtime.activity import (
    NOTABLE_BYTES,
    NOTABLE_CPU_S,
    NOTABLE_FAULTS,
    Activity,
    moved,
    read_activity,
)
from tests.conftest import wait_until

RESTING = Activity(cpu_s=1.0, major_faults=10, resident_bytes=1 << 30, read_bytes=0)


@pytest.mark.parametrize(
    "after",
    [
        replace(RESTING, cpu_s=1.0 + NOTABLE_CPU_S),
        replace(RESTING, major_faults=10 + NOTABLE_FAULTS),
        replace(RESTING, resident_bytes=(1 << 30) + NOTABLE_BYTES),
        replace(RESTING, read_bytes=NOTABLE_BYTES),
    ],
)
def test_what_counts_as_progress(after: Activity) -> None:
    assert moved(RESTING, after)
    assert not moved(RESTING, RESTING)


def test_answering_a_probe_is_no_progress() -> None:
    probed = Activity(1.01, 11, (1 << 30) + 40_960, 4096)
    assert not moved(RESTING, probed)


def test_shrinking_is_no_progress() -> None:
    assert not moved(RESTING, replace(RESTING, resident_bytes=1 << 20))


def test_a_process_that_works_and_one_that_waits() -> None:
    program = "import sys\nsys.stdin.readline()\nx = b'x' * 50_000_000\nsys.stdin.readline()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        before = read_activity(child.pid)
        assert before is not None
        child.stdin.write(b"\n")
        child.stdin.flush()

        def has_moved() -> bool:
            after = read_activity(child.pid)
            return after is not None and moved(before, after)

        wait_until(has_moved, what="progress")
    assert read_activity(child.pid) is None


def test_ones_own_activity_has_all_its_parts() -> None:
    mine = read_activity(os.getpid())
    assert mine is not None
    assert mine.cpu_s > 0
    assert mine.resident_bytes > 1_000_000
    assert mine.read_bytes > 0
