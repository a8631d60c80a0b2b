"""Fixtures every test may use. Leaked tasks, threads, children and sockets fail the test."""

from __future__ import annotations

import asyncio
import atexit
import gc
import inspect
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

from meshd.errors import MeshdError

# No test asks anybody outside this machine for weights, or looks into the developer's own: tests of
# the hub name one of their own. Set before huggingface_hub is imported, which reads it then.
os.environ |= {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HOME": tempfile.mkdtemp(prefix="meshd-tests-hf-"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
}
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# A run in the background begins with SIGINT ignored, and tests of Ctrl-C would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("quick", deadline=None, max_examples=25)  # `make check`
settings.register_profile("default", deadline=None, max_examples=100)
settings.register_profile(
    "soak", deadline=None, max_examples=5000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

LEAK_DEADLINE_S = 5.0
LAST_LINES = 25
"""Of what a failed test said, shown once more at the end."""
COLLECTED_AFTER_S = 1.0
"""What a library left in a cycle (a connection in the traceback of its own error) is closed by the
collector, whose time comes by chance: it is given one turn."""


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Children, threads and sockets that a test started are gone when it ends."""
    if inspect.iscoroutinefunction(getattr(request.node, "function", None)):
        request.getfixturevalue("_no_leaked_tasks")
    before = _resources()
    yield
    began, collected = time.monotonic(), False
    while leaked := _resources() - before:
        waited_s = time.monotonic() - began
        if waited_s > LEAK_DEADLINE_S:
            pytest.fail(f"left behind: {sorted(leaked)}")
        if waited_s > COLLECTED_AFTER_S and not collected:
            collected = True
            gc.collect()
        time.sleep(0.01)


@pytest.fixture
async def _no_leaked_tasks() -> AsyncIterator[None]:
    yield
    await asyncio.sleep(0)  # let done callbacks run
    current = asyncio.current_task()
    leaked = [t.get_name() for t in asyncio.all_tasks() if t is not current and not t.done()]
    assert not leaked, f"tasks left running: {leaked}"


@pytest.fixture(scope="session")
def engine_dir() -> Path:
    """Directory of a real llama-server; `make engine` provides one."""
    if chosen := os.environ.get("MESHD_TEST_ENGINE"):
        return Path(chosen)
    from meshd import config
    from meshd.runtime.registry import Registry

    try:
        record = Registry(config.load().config.cache_dir).find(None)
    except MeshdError as error:
        if os.environ.get("CI"):
            raise  # there it is a defect of the set-up, not a reason to pass
        pytest.skip(f"no engine: {error.message}")
    return Path(record.server_path).parent


def wait_until(condition: Callable[[], object], *, timeout_s: float = 10.0, what: str = "") -> None:
    """Poll `condition` until it is true; fails, naming `what`, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {what or condition}")
        time.sleep(0.01)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every test that could not run, and why; and repeat at the end how the others failed: of
    a long run the end is what is kept."""
    for kind in ("failed", "error"):
        for report in terminalreporter.stats.get(kind, []):
            terminalreporter.section(f"{kind}: {report.nodeid}", sep="-")
            for line in report.longreprtext.splitlines()[-LAST_LINES:]:
                terminalreporter.line(line)
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("could not run here")
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.line(f"{report.nodeid}: {reason}")


def _resources() -> set[str]:
    own = psutil.Process()
    found = set()
    for child in own.children(recursive=True):
        try:
            found.add(f"child {child.pid} {' '.join(child.cmdline())[:80]}")
        except psutil.NoSuchProcess:
            continue
    found |= {
        f"thread {t.ident} {t.name}"
        for t in threading.enumerate()
        if not t.name.startswith("pydev")
    }
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = entry.readlink()
        except FileNotFoundError:
            continue
        if str(target).startswith("socket:"):
            found.add(f"fd {entry.name} {target}")
    return found
