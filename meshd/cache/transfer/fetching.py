"""The daemon's side of a fetch: the child's start, its news, its end.

Imports nothing that is slow: what fetches lives in the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, Self

from pydantic import TypeAdapter, ValidationError

from meshd.cache.transfer.words import Done, FetchFailed, FetchOrder, News

LINE_LIMIT: Final = 4 * 1024 * 1024
"""Of a line of news: a manifest of a thousand files with long names."""
COMPLAINT_BYTES: Final = 4096
"""How much of what the child says on standard error is kept: its end."""
GRACE_S: Final = 5.0
"""From SIGTERM to SIGKILL."""
DIED: Final = "fetch_died"

_NEWS: Final[TypeAdapter[News]] = TypeAdapter(News)


class Fetch:
    """One child. Iterate over it to the end; the last news is Done or FetchFailed, always.

        async with await Fetch.start(order, command, environment) as fetch:
            async for news in fetch: ...

    Leaving the block ends the child, whatever it is doing.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._complaint = asyncio.create_task(_tail(process.stderr), name="complaints of a fetch")

    @classmethod
    async def start(
        cls, order: FetchOrder, command: Sequence[str], environment: Mapping[str, str]
    ) -> Self:
        """`command` starts the child (`… -m meshd.fetcher`), by way of whatever guards children
        here. Raises OSError if no process can be made."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT,
            env=dict(environment),
            start_new_session=True,
        )
        assert process.stdin is not None, "it was asked for"
        # Sent while we do other things; if the child does not take it, its death will be told.
        process.stdin.write(order.model_dump_json().encode())
        process.stdin.close()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[News]:
        assert self._process.stdout is not None, "it was asked for"
        while True:
            try:
                line = await self._process.stdout.readline()
                if not line:
                    yield await self._died()
                    return
                news = _NEWS.validate_json(line)
            except ValueError as error:  # of readline: longer than the limit
                self._kill()
                what = "nonsense" if isinstance(error, ValidationError) else "without end"
                message = f"the process that fetches speaks {what}"
                yield FetchFailed(code=DIED, message=message, permanent=False)
                return
            yield news
            if isinstance(news, Done | FetchFailed):
                return

    def cancel(self) -> None:
        """End it in good order; it says FetchFailed (`cancelled`), and goes on from there the next
        time. `close` sees to it that it obeys."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def close(self) -> None:
        """Have it end within seconds, if it has not; nothing of it is left. Idempotent."""
        try:
            if self._process.returncode is None:
                self.cancel()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE_S):
                        await self._drain()
        finally:
            self._kill()
            self._complaint.cancel()
            await asyncio.gather(self._complaint, return_exceptions=True)
            await self._process.wait()

    async def _drain(self) -> None:
        """Read what nobody wants any more, so that the child can come to its end."""
        assert self._process.stdout is not None, "it was asked for"
        while await self._process.stdout.read(65_536):
            pass
        await self._process.wait()

    async def _died(self) -> FetchFailed:
        """It ended without a last word, or stopped speaking."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await self._process.wait()
        self._kill()
        status = await self._process.wait()
        how = f"status {status}" if status >= 0 else f"signal {-status}"
        complaint = (await self._complaint).strip().rpartition("\n")[2]
        message = f"the process that fetches ended with {how}"
        if complaint:
            message += f": {complaint[:300]}"
        return FetchFailed(code=DIED, message=message, permanent=False)

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


async def _tail(stream: asyncio.StreamReader | None) -> str:
    """The last of what comes, when it has ended."""
    assert stream is not None, "it was asked for"
    kept = b""
    while piece := await stream.read(65_536):
        kept = (kept + piece)[-COMPLAINT_BYTES:]
    return kept.decode(errors="replace")
