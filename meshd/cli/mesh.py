"""`meshd invite`, `peers`, `revoke`, `leave`, `drain`, `undrain`: nodes among others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meshd.cli.options import (
    admin,
    console,
    data_dir_option,
    duration,
    json_option,
    print_json,
    round_trip,
    short_id,
)
from meshd.cli.words import length_of_time

MIN_TTL_S = 60.0
MAX_TTL_S = 30 * 86_400.0

LEAVE_TIMEOUT_S = 60.0
"""Leaving waits until the others were told."""


@click.command()
@click.option(
    "--ttl",
    "ttl_s",
    type=length_of_time,
    metavar="TIME",
    default="24h",
    show_default=True,
    help="How long it may be used: 30m, 24h, 7d (at most 30d).",
)
@click.option(
    "--uses",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="How many machines may join with it.",
)
@click.option(
    "--role",
    type=click.Choice(["member", "client"]),
    default="member",
    show_default=True,
    help="A client uses the mesh and hosts nothing.",
)
@click.option("--issuer", is_flag=True, help="Who joins with it may invite others.")
@data_dir_option
@json_option
def invite(
    ttl_s: float, uses: int, role: str, issuer: bool, data_dir: Path | None, as_json: bool
) -> int:
    """Make a token with which another machine can join this mesh.

    The token is a secret: whoever has it can join until it is used up or has run out.
    """
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise click.BadParameter("an invite lasts 1m to 30d", param_hint="'--ttl'")
    if issuer and role == "client":
        raise click.UsageError("a client cannot be an issuer; leave out --role client or --issuer")
    body = {"ttl_s": ttl_s, "uses": uses, "role": role, "issuer": issuer}
    answer = admin(data_dir).post("/invite", body)
    if as_json:
        print_json(answer)
        return 0
    times = "once" if uses == 1 else f"{uses} times"
    click.echo(answer["token"])
    click.echo(f"\nWithin {duration(ttl_s)}, {times}, on the machine that is to join:\n")
    click.echo(answer["command"])
    return 0


@click.command()
@data_dir_option
@json_option
def peers(data_dir: Path | None, as_json: bool) -> int:
    """The other nodes of the mesh, as this one sees them."""
    answer = admin(data_dir).get("/status")
    if as_json:
        print_json(answer["peers"])
        return 0
    if not answer["peers"]:
        click.echo("no other nodes; `meshd invite` makes a token with which one can join")
        return 0
    print_peers(console(), answer["peers"])
    return 0


@click.command()
@click.argument("node")
@data_dir_option
@json_option
def revoke(node: str, data_dir: Path | None, as_json: bool) -> int:
    """Expel NODE for good: a name of `meshd peers`, an id, or the beginning of one.

    Its links are closed, every node refuses it from then on, and it cannot come back with its old
    key.
    """
    answer = admin(data_dir).post("/revoke", {"node": node})
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['node']} ({short_id(answer['id'])}) is revoked")
    return 0


@click.command()
@data_dir_option
@json_option
def leave(data_dir: Path | None, as_json: bool) -> int:
    """Leave the mesh: tell the others, and forget its certificate and keys."""
    answer = admin(data_dir, timeout_s=LEAVE_TIMEOUT_S).post("/leave", {})
    if as_json:
        print_json(answer)
    else:
        click.echo(f"left the mesh {answer['mesh']}; coming back needs a new invite")
    return 0


@click.command()
@data_dir_option
@json_option
def drain(data_dir: Path | None, as_json: bool) -> int:
    """Hand this node's models over to others and host none: each is served here until another node
    is ready or none can be, and requests in flight finish."""
    answer = admin(data_dir).post("/drain", {})
    if as_json:
        print_json(answer)
    else:
        click.echo("draining: other nodes take its models over; `meshd undrain` takes it back")
    return 0


@click.command()
@data_dir_option
@json_option
def undrain(data_dir: Path | None, as_json: bool) -> int:
    """Host models and take requests again after `meshd drain`."""
    answer = admin(data_dir).post("/undrain", {})
    if as_json:
        print_json(answer)
    else:
        click.echo("this node takes requests again")
    return 0


def print_peers(out: Any, answer: list[dict[str, Any]]) -> None:
    """The table of `peers` of a status, on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NODE", "ID", "STATE", "ADDRESS", "RTT", "VERSION", "ROLE", "MODELS"):
        table.add_column(heading, overflow="fold")
    for peer in answer:
        draining = ", draining" if peer.get("draining") and peer["state"] == "alive" else ""
        table.add_row(
            escape(peer["name"]),
            short_id(peer["id"]),
            peer["state"] + draining,
            escape(peer["address"] or "-"),
            round_trip(peer["rtt_ms"]),
            escape(peer["version"] or "-"),
            peer.get("role", "member"),
            escape(", ".join(_model_id(m) for m in peer["models"]) or "-"),
        )
    out.print(table)


def mesh_line(mesh: dict[str, Any]) -> str:
    """The mesh of a status in one line, without a heading."""
    name, state, reason = mesh["name"], mesh.get("state", "member"), mesh.get("reason")
    if state == "member" and mesh["id"] is not None:
        return f"{name} ({short_id(mesh['id'])}), {mesh['alive']} of {mesh['members']} nodes alive"
    why = f": {reason}" if reason else ""
    return f"none{why}" if state == "none" else f"{name}, {state}{why}"


def _model_id(model: Any) -> str:
    return str(model["id"]) if isinstance(model, dict) else str(model)
