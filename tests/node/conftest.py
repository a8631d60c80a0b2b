"""A real daemon with a real engine, in a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshd.cli.client import AdminClient
from meshd.errors import DaemonNotRunning
from tests.conftest import wait_until

START_LIMIT_S = 20.0
STOP_LIMIT_S = 20.0


class Daemon:
    """`meshd run` on a free port. `stop()` ends it the way a service manager would."""

    def __init__(self, data_dir: Path, engine_dir: Path, *flags: str, **environ: str) -> None:
        self.data_dir = data_dir
        self._command = [
            *(sys.executable, "-m", "meshd", "run", "--data-dir", str(data_dir)),
            *("--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"),
            *("--runtime-dir", str(engine_dir), "--name", "testnode"),
            *flags,
        ]
        self._environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MESHD_")},
            **environ,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.admin = AdminClient(data_dir / "admin.sock")
        self.port = 0

    def start(self) -> Daemon:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.data_dir / "stderr.txt").open("ab") as stderr:
            self.process = subprocess.Popen(self._command, env=self._environ, stderr=stderr)
        wait_until(self._answers, timeout_s=START_LIMIT_S, what=f"admin socket; {self.stderr()}")
        self.port = int(self.status()["node"]["listen"].rpartition(":")[2])
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.stderr()
        try:
            return bool(self.status()["node"]["state"] == "ready")
        except DaemonNotRunning:
            return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stderr(self) -> str:
        path = self.data_dir / "stderr.txt"
        return path.read_text()[-4000:] if path.exists() else ""

    def flight(self) -> str:
        """The last events and effects of every machine, for the report of a failure."""
        try:
            lines: list[str] = self.admin.get("/flight")["lines"]
        except DaemonNotRunning:
            return "(the daemon is gone)"
        return "\n".join(lines[-60:])

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.admin.get("/status")
        return status

    def model(self, name: str) -> dict[str, Any]:
        return next(m for m in self.status()["models"] if m["id"] == name)

    def load(self, ref: str, **options: Any) -> str:
        name: str = self.admin.post("/load", {"ref": ref, **options})["model"]
        return name

    def unload(self, name: str) -> None:
        self.admin.post("/unload", {"model": name, "drain_s": 5})

    def wait_state(self, name: str, *states: str, timeout_s: float = 20.0) -> dict[str, Any]:
        def reached() -> bool:
            return self.model(name)["state"] in states

        try:
            wait_until(reached, timeout_s=timeout_s, what=f"{name} {states}")
        except pytest.fail.Exception as failure:
            raise AssertionError(f"{failure}\n{self.stderr()}\n{self.flight()}") from None
        return self.model(name)

    def engines(self) -> list[psutil.Process]:
        """Children that are engines; not the short-lived ones that probe or make models."""
        found = []
        for child in psutil.Process(self.pid).children(recursive=True):
            try:
                if "--alias" in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, body=data, headers=headers or {})
            response = connection.getresponse()
            return (
                response.status,
                {k.lower(): v for k, v in response.getheaders()},
                response.read(),
            )
        finally:
            connection.close()

    def slots_busy(self, name: str) -> int:
        """As the engine itself says, asked on its own socket."""
        run_dir = self.data_dir / "run"
        busy = 0
        for path in run_dir.glob("*.sock"):
            client = AdminClient(path)
            if name in {m["id"] for m in client.get("/v1/models")["data"]}:
                busy += sum(slot["is_processing"] for slot in client.get("/slots"))
        return busy

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(STOP_LIMIT_S)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_LIMIT_S)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short path: unix sockets must fit into 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="meshd-"))
    yield path
    shutil.rmtree(path)


DaemonFactory = Callable[..., Daemon]


@pytest.fixture
def make_daemon(short_dir: Path, engine_dir: Path) -> Iterator[DaemonFactory]:
    made: list[Daemon] = []

    def make(
        *flags: str, data_dir: Path | None = None, engine: Path | None = None, **environ: str
    ) -> Daemon:
        directory = data_dir or short_dir / f"n{len(made)}"
        daemon = Daemon(directory, engine or engine_dir, *flags, **environ)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture
def slow_engine(engine_dir: Path, short_dir: Path) -> Path:
    """The real engine, behind a script that waits 2 s before it becomes it."""
    directory = short_dir / "slow"
    directory.mkdir()
    script = directory / "llama-server"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--alias*) sleep 2;; esac\n'
        f'exec "{engine_dir}/llama-server" "$@"\n'
    )
    script.chmod(0o755)
    return directory


def wait_gone(pids: list[int], *, timeout_s: float) -> float:
    """Seconds until none of `pids` runs any more."""
    began = time.monotonic()
    wait_until(
        lambda: not any(psutil.pid_exists(p) and _runs(p) for p in pids),
        timeout_s=timeout_s,
        what=f"end of {pids}",
    )
    return time.monotonic() - began


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
