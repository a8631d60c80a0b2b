"""node: the only composition root of the daemon, where configuration becomes machines and services.

May come in: every room. May not come in: argv (cli), and whatever could be decided in a room.
"""

from __future__ import annotations

import asyncio
import faulthandler
import resource
import sys
from typing import Final

from meshd.config import Loaded, under_journal
from meshd.errors import BadConfig
from meshd.kernel import DirectoryLock
from meshd.kernel.logs import configure_logging
from meshd.node.node import Node

OPEN_FILES: Final = 65_536
"""What a node may need with every limit of its configuration used; shells often allow 1024."""


def raise_open_files() -> None:
    """Allow this process as many open files as it may allow itself, up to `OPEN_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(loaded: Loaded) -> int:
    """Be a node until told to stop. Returns the exit code; raises MeshdError if it cannot start."""
    config = loaded.config
    raise_open_files()
    faulthandler.enable()  # a watchdog ends a hung process with SIGABRT: say where it hung
    try:
        config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        config.data_dir.chmod(0o700)
        lock = DirectoryLock(config.data_dir)
    except OSError as error:
        raise BadConfig(
            f"data directory {config.data_dir} cannot be used: {error.strerror}; "
            "name another with --data-dir"
        ) from None
    try:
        configure_logging(
            config.log_level, config.log_format, config.log_dir, journal=under_journal()
        )
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(Node(loaded).run())
    finally:
        lock.release()


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    if sys.implementation.name != "cpython":
        return None
    import uvloop

    return uvloop.Loop
