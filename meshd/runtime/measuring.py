"""The shell around `Measured`: a file in the data directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from meshd.errors import MeshdError
from meshd.kernel import Pool, write_atomic
from meshd.runtime.measured import Launch, Measured
from meshd.runtime.reported import MemoryReport

log = logging.getLogger(__name__)


class Measurements:
    """Read once, when it is made, and written whenever there is news. A file that cannot be read or
    written costs a talkative start, nothing more."""

    def __init__(
        self, path: Path, pool: Pool, spawn: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        """`spawn` is called while an engine runs."""
        self._path = path
        self._pool = pool
        self._spawn = spawn
        try:
            self._measured = Measured.from_json(path.read_bytes())
        except FileNotFoundError:
            self._measured = Measured()
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error.strerror)
            self._measured = Measured()

    def find(self, launch: Launch) -> MemoryReport | None:
        return self._measured.find(launch)

    def keep(self, launch: Launch, report: MemoryReport) -> None:
        if self._measured.keep(launch, report):
            self._spawn(self._write(self._measured.to_json()))

    async def _write(self, data: bytes) -> None:
        try:
            await self._pool.run(write_atomic, self._path, data)
        except (OSError, MeshdError) as error:
            log.warning("%s cannot be written: %s", self._path, error)
