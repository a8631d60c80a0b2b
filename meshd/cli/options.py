"""Options several commands share, and what they do with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import orjson

from meshd import config
from meshd.cli.client import AdminClient

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 240

F = TypeVar("F", bound=Callable[..., Any])


def data_dir_option(command: F) -> F:
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Data directory of the node (MESHD_DATA_DIR; default ~/.local/share/meshd).",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(
        command
    )


def load_config(data_dir: Path | None) -> config.Config:
    """The configuration a daemon on that data directory would have."""
    return config.load({"data_dir": str(data_dir) if data_dir else None}).config


def admin(data_dir: Path | None, *, timeout_s: float = 30.0) -> AdminClient:
    return AdminClient(load_config(data_dir).admin_socket, timeout_s=timeout_s)


def absolute(ref: str) -> str:
    """A path means something where the command was typed, not where the daemon runs. Links stay:
    in a Hugging Face cache they have the names, and what they lead to has none."""
    path = Path(ref).expanduser()
    if path.exists() and (ref.startswith((".", "~", "/")) or path.suffix.lower() == ".gguf"):
        return str(path.absolute())
    return ref


def print_json(value: Any) -> None:
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def console() -> Console:
    """For tables and lines of text. What is not a terminal has no width to wrap at."""
    from rich.console import Console  # late: JSON needs none of it

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def size(count: int | float | None) -> str:
    """`123456789` as `117.7 MiB`."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """`3725` as `1h 2m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600}h"


def round_trip(milliseconds: float | None) -> str:
    """`0.3417` as `0.34 ms`."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.2f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def short_id(identifier: str) -> str:
    """As much of the id of a node or a mesh as tells it from others."""
    return identifier[:8]
