"""The commands people type, against a daemon with a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.models import small_model
from tests.node.conftest import Daemon, DaemonFactory
from tests.node.test_bad_input import meshd

pytestmark = pytest.mark.engine


@pytest.fixture
def daemon(make_daemon: DaemonFactory) -> Daemon:
    # A chat goes on to the end of the context: the model's noise has no other one.
    daemon = make_daemon("--model", "builtin", MESHD_ENGINE__CONTEXT="256").start()
    daemon.wait_state("builtin", "ready")
    return daemon


def test_status_and_models(daemon: Daemon) -> None:
    at = ("--data-dir", str(daemon.data_dir))
    text = meshd("status", *at).stdout
    assert "testnode" in text
    assert f"http://127.0.0.1:{daemon.port}/v1" in text
    assert "builtin" in text
    status = json.loads(meshd("status", *at, "--json").stdout)
    assert set(status) == {
        *("node", "mesh", "runtime", "devices", "peers", "models", "deployments", "cache")
    }
    node = status["node"]
    assert (node["name"], node["state"], node["role"]) == ("testnode", "ready", "member")
    assert len(node["id"]) == 52
    assert status["runtime"]["binaries"][0]["sha256"]
    assert status["devices"][-1]["backend"] == "cpu"
    (model,) = json.loads(meshd("models", *at, "--json").stdout)
    (host,) = model["hosts"]
    assert (model["state"], host["node"], host["slots"]) == ("ready", "testnode", 4)
    assert host["plan"]["kind"] == "solo"
    assert status == json.loads(daemon.request("GET", "/mesh/status")[2]) | {"node": node}


def test_load_with_options_and_unload(daemon: Daemon, short_dir: Path) -> None:
    at = ("--data-dir", str(daemon.data_dir))
    path = small_model(short_dir / "small.gguf")
    done = meshd("load", str(path), "--ctx", "512", "--parallel", "2", *at, "--json")
    assert done.returncode == 0, done.stderr
    (host,) = json.loads(done.stdout)["hosts"]
    assert (host["slots"], host["context_length"]) == (2, 512)
    again = meshd("load", str(path), "--ctx", "1024", *at, "--json")
    (host,) = json.loads(again.stdout)["hosts"]
    assert host["context_length"] == 1024
    done = meshd("unload", str(path), *at)
    assert (done.returncode, done.stdout) == (0, "small is unloaded\n")
    assert len(daemon.engines()) == 1


def test_a_chat_from_a_pipe(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshd", "chat", "--data-dir", str(daemon.data_dir)],
        input=b"Hello",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1


@contextmanager
def following(daemon: Daemon, *arguments: str) -> Iterator[list[bytes]]:
    command = [sys.executable, "-m", "meshd", "logs", *arguments, "-f"]
    lines: list[bytes] = []
    with subprocess.Popen(
        [*command, "--data-dir", str(daemon.data_dir)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        try:
            yield lines
        finally:
            process.kill()
            reader.join(10)


def test_logs_follow_the_engine_and_the_daemon(daemon: Daemon) -> None:
    with following(daemon, "builtin") as lines:
        body = {"model": "builtin", "prompt": "x", "max_tokens": 1}

        def told() -> bool:
            daemon.request("POST", "/v1/completions", body)
            return any(b"launch_slot_" in line for line in lines)

        wait_until(told, what="the engine's words on a request")
    text = meshd("logs", "-n", "500", "--data-dir", str(daemon.data_dir)).stdout
    assert "engine of builtin is ready" in text
    flight = meshd("logs", "--flight", "--data-dir", str(daemon.data_dir)).stdout
    assert "child builtin" in flight
    assert "hosting" in flight
