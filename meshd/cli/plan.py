"""`meshd plan`: which node hosts a model, or would, and why not each of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from meshd.cli.options import (
    absolute,
    admin,
    console,
    data_dir_option,
    json_option,
    print_json,
    size,
)

PLAN_TIMEOUT_S: Final = 120.0
"""The headers of weights that are on no disk here are read from the hub."""

_CAN: Final = ("hosts", "next", "stands by")


@click.command()
@click.argument("ref")
@data_dir_option
@json_option
def plan(ref: str, data_dir: Path | None, as_json: bool) -> int:
    """Say which node hosts REF, or would if it were loaded, what memory it needs, and why not
    each of the others. Changes nothing.

    Exit code 1 if no node can host it.
    """
    answer = admin(data_dir, timeout_s=PLAN_TIMEOUT_S).post("/plan", {"ref": absolute(ref)})
    if as_json:
        print_json(answer)
    else:
        _print_plan(console(), answer)
    return 0 if any(node["verdict"] in _CAN for node in answer["nodes"]) else 1


def _print_plan(out: Any, answer: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out.print(answer["decision"], markup=False)
    if answer["shape"] is not None:
        out.print(_needs(answer["shape"]), markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NODE", "VERDICT", "NEEDS", "FREE", "EPOCH", "WHY"):
        table.add_column(heading, overflow="fold")
    for node in answer["nodes"]:
        table.add_row(
            escape(node["name"]),
            node["verdict"],
            size(node["needs_bytes"]),
            size(node["free_bytes"]),
            "-" if node["epoch"] is None else str(node["epoch"]),
            escape(node["why"]),
        )
    out.print(table)


def _needs(shape: dict[str, Any]) -> str:
    """What the memory is for, in one line."""
    return (
        f"weights {size(shape['weights_bytes'])}, cache {size(shape['cache_bytes'])} "
        f"({shape['slots']} slots of {shape['context']} tokens), "
        f"compute {size(shape['compute_bytes'])}, kept prompts {size(shape['prompts_bytes'])}"
    )
