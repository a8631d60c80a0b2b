"""What a node does about the limits of the shell it was started from."""

from __future__ import annotations

import subprocess
import sys

RAISE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from meshd.node import raise_open_files
raise_open_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def after(soft: int, hard: int) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", RAISE.format(soft=soft, hard=hard)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


def test_open_files_are_raised_as_far_as_allowed() -> None:
    assert after(256, 4096) == [4096, 4096]
    assert after(512, 512) == [512, 512]
