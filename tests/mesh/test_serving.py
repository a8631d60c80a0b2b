"""Several nodes, one endpoint: real engines behind it, the OpenAI SDK in front."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.mesh.nodes import Lan, MeshNode

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "builtin"
PROMPT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something"}]
SLOT_LIMIT_S = 1.0


@pytest.fixture
def hosts(engine_lan: Lan) -> tuple[MeshNode, MeshNode, MeshNode]:
    """Two nodes that serve the built-in model, and a client node."""
    a, b, c = engine_lan.mesh("a", "b", "c", flags={"c": ("--client",)})
    a.load(MODEL, replicas=2)
    engine_lan.until(
        lambda: {h["node"] for h in _model(c)["hosts"] if h["state"] == "ready"} == {"a", "b"},
        timeout_s=30,
        what="c sees both engines ready",
    )
    return a, b, c


@pytest.fixture
def sdk(hosts: tuple[MeshNode, MeshNode, MeshNode]) -> Iterator[OpenAI]:
    """On the client node's host; its connections are made by the thread that is there."""
    *_, c = hosts
    with (
        c.host.inside(),
        OpenAI(base_url=f"{c.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


def test_a_client_node_streams_from_both(
    hosts: tuple[MeshNode, MeshNode, MeshNode], sdk: OpenAI
) -> None:
    a, b, c = hosts
    assert c.status()["node"]["role"] == "client"
    assert c.engines() == []
    (listed,) = sdk.models.list().data
    assert listed.id == MODEL
    assert sorted(listed.model_extra["meshd"]["nodes"]) == ["a", "b"]  # type: ignore[index]
    texts: dict[str, set[str]] = {}
    until = time.monotonic() + 30
    while len(texts) < 2 and time.monotonic() < until:
        with sdk.chat.completions.with_streaming_response.create(
            model=MODEL, messages=PROMPT, max_tokens=24, temperature=0, stream=True
        ) as raw:
            assert raw.headers["x-meshd-route"] == "remote"
            pieces = [e.choices[0].delta.content for e in raw.parse() if e.choices]
        assert len(pieces) > 10
        texts.setdefault(raw.headers["x-meshd-node"], set()).add("".join(filter(None, pieces)))
    assert set(texts) == {a.name, b.name}
    assert len(set.union(*texts.values())) == 1  # greedy, the same weights: the same words


def test_the_answer_is_the_hosts_own(hosts: tuple[MeshNode, MeshNode, MeshNode]) -> None:
    a, _b, c = hosts
    body = {"model": MODEL, "messages": PROMPT, "max_tokens": 32, "temperature": 0, "seed": 1}
    status, headers, there = a.request("POST", "/v1/chat/completions", body)
    assert (status, headers["x-meshd-route"], headers["x-meshd-node"]) == (200, "local", "a")
    while True:
        status, headers, here = c.request("POST", "/v1/chat/completions", body)
        assert (status, headers["x-meshd-route"]) == (200, "remote")
        if headers["x-meshd-node"] == "a":
            break
    assert _without_chance(here) == _without_chance(there)
    assert float(headers["x-meshd-queue-ms"]) >= 0
    assert headers["x-meshd-attempts"] == "1"


def test_a_member_without_the_model_is_an_endpoint_for_it(engine_lan: Lan) -> None:
    a, b = engine_lan.mesh("a", "b")
    a.load(MODEL, host="a")
    engine_lan.until(lambda: _model(b)["state"] == "ready", timeout_s=30, what="b offers it")
    status, headers, _ = b.request(
        "POST", "/v1/completions", {"model": MODEL, "prompt": "1 2 3", "max_tokens": 4}
    )
    assert (status, headers["x-meshd-route"], headers["x-meshd-node"]) == (200, "remote", "a")
    a.unload(MODEL)
    engine_lan.until(lambda: not _model(b)["hosts"], timeout_s=10, what="b offers it no more")


def test_a_host_killed_under_load_costs_no_request(
    engine_lan: Lan, hosts: tuple[MeshNode, MeshNode, MeshNode]
) -> None:
    a, b, c = hosts
    outcomes: list[tuple[int, str, bytes]] = []

    def ask() -> None:
        body = {"model": MODEL, "messages": PROMPT, "max_tokens": 8}
        status, headers, answer = c.request("POST", "/v1/chat/completions", body)
        node = headers.get("x-meshd-node", "")
        outcomes.append((status, node, b"" if status == 200 else answer))

    rate_hz, seconds, kill_at_s = 20, 5.0, 1.5
    began = time.monotonic()
    killed = False
    with ThreadPoolExecutor(32) as pool:
        for number in range(int(rate_hz * seconds)):
            due = began + number / rate_hz
            while (wait_s := due - time.monotonic()) > 0:
                time.sleep(wait_s)  # the pace is what is tested, nothing is waited for
            if not killed and due - began >= kill_at_s:
                os.kill(b.pid, signal.SIGKILL)
                killed = True
            pool.submit(ask)
    assert len(outcomes) == rate_hz * seconds
    failed = [o for o in outcomes if o[0] != 200]
    assert failed == []
    assert {node for _, node, _ in outcomes} == {"a", "b"}
    engine_lan.say(
        f"{len(outcomes)} requests at {rate_hz}/s, "
        f"{sum(node == b.name for _, node, _ in outcomes)} by the host that was killed, "
        f"{len(failed)} failed"
    )
    assert a.sees("b") == "dead"


def test_a_stream_whose_host_dies_ends_with_an_error(
    hosts: tuple[MeshNode, MeshNode, MeshNode],
) -> None:
    a, b, c = hosts
    connection = c.connect()
    try:
        body = json.dumps(_long_chat(stream=True))
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline().startswith(b"data:")
        victim = a if answer.headers["x-meshd-node"] == "a" else b
        os.kill(victim.pid, signal.SIGKILL)
        began = time.monotonic()
        lines = [line for line in answer.read().splitlines() if line]
        assert time.monotonic() - began < 3
    finally:
        connection.close()
    error = json.loads(lines[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_failed"


def test_a_client_that_leaves_frees_the_slot_on_the_other_host(
    engine_lan: Lan, hosts: tuple[MeshNode, MeshNode, MeshNode]
) -> None:
    a, b, c = hosts
    body = json.dumps(_long_chat(stream=True))
    with c.host.inside():
        client = socket.create_connection(("127.0.0.1", c.port))
    with client:
        client.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            f"\r\nContent-Type: application/json\r\n\r\n{body}".encode()
        )
        head = client.recv(65_536)
        busy = a if b"x-meshd-node: a" in head.lower() else b
        engine_lan.until(
            lambda: busy.slots_busy(MODEL) == 1, timeout_s=5, what="a slot busy at the host"
        )
    took_s = engine_lan.until(
        lambda: busy.slots_busy(MODEL) == 0, timeout_s=SLOT_LIMIT_S, what="the slot free again"
    )
    engine_lan.say(f"slot of the remote engine free {took_s:.3f} s after its client left")
    assert a.peers()["b"]["state"] == "alive"


def test_load_spreads_over_both(hosts: tuple[MeshNode, MeshNode, MeshNode]) -> None:
    *_, c = hosts
    nodes: list[str] = []
    lock = threading.Lock()

    def ask() -> None:
        body = _long_chat(max_tokens=40)
        status, headers, _ = c.request("POST", "/v1/chat/completions", body)
        assert status == 200
        with lock:
            nodes.append(headers["x-meshd-node"])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ask) for _ in range(32)]:
            done.result()
    assert min(nodes.count("a"), nodes.count("b")) >= 8


# -- steps ----------------------------------------------------------------------------------------


def _model(node: MeshNode) -> dict[str, Any]:
    return node.model(MODEL)


def _long_chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": PROMPT, "max_tokens": 8000, "ignore_eos": True, **more}


def _without_chance(body: bytes) -> dict[str, Any]:
    """An answer less what differs between two of the same."""
    answer: dict[str, Any] = json.loads(body)
    for key in ("id", "created", "timings"):
        answer.pop(key, None)
    answer.get("usage", {}).pop("prompt_tokens_details", None)  # what the slot still had
    return answer
