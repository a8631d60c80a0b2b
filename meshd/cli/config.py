"""`meshd config show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meshd import config as configuration
from meshd.cli.options import data_dir_option, json_option, print_json

SECRETS = ("api_key",)


@click.group()
def config() -> None:
    """The configuration of a node."""


@config.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="Configuration file.")
@data_dir_option
@json_option
def show(file: Path | None, data_dir: Path | None, as_json: bool) -> int:
    """Print the effective configuration, and where each value that is no default comes from."""
    flags = {"data_dir": str(data_dir) if data_dir else None}
    loaded = configuration.load(flags, file=file)
    if as_json:
        print_json({key: {"value": _value(loaded.config, key),
                          "source": loaded.sources.get(key, "default")}
                    for key in configuration.known_keys()})  # fmt: skip
        return 0
    for line in describe(loaded):
        click.echo(line)
    return 0


def describe(loaded: configuration.Loaded) -> list[str]:
    """`key = value    # source` for every key, secrets masked."""
    lines = []
    for key in configuration.known_keys():
        source = loaded.sources.get(key)
        lines.append(
            f"{key} = {_value(loaded.config, key)!r}" + (f"    # {source}" if source else "")
        )
    return lines


def _value(loaded: configuration.Config, key: str) -> Any:
    value: Any = loaded
    for part in key.split("."):
        value = getattr(value, part)
    if key in SECRETS and value is not None:
        return "(set)"
    return str(value) if isinstance(value, Path) else configuration.masked(value)
