"""`meshd cache …`: the models on this machine's disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from meshd.cli.cache_access import CacheAccess
from meshd.cli.options import absolute, console, data_dir_option, json_option, print_json
from meshd.errors import MeshdError

if TYPE_CHECKING:
    from meshd.cache.commands import Event
    from meshd.cli.cache_show import EventView

INTERRUPTED = 130
RESULTS = ("done", "verified", "failed")
"""What the last event can be."""


@click.group()
def cache() -> None:
    """The models on this machine's disk, in the ordinary Hugging Face cache.

    Where a daemon runs it carries these commands out; otherwise this process does, without other
    nodes to fetch from.
    """


@cache.command("ls")
@data_dir_option
@json_option
def list_sets(data_dir: Path | None, as_json: bool) -> int:
    """List the models, whether they are whole, and what takes the space."""
    answer = CacheAccess(data_dir).ask("ls")
    if as_json:
        print_json(answer)
        return 0
    from meshd.cli.cache_show import print_listing  # late: JSON needs no tables

    print_listing(console(), answer)
    return 0


@cache.command()
@click.argument("ref")
@data_dir_option
@json_option
def pull(ref: str, data_dir: Path | None, as_json: bool) -> int:
    """Fetch REF: owner/repo[@revision][:QUANT], owner/repo/path/file.gguf, or a catalog name.

    What is there already is not fetched again; an interrupted fetch goes on where it stopped. With
    --json one line per event, the last one is the result.
    """
    return _fetch("pull", ref, data_dir, as_json)


@cache.command()
@click.argument("ref")
@data_dir_option
@json_option
def repair(ref: str, data_dir: Path | None, as_json: bool) -> int:
    """Verify REF and fetch what is missing or wrong, of a damaged file only its bad parts."""
    return _fetch("repair", ref, data_dir, as_json)


@cache.command()
@click.argument("ref", required=False)
@data_dir_option
@json_option
def verify(ref: str | None, data_dir: Path | None, as_json: bool) -> int:
    """Hash every file of REF, or of all models, and compare with what the hub says it is.

    Exits with 1 if anything is not as it should be.
    """
    from meshd.cli.cache_show import VerifyView

    view = VerifyView(everything=ref is None)
    body = {"ref": None if ref is None else absolute(ref)}
    result = _follow("verify", body, view, data_dir, as_json)
    if result["t"] == "failed":
        return 1
    if not as_json:
        view.print_result(console(), result)
    return 1 if result["wrong"] else 0


@cache.command()
@click.argument("ref")
@click.option("--force", is_flag=True, help="Also if it is pinned, or the last copy in the mesh.")
@data_dir_option
@json_option
def rm(ref: str, force: bool, data_dir: Path | None, as_json: bool) -> int:
    """Remove REF from the disk, unless an engine runs on it."""
    answer = CacheAccess(data_dir).ask("rm", ref=absolute(ref), force=force)
    if as_json:
        print_json(answer)
        return 0
    from meshd.sizes import format_size

    click.echo(f"{answer['model']} is removed: {format_size(answer['freed_bytes'])} freed")
    return 0


@cache.command()
@click.option("--dry-run", is_flag=True, help="Show what would go and what would stay, and why.")
@click.option("--force", is_flag=True, help="Remove last copies in the mesh too.")
@data_dir_option
@json_option
def prune(dry_run: bool, force: bool, data_dir: Path | None, as_json: bool) -> int:
    """Make the cache fit into `cache.budget`: models used longest ago go first.

    Downloads nobody came back for and files no model needs go in any case. Models that are pinned
    or in use stay. Exits with 1 if the cache is still too large.
    """
    answer = CacheAccess(data_dir).ask("prune", dry_run=dry_run, force=force)
    if as_json:
        print_json(answer)
    else:
        from meshd.cli.cache_show import print_plan

        print_plan(console(), answer)
    return 0 if dry_run or not answer["still_over_bytes"] else 1


def _fetch(command: str, ref: str, data_dir: Path | None, as_json: bool) -> int:
    from meshd.cli.cache_show import FetchView

    view = FetchView()
    try:
        result = _follow(command, {"ref": absolute(ref)}, view, data_dir, as_json)
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; `meshd cache {command} {ref}` goes on from here", err=True)
        return INTERRUPTED
    if result["t"] == "failed":
        return 1
    if not as_json:
        click.echo(view.words(ref, result))
    return 0


def _follow(
    command: str, body: dict[str, Any], view: EventView, data_dir: Path | None, as_json: bool
) -> Event:
    """Show the events of `command` as they come; the last one. An error is raised, or is the last
    line of JSON."""
    access = CacheAccess(data_dir)
    last: Event = {"t": None}

    def print_line(event: Event) -> None:
        nonlocal last
        last = event
        click.echo(orjson.dumps(event).decode())

    def show(event: Event) -> None:
        nonlocal last
        last = event
        view.show(event)

    if not as_json:
        with view:
            access.watch(command, show, **body)
        if last["t"] == "failed":
            raise MeshdError(last["message"])
    else:
        try:
            access.watch(command, print_line, **body)
        except MeshdError as error:
            from meshd.cache.commands import failed  # late: only for this

            print_line(failed(error))
    if last["t"] not in RESULTS:
        raise MeshdError("the work ended without a result; `meshd logs` may say why")
    return last
