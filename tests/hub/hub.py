"""The local hub itself: a server in a thread of its own, and what tests say to it."""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from tests.hub.faults import FaultBook
from tests.hub.log import Request, RequestLog
from tests.hub.repositories import Repository, StoredFile, store
from tests.hub.site import Site

HOST = "127.0.0.1"
START_LIMIT_S = 10.0
LOOP_TURNS = 5
"""Of the event loop, from a connection in the queue to a protocol that has it: three or four."""


class LocalHub:
    """Serves from `__enter__` to `close`. Its methods may be called from any thread."""

    endpoint: str
    """`HF_ENDPOINT`."""

    def __init__(self, *, page_size: int = 1000) -> None:
        """`page_size`: entries of a tree in one answer."""
        self.faults = FaultBook()
        self._log = RequestLog()
        self._repositories: dict[str, Repository] = {}
        self._site = Site(self._repositories, self.faults, self._log, page_size)
        self._scratch = tempfile.TemporaryDirectory(prefix="local-hub-")
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="local hub")
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(START_LIMIT_S):
            raise TimeoutError("the local hub does not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections and the port; from now on they are refused. Idempotent."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._loop = None
            self._thread.join()
            self._scratch.cleanup()

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Make `files`, by path in the repository, the content of that branch; the commit's hash.

        Files given by path are served from where they lie and must not change.
        """
        stored: dict[str, StoredFile] = {}
        for path, content in files.items():
            if isinstance(content, bytes):
                location = Path(self._scratch.name, str(next(self._numbers)))
                location.write_bytes(content)
            else:
                location = content
            stored[path] = store(path, location)
        repository = self._repositories.get(repo) or Repository(repo)
        repository.private, repository.gated = private, gated
        commit = repository.commit(revision, stored)
        self._repositories[repo] = repository
        return commit

    def admit(self, token: str, repo: str) -> None:
        """Let whoever has `token` read a private or gated repository."""
        self._repositories[repo].guests.add(token)

    @property
    def requests(self) -> list[Request]:
        """So far, in the order they came."""
        return self._log.all()

    def forget_requests(self) -> None:
        self._log.clear()

    def content_requests(self, pattern: str = "*") -> list[Request]:
        """Requests for bytes of files whose path matches `pattern`, as of fnmatch."""
        return self._log.content(pattern)

    def sent(self, pattern: str = "*") -> int:
        """Bytes of those files that were sent. While an answer is on its way, or has only just
        arrived, it can be some less; see `wait_idle`."""
        return sum(request.sent_bytes for request in self._log.content(pattern))

    def wait_sent(self, pattern: str, at_least: int, *, timeout_s: float = 30.0) -> None:
        """Raises TimeoutError if that many bytes of those files were not sent in time."""
        self._log.wait(
            lambda: self.sent(pattern) >= at_least,
            timeout_s,
            f"{at_least} bytes of {pattern} sent",
        )

    def wait_requests(self, pattern: str, at_least: int, *, timeout_s: float = 30.0) -> None:
        """The same for requests for those files' bytes."""
        self._log.wait(
            lambda: len(self._log.content(pattern)) >= at_least,
            timeout_s,
            f"{at_least} requests for {pattern}",
        )

    def wait_idle(self, *, timeout_s: float = 10.0) -> None:
        """Until every request so far has been answered or given up, so that all is counted."""
        self._log.wait(
            lambda: all(request.is_over for request in self._log.all()),
            timeout_s,
            "every request answered",
        )

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """This process' environment with everything that leads `huggingface_hub` here and keeps it
        from elsewhere; its cache is `home`/hub."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        kept |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }
        return kept if token is None else kept | {"HF_TOKEN": token}

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        cdn = _runner(self._site.cdn_application())
        hub = _runner(self._site.hub_application())
        try:
            self._site.cdn = await _listen(cdn)
            self.endpoint = await _listen(hub)
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await self._ended.wait()
        finally:
            await _settled()  # asyncio loses a connection that it accepts while its server closes
            await hub.cleanup()
            await cdn.cleanup()
            await _settled()  # what is being closed is closed


async def _settled() -> None:
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)


def _runner(application: web.Application) -> web.AppRunner:
    return web.AppRunner(
        application, handler_cancellation=True, shutdown_timeout=0.05, access_log=None
    )


async def _listen(runner: web.AppRunner) -> str:
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    return f"http://{HOST}:{runner.addresses[0][1]}"
