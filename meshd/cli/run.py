"""`meshd run`: the only command that is the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meshd import config


@click.command()
@click.option("--model", multiple=True, metavar="REF", help="Load this model; may be repeated.")
@click.option("--name", help="Name of this node (default: the host name).")
@click.option("--listen", metavar="HOST:PORT", help="API address (default 127.0.0.1:9337).")
@click.option("--peer-listen", metavar="HOST:PORT", help="Address for other nodes; not served yet.")
@click.option("--mesh", metavar="NAME", help="Name of the mesh; of one node for now.")
@click.option("--no-mdns", is_flag=True, help="Do not look for nodes on the LAN.")
@click.option("--api-key", help="Ask clients for this key (prefer --api-key-file).")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the API key.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="Configuration file."
)
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory with a llama-server of your own.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]))
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def run(config_file: Path | None, no_mdns: bool, **flags: Any) -> int:
    """Start a node and serve the API until SIGTERM or Ctrl-C (twice hurries)."""
    flags["mdns"] = False if no_mdns else None
    values = {key: str(v) if isinstance(v, Path) else v for key, v in flags.items()}
    loaded = config.load(values, file=config_file)
    from meshd.node import run as run_node  # late: a usage error needs no daemon

    return run_node(loaded)
