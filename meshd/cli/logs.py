"""`meshd logs`: the daemon's log, or an engine's. Reads the files: works after a crash too."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click

from meshd.cli.options import admin, data_dir_option, load_config
from meshd.errors import NotFound

POLL_S = 0.2


@click.command()
@click.argument("model", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on printing what comes.")
@click.option("-n", "--lines", type=click.IntRange(min=0), default=100, show_default=True)
@click.option("--flight", is_flag=True, help="Last events and effects of every state machine.")
@data_dir_option
def logs(model: str | None, follow: bool, lines: int, flight: bool, data_dir: Path | None) -> int:
    """Print the log of the daemon, or of the engine of MODEL."""
    if flight:
        for line in admin(data_dir).get("/flight")["lines"]:
            click.echo(line)
        return 0
    directory = load_config(data_dir).log_dir
    path = directory / f"{model or 'meshd'}.log"
    if not path.is_file():
        known = sorted(p.stem for p in directory.glob("*.log") if p.stem != "meshd")
        which = f"logs of engines here: {', '.join(known)}" if known else "no engine has run here"
        raise NotFound(f"there is no log {path}; {which}")
    for line in tail(path, lines, follow=follow):
        click.echo(line, nl=False)
    return 0


def tail(path: Path, lines: int, *, follow: bool) -> Iterator[str]:
    """The last `lines` lines of `path`; with `follow`, each new one too, also past a rotation."""
    file = path.open(errors="replace")
    try:
        yield from deque(file, maxlen=lines)
        while follow:
            line = file.readline()
            if line:
                yield line
            elif _rotated(path, file.fileno()):
                file.close()
                file = path.open(errors="replace")
            else:
                time.sleep(POLL_S)
    finally:
        file.close()


def _rotated(path: Path, fd: int) -> bool:
    try:
        return path.stat().st_ino != os.fstat(fd).st_ino
    except FileNotFoundError:
        return False  # between rename and re-creation; ask again
