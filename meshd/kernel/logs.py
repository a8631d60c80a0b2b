"""Logging of the daemon: stdlib, to standard error and to a rotating file.

Text for people, JSON lines for machines. Under systemd (`JOURNAL_STREAM`) the time is left to the
journal. What travels with a record (request id, model, peer) comes from context variables.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
model: ContextVar[str | None] = ContextVar("model", default=None)

_CONTEXT = {"request_id": request_id, "model": model}

FILE_BYTES = 4 * 1024 * 1024
FILE_BACKUPS = 3


def configure_logging(
    level: str, fmt: Literal["text", "json"], directory: Path | None, *, journal: bool = False
) -> None:
    """Send the root logger to standard error and, if `directory` is given, to `meshd.log` in it."""
    formatter: logging.Formatter = _JsonFormatter() if fmt == "json" else _TextFormatter(journal)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if directory is not None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = logging.handlers.RotatingFileHandler(
            directory / "meshd.log", maxBytes=FILE_BYTES, backupCount=FILE_BACKUPS, delay=True
        )
        handlers.append(file)
    for handler in handlers:
        handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level.upper())
    # A full disk or a closed terminal must not take the daemon down, nor flood it with tracebacks.
    logging.raiseExceptions = False


def _context() -> dict[str, str]:
    return {name: value for name, var in _CONTEXT.items() if (value := var.get()) is not None}


class _TextFormatter(logging.Formatter):
    def __init__(self, journal: bool) -> None:
        clock = "" if journal else "%(asctime)s "
        super().__init__(f"{clock}%(levelname)-7s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        context = " ".join(f"{key}={value}" for key, value in _context().items())
        line = super().format(record)
        return f"{line} [{context}]" if context else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)
