"""`scripts/arm64/check.sh`: the image's steps and a node on aarch64, when asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHOSEN = "ARM64_TEST"
CHECK = Path(__file__).parents[2] / "scripts" / "arm64" / "check.sh"
LIMIT_S = 3600.0
"""The first run makes a Debian and compiles an engine with one job."""
BLOCK = "arm64"
"""Of docs/install.md: `make arm64-test` runs this file."""


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(LIMIT_S + 60)
def test_the_steps_of_the_image_and_a_node_on_aarch64() -> None:
    if not os.environ.get(CHOSEN):
        pytest.skip("half an hour with an emulated Debian: `make arm64-test`")
    done = subprocess.run([CHECK], stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0
    assert re.search(r"^meshd run listens .* aarch64$", done.stdout, re.MULTILINE)
    assert re.search(r"^chat with builtin .* \d+ tokens$", done.stdout, re.MULTILINE)
