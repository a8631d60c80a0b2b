"""What a node of a benchmark's mesh tells while something happens: its events, and its answers.

Each is read by a thread. Times are Unix times: those of events are the node's own, whose clock is
this machine's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from bench.lan import API_PORT
from tests.mesh.network import Host

WAIT_S = 10
"""How long the client lets its node wait for a host before it is refused."""
PACE_S = 0.01
"""Of the client, between an answer or a refusal and the next question."""
LIMIT_S = 30.0

Event = Mapping[str, Any]
"""One of `/mesh/events`; `at` is when."""


class Events:
    """What the node of `host` tells of itself and the mesh, from now on."""

    def __init__(self, host: Host) -> None:
        self._seen: list[Event] = []
        self._connection = _connect(host)
        self._connection.request("GET", "/mesh/events")
        self._answer = self._connection.getresponse()
        self._answer.readline()  # it is subscribed
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def seen(self) -> tuple[Event, ...]:
        return tuple(self._seen)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the node hung up
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._answer.close()
        self._connection.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            for line in self._answer:
                if line.startswith(b"data: "):
                    self._seen.append(json.loads(line[6:]))


class Client:
    """Asks the node of `host` for a few tokens, again and again."""

    def __init__(self, host: Host, model: str) -> None:
        self._host = host
        self._body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": "Say something"}],
                "max_tokens": 4,
                "stream": True,
            }
        )
        self._answers: list[tuple[str, float]] = []
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def first_tokens(self, nodes: Collection[str]) -> list[tuple[str, float]]:
        """(node, when its first token came), for each answer by one of `nodes`."""
        return [answer for answer in tuple(self._answers) if answer[0] in nodes]

    def close(self) -> None:
        self._enough.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._enough.wait(PACE_S):
            connection = _connect(self._host)
            headers = {"Content-Type": "application/json", "X-Meshd-Wait-S": str(WAIT_S)}
            try:
                connection.request("POST", "/v1/chat/completions", self._body, headers)
                answer = connection.getresponse()
                if answer.status == 200 and any(_tokens(answer)):
                    self._answers.append((str(answer.headers["x-meshd-node"]), time.time()))
                answer.read()
            except (OSError, http.client.HTTPException):
                pass  # its host died in the middle
            finally:
                connection.close()


def _tokens(answer: http.client.HTTPResponse) -> Iterator[str]:
    """The text of each event that has some."""
    for line in answer:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                if text := choice["delta"].get("content"):
                    yield text


def _connect(host: Host) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=LIMIT_S)
    with host.inside():
        connection.connect()
    return connection
