from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.compiled import binary
from bench.processes import Stable, accepts, free_port, wait_for


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the benchmark's programs (Debian: apt install gcc)")


@pytest.fixture
def stable(tmp_path: Path) -> Iterator[Stable]:
    with Stable(tmp_path) as stable:
        yield stable


@pytest.fixture
def mock_port(stable: Stable) -> int:
    """A running mock engine."""
    port = free_port()
    stable.start("mock", [str(binary("mock_engine"))], env={"MOCK_TCP_PORT": str(port)})
    wait_for(lambda: accepts(port), limit_s=10, what="the mock listens")
    return port
