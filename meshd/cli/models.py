"""`meshd load` and `meshd unload`: what the mesh serves."""

from __future__ import annotations

import time
from pathlib import Path

import click

from meshd.cli.options import absolute, admin, data_dir_option, json_option, print_json
from meshd.cli.waiting import POLL_S, wait_until_hosted
from meshd.cli.words import count_of_hosts


@click.command()
@click.argument("ref")
@click.option("--ctx", "context", type=click.IntRange(min=128), help="Context, tokens per slot.")
@click.option("--parallel", type=click.IntRange(1, 1024), help="Slots: requests at once.")
@click.option(
    "--replicas",
    type=count_of_hosts,
    metavar="N|auto",
    help="How many nodes are to host it (default: as before, else 1); auto: as demand has it.",
)
@click.option(
    "--host",
    metavar="NODE",
    help="The only node that may host it: its name, its id, or the beginning of one.",
)
@click.option("--split", is_flag=True, help="Spread it over several nodes even if one can hold it.")
@click.option("--wait/--no-wait", default=True, help="Wait until it is ready (default) or not.")
@data_dir_option
@json_option
def load(
    ref: str,
    context: int | None,
    parallel: int | None,
    replicas: int | str | None,
    host: str | None,
    split: bool,
    wait: bool,
    data_dir: Path | None,
    as_json: bool,
) -> int:
    """Have the mesh serve the model REF: owner/repo[@revision][:QUANT] or
    owner/repo/path/file.gguf of the Hugging Face hub, a name of the catalog, the path of a GGUF
    file (any shard of a split one), `builtin`.

    The nodes agree on which of them hosts it; `meshd plan REF` shows how. What is not on that
    machine is fetched first, from other nodes or the hub; what is damaged is mended.
    """
    client, ref = admin(data_dir), absolute(ref)
    wishes = {"context": context, "parallel": parallel, "replicas": replicas, "host": host}
    answer = client.post("/load", {"ref": ref, "split": split, **wishes})
    least = replicas if isinstance(replicas, int) else 1
    model = wait_until_hosted(client, ref, answer["model"], least) if wait else answer
    if as_json:
        print_json(model)
    elif wait:
        click.echo(f"{model['id']} is ready")
    else:
        click.echo(f"loading {answer['model']}; `meshd models` shows how far it is")
    return 0


@click.command()
@click.argument("model")
@click.option("--drain", "drain_s", type=click.FloatRange(min=0), help="Seconds for requests.")
@data_dir_option
@json_option
def unload(model: str, drain_s: float | None, data_dir: Path | None, as_json: bool) -> int:
    """Unload MODEL (a name of `meshd models`, or its REF) on every node, after its requests in
    flight."""
    client = admin(data_dir)
    answer = client.post("/unload", {"model": absolute(model), "drain_s": drain_s})
    name = answer["model"]
    while any(m["id"] == name and m["hosts"] for m in client.get("/status")["models"]):
        time.sleep(POLL_S)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{name} is unloaded")
    return 0
