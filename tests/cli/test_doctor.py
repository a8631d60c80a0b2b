"""`meshd doctor`: this node's own checks, the marks, the exit code."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd import __version__
from meshd.cli import checks
from meshd.cli.checks import Surroundings, examine
from meshd.cli.client import AdminClient
from meshd.cli.main import main
from meshd.config import Config, load
from meshd.errors import MeshdError
from meshd.kernel.findings import Finding, Verdict
from tests.cli.patients import machine
from tests.runtime.fake_engine import make_engine

STEPS = [
    *("toolchain", "engine", "backend", "architecture", "cache flags", "binaries", "installed"),
    *("gpu", "gpu access", "limits", "clock", "disk"),
    *("data", "cache", "daemon", "version", "api port", "peer port", "models", "mesh", "peers"),
]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "engine")


@pytest.fixture
def configure(tmp_path: Path, engine: Path) -> Callable[..., Config]:
    def make(**flags: Any) -> Config:
        usual = {
            "data_dir": str(tmp_path / "data"),
            "runtime_dir": str(engine),
            "listen": "127.0.0.1:0",
            "peer_listen": "127.0.0.1:0",
        }
        environ = {"HOME": "/", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return load(usual | flags, environ=environ).config

    return make


@pytest.fixture
def taken() -> Iterator[str]:
    """HOST:PORT of a port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    return machine(tmp_path)


Looked = Callable[[Config], dict[str, Finding]]


@pytest.fixture
def looked(around: Surroundings) -> Looked:
    return lambda config: look(config, around)


def look(config: Config, around: Surroundings) -> dict[str, Finding]:
    told: list[Finding] = []
    findings = examine(config, told.append, surroundings=around)
    assert told == findings
    assert [f.step for f in findings] == STEPS
    assert all((f.remedy is not None) == (f.state is Verdict.FAILED) for f in findings)
    return {f.step: f for f in findings}


def running(monkeypatch: pytest.MonkeyPatch, status: dict[str, Any]) -> None:
    monkeypatch.setattr(AdminClient, "get", lambda _self, _path: status)


def status(**changes: Any) -> dict[str, Any]:
    node = {"name": "study", "state": "ready", "version": __version__}
    return {
        "runtime": None,
        "models": [],
        "peers": [],
        "node": node | {"listen": "127.0.0.1:1", "peer_listen": None} | changes,
        "mesh": {"id": "0" * 32, "name": "home", "members": 3, "alive": 2, "state": "member"},
    }


def test_a_machine_before_its_first_start(configure: Callable[..., Config], looked: Looked) -> None:
    found = looked(configure())
    assert not configure().data_dir.exists()
    assert [step for step, f in found.items() if f.state is Verdict.PASSED] == [
        *("engine", "backend", "binaries", "installed", "limits", "clock", "disk", "version"),
        *("api port", "peer port"),
    ]
    assert not [step for step, f in found.items() if f.state is Verdict.FAILED]


def test_the_data_directory(
    configure: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    looked: Looked,
) -> None:
    directory = tmp_path / "data"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    finding = looked(configure())["data"]
    assert (finding.state, finding.remedy) == (Verdict.FAILED, f"chmod 700 {directory}")
    directory.chmod(0o700)
    assert looked(configure())["data"].state is Verdict.PASSED
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert "cannot be written" in looked(configure())["data"].evidence


def test_the_engine(configure: Callable[..., Config], tmp_path: Path, looked: Looked) -> None:
    (tmp_path / "empty").mkdir()
    finding = looked(configure(runtime_dir=str(tmp_path / "empty")))["engine"]
    assert finding.state is Verdict.FAILED
    assert "meshd runtime build" in str(finding.remedy)
    assert looked(configure(client=True))["engine"].state is Verdict.SKIPPED


def test_ports_that_others_hold(
    configure: Callable[..., Config], taken: str, looked: Looked
) -> None:
    found = looked(configure(listen=taken, peer_listen=taken))
    for step, flag in (("api port", "--listen"), ("peer port", "--peer-listen")):
        assert found[step].state is Verdict.FAILED
        assert f"{taken} cannot be opened: address already in use" in found[step].evidence
        assert flag in str(found[step].remedy)


def test_a_daemon_whose_ports_do_not_answer(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, looked: Looked
) -> None:
    running(monkeypatch, status(peer_listen="0.0.0.0:1"))
    found = looked(configure())
    assert found["daemon"].evidence == f"study ready, meshd {__version__}"
    assert found["api port"].state is Verdict.FAILED
    assert found["peer port"].state is Verdict.FAILED
    assert found["mesh"].evidence == "home, 2 of 3 nodes alive"


def test_a_daemon_whose_ports_answer(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, taken: str, looked: Looked
) -> None:
    port = taken.rpartition(":")[2]
    running(monkeypatch, status(peer_listen=f"0.0.0.0:{port}", listen=taken))
    found = looked(configure())  # the API there never answers
    assert found["peer port"].state is Verdict.PASSED
    assert "does not answer" in found["api port"].evidence


@pytest.mark.parametrize(
    ("mesh", "state"),
    [
        ({"state": "joining", "reason": "no answer"}, Verdict.FAILED),
        ({"state": "refused", "reason": None}, Verdict.FAILED),
        ({"state": "none", "reason": "left"}, Verdict.SKIPPED),
    ],
)
def test_where_it_stands_with_its_mesh(
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    looked: Looked,
    mesh: dict[str, Any],
    state: Verdict,
) -> None:
    answer = status()
    answer["mesh"] |= mesh
    running(monkeypatch, answer)
    finding = looked(configure())["mesh"]
    assert finding.state is state
    assert mesh["reason"] is None or mesh["reason"] in finding.evidence


def test_a_daemon_that_is_broken(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, looked: Looked
) -> None:
    def broken(_self: AdminClient, _path: str) -> Any:
        raise MeshdError("the daemon broke off")

    monkeypatch.setattr(AdminClient, "get", broken)
    finding = looked(configure())["daemon"]
    assert (finding.state, finding.evidence) == (Verdict.FAILED, "the daemon broke off")


def test_marks_and_exit_codes(
    tmp_path: Path,
    taken: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: Path,
    around: Surroundings,
) -> None:
    monkeypatch.setattr(checks.checkup, "Surroundings", lambda: around)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MESHD_RUNTIME_DIR", str(engine))
    monkeypatch.setenv("MESHD_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("MESHD_PEER_LISTEN", "127.0.0.1:0")

    def call(*words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as left:
            main(["doctor", "--data-dir", str(tmp_path / "data"), *words])
        return left.value.code, capsys.readouterr().out

    code, out = call()
    assert code == 0
    marks = {line[2:14].strip(): line[0] for line in out.splitlines()}
    assert list(marks) == STEPS
    assert set(marks.values()) == {"✓", "–"}
    monkeypatch.setenv("MESHD_LISTEN", taken)
    code, out = call()
    assert code == 1
    assert f"✗ api port     {taken}" in out
    assert "→ stop what uses it, or choose another with --listen\n" in out
    code, out = call("--json")
    assert code == 1
    assert {f["step"]: f["state"] for f in json.loads(out)}["api port"] == "failed"
    code, out = call("--peer", "127.0.0.1:1", "--json")
    assert code == 1
    assert [f["state"] for f in json.loads(out)][:3] == ["passed", "failed", "skipped"]
    for wrong in ("nonsense", "host:0", "host:99999", "-x"):
        assert call("--peer", wrong)[0] == 2
