"""What requests bring about on one node: models loaded for them, put to sleep, woken up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd.election.offering import SWAP_IDLE_S
from tests.conftest import wait_until
from tests.hub import LocalHub
from tests.models import small_model
from tests.node.conftest import Daemon, DaemonFactory
from tests.node.test_bad_input import meshd

pytestmark = pytest.mark.engine

REPO = "owner/small-GGUF"
REF = f"{REPO}:F16"
PULLED = "small-F16"
WAIT = {"x-meshd-wait-s": "30"}
IDLE_S = 10
"""The least there may be."""
ONE_OF_TWO = "34MB"
"""Room for one small model, not for two."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {"small-F16.gguf": small_model(tmp_path / "small-F16.gguf")})
        yield hub


@pytest.fixture
def environment(hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    return hub.environment(tmp_path / "home")


def pull(daemon: Daemon, environment: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "meshd", "cache", "pull", REF, "--data-dir", str(daemon.data_dir)],
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )


def chat(
    daemon: Daemon, model: str, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body, headers)
    return status, json.loads(answer)


def listed(daemon: Daemon) -> list[str]:
    return [m["id"] for m in json.loads(daemon.request("GET", "/v1/models")[2])["data"]]


def test_a_request_loads_what_lies_on_the_disk(
    make_daemon: DaemonFactory, hub: LocalHub, environment: dict[str, str]
) -> None:
    daemon = make_daemon("--no-mdns", "--on-demand", **environment).start()
    assert chat(daemon, PULLED)[1]["error"]["code"] == "model_not_found"
    pull(daemon, environment)
    wait_until(lambda: PULLED in listed(daemon), what="the pulled model in the list")
    hub.close()

    status, refused = chat(daemon, PULLED)
    assert (status, refused["error"]["code"]) == (503, "model_loading")
    status, answer = chat(daemon, PULLED, WAIT)
    assert status == 200, answer
    assert answer["model"] == PULLED
    status, answer = chat(daemon, "builtin", WAIT)
    assert status == 200, answer
    causes = {r["model"]: r["cause"] for r in daemon.status()["deployments"]}
    assert causes == {PULLED: "demand", "builtin": "demand"}

    daemon.unload(PULLED)
    wait_until(lambda: daemon.model(PULLED)["state"] == "absent", what="the model gone")
    status, answer = chat(daemon, PULLED, WAIT)
    assert status == 200, answer
    assert chat(daemon, "nonsense", WAIT)[0] == 404


def test_without_the_flag_a_request_loads_nothing(
    make_daemon: DaemonFactory, environment: dict[str, str]
) -> None:
    daemon = make_daemon("--no-mdns", "--model", "builtin", **environment).start()
    pull(daemon, environment)
    daemon.wait_state("builtin", "ready")
    daemon.unload("builtin")
    daemon.wait_state("builtin", "absent")
    for model in ("builtin", PULLED):
        status, refused = chat(daemon, model)
        assert (status, refused["error"]["code"]) == (404, "model_not_found")
    assert "`meshd load builtin` loads it" in chat(daemon, "builtin")[1]["error"]["message"]
    assert daemon.status()["deployments"] == []
    assert daemon.engines() == []


@pytest.mark.slow
def test_what_nobody_asks_for_sleeps_until_it_is_asked_for(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--no-mdns", "--model", "builtin", "--idle-unload", str(IDLE_S)).start()
    daemon.wait_state("builtin", "ready")
    for _ in range(2):
        daemon.wait_state("builtin", "absent", timeout_s=IDLE_S + 10)
        wait_until(lambda: not daemon.engines(), what="no engine")
        assert daemon.model("builtin")["reason"].startswith("asleep")
        assert "builtin" in listed(daemon)
        (record,) = daemon.status()["deployments"]
        assert record["asleep"]
        status, answer = chat(daemon, "builtin", WAIT)
        assert status == 200, answer
        (record,) = daemon.status()["deployments"]
        assert not record["asleep"]
    events = [line for line in daemon.stderr().splitlines() if "goes to sleep" in line]
    assert len(events) == 2
    assert f"nobody has asked for it for {IDLE_S} s" in events[0]


@pytest.mark.slow
def test_sleep_outlives_a_restart(make_daemon: DaemonFactory, short_dir: Path) -> None:
    path = small_model(short_dir / "small.gguf")
    daemon = make_daemon("--no-mdns", "--idle-unload", str(IDLE_S)).start()
    daemon.load(str(path))
    daemon.wait_state("small", "ready")
    daemon.wait_state("small", "absent", timeout_s=IDLE_S + 10)
    assert daemon.stop() == 0
    again = make_daemon("--no-mdns", data_dir=daemon.data_dir).start()
    again.wait_state("small", "absent")
    assert again.engines() == []
    status, answer = chat(again, "small", WAIT)
    assert status == 200, answer


def test_a_model_in_use_is_not_pushed_out(make_daemon: DaemonFactory, short_dir: Path) -> None:
    first = small_model(short_dir / "first.gguf")
    second = small_model(short_dir / "second.gguf", seed=2)
    daemon = make_daemon("--no-mdns", "--max-vram", ONE_OF_TWO).start()
    daemon.load(str(first))
    daemon.wait_state("first", "ready")
    (engine,) = daemon.engines()
    daemon.load(str(second))
    reason = daemon.wait_state("second", "waiting")["reason"]
    wait_until(lambda: "short" in daemon.model("second")["reason"], what="why it waits")
    reason = daemon.model("second")["reason"]
    plan = meshd("plan", str(second), "--data-dir", str(daemon.data_dir), "--json")
    assert plan.returncode == 1
    (node,) = json.loads(plan.stdout)["nodes"]
    assert (node["verdict"], node["why"]) == ("cannot", reason)
    assert daemon.model("first")["state"] == "ready"
    assert [e.pid for e in daemon.engines()] == [engine.pid]
    # Its memory is free as soon as it is unloaded, and the other one is waiting for it.
    daemon.unload("first")
    daemon.wait_state("second", "ready")
    assert len(daemon.engines()) == 1


@pytest.mark.slow
def test_an_unused_model_sleeps_for_a_wanted_one(
    make_daemon: DaemonFactory, short_dir: Path
) -> None:
    first = small_model(short_dir / "first.gguf")
    second = small_model(short_dir / "second.gguf", seed=2)
    daemon = make_daemon("--no-mdns", "--max-vram", ONE_OF_TWO).start()
    daemon.load(str(first))
    daemon.wait_state("first", "ready")
    daemon.load(str(second))
    daemon.wait_state("second", "ready", timeout_s=SWAP_IDLE_S + 20)
    assert daemon.model("first")["reason"].startswith("asleep")
    assert len(daemon.engines()) == 1
    assert "first goes to sleep: its memory is needed for second" in daemon.stderr()
    # It is asked for again, and has to wait until the other one is unused as well.
    status, refused = chat(daemon, "first")
    assert (status, refused["error"]["code"]) == (503, "model_loading")
    assert daemon.model("second")["state"] == "ready"
