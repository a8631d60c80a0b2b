"""Short questions over HTTP, to a port or a unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path

Where = int | Path
"""A port of 127.0.0.1, or the path of a unix socket."""


def chat_status(where: Where, model: str, *, limit_s: float = 30.0) -> int | None:
    """Status of a chat of one token, or None if there was no answer."""
    messages = [{"role": "user", "content": "a"}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 1})
    return _status(where, "POST", "/v1/chat/completions", body, limit_s)


def get_status(where: Where, path: str, *, limit_s: float = 30.0) -> int | None:
    return _status(where, "GET", path, None, limit_s)


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


def _status(where: Where, method: str, path: str, body: str | None, limit_s: float) -> int | None:
    connection = _Connection(where, limit_s)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return answer.status
