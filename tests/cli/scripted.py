"""A daemon's admin socket that answers from a script, and the command line that asks it."""

from __future__ import annotations

import json
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

ALPHA, BETA = "a" * 52, "b" * 52


def status(**changes: Any) -> dict[str, Any]:
    return {
        "node": {
            "id": ALPHA,
            "name": "study",
            "version": "0.2.0",
            "role": "member",
            "state": "ready",
            "uptime_s": 61.0,
            "listen": "127.0.0.1:9337",
            "peer_listen": "0.0.0.0:9338",
        },
        "mesh": {
            "id": "0123456789abcdef" * 2,
            "name": "home",
            "members": 3,
            "alive": 2,
            "state": "member",
            "reason": None,
        },
        "runtime": None,
        "devices": [],
        "peers": [],
        "models": [],
        "cache": None,
    } | changes


def peer(**changes: Any) -> dict[str, Any]:
    return {
        "id": BETA,
        "name": "attic",
        "state": "alive",
        "address": "192.168.1.7:9338",
        "rtt_ms": 0.341,
        "version": "0.2.0",
        "role": "member",
        "draining": False,
        "models": ["builtin", "llama"],
        "devices": [],
    } | changes


@dataclass
class Daemon:
    """What it was asked, and what it answers."""

    data_dir: Path
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    turns: dict[str, list[Any]] = field(default_factory=dict)

    def say(self, path: str, *values: Any) -> None:
        """Answer 200 with one after the other; the last one stays."""
        self.turns[path] = list(values)

    def answer(self, path: str) -> tuple[int, Any]:
        turns = self.turns.get(path)
        if turns is None:
            return self.answers[path]
        return 200, turns.pop(0) if len(turns) > 1 else turns[0]


@contextmanager
def listening() -> Iterator[Daemon]:
    directory = Path(tempfile.mkdtemp(prefix="meshd-"))
    scripted = Daemon(directory)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            scripted.asked.append((self.path, body))
            code, value = scripted.answer(self.path)
            payload = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            return

    with socketserver.UnixStreamServer(str(directory / "admin.sock"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield scripted
        server.shutdown()
        thread.join(10)
    shutil.rmtree(directory)


@dataclass(frozen=True)
class Result:
    exit_code: object
    stdout: str
    stderr: str


Cli = Callable[..., Result]
