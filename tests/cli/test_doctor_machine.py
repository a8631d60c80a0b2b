"""The steps of `meshd doctor` around the engine: each that can fail does, with its words."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd import __version__
from meshd.cli.checks import Surroundings, machine, node, peers
from meshd.cli.checks.cache import weights
from meshd.cli.checks.clock import is_clock_kept
from meshd.cli.checks.subject import Subject
from meshd.cli.client import AdminClient
from meshd.config import Config, load
from meshd.kernel.findings import Fault, NotApplicable
from tests.cli import patients
from tests.cli.patients import LIMITS
from tests.models import small_model

Examine = Callable[..., Subject]


@pytest.fixture
def subject(tmp_path: Path) -> Examine:
    def make(around: Surroundings | None = None, **flags: Any) -> Subject:
        return Subject(configuration(tmp_path, **flags), around or patients.machine(tmp_path))

    return make


def configuration(tmp_path: Path, **flags: Any) -> Config:
    environ = {"HOME": "/", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return load({"data_dir": str(tmp_path / "data")} | flags, environ=environ).config


def daemon(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    status = {"node": {"name": "n", "version": __version__}, "models": [], "peers": []} | parts
    monkeypatch.setattr(AdminClient, "get", lambda _self, _path: status)


# -- device files and limits ----------------------------------------------------------------------


def test_device_files(subject: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotApplicable, match="no device files"):
        machine.device_files(subject())
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
        (tmp_path / "dev" / name).touch()
    assert machine.device_files(subject()) == "nvidia0, nvidiactl, nvidia-uvm: can be opened"
    monkeypatch.setattr(os, "access", lambda path, _mode: path.name != "nvidia0")
    with pytest.raises(Fault, match="dev/nvidia0 cannot be opened by this user") as caught:
        machine.device_files(subject())
    assert "usermod -aG " in caught.value.remedy


def test_open_files(subject: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low = patients.machine(tmp_path, soft=1024)
    assert "open files 1024 of 524288" in machine.limits(subject(low)), "a start can raise it"
    with pytest.raises(Fault, match="524288 open files are allowed; with") as caught:
        machine.limits(demanding(configuration(tmp_path), low))
    assert "LimitNOFILE=" in caught.value.remedy
    # Of a daemon that runs, what it has counts.
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "lock").write_text("4711\n")
    (tmp_path / "proc" / "4711").mkdir()
    (tmp_path / "proc" / "4711" / "limits").write_text(LIMITS.format(soft=1024, hard=524288))
    daemon(monkeypatch)
    with pytest.raises(Fault, match="1024 open files are allowed to the daemon"):
        machine.limits(subject())


def demanding(config: Config, around: Surroundings) -> Subject:
    api = config.api.model_copy(update={"max_connections": 300_000})
    return Subject(config.model_copy(update={"api": api}), around)


def test_locked_memory(subject: Examine, tmp_path: Path) -> None:
    assert "locked memory 8.4 MB" in machine.limits(subject())
    with pytest.raises(Fault, match=r"has --mlock, and 8\.4 MB may be locked") as caught:
        machine.limits(subject(**{"engine.extra_args": ("--mlock",)}))
    assert "LimitMEMLOCK=infinity" in caught.value.remedy


def test_limits_that_are_not_told(subject: Examine, tmp_path: Path) -> None:
    around = patients.machine(tmp_path)
    (tmp_path / "proc" / "self" / "limits").unlink()
    with pytest.raises(NotApplicable, match="does not tell"):
        machine.limits(subject(around))


# -- clock and disk -------------------------------------------------------------------------------


def test_clock(subject: Examine, tmp_path: Path) -> None:
    assert machine.clock(subject()).endswith("kept by a time service")
    unkept = patients.machine(tmp_path, clock_is_kept=lambda: False)
    with pytest.raises(NotApplicable, match="container"):
        machine.clock(subject(unkept))
    (tmp_path / "run" / "systemd" / "system").mkdir(parents=True)
    with pytest.raises(Fault, match="no time service keeps the clock") as caught:
        machine.clock(subject(unkept))
    assert "timedatectl set-ntp true" in caught.value.remedy
    with pytest.raises(NotApplicable, match="does not tell"):
        machine.clock(subject(patients.machine(tmp_path, clock_is_kept=lambda: None)))
    assert is_clock_kept() in (True, False, None)


def test_a_clock_that_went_back(subject: Examine, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.utime(tmp_path / "data", (4_000_000_000, 4_000_000_000))
    with pytest.raises(Fault, match="was written 2096-10-02 07:06:40 UTC") as caught:
        machine.clock(subject())
    assert "certificates and invites are refused" in caught.value.remedy


def test_disk(subject: Examine) -> None:
    assert "free for weights" in machine.disk(subject(**{"cache.reserve": "1B"}))
    with pytest.raises(Fault, match=r"are free for weights in .*, less than") as caught:
        machine.disk(subject(**{"cache.reserve": "100%"}))
    assert "meshd cache prune" in caught.value.remedy


# -- weights --------------------------------------------------------------------------------------


def test_weights(subject: Examine, tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match="no models are in"):
        weights(subject())
    snapshot = tmp_path / "hub" / "models--acme--small-GGUF" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    whole = small_model(snapshot / "small-Q4_K_M.gguf")
    assert weights(subject()).startswith("1 unverified in ")
    whole.write_bytes(whole.read_bytes()[:-4000])
    with pytest.raises(Fault, match=r"1 short: acme/small-GGUF") as caught:
        weights(subject())
    assert caught.value.remedy.startswith("`meshd cache repair acme/small-GGUF")
    with pytest.raises(NotApplicable, match="client"):
        weights(subject(client=True))


# -- models, version, peers -----------------------------------------------------------------------


def test_models(subject: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotApplicable, match="does not run"):
        node.models(subject())
    good = [{"id": "a", "state": "ready"}, {"id": "b", "state": "ready"}]
    daemon(monkeypatch, models=[*good, {"id": "c", "state": "loading"}])
    assert node.models(subject()) == "1 loading, 2 ready"
    daemon(monkeypatch, models=[*good, {"id": "c", "state": "failed", "reason": "out of memory"}])
    with pytest.raises(Fault, match="c: out of memory") as caught:
        node.models(subject())
    assert caught.value.remedy.startswith("`meshd logs c`")


def test_versions_that_differ(subject: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert node.version(subject()).startswith(f"meshd {__version__}, Python 3.")
    daemon(monkeypatch, node={"name": "n", "version": "0.0.1"})
    with pytest.raises(Fault, match=r"the daemon runs 0\.0\.1") as caught:
        node.version(subject())
    assert "restart the daemon" in caught.value.remedy


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_other_nodes(subject: Examine, monkeypatch: pytest.MonkeyPatch, listening: str) -> None:
    def peer(name: str, state: str, address: str | None) -> dict[str, Any]:
        return {"name": name, "state": state, "address": address, "rtt_ms": 0.4}

    daemon(monkeypatch, peers=[peer("gone", "dead", "127.0.0.1:1")])
    with pytest.raises(NotApplicable, match="no other node"):
        peers.others(subject())
    answers = [peer("attic", "alive", listening), peer("gone", "dead", "127.0.0.1:1")]
    daemon(monkeypatch, peers=answers)
    assert peers.others(subject()) == (
        "1 alive, 1 dead; 1 take connections, the farthest 0.4 ms away"
    )
    daemon(monkeypatch, peers=[*answers, peer("cellar", "alive", "127.0.0.1:1")])
    with pytest.raises(Fault, match=r"cellar at 127\.0\.0\.1:1 does not answer") as caught:
        peers.others(subject())
    assert caught.value.remedy.startswith("`meshd doctor --peer 127.0.0.1:1`")
    daemon(monkeypatch, peers=[peer("attic", "suspect", listening)])
    with pytest.raises(Fault, match="attic takes connections but missed its last probes"):
        peers.others(subject())
