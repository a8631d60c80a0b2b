"""What people get wrong: exit codes, messages, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.node.conftest import DaemonFactory


def meshd(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MESHD_")}
    return subprocess.run(
        [sys.executable, "-m", "meshd", *arguments],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_unknown_flags_and_commands_are_usage_errors() -> None:
    for arguments in (["run", "--modle", "x"], ["lod"], ["load"], ["run", "--log-level", "loud"]):
        done = meshd(*arguments)
        assert done.returncode == 2, arguments
        assert "Usage: meshd" in done.stderr
    assert "--model" in meshd("run", "--modle", "x").stderr


def test_unknown_keys_are_named_with_the_nearest(short_dir: Path) -> None:
    (short_dir / "config.toml").write_text("[api]\nqueue_per_modle = 3\n")
    done = meshd("run", "--data-dir", str(short_dir))
    assert done.returncode == 78
    assert "api.queue_per_modle" in done.stderr
    assert "api.queue_per_model`" in done.stderr
    assert str(short_dir / "config.toml") in done.stderr
    assert [p.name for p in short_dir.iterdir()] == ["config.toml"]


def test_values_are_named_with_their_source(short_dir: Path) -> None:
    done = meshd("run", "--data-dir", str(short_dir), MESHD_LISTEN="nonsense")
    assert done.returncode == 78
    assert "listen" in done.stderr
    assert "MESHD_LISTEN" in done.stderr
    assert meshd("run", "--config", str(short_dir / "none.toml")).returncode == 78


def test_an_open_address_needs_a_key(short_dir: Path) -> None:
    done = meshd("run", "--data-dir", str(short_dir), "--listen", "0.0.0.0:0")
    assert done.returncode == 78
    assert "--api-key-file" in done.stderr


def test_reading_commands_say_that_nobody_runs(short_dir: Path) -> None:
    for arguments in (["status"], ["models"], ["load", "builtin"], ["unload", "x"], ["chat"]):
        done = meshd(*arguments, "--data-dir", str(short_dir / "none"))
        assert done.returncode == 3, (arguments, done.stderr)
        assert "meshd run" in done.stderr
    assert list(short_dir.iterdir()) == []


def test_a_taken_port_is_named_with_its_holder(short_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = meshd("run", "--data-dir", str(short_dir), "--listen", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert str(os.getpid()) in done.stderr
    assert not list(short_dir.rglob("*.sock"))


@pytest.mark.engine
class TestDaemon:
    def test_one_data_directory_one_daemon(self, make_daemon: DaemonFactory) -> None:
        daemon = make_daemon().start()
        done = meshd("run", "--data-dir", str(daemon.data_dir), "--listen", "127.0.0.1:0")
        assert done.returncode == 1
        assert f"pid {daemon.pid}" in done.stderr
        assert daemon.status()["node"]["state"] == "ready"

    def test_bad_references(self, make_daemon: DaemonFactory, short_dir: Path) -> None:
        daemon = make_daemon().start()
        at = ("--data-dir", str(daemon.data_dir))
        hub = meshd("load", "owner/repo:Q4_K_M", *at)
        assert hub.returncode == 1
        assert "127.0.0.1:9 cannot be reached" in hub.stderr
        gone = meshd("load", str(short_dir / "gone.gguf"), *at)
        assert gone.returncode == 1
        assert f"{short_dir / 'gone.gguf'}: is missing" in gone.stderr
        text = short_dir / "text.gguf"
        text.write_text("this is not a model, it only has its name" * 10)
        odd = meshd("load", str(text), *at)
        assert odd.returncode == 1
        assert str(text) in odd.stderr
        assert "GGUF" in odd.stderr
        assert meshd("unload", "nothing", *at).returncode == 1
        unknown = meshd("logs", "nothing", *at)
        assert unknown.returncode == 1

    def test_a_file_that_cannot_be_read(self, make_daemon: DaemonFactory, short_dir: Path) -> None:
        directory = short_dir / "d.gguf"
        directory.mkdir()
        daemon = make_daemon().start()
        done = meshd("load", str(directory), "--data-dir", str(daemon.data_dir))
        assert done.returncode == 1
        assert "directory" in done.stderr

    def test_requests(self, make_daemon: DaemonFactory) -> None:
        daemon = make_daemon().start()
        chat = "/v1/chat/completions"
        cases = [
            ("POST", chat, b"not json", 400, "invalid_request"),
            ("POST", chat, b"[]", 400, "invalid_request"),
            ("POST", chat, b"{}", 400, "invalid_request"),
            ("POST", chat, b'{"model": 3}', 400, "invalid_request"),
            ("POST", chat, b'{"model": "nobody"}', 404, "model_not_found"),
            ("POST", chat, b'{"model": "builtin"}', 404, "model_not_found"),
            ("GET", chat, None, 405, "method_not_allowed"),
            ("GET", "/v1/modles", None, 404, "not_found"),
        ]
        for method, path, body, status, code in cases:
            found, headers, answer = daemon.request(method, path, body)
            error = json.loads(answer)["error"]
            assert (found, error["code"]) == (status, code), (method, path, body)
            assert set(error) >= {"message", "type", "param", "code"}
            assert headers["x-request-id"]
        assert daemon.request("GET", "/livez")[0] == 200
        status, _, answer = daemon.request("GET", "/livez", headers={"Host": "evil.example"})
        assert (status, json.loads(answer)["error"]["code"]) == (403, "host_not_allowed")

    def test_too_large_is_refused_before_it_is_sent(self, make_daemon: DaemonFactory) -> None:
        daemon = make_daemon().start()
        with socket.create_connection(("127.0.0.1", daemon.port)) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 40000000\r\n\r\n"
            )
            client.settimeout(5)
            answer = client.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"request_too_large" in answer

    def test_a_broken_engine_directory_is_a_reason_not_a_crash(
        self, make_daemon: DaemonFactory, short_dir: Path
    ) -> None:
        empty = short_dir / "empty"
        empty.mkdir()
        daemon = make_daemon("--model", "builtin", engine=empty).start()
        model = daemon.wait_state("builtin", "waiting")
        assert "has no llama-server" in model["reason"] or "looking" in model["reason"]
        assert daemon.request("GET", "/readyz")[0] == 200


def test_a_required_gpu_that_is_not_there_is_no_start(short_dir: Path) -> None:
    arguments = ["run", "--require-gpu", "--no-mdns", "--data-dir", str(short_dir / "data")]
    arguments += ["--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"]
    done = meshd(*arguments, XDG_CACHE_HOME=str(short_dir / "cache"), PATH="/none")
    assert done.returncode == 78
    assert done.stderr.splitlines()[-1].startswith("error: --require-gpu: there is no llama.cpp")
    done = meshd(*arguments, "--client", XDG_CACHE_HOME=str(short_dir / "cache"), PATH="/none")
    assert done.returncode == 78
    assert "a client node hosts nothing" in done.stderr
