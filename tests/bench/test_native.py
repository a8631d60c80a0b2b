"""The two C programs: does the mock speak as llama-server does, does the client count right?"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httptools
import pytest

from bench.chats import chat_status, get_status
from bench.compiled import binary
from bench.processes import Stable, wait_for
from meshd.ids import InstanceId
from meshd.runtime import prober
from meshd.runtime.child_events import EngineFacts
from meshd.runtime.probe import probe

STREAM = {"stream": True, "n_events": 40, "rate_hz": 400}


def load(*arguments: object) -> Any:
    argv = [str(binary("load")), *map(str, arguments), "--max-s", "10"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- mock -----------------------------------------------------------------------------------------


def test_meshd_takes_the_mock_for_an_engine(tmp_path: Path) -> None:
    (tmp_path / "llama-server").symlink_to(binary("mock_engine"))
    record = probe(tmp_path)
    assert record.version.startswith("0.5.0-dev")
    assert record.backend == "cpu"


async def test_mock_passes_the_start_probe(stable: Stable, tmp_path: Path) -> None:
    argv = [str(binary("mock_engine")), "--model", "x.gguf", "--alias", "some,~0123"]
    argv += ["--host", "mock.sock", "--ctx-size", "4096", "--parallel", "2"]
    stable.start("mock", [*argv, "--no-webui", "--slots", "--offline"], cwd=tmp_path)
    path = tmp_path / "mock.sock"
    wait_for(lambda: get_status(path, "/health") == 200, limit_s=10, what="the mock listens")
    found = await prober.startup(str(path), InstanceId("~0123"), 5.0)
    assert found == EngineFacts(slots=2, context_length=2048)
    assert await prober.liveness(str(path)) is None
    stranger = await prober.startup(str(path), InstanceId("~9999"), 5.0)
    assert isinstance(stranger, prober.Wrong)


def test_unknown_path_is_404(mock_port: int) -> None:
    assert get_status(mock_port, "/nothing") == 404
    assert chat_status(mock_port, "any") == 200


def test_stream_is_well_formed(mock_port: int) -> None:
    body = json.dumps({**STREAM, "n_events": 3, "rate_hz": 0}).encode()
    chunks = _chunks_of(mock_port, body)
    assert chunks[-1] == b"data: [DONE]\n\n"
    assert len(chunks) == 4
    for number, chunk in enumerate(chunks[:-1]):
        assert len(chunk) == 200
        event = json.loads(chunk.removeprefix(b"data: "))
        content = event["choices"][0]["delta"]["content"]
        assert re.fullmatch(rf"@\d+#{number} x+", content)


def test_connection_serves_pipelined_requests_in_order(mock_port: int) -> None:
    request = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", mock_port), timeout=5) as client:
        client.sendall(request % b"health" + request % b"nothing" + request % b"health")
        received = b""
        while received.count(b"HTTP/1.1 ") < 3:
            received += client.recv(4096)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"404", b"200"]


# -- client ---------------------------------------------------------------------------------------


def test_sequential_requests_are_counted_without_the_warm_up(mock_port: int) -> None:
    report = load("requests", "--port", mock_port, "--count", 200, "--warmup", 10)
    assert (report["answered"], report["timed"], report["errors"]) == (210, 200, 0)
    latency = report["latency_us"]
    assert latency["n"] == 200
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]


def test_closed_loop_over_many_connections(mock_port: int) -> None:
    report = load("requests", "--port", mock_port, "--count", 2000, "--connections", 32)
    assert (report["timed"], report["errors"], report["reconnects"]) == (2000, 0, 0)
    assert report["per_s"] == pytest.approx(2000 / report["elapsed_s"], rel=0.01)


def test_streams_arrive_whole_and_in_order(mock_port: int) -> None:
    body = json.dumps(STREAM)
    report = load(
        *("streams", "--port", mock_port, "--body", body, "--connections", 8, "--events", 40)
    )
    assert (report["finished"], report["events"]) == (8, 320)
    assert (report["lost"], report["disordered"], report["errors"]) == (0, 0, 0)
    assert report["delay_us"]["n"] == 320
    assert report["ttft_us"]["n"] == 8


def test_events_that_never_came_are_lost(mock_port: int) -> None:
    body = json.dumps(STREAM)
    report = load(
        *("streams", "--port", mock_port, "--body", body, "--connections", 2, "--events", 50)
    )
    assert report["lost"] == 20


def test_error_answers_are_errors(mock_port: int) -> None:
    report = load("requests", "--port", mock_port, "--count", 5, "--path", "/nothing")
    assert (report["errors"], report["bad_status"]) == (5, 404)


def test_merged_split_and_missing_events_are_told_apart() -> None:
    """Events 0 and 1 in one read, 2 cut in two reads, 3 missing, 4 alone."""

    def event(number: int) -> bytes:
        data = b'data: {"content":"@%d#%d x"}\n\n' % (1, number)
        return b"%x\r\n%b\r\n" % (len(data), data)

    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [head, event(0) + event(1), event(2)[:20], event(2)[20:], event(4), b"0\r\n\r\n"]
    report = _against(
        parts, lambda port: load("streams", "--port", port, "--events", 5, "--connections", 1)
    )
    assert report["merged"] == 1
    assert report["events"] == 4
    assert report["lost"] == 1
    assert report["disordered"] == 1


def test_answer_that_closes_the_connection_is_followed_by_another_one(mock_port: int) -> None:
    """As nginx does after a thousand requests."""
    closing = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    report = _against(
        [closing], lambda port: load("requests", "--port", port, "--count", 3), connections=3
    )
    assert (report["timed"], report["reconnects"], report["errors"]) == (3, 2, 0)


# -- scripted peers -------------------------------------------------------------------------------


def _chunks_of(port: int, body: bytes) -> list[bytes]:
    """The chunks of an answer, each whole."""
    chunks: list[bytes] = []

    class Reader:
        complete = False

        def on_chunk_header(self) -> None:
            chunks.append(b"")

        def on_body(self, data: bytes) -> None:
            chunks[-1] += data

        def on_message_complete(self) -> None:
            self.complete = True

    reader = Reader()
    parser = httptools.HttpResponseParser(reader)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(body) + body)
        while not reader.complete:
            parser.feed_data(client.recv(65_536))
    return [chunk for chunk in chunks if chunk]


def _against(parts: list[bytes], run: Callable[[int], Any], *, connections: int = 1) -> Any:
    """`run` against a server that answers a request with `parts`, one segment at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_serve, args=(server, parts, connections))
        thread.start()
        try:
            return run(server.getsockname()[1])
        finally:
            thread.join(10)


def _serve(server: socket.socket, parts: list[bytes], connections: int) -> None:
    server.settimeout(10)
    for _ in range(connections):
        client, _ = server.accept()
        with client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.recv(4096)
            for part in parts:
                client.sendall(part)
                _wait_taken(client)


def _wait_taken(client: socket.socket) -> None:
    """Until the peer has read everything: then the next segment is another read of its."""
    port_pair = (client.getpeername()[1], client.getsockname()[1])

    def taken() -> bool:
        # Bytes in the peer's receive queue, as /proc/net/tcp counts them.
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(fields[i].rpartition(":")[2], 16) for i in (1, 2))
            if (local, remote) == port_pair:
                return fields[4].endswith(":00000000")
        return True

    wait_for(taken, limit_s=5, what="the client reads", step_s=0.001)
