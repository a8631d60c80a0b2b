"""`meshd chat`: talk to a model of this node, over the API everybody uses."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from meshd.cli.options import admin, data_dir_option, load_config
from meshd.config import Config, split_address
from meshd.errors import ModelNotFound, UpstreamFailed

Message = dict[str, str]


@click.command()
@click.argument("model", required=False)
@data_dir_option
def chat(model: str | None, data_dir: Path | None) -> int:
    """Chat with MODEL (default: the first one that is ready). Ctrl-D ends.

    With input from a pipe, the whole of it is one message and the answer is all that is printed.
    """
    config = load_config(data_dir)
    status = admin(data_dir).get("/status")
    name = model or _first_ready(status["models"])
    address = status["node"]["listen"]
    if not sys.stdin.isatty():
        _say(config, address, name, [{"role": "user", "content": sys.stdin.read()}])
        return 0
    click.echo(f"{name} on {status['node']['name']}; Ctrl-D ends")
    messages: list[Message] = []
    while True:
        try:
            text = click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort:
            click.echo()
            return 0
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _say(config, address, name, messages)})


def _first_ready(models: list[dict[str, Any]]) -> str:
    for model in models:
        if model["state"] == "ready":
            return str(model["id"])
    raise ModelNotFound("no model is ready; `meshd load builtin` loads the built-in one")


def _say(config: Config, address: str, model: str, messages: list[Message]) -> str:
    """Print the answer while it comes; returns it whole."""
    parts: list[str] = []
    for part in _stream(config, address, model, messages):
        parts.append(part)
        click.echo(part, nl=False)
    click.echo()
    return "".join(parts)


def _stream(config: Config, address: str, model: str, messages: list[Message]) -> Iterator[str]:
    host, port = split_address(address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    headers = {"Content-Type": "application/json", "x-meshd-wait-s": "60"}
    if config.api_key is not None:
        headers["Authorization"] = f"Bearer {config.api_key}"
    connection = http.client.HTTPConnection(host, port, timeout=600)
    try:
        body = json.dumps({"model": model, "messages": messages, "stream": True})
        connection.request("POST", "/v1/chat/completions", body=body.encode(), headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise UpstreamFailed(_message(response.read(), response.status))
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise UpstreamFailed(str(event["error"].get("message")))
            for choice in event.get("choices", ()):
                yield choice.get("delta", {}).get("content") or ""
    except (OSError, http.client.HTTPException) as error:
        raise UpstreamFailed(f"the answer broke off: {error!r}") from None
    finally:
        connection.close()


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the API answered {status}"
