"""Short questions over HTTP, to a port or a unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Where = int | Path
"""A port of 127.0.0.1, or the path of a unix socket."""


def chat_status(where: Where, model: str, *, limit_s: float = 30.0) -> int | None:
    """Status of a chat of one token, or None if there was no answer."""
    messages = [{"role": "user", "content": "a"}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 1})
    answer = _exchange(where, "POST", "/v1/chat/completions", body, limit_s)
    return None if answer is None else answer[0]


def get_status(where: Where, path: str, *, limit_s: float = 30.0) -> int | None:
    answer = _exchange(where, "GET", path, None, limit_s)
    return None if answer is None else answer[0]


def greedy(
    where: Where, prompt: str | Sequence[int], tokens: int, *, limit_s: float = 120.0
) -> dict[str, Any] | None:
    """What an engine itself says to so many of the likeliest tokens after `prompt` (text or
    tokens), of which it remembers nothing: `tokens`, and `timings`. None without a good answer."""
    wanted = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    wanted |= {"return_tokens": True, "cache_prompt": False}
    answer = _exchange(where, "POST", "/completion", json.dumps(wanted), limit_s)
    if answer is None or answer[0] != 200:
        return None
    found: dict[str, Any] = json.loads(answer[1])
    return found


class _Connection(http.client.HTTPConnection):
    def __init__(self, where: Where, limit_s: float) -> None:
        super().__init__("127.0.0.1", timeout=limit_s)
        self._where = where

    def connect(self) -> None:
        if isinstance(self._where, Path):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(str(self._where))
        else:
            self.sock = socket.create_connection(("127.0.0.1", self._where), self.timeout)


def _exchange(
    where: Where, method: str, path: str, body: str | None, limit_s: float
) -> tuple[int, bytes] | None:
    """Status and body of the answer."""
    connection = _Connection(where, limit_s)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
