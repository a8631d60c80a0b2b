"""One node that places models: what it plans, refuses, keeps, and tells of it."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import wait_until
from tests.hub import LocalHub
from tests.models import small_model
from tests.node.conftest import Daemon, DaemonFactory, wait_gone
from tests.node.test_bad_input import meshd

pytestmark = pytest.mark.engine

REPO = "owner/small-GGUF"
REF = f"{REPO}:F16"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {"small-F16.gguf": small_model(tmp_path / "small-F16.gguf")})
        yield hub


def epoch_of(daemon: Daemon, model: str) -> int:
    (host,) = daemon.model(model)["hosts"]
    return int(host["epoch"])


def deployed(daemon: Daemon) -> dict[str, Any]:
    return {record["model"]: record for record in daemon.status()["deployments"]}


# -- plans ----------------------------------------------------------------------------------------


def test_a_plan_before_and_after(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--no-mdns").start()
    at = ("--data-dir", str(daemon.data_dir))
    before = meshd("plan", "builtin", *at)
    assert before.returncode == 0, before.stderr
    assert "testnode (weights on disk, " in before.stdout
    assert "is to host builtin" in before.stdout
    assert "4 slots of 8192 tokens" in before.stdout
    told = json.loads(meshd("plan", "builtin", *at, "--json").stdout)
    (node,) = told["nodes"]
    assert (told["deployed"], node["verdict"]) == (False, "next")
    status, _, refused = daemon.request("GET", "/mesh/plan?model=builtin")
    assert (status, json.loads(refused)["error"]["code"]) == (404, "model_not_found")
    assert daemon.status()["deployments"] == []

    loaded = meshd("load", "builtin", *at)
    assert (loaded.returncode, loaded.stdout) == (0, "builtin is ready\n")
    after = meshd("plan", "builtin", *at)
    assert after.returncode == 0
    assert "hosts builtin" in after.stdout
    status, _, answer = daemon.request("GET", "/mesh/plan?model=builtin")
    (node,) = json.loads(answer)["nodes"]
    assert (status, node["verdict"], node["epoch"]) == (200, "hosts", 1)
    assert node["why"].startswith("ready, epoch 1: nobody hosts it; testnode: weights on disk, ")


def test_the_merits_of_a_plan_are_those_of_the_bid(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--no-mdns").start()
    planned = daemon.admin.post("/plan", {"ref": "builtin"})["nodes"][0]["why"]
    with host_events(daemon) as events:
        daemon.load("builtin")
        wait_until(lambda: events, what="a claim")
    assert events[0]["reason"] == f"nobody hosts it; testnode: {planned}"


def test_a_plan_reads_headers_of_the_hub_and_fetches_nothing(
    make_daemon: DaemonFactory, hub: LocalHub, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    daemon = make_daemon("--no-mdns", **hub.environment(home)).start()
    told = daemon.admin.post("/plan", {"ref": REF})
    (node,) = told["nodes"]
    assert (node["verdict"], told["deployed"]) == ("next", False)
    assert node["why"].startswith("weights to be fetched, ")
    assert 0 < told["shape"]["weights_bytes"] < 1_000_000
    assert list(home.rglob("*.gguf")) == []
    unknown = meshd("plan", "owner/none:F16", "--data-dir", str(daemon.data_dir))
    assert unknown.returncode == 1
    assert "owner/none" in unknown.stderr


def test_a_plan_of_what_does_not_fit(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--no-mdns", "--max-vram", "1MB").start()
    plan = meshd("plan", "builtin", "--data-dir", str(daemon.data_dir))
    assert plan.returncode == 1
    assert "cannot" in plan.stdout
    assert "1.0 MB free" in " ".join(plan.stdout.split())


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_does_not_fit_waits_and_says_why(make_daemon: DaemonFactory) -> None:
    """The command waits until it is clear that nobody comes."""
    daemon = make_daemon("--no-mdns", "--max-vram", "1MB").start()
    at = ("--data-dir", str(daemon.data_dir))
    loaded = meshd("load", "builtin", *at)
    assert loaded.returncode == 1
    model = daemon.model("builtin")
    assert model["state"] == "waiting"
    for part in ("needs ", "weights 5.1 MB", "4 × 8192 tokens", "1.0 MB free", "short"):
        assert part in model["reason"]
    assert model["reason"] in loaded.stderr
    assert "`meshd unload builtin` takes it back" in loaded.stderr
    assert daemon.engines() == []
    unloaded = meshd("unload", "builtin", *at)
    assert (unloaded.returncode, unloaded.stdout) == (0, "builtin is unloaded\n")
    assert daemon.model("builtin")["state"] == "absent"
    assert daemon.status()["deployments"] == []


def test_a_full_disk_is_named_and_waited_for(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--no-mdns").start()
    process = psutil.Process(daemon.pid)
    _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))  # no file of the daemon may grow
    daemon.load("builtin")
    wait_until(
        lambda: "cannot be written" in (daemon.model("builtin")["reason"] or ""), what="the reason"
    )
    model = daemon.model("builtin")
    assert (model["state"], model["hosts"]) == ("waiting", [])
    assert str(daemon.data_dir) in model["reason"]
    assert daemon.engines() == []
    process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    daemon.wait_state("builtin", "ready")
    kept = daemon.data_dir / "deployments.json"
    wait_until(lambda: kept.exists() and b"builtin" in kept.read_bytes(), what="the record kept")


# -- what is kept ---------------------------------------------------------------------------------


def test_deployments_outlive_stops_and_kills(make_daemon: DaemonFactory, short_dir: Path) -> None:
    path = small_model(short_dir / "small.gguf")
    daemon = make_daemon("--no-mdns").start()
    daemon.load(str(path), parallel=2)
    daemon.wait_state("small", "ready")
    epochs = [epoch_of(daemon, "small")]
    for number in (signal.SIGTERM, signal.SIGKILL):
        engines = [e.pid for e in daemon.engines()]
        daemon.stop(number)
        wait_gone(engines, timeout_s=10)
        daemon = make_daemon("--no-mdns", data_dir=daemon.data_dir).start()
        (host,) = daemon.wait_state("small", "ready")["hosts"]
        assert host["slots"] == 2
        epochs.append(host["epoch"])
    (daemon.data_dir / "epochs.json").write_bytes(b"{")
    daemon.stop()
    (daemon.data_dir / "epochs.json").write_bytes(b"{")
    daemon = make_daemon("--no-mdns", data_dir=daemon.data_dir).start()
    daemon.wait_state("small", "ready")
    epochs.append(epoch_of(daemon, "small"))
    assert epochs == sorted(set(epochs))
    assert deployed(daemon)["small"]["cause"] == "operator"
    daemon.unload("small")
    wait_until(lambda: not daemon.engines(), what="no engine")
    daemon.stop()
    daemon = make_daemon("--no-mdns", data_dir=daemon.data_dir).start()
    assert deployed(daemon) == {}


def test_a_flag_that_is_gone_takes_its_model_along(
    make_daemon: DaemonFactory, short_dir: Path
) -> None:
    first = small_model(short_dir / "first.gguf")
    second = small_model(short_dir / "second.gguf", seed=2)
    third = small_model(short_dir / "third.gguf", seed=3)
    daemon = make_daemon("--no-mdns", "--model", str(first)).start()
    daemon.wait_state("first", "ready")
    daemon.load(str(third))
    daemon.wait_state("third", "ready")
    assert daemon.stop() == 0
    again = make_daemon("--no-mdns", "--model", str(second), data_dir=daemon.data_dir).start()
    again.wait_state("second", "ready")
    again.wait_state("third", "ready")
    assert {model: record["cause"] for model, record in deployed(again).items()} == {
        "second": "flag",
        "third": "operator",
    }
    assert len(again.engines()) == 2


# -- options --------------------------------------------------------------------------------------


def test_other_options_restart_the_engine_under_the_same_claim(
    make_daemon: DaemonFactory, short_dir: Path
) -> None:
    path = str(small_model(short_dir / "small.gguf"))
    daemon = make_daemon("--no-mdns").start()
    daemon.load(path)
    daemon.wait_state("small", "ready")
    epoch, (engine,) = epoch_of(daemon, "small"), daemon.engines()
    for context in (512, 1024, 512):
        loaded = meshd(
            *("load", path, "--ctx", str(context)), "--data-dir", str(daemon.data_dir), "--json"
        )
        assert loaded.returncode == 0, loaded.stderr
        (host,) = json.loads(loaded.stdout)["hosts"]
        assert (host["state"], host["context_length"]) == ("ready", context)
        assert epoch_of(daemon, "small") == epoch
        before, (engine,) = engine, daemon.engines()
        assert engine.pid != before.pid
    unchanged = meshd("load", path, "--data-dir", str(daemon.data_dir), "--json")
    assert unchanged.returncode == 0
    assert [e.pid for e in daemon.engines()] != []


# -- what is told ---------------------------------------------------------------------------------


@contextmanager
def host_events(daemon: Daemon) -> Iterator[list[dict[str, Any]]]:
    """Events of type `host` of `/mesh/events`, as they come."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
    connection.request("GET", "/mesh/events")
    response = connection.getresponse()
    found: list[dict[str, Any]] = []

    def read() -> None:
        while line := response.readline():
            if line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                if event["type"] == "host":
                    found.append(event)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield found
    finally:
        connection.sock.shutdown(2)
        reader.join(10)
        connection.close()


def test_changes_of_hosts_are_told_and_counted(make_daemon: DaemonFactory) -> None:
    daemon = make_daemon("--no-mdns").start()
    with host_events(daemon) as events:
        daemon.load("builtin")
        daemon.wait_state("builtin", "ready")
        daemon.unload("builtin")
        wait_until(lambda: events and events[-1]["state"] == "gone", what="the end of the claim")
    states = list(dict.fromkeys(e["state"] for e in events))
    assert states == ["preparing", "ready", "draining", "gone"]
    assert {(e["model"], e["node"], e["epoch"]) for e in events} == {("builtin", "testnode", 1)}
    first, *_, last = events
    assert first["reason"].startswith("nobody hosts it; testnode: weights on disk, ")
    assert last["reason"] == "it was unloaded"
    metrics = daemon.request("GET", "/metrics")[2].decode()
    counted = [line for line in metrics.splitlines() if line.startswith("meshd_host_changes_total")]
    assert len(counted) == 2
    assert all('model="builtin"' in line and line.endswith(" 1.0") for line in counted)
