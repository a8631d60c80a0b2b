"""Clients of a node that ask while something happens to the mesh."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from tests.mesh.nodes import MeshNode

PACE_S = 0.02
"""Between an answer and the next question: refusals come at once, and asking is not what is
tested."""
LIMIT_S = 120.0
MESSAGES = [{"role": "user", "content": "Say something"}]


@dataclass(frozen=True, slots=True)
class Answer:
    ended_at: float
    """Monotonic."""
    status: int
    node: str
    """Whose engine answered; empty for a refusal."""
    code: str
    """Of an error; empty for an answer."""
    retry_after: str | None = None


class Asker:
    """Asks `node` for short answers of `model`, one after the other, while its block runs."""

    def __init__(self, node: MeshNode, model: str) -> None:
        self.answers: list[Answer] = []
        """Appended to by the asking thread, in the order in which they came."""
        self._node = node
        self._model = model
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._ask, name=f"asks {node.name}")
        self._problem: Exception | None = None

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._enough.set()
        self._thread.join()
        if error is None and self._problem is not None:
            raise self._problem

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in tuple(self.answers) if answer.status != 200]

    def by(self, *names: str, since: float = 0.0) -> list[Answer]:
        """Answers of engines of those nodes that came after `since`, monotonic."""
        return [a for a in tuple(self.answers) if a.node in names and a.ended_at > since]

    def _ask(self) -> None:
        body = {"model": self._model, "messages": MESSAGES, "max_tokens": 4}
        until = time.monotonic() + LIMIT_S
        while not self._enough.wait(PACE_S) and time.monotonic() < until:
            try:
                status, headers, text = self._node.request("POST", "/v1/chat/completions", body)
            except (OSError, http.client.HTTPException) as problem:
                self._problem = problem  # its own node answers whatever happens to others
                return
            code = "" if status == 200 else str(json.loads(text)["error"]["code"])
            node = headers.get("x-meshd-node", "") if status == 200 else ""
            again = headers.get("retry-after")
            self.answers.append(Answer(time.monotonic(), status, node, code, again))


class LongStream:
    """A stream in flight, of which the first event has come. Closed by whoever opened it."""

    def __init__(self, node: MeshNode, model: str) -> None:
        body = {"model": model, "messages": MESSAGES, "stream": True}
        body |= {"max_tokens": 8000, "ignore_eos": True}
        with contextlib.ExitStack() as stack:
            self._connection = node.connect()
            stack.callback(self._connection.close)
            self._connection.request("POST", "/v1/chat/completions", json.dumps(body))
            self._answer = self._connection.getresponse()
            assert self._answer.status == 200, self._answer.read()
            assert self._answer.readline().startswith(b"data:")
            stack.pop_all()
        self.node = str(self._answer.headers["x-meshd-node"])

    def close(self) -> None:
        self._connection.close()

    def error_at_its_end(self) -> str:
        """Read on to its end: the code of the error that is its last event."""
        *_, last = [line for line in self._answer.read().splitlines() if line]
        code: str = json.loads(last.removeprefix(b"data: "))["error"]["code"]
        return code
