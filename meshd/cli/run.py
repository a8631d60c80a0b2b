"""`meshd run`: the only command that is the daemon."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from meshd import config
from meshd.errors import BadConfig, BadInvite, ProtocolError


@click.command()
@click.option(
    "--model",
    multiple=True,
    metavar="REF",
    help="Have the mesh serve this model, on whichever node suits best; may be repeated.",
)
@click.option(
    "--auto",
    is_flag=True,
    default=None,
    help="Choose a model of the catalog that fits, if the mesh serves none.",
)
@click.option(
    "--on-demand",
    is_flag=True,
    default=None,
    help="Load a model that lies on some node's disk when a request names it.",
)
@click.option(
    "--idle-unload",
    "idle_unload_s",
    type=float,
    metavar="SECONDS",
    help="Unload what nobody asked for this long, until it is asked for again (default: never).",
)
@click.option(
    "--max-vram",
    metavar="SIZE",
    help="Memory that models may take on this node, such as 40GiB (default: what is free).",
)
@click.option(
    "--join",
    multiple=True,
    metavar="MESH",
    help="An invite token, or the name or a member's HOST:PORT of a mesh this node is in; may be "
    "repeated (MESHD_JOIN keeps a token out of the process list).",
)
@click.option(
    "--mesh", metavar="NAME", help="Name of the mesh to found if it is in none (default: default)."
)
@click.option("--client", is_flag=True, default=None, help="Use the mesh, host nothing.")
@click.option("--name", help="Name of this node (default: the host name).")
@click.option("--listen", metavar="HOST:PORT", help="API address (default 127.0.0.1:9337).")
@click.option(
    "--peer-listen", metavar="HOST:PORT", help="Port for other nodes (default 0.0.0.0:9338)."
)
@click.option(
    "--advertise",
    multiple=True,
    metavar="HOST:PORT",
    help="Tell others to reach this node here; may be repeated (default: its interfaces).",
)
@click.option(
    "--no-mdns", is_flag=True, help="Do not look for members on the LAN, nor be found there."
)
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
@click.option(
    "--require-gpu",
    is_flag=True,
    default=None,
    help="Do not start if models cannot be proved to run on a GPU (exit code 78).",
)
@click.option("--log-format", type=click.Choice(["text", "json"]))
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def run(config_file: Path | None, no_mdns: bool, **flags: Any) -> int:
    """Start a node and serve the API until SIGTERM or Ctrl-C (twice hurries)."""
    flags["mdns"] = False if no_mdns else None
    values = {key: str(v) if isinstance(v, Path) else v for key, v in flags.items()}
    loaded = config.load(values, file=config_file)
    check_join(loaded.config)
    from meshd.node import run as run_node  # late: a usage error needs no daemon

    return run_node(loaded)


def check_join(loaded: config.Config) -> None:
    """Refuse what can never let this node in, before anything is started or written.

    An invite that has run out is no mistake once it has done its work: a unit file keeps it.

    Raises BadInvite for a token that is none, is cut off or has run out, BadConfig for what is
    neither a token nor a name nor an address. The message does not repeat a token.
    """
    for wish in loaded.join:
        if config.is_invite(wish):
            from meshd.peers.joining.invites import decode_invite  # late: few starts have a token

            try:
                decode_invite(wish)
            except BadInvite:
                if decode_invite(wish, now=0.0).mesh_id != _mesh_on_disk(loaded.mesh_dir):
                    raise
        elif not config.is_address(wish) and not re.fullmatch(config.NAME_PATTERN, wish):
            shown = wish if len(wish) <= 24 else f"{wish[:8]}… ({len(wish)} characters)"
            raise BadConfig(
                f"`join` {shown!r} is no invite token (meshd1-…), no HOST:PORT and no name of a "
                "mesh; `meshd invite` on a member prints a token",
                param="join",
            )


def _mesh_on_disk(mesh_dir: Path) -> str | None:
    """The id of the mesh this data directory belongs to, as far as that can be read here."""
    from meshd.peers.trust.certificates import mesh_of

    try:
        return mesh_of((mesh_dir / "ca.crt").read_bytes())[0]
    except (OSError, ProtocolError):
        return None
