"""Several real daemons, each on a host of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.compiled import binary
from tests.mesh.network import Network, missing
from tests.mesh.nodes import Lan
from tests.node.conftest import short_dir

__all__ = ["short_dir"]

MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def _namespaces() -> None:
    reason = missing()
    if reason is None:
        return
    if os.environ.get("CI"):
        pytest.fail(reason)  # there it is a defect of the set-up, not a reason to pass
    pytest.skip(reason)


@pytest.fixture
def network(_namespaces: None) -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines a test wants to be read beside its result."""
    lines: list[str] = []
    yield lines
    found = request.config.stash.setdefault(MEASURED, [])
    found += [f"{request.node.name}: {line}" for line in lines]


@pytest.fixture
def lan(network: Network, short_dir: Path, measured: list[str]) -> Iterator[Lan]:
    """Nodes without an engine: what they tell each other needs none."""
    lan = Lan(network, short_dir, measured)
    yield lan
    lan.close()


@pytest.fixture
def engine_lan(
    network: Network, short_dir: Path, measured: list[str], engine_dir: Path
) -> Iterator[Lan]:
    """Nodes with a real llama-server."""
    lan = Lan(network, short_dir, measured, engine_dir)
    yield lan
    lan.close()


@pytest.fixture
def mock_lan(network: Network, short_dir: Path, measured: list[str]) -> Iterator[Lan]:
    """Nodes with the benchmarks' engine: it makes no text, but streams of a length and pace that
    a test can choose."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the mock engine (Debian: apt install gcc)")
    directory = short_dir / "mock-engine"
    directory.mkdir()
    (directory / "llama-server").symlink_to(binary("mock_engine"))
    lan = Lan(network, short_dir, measured, directory)
    yield lan
    lan.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := terminalreporter.config.stash.get(MEASURED, []):
        terminalreporter.section("measured in the mesh")
        for line in lines:
            terminalreporter.line(line)
