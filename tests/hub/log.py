"""What the local hub was asked and what it sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.hub.faults import Fault, Stage


@dataclass(slots=True)
class Request:
    """One request; `status` and `sent_bytes` grow while it is answered."""

    method: str
    path: str
    """Of the URL, with the query."""
    stage: Stage
    subject: str
    """The file's path in the repository; `info` or `tree` of the API."""
    range: tuple[int, int] | None
    """First byte and the one after the last, as far as the client said; -1: to the end."""
    token: str | None
    user_agent: str
    status: int = 0
    """0: no answer yet, or none at all."""
    sent_bytes: int = 0
    """Of the body, given to the kernel."""
    faults: tuple[Fault, ...] = ()
    is_over: bool = False
    """Answered, or nobody waits for the answer any more."""


class RequestLog:
    """All requests, in the order they came. May be used from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()

    def sent(self, request: Request, count: int) -> None:
        with self._changed:
            request.sent_bytes += count
            self._changed.notify_all()

    def over(self, request: Request) -> None:
        with self._changed:
            request.is_over = True
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._requests.clear()

    def all(self) -> list[Request]:
        with self._changed:
            return list(self._requests)

    def content(self, pattern: str) -> list[Request]:
        """Those that carried bytes of files that match `pattern`."""
        return [
            request
            for request in self.all()
            if request.stage is Stage.CONTENT and fnmatchcase(request.subject, pattern)
        ]

    def wait(self, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Raises TimeoutError when `condition` did not become true at any request or byte sent."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise TimeoutError(f"not within {timeout_s} s: {what}")
