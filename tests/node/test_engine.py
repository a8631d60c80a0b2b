"""A daemon and real engines: loading, failing, dying, coming back, leaving nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_until
from tests.models import small_model, split_model
from tests.node.conftest import Daemon, DaemonFactory, wait_gone

pytestmark = pytest.mark.engine


def chat_body(model: str, **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}


def test_killed_engine_comes_back_and_clients_are_told(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--model", "builtin").start()
    daemon.wait_state("builtin", "ready")
    outcomes: list[tuple[int, str]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            status, _, body = daemon.request(
                "POST", "/v1/chat/completions", chat_body("builtin", max_tokens=20)
            )
            code = json.loads(body).get("error", {}).get("code", "")
            outcomes.append((status, code))

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: len(outcomes) > 20, what="requests under way")
        (engine,) = daemon.engines()
        os.kill(engine.pid, signal.SIGKILL)
        wait_until(
            lambda: [p.pid for p in daemon.engines()] not in ([], [engine.pid]), what="new engine"
        )
        daemon.wait_state("builtin", "ready")
        before = len(outcomes)
        wait_until(lambda: (200, "") in outcomes[before:], what="service again")
    finally:
        stop.set()
        for client in clients:
            client.join()
    allowed = {(200, ""), (502, "upstream_failed"), (503, "model_loading")}
    assert set(outcomes) <= allowed
    metrics = daemon.request("GET", "/metrics")[2].decode()
    assert 'meshd_child_restarts_total{kind="llama-server"} 1.0' in metrics


def test_an_engine_is_asked_once_what_it_takes(make_daemon: DaemonFactory) -> None:
    """The first start of a model tells of buffers; the next one is quiet, and it is still known."""
    daemon = make_daemon("--model", "builtin").start()
    first = daemon.wait_state("builtin", "ready")["hosts"][0]
    assert set(first["memory"]) == {"CPU"}
    weights = first["plan"]["workers"][0]["bytes"]
    assert 0.5 * weights < first["memory"]["CPU"] < 1 << 30
    log = daemon.data_dir / "logs" / "builtin.log"
    assert log.read_text().count("KV buffer size") > 0
    kept = daemon.data_dir / "measured.json"
    wait_until(kept.exists, what="the measurement on disk")
    assert daemon.stop() == 0
    log.unlink()
    again = make_daemon("--model", "builtin", data_dir=daemon.data_dir).start()
    assert again.wait_state("builtin", "ready")["hosts"][0]["memory"] == first["memory"]
    assert "KV buffer size" not in log.read_text()


@pytest.mark.parametrize("victims", ["daemon", "both"])
def test_no_engine_outlives_a_killed_daemon(make_daemon: DaemonFactory, victims: str) -> None:
    daemon = make_daemon("--model", "builtin").start()
    daemon.wait_state("builtin", "ready")
    (engine,) = daemon.engines()
    if victims == "both":
        os.kill(engine.pid, signal.SIGSTOP)  # it cannot see anything any more, and must still go
    daemon.stop(signal.SIGKILL)
    assert wait_gone([engine.pid], timeout_s=2.0) < 2.0
    again = make_daemon("--model", "builtin", data_dir=daemon.data_dir).start()
    again.wait_state("builtin", "ready")
    assert len(again.engines()) == 1
    assert again.stop() == 0


def test_an_engine_the_kernel_did_not_end_is_swept_at_the_next_start(
    make_daemon: DaemonFactory,
) -> None:
    daemon = make_daemon().start()
    run_dir = daemon.data_dir / "run"
    assert daemon.stop() == 0
    from meshd.runtime.orphans import write_pid_file

    left_over = psutil.Popen(["sleep", "60"], start_new_session=True)
    bystander = psutil.Popen(["sleep", "60"], start_new_session=True)
    try:
        write_pid_file(run_dir / "old.pid", left_over.pid)
        (run_dir / "other.pid").write_text(f"{bystander.pid} 1\n")  # its pid, another start time
        (run_dir / "old.sock").touch()
        make_daemon(data_dir=daemon.data_dir).start()
        assert left_over.wait(5) == -signal.SIGKILL
        assert bystander.poll() is None
        assert list(run_dir.iterdir()) == []
    finally:
        bystander.kill()
        bystander.wait()


def test_a_missing_shard_fails_at_once_and_is_named(
    make_daemon: DaemonFactory, short_dir: Path, engine_dir: Path
) -> None:
    shards = split_model(small_model(short_dir / "big.gguf"), engine_dir)
    assert len(shards) == 4
    missing = shards[2]
    kept = missing.rename(short_dir / "kept")
    daemon = make_daemon().start()
    began = time.monotonic()
    daemon.load(str(shards[1]))
    model = daemon.wait_state("big", "failed", timeout_s=2.0)
    assert time.monotonic() - began < 2.0
    assert str(missing) in model["reason"]
    assert daemon.engines() == []
    status, headers, body = daemon.request("POST", "/v1/chat/completions", chat_body("big"))
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (503, "model_failed")
    assert str(missing) in error["message"]
    assert int(headers["retry-after"]) >= 1

    kept.rename(missing)
    daemon.load(str(shards[1]))
    daemon.wait_state("big", "ready")


def test_an_engine_that_cannot_load_says_why(make_daemon: DaemonFactory, short_dir: Path) -> None:
    import gguf

    path = short_dir / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    daemon = make_daemon().start()
    daemon.load(str(path))
    model = daemon.wait_state("odd", "failed")
    assert "no-such-architecture" in model["reason"]
    assert daemon.engines() == []


def test_two_models_at_once(make_daemon: DaemonFactory, short_dir: Path) -> None:
    other = small_model(short_dir / "other.gguf")
    daemon = make_daemon("--model", "builtin", "--model", str(other)).start()
    for name in ("builtin", "other"):
        daemon.wait_state(name, "ready")
    assert len(daemon.engines()) == 2
    for name in ("builtin", "other"):
        status, headers, body = daemon.request(
            "POST", "/v1/chat/completions", chat_body(name, max_tokens=4)
        )
        assert (status, json.loads(body)["model"]) == (200, name)
        assert headers["x-meshd-node"] == "testnode"
        assert headers["x-meshd-route"] == "local"
    daemon.unload("other")
    wait_until(lambda: len(daemon.engines()) == 1, what="one engine less")
    # The child is gone a moment before the daemon has heard of it.
    wait_until(
        lambda: daemon.request("POST", "/v1/chat/completions", chat_body("other"))[0] == 404,
        what="the model unknown",
    )
    assert daemon.model("builtin")["state"] == "ready"


def test_a_stopped_engine_is_noticed_and_replaced(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon(
        "--model",
        "builtin",
        MESHD_ENGINE__PROBE_INTERVAL_S="0.2",
        MESHD_ENGINE__HANG_AFTER_S="6",
    ).start()
    daemon.wait_state("builtin", "ready")
    (engine,) = daemon.engines()
    os.kill(engine.pid, signal.SIGSTOP)
    wait_gone([engine.pid], timeout_s=20)
    daemon.wait_state("builtin", "ready")
    assert "answered nothing" in (daemon.data_dir / "stderr.txt").read_text()


# llama-server notices the end of a connection at the next event of a stream; without a stream it
# looks once a second.
@pytest.mark.parametrize(("stream", "limit_s"), [(True, 1.0), (False, 1.5)])
def test_a_client_that_leaves_frees_its_slot(
    make_daemon: DaemonFactory, stream: bool, limit_s: float
) -> None:
    daemon = make_daemon("--model", "builtin").start()
    daemon.wait_state("builtin", "ready")
    body = json.dumps(chat_body("builtin", max_tokens=8000, stream=stream, ignore_eos=True))
    with socket.create_connection(("127.0.0.1", daemon.port)) as client:
        client.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            f"\r\nContent-Type: application/json\r\n\r\n{body}".encode()
        )
        wait_until(lambda: "processing task" in _engine_log(daemon), what="a busy slot")
    # The log, not `/slots`: llama-server looks at the connection of a request without stream only
    # after a second without any result, and an answer to `/slots` is one.
    wait_until(lambda: "cancel task" in _engine_log(daemon), timeout_s=limit_s, what="a free slot")
    wait_until(lambda: daemon.slots_busy("builtin") == 0, timeout_s=0.5, what="a free slot")


def _engine_log(daemon: Daemon) -> str:
    """What the engine did since the token that proved it."""
    text = (daemon.data_dir / "logs" / "builtin.log").read_text()
    return text.partition("release: id")[2]


def test_a_loading_model_says_so_or_lets_wait(
    make_daemon: DaemonFactory, slow_engine: Path
) -> None:
    daemon = make_daemon("--model", "builtin", engine=slow_engine).start()
    status, headers, body = daemon.request("POST", "/v1/chat/completions", chat_body("builtin"))
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (503, "model_loading")
    assert int(headers["retry-after"]) >= 1
    assert error["meshd"]["state"] in ("verifying", "waiting", "loading")
    assert error["meshd"]["reason"]
    status, headers, _ = daemon.request(
        "POST",
        "/v1/chat/completions",
        chat_body("builtin", max_tokens=2),
        {"x-meshd-wait-s": "20"},
    )
    assert status == 200
    assert float(headers["x-meshd-queue-ms"]) > 0


@pytest.mark.slow
def test_a_hundred_loads_leave_nothing(make_daemon: DaemonFactory, short_dir: Path) -> None:
    model = small_model(short_dir / "m.gguf")
    daemon = make_daemon().start()
    me = psutil.Process(daemon.pid)

    def cycle() -> None:
        daemon.load(str(model))
        daemon.wait_state("m", "ready")
        daemon.unload("m")
        wait_until(lambda: all(x["id"] != "m" for x in daemon.status()["models"]), what="unload")

    for _ in range(3):
        cycle()
    wait_until(lambda: daemon.engines() == [])
    descriptors, run_dir = me.num_fds(), daemon.data_dir / "run"
    for _ in range(100):
        cycle()
    assert daemon.engines() == []
    assert list(run_dir.iterdir()) == []
    wait_until(lambda: me.num_fds() <= descriptors, what=f"{me.num_fds()} > {descriptors} fds")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hundred_starts_and_stops_leave_nothing(
    make_daemon: DaemonFactory, short_dir: Path
) -> None:
    model = small_model(short_dir / "m.gguf")
    daemon = make_daemon("--model", str(model))
    files: set[str] | None = None
    for _ in range(100):
        daemon.start()
        daemon.wait_state("m", "ready")
        engines = [p.pid for p in daemon.engines()]
        assert daemon.stop() == 0
        assert not any(psutil.pid_exists(p) for p in engines)
        left = {str(p.relative_to(daemon.data_dir)) for p in daemon.data_dir.rglob("*")}
        assert files is None or left == files
        files = left
    assert files is not None
    assert not any(name.endswith((".sock", ".pid")) for name in files)


def test_sigterm_lets_a_stream_finish(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--model", "builtin").start()
    daemon.wait_state("builtin", "ready")
    stream = _Stream(daemon, max_tokens=1500)
    wait_until(lambda: stream.events > 5, what="events")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: _draining(daemon), what="refusal of new requests")
    stream.thread.join(30)
    assert stream.finished
    assert daemon.process.wait(20) == 0


def test_a_second_sigterm_hurries(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--model", "builtin").start()
    daemon.wait_state("builtin", "ready")
    stream = _Stream(daemon, max_tokens=8000)
    wait_until(lambda: stream.events > 5, what="events")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: _draining(daemon), what="refusal of new requests")
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 5.0
    stream.thread.join(10)
    assert not stream.finished


def _draining(daemon: Daemon) -> bool:
    body = chat_body("builtin", max_tokens=1)
    status, headers, answer = daemon.request("POST", "/v1/chat/completions", body)
    if status != 503 or json.loads(answer)["error"]["code"] != "node_draining":
        return False
    assert "retry-after" in headers
    return True


class _Stream:
    """A streamed chat read in a thread."""

    def __init__(self, daemon: Daemon, *, max_tokens: int) -> None:
        self.events = 0
        self.finished = False
        self._daemon = daemon
        self._body = chat_body("builtin", stream=True, max_tokens=max_tokens, ignore_eos=True)
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", self._daemon.port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", body=json.dumps(self._body))
            for line in connection.getresponse():
                self.events += line.startswith(b"data:")
                self.finished |= line.strip() == b"data: [DONE]"
        except (OSError, http.client.HTTPException):
            pass  # cut: `finished` says so
        finally:
            connection.close()
