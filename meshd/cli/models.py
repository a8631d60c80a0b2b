"""`meshd load` and `meshd unload`."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshd.cli.client import AdminClient
from meshd.cli.options import absolute, admin, data_dir_option, json_option, print_json
from meshd.errors import MeshdError

if TYPE_CHECKING:
    from meshd.cli.cache_show import EventView

POLL_S = 0.1


@click.command()
@click.argument("ref")
@click.option("--ctx", "context", type=click.IntRange(min=128), help="Context, tokens per slot.")
@click.option("--parallel", type=click.IntRange(1, 1024), help="Slots: requests at once.")
@click.option("--wait/--no-wait", default=True, help="Wait until it is ready (default) or not.")
@data_dir_option
@json_option
def load(
    ref: str,
    context: int | None,
    parallel: int | None,
    wait: bool,
    data_dir: Path | None,
    as_json: bool,
) -> int:
    """Load the model REF: owner/repo[@revision][:QUANT] or owner/repo/path/file.gguf of the Hugging
    Face hub, a name of the catalog, the path of a GGUF file (any shard of a split one), `builtin`.

    What is not on this machine is fetched first, from other nodes or the hub; what is damaged is
    mended.
    """
    client = admin(data_dir)
    answer = client.post("/load", {"ref": absolute(ref), "context": context, "parallel": parallel})
    model = _wait(client, answer["model"]) if wait else answer
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
    """Unload MODEL (a name of `meshd models`, or its REF) after its requests in flight."""
    client = admin(data_dir)
    answer = client.post("/unload", {"model": absolute(model), "drain_s": drain_s})
    while any(m["id"] == answer["model"] and m["hosts"] for m in _models(client)):
        time.sleep(POLL_S)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['model']} is unloaded")
    return 0


def _wait(client: AdminClient, name: str) -> dict[str, Any]:
    with _Watch() as watch:
        while True:
            model = next((m for m in _models(client) if m["id"] == name), None)
            if model is None or model["state"] == "absent":
                raise MeshdError(f"{name} was unloaded while it was loading")
            if model["state"] == "ready":
                return model
            if model["state"] == "failed":
                raise MeshdError(f"{name}: {model['reason']}")
            watch.show(model)
            time.sleep(POLL_S)


class _Watch(contextlib.ExitStack):
    """Tells people at a terminal what a model waits for, with a bar for what is counted in bytes.
    Where nobody watches it says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._said: str | None = None
        self._bar: EventView | None = None

    def show(self, model: dict[str, Any]) -> None:
        if not sys.stderr.isatty():
            return
        fetch, reason = model["fetch"], model["reason"] or ""
        if fetch is not None:
            if self._bar is None:
                from meshd.cli.cache_show import EventView  # late: only what is fetched needs it

                self._bar = self.enter_context(EventView())
            words = {"t": "progress", "stage": model["state"], "reason": reason}
            self._bar.show({**fetch, **words})
        elif reason != self._said:
            self._said = reason
            click.echo(f"{model['state']}: {reason}", err=True)


def _models(client: AdminClient) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = client.get("/status")["models"]
    return models
