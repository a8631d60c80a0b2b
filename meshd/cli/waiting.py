"""Waiting for a model that was asked for, and telling people at a terminal how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from meshd.errors import MeshdError

if TYPE_CHECKING:
    from meshd.cli.cache_show import EventView
    from meshd.cli.client import AdminClient

POLL_S = 0.1
STANDSTILL_S = 10.0
"""Nodes agree on a host within a few seconds; what has not moved for longer waits for somebody."""

_NOBODY_WORKS: Final = ("absent", "waiting", "ready")
"""States that can last for ever while fewer nodes host a model than were asked for."""


def wait_until_hosted(client: AdminClient, ref: str, name: str, replicas: int) -> dict[str, Any]:
    """The model `name`, deployed as `ref`, of the status once `replicas` nodes are ready to serve.

    Raises MeshdError when it is unloaded meanwhile, when it fails, and when nothing has changed for
    `STANDSTILL_S` and too few nodes can host it. The deployment stands in the last two cases.
    """
    with Watch() as watch:
        seen: object = None
        since = time.monotonic()
        while True:
            status = client.get("/status")
            model = _model(status, name)
            if model["state"] == "absent" and not _is_deployed(status, name):
                raise MeshdError(f"{name} was unloaded while it was loading")
            if model["state"] == "failed":
                raise MeshdError(f"{name}: {model['reason']}")
            ready = [host["node"] for host in model["hosts"] if host["state"] == "ready"]
            if model["state"] == "ready" and len(ready) >= replicas:
                return model
            watch.show(model, ready, replicas)
            now, stands = time.monotonic(), (model["state"], model["reason"], ready)
            if stands != seen or model["state"] not in _NOBODY_WORKS:
                seen, since = stands, now
            elif now - since >= STANDSTILL_S:
                since = now
                _check_prospects(client, ref, model, ready, replicas)
            time.sleep(POLL_S)


class Watch(contextlib.ExitStack):
    """Tells people at a terminal what a model waits for, with a bar for what is counted in bytes.
    Where nobody watches it says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._said: str | None = None
        self._bar: EventView | None = None

    def show(self, model: dict[str, Any], ready: list[str], replicas: int) -> None:
        """`ready`: nodes that serve it, of `replicas` that were asked for."""
        if not sys.stderr.isatty():
            return
        fetch, reason = model["fetch"], model["reason"] or ""
        if fetch is not None:
            if self._bar is None:
                from meshd.cli.cache_show import EventView  # late: only what is fetched needs it

                self._bar = self.enter_context(EventView())
            words = {"t": "progress", "stage": model["state"], "reason": reason}
            self._bar.show({**fetch, **words})
            return
        if model["state"] == "ready":
            reason = f"{len(ready)} of {replicas} nodes: {', '.join(ready)}"
        if reason != self._said:
            self._said = reason
            click.echo(f"{model['state']}: {reason}", err=True)


def _model(status: dict[str, Any], name: str) -> dict[str, Any]:
    """A model that is not in the status is one that nobody has."""
    models: list[dict[str, Any]] = status["models"]
    nobodys: dict[str, Any] = {"id": name, "state": "absent", "reason": None}
    nobodys |= {"fetch": None, "hosts": []}
    return next((model for model in models if model["id"] == name), nobodys)


def _is_deployed(status: dict[str, Any], name: str) -> bool:
    """Whether it is only that no node has taken it up yet."""
    return any(record["model"] == name for record in status["deployments"])


def _check_prospects(
    client: AdminClient, ref: str, model: dict[str, Any], ready: list[str], replicas: int
) -> None:
    """Raises MeshdError unless the nodes that host the model, and those whose turn it is, are
    enough: one of them may be waiting for somebody else's download."""
    name, plan = model["id"], client.post("/plan", {"ref": ref})
    able = sum(node["verdict"] in ("hosts", "next") for node in plan["nodes"])
    if able >= replicas:
        return
    if ready:
        what = f"{name} is ready on {len(ready)} of {replicas} nodes: {plan['decision']}"
    else:
        what = f"{name} waits: {model['reason'] or plan['decision']}"
    raise MeshdError(f"{what}; the deployment stands, `meshd unload {name}` takes it back")
