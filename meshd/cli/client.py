"""The CLI's side of the admin socket: one blocking HTTP exchange at a time, nothing imported that
a short command does not need."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from meshd.errors import DaemonNotRunning, MeshdError


class AdminClient:
    """Talks to the daemon of one data directory.

    Raises DaemonNotRunning if nobody listens on its socket, and `AdminRefused` with the daemon's
    own words if it says no.
    """

    def __init__(self, admin_socket: Path, *, timeout_s: float = 30.0) -> None:
        self._path = admin_socket
        self._timeout_s = timeout_s

    def get(self, path: str) -> Any:
        return self._exchange("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._exchange("POST", path, json.dumps(body).encode())

    def post_lines(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The lines of the answer as they come. There is no time limit: the work may take hours;
        closing the generator hangs up, which cancels it."""
        with self._open("POST", path, json.dumps(body).encode(), timeout_s=None) as response:
            for line in response:
                yield json.loads(line)

    def _exchange(self, method: str, path: str, body: bytes | None) -> Any:
        with self._open(method, path, body, timeout_s=self._timeout_s) as response:
            payload = response.read()
        return json.loads(payload) if payload else None

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, body: bytes | None, *, timeout_s: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, its body unread; raises for one that is an error."""
        connection = _UnixConnection(self._path, timeout_s)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            if response.status >= 400:
                payload = response.read()
                raise AdminRefused(json.loads(payload) if payload else None, response.status)
            yield response
        except (FileNotFoundError, ConnectionRefusedError):
            raise DaemonNotRunning(
                f"no meshd runs on {self._path.parent}; start one with `meshd run`, or name its "
                "data directory with --data-dir"
            ) from None
        except PermissionError:
            raise DaemonNotRunning(
                f"{self._path} belongs to another user; run this command as that user"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise MeshdError(
                f"the daemon at {self._path} broke off: {error!r}; see `meshd logs`"
            ) from None
        finally:
            connection.close()


class AdminRefused(MeshdError):
    """The daemon said no; `message` and `code` are its own."""

    def __init__(self, answer: Any, status: int) -> None:
        error = answer.get("error", {}) if isinstance(answer, dict) else {}
        super().__init__(str(error.get("message") or f"the daemon answered {status}"))
        self.detail = {"code": error.get("code"), "status": status}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
