"""`python -m tests.cache.doomed MOMENT BELOW ARGUMENT…`: `meshd ARGUMENT…`, which kills itself.

The moment is a number of things done to files below the directory BELOW, as the interpreter
announces them (opened, made, renamed, removed; PEP 578), before the next one: chosen, not timed, so
that the same number is the same moment on every machine. With 0 it lives, and their count is the
last line of its standard error.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from meshd.cli import main

CHANGES = ("open", "os.")


def doom(moment: int, below: str) -> None:
    """Kill this process at that moment."""
    prefix = below + os.sep
    done = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if not event.startswith(CHANGES) or not arguments:
            return
        where = arguments[0]
        if isinstance(where, bytes | os.PathLike):
            where = os.fsdecode(where)
        if isinstance(where, str) and where.startswith(prefix):
            done += 1
            if done == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if moment == 0:
        import atexit

        atexit.register(lambda: sys.stderr.write(f"\n{done}\n"))


if __name__ == "__main__":
    doom(int(sys.argv[1]), sys.argv[2])
    sys.argv = ["meshd", *sys.argv[3:]]
    main()
