"""One booted machine for all tests of this directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.machine import Machine, missing

CHOSEN = "SERVICE_TEST"
MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(autouse=True)
def _no_leaks() -> None:
    """In place of the search for leaks: processes in the container come and go below this one, and
    all of them end with it."""


@pytest.fixture(scope="module")
def machine(engine_dir: Path) -> Iterator[Machine]:
    if not os.environ.get(CHOSEN):
        pytest.skip("minutes with a container of its own: `make service-test`")
    reason = missing()
    if reason is not None:
        # Who asked for these tests is not served by their absence.
        pytest.fail(reason)
    with Machine(engine_dir) as machine:
        yield machine


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines a test wants to be read beside its result."""
    lines: list[str] = []
    yield lines
    found = request.config.stash.setdefault(MEASURED, [])
    found += [f"{request.node.name}: {line}" for line in lines]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := terminalreporter.config.stash.get(MEASURED, []):
        terminalreporter.section("measured under systemd")
        for line in lines:
            terminalreporter.line(line)
