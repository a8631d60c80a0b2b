"""`meshd status`, `meshd models`, `meshd version`: what the daemon says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meshd import __version__
from meshd.cli.mesh import mesh_line, print_peers
from meshd.cli.options import (
    admin,
    console,
    data_dir_option,
    duration,
    json_option,
    print_json,
    size,
)
from meshd.sizes import format_size


@click.command()
@data_dir_option
@json_option
def status(data_dir: Path | None, as_json: bool) -> int:
    """What this node is, runs and waits for."""
    answer = admin(data_dir).get("/status")
    if as_json:
        print_json(answer)
        return 0
    from rich.markup import escape

    node, runtime, cache = answer["node"], answer["runtime"], answer["cache"]
    out = console()
    out.print(
        f"[bold]{escape(node['name'])}[/] {node['state']}, up {duration(node['uptime_s'])}, "
        f"meshd {node['version']}, API http://{node['listen']}/v1"
    )
    out.print(f"mesh     {escape(mesh_line(answer['mesh']))}")
    if runtime is None:
        out.print("engine   none yet; `meshd runtime build --backend cpu` makes one")
    else:
        proof = runtime["proof"]
        verdict = "passed" if proof["passed"] else "FAILED"
        out.print(
            f"engine   {runtime['id']}: {runtime['build']} ({runtime['backend']}), "
            f"proof {proof['level']} {verdict}"
        )
        if proof["problem"]:
            out.print(f"         built for {runtime['built_for']}: {escape(proof['problem'])}")
    for device in answer["devices"]:
        out.print(
            f"device   {escape(device['name'])} ({device['backend']}), "
            f"{size(device['memory_free_bytes'])} of {size(device['memory_total_bytes'])} free"
            + (f", {format_size(speed)}/s" if (speed := device.get("memory_bytes_per_s")) else "")
        )
    if cache is not None:
        out.print(
            f"cache    {escape(cache['path'])}: {size(cache['used_bytes'])} used, "
            f"{size(cache['free_bytes'])} free on disk"
        )
    _print_models(out, answer["models"])
    if answer["peers"]:
        out.print()
        print_peers(out, answer["peers"])
    return 0


@click.command()
@data_dir_option
@json_option
def models(data_dir: Path | None, as_json: bool) -> int:
    """The models of the mesh, which nodes host them, and what the others wait for."""
    answer = admin(data_dir).get("/status")["models"]
    if as_json:
        print_json(answer)
        return 0
    _print_models(console(), answer)
    return 0


@click.command()
@json_option
def version(as_json: bool) -> int:
    """Print the version."""
    if as_json:
        print_json({"version": __version__})
    else:
        click.echo(f"meshd {__version__}")
    return 0


def _print_models(out: Any, answer: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("MODEL", "STATE", "HOSTS", "SLOTS", "CONTEXT", "WHY / REF"):
        table.add_column(heading, overflow="fold")
    for model in answer:
        hosts = model["hosts"]
        slots = f"{sum(h['slots_free'] for h in hosts)}/{sum(h['slots'] for h in hosts)} free"
        context = next((h["context_length"] for h in hosts if h["context_length"]), None)
        progress = "" if model["progress"] is None else f" {model['progress']:.0%}"
        table.add_row(
            escape(model["id"]),
            model["state"] + progress,
            escape(", ".join(map(_host, hosts)) or "-"),
            slots if hosts else "-",
            str(context or "-"),
            escape(model["reason"] or model["ref"]),
        )
    out.print(table)


def _host(host: dict[str, Any]) -> str:
    """Its name, those of its workers, and its state if it does not serve."""
    name = str(host["node"])
    if host["plan"]["kind"] == "split":
        name += "".join(f" + {worker['node']}" for worker in host["plan"]["workers"])
    return name if host["state"] == "ready" else f"{name} ({host['state']})"
