"""Asks an RPC server that was not built here what it speaks, by running it for a moment."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import Final

from meshd.config import environment_of_children
from meshd.runtime.lending import ports
from meshd.runtime.lending.rpc_client import Connection

ANSWER_LIMIT_S: Final = 5.0
"""It initialises its devices first."""
LOOK_EVERY_S: Final = 0.05


def ask_protocol(binary: Path, limit_s: float = ANSWER_LIMIT_S) -> str | None:
    """The RPC protocol of `binary`, as `7.0.0`; None if it does not answer. Blocking.

    Nothing but a greeting is said to it, and it holds no memory of a model.
    """
    port = ports.free_port()
    try:
        server = subprocess.Popen(
            [str(binary), "-H", ports.LOOPBACK, "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment_of_children({"GGML_RPC_NO_RDMA": "1"}),
            start_new_session=True,
        )
    except OSError:
        return None
    try:
        until = time.monotonic() + limit_s
        while server.poll() is None and time.monotonic() < until:
            # Where the kernel does not tell whose port it is, who answers there has to do.
            if ports.listens(server.pid, port) is not False:
                with contextlib.suppress(OSError, ValueError), Connection(port, _nothing) as asked:
                    return asked.hello()
            time.sleep(LOOK_EVERY_S)
        return None
    finally:
        server.kill()
        server.wait()


def _nothing() -> None:
    """Nobody waits beside it."""
