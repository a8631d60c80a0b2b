"""What this process is told by its environment, and what its children are told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENT_PREFIX = "MESHD_"
SECTION_SEPARATOR = "__"
"""`MESHD_API__QUEUE_PER_MODEL=64` sets `queue_per_model` of section `api`."""


def environment_of_children(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a child process gets: ours, less meshd's own settings and secrets."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith((ENVIRONMENT_PREFIX, "LLAMA_ARG_", "NOTIFY_", "WATCHDOG_"))
    }
    kept.update(extra or {})
    return kept


def hub_cache_dir() -> Path:
    """Where `huggingface_hub` keeps models; its own rules, without importing it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or str(home_of(os.environ) / ".cache")
    return Path(base) / "huggingface" / "hub"


def user_config_dir() -> Path:
    """Where programs of this user keep their settings; systemd its units."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or home_of(os.environ) / ".config")


def under_journal() -> bool:
    """Whether standard error is the systemd journal, which stamps lines itself."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def notify_socket() -> str | None:
    """Where the service manager that started this process listens; see `kernel.notify`."""
    return os.environ.get("NOTIFY_SOCKET")


def watchdog_limit_s() -> float | None:
    """How long the service manager waits for a sign of life of this process; None: it does not.
    sd_watchdog_enabled(3): the variables may have been meant for a parent."""
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not limit.isdecimal() or int(limit) == 0 or pid not in (None, str(os.getpid())):
        return None
    return int(limit) / 1_000_000


def home_of(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()
