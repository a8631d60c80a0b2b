"""`meshd doctor --bundle`: everything a report needs, and no secret of this machine in any byte."""

from __future__ import annotations

import json
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshd.cli import checks
from meshd.cli.client import AdminClient
from meshd.cli.main import main
from meshd.peers.trust.identity import KEY_FILE, load_or_create
from tests.cli.patients import machine
from tests.runtime.fake_engine import make_engine

API_KEY = "correct horse/battery+staple"
INVITE = "meshd1-mfrggzdfmztwq2lknnwg23tpobyxe43uov3ho6dzpiydcmrtgq2tmnzyhe"
HUB_TOKEN = "hf_InventedInventedInventedInvented"
LOGIN_TOKEN = "hf_ofAnotherLoginInventedToo0000"
PLANTED = {
    "OPENAI_API_KEY": "sk-invented-000111222333444",
    "REGISTRY_PASSWORD": "tr0ub4dor&3",
    "HF_TOKEN": HUB_TOKEN,
}

Bundle = dict[str, str]
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine full of secrets; its `meshd` is configured by environment and file."""
    home = tmp_path / "ada"
    data = home / "data"
    data.mkdir(parents=True, mode=0o700)
    engine = make_engine(
        home / "engine", devices="Available devices:\n  CUDA0: NVIDIA GB10 (1 MiB)"
    )
    (data / "config.toml").write_text(f'api_key = "{API_KEY}"\njoin = ["{INVITE}"]\n')
    load_or_create(data)
    (data / "mesh").mkdir()
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(f"{LOGIN_TOKEN}\n")
    settings = {
        "HOME": home, "XDG_CACHE_HOME": home / ".cache", "MESHD_DATA_DIR": data,
        "MESHD_RUNTIME_DIR": engine, "MESHD_LISTEN": "127.0.0.1:0", "MESHD_NAME": "study",
        "MESHD_PEER_LISTEN": "127.0.0.1:0", "CUDA_VISIBLE_DEVICES": "0",
    }  # fmt: skip
    for name, value in {**settings, **PLANTED}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("HF_HOME", raising=False)
    around = machine(tmp_path)
    monkeypatch.setattr(checks.checkup, "Surroundings", lambda: around)
    plant_in_logs(data)
    return home


def plant_in_logs(data: Path) -> None:
    key = (data / KEY_FILE).read_text()
    (data / "logs").mkdir()
    lines = [
        f"INFO joining with {INVITE}",
        f"DEBUG request head: Authorization: Bearer {API_KEY}",
        f"DEBUG {json.dumps({'key': API_KEY, 'pem': key})}",
        f"WARNING https://cdn.example/f?token={HUB_TOKEN}&x=1",
        *(f"ERROR {name} is {value}" for name, value in PLANTED.items()),
        f"ERROR the hub refused {LOGIN_TOKEN}",
        *key.splitlines(),
        f"INFO study listens; {data / 'x'}",
    ]
    (data / "logs" / "meshd.log").write_text("\n".join(lines))
    (data / "logs" / "some-model.log").write_text(f"llama_server: api key {API_KEY}\nload ok\n")


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["doctor", *words])
        assert isinstance(left.value.code, int)
        return left.value.code, capsys.readouterr().out

    return run


def unpacked(file: Path) -> Bundle:
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        assert {(m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, "", "", 0o600)
        }
        texts = {}
        for member in members:
            content = archive.extractfile(member)
            assert content is not None
            texts[member.name.removeprefix("meshd-doctor/")] = content.read().decode()
    return texts


def test_no_secret_is_in_it(call: Call, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.tar.gz"
    call("--bundle", str(file))
    everything = "\n".join(f"{name}\n{text}" for name, text in unpacked(file).items())
    key_lines = (home / "data" / KEY_FILE).read_text().splitlines()[1:-1]
    secrets = [API_KEY, json.dumps(API_KEY)[1:-1], INVITE, INVITE[8:], HUB_TOKEN, LOGIN_TOKEN]
    for secret in (*secrets, *PLANTED.values(), *key_lines, str(home)):
        assert secret not in everything, secret
        assert secret.lower() not in everything.lower(), secret


def test_what_a_report_needs_is_in_it(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "report.tar.gz"
    code, out = call("--bundle", str(file), "--json")
    assert file.stat().st_mode & 0o777 == 0o600
    parts = unpacked(file)
    assert set(parts) == {
        *("doctor.json", "status.json", "config.txt", "environment.txt", "versions.txt"),
        *("machine.txt", "flight.txt", "engine/list-devices.txt", "engine/record.json"),
        *("engine/build.log", "logs/meshd.log", "logs/some-model.log"),
    }
    findings = json.loads(parts["doctor.json"])
    assert [f["step"] for f in findings] == [f["step"] for f in json.loads(out)]
    assert code == (1 if any(f["state"] == "failed" for f in findings) else 0)
    assert "no meshd runs" in parts["status.json"]
    assert "no meshd runs" in parts["flight.txt"]
    assert "name = 'study'    # environment MESHD_NAME" in parts["config.txt"]
    assert "data_dir = '~/data'" in parts["config.txt"]
    assert "join = ['(invite)']" in parts["config.txt"]
    assert "CUDA_VISIBLE_DEVICES=0\n" in parts["environment.txt"]
    assert "HF_TOKEN=(secret)\n" in parts["environment.txt"]
    assert "OPENAI" not in parts["environment.txt"]
    assert "aiohttp 3" in parts["versions.txt"]
    assert "uname: " in parts["machine.txt"]
    assert "MemAvailable" in parts["machine.txt"]
    assert "CUDA0: NVIDIA GB10" in parts["engine/list-devices.txt"]
    assert json.loads(parts["engine/record.json"])["backend"] == "cuda"
    assert "INFO study listens; ~/data/x" in parts["logs/meshd.log"]
    assert "load ok" in parts["logs/some-model.log"]


def test_with_a_daemon_and_without_names(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = {"name": "attic", "state": "dead", "address": "192.168.7.4:9338", "rtt_ms": None}
    status: dict[str, Any] = {
        "node": {"name": "study", "state": "ready", "version": "1", "listen": "127.0.0.1:1",
                 "peer_listen": None},
        "mesh": {"name": "cellar", "members": 2, "alive": 1, "state": "member"},
        "models": [], "peers": [peer], "runtime": None,
    }  # fmt: skip
    answers: dict[str, Any] = {"/status": status, "/flight": {"lines": ["1.0 swim attic died"]}}
    monkeypatch.setattr(AdminClient, "get", lambda _self, path: answers[path])
    monkeypatch.setattr(socket, "gethostname", lambda: "study")
    file = tmp_path / "report.tar.gz"
    call("--bundle", str(file))
    parts = unpacked(file)
    assert "swim attic died" in parts["flight.txt"]
    assert json.loads(parts["status.json"])["peers"][0]["address"] == "192.168.7.4:9338"
    call("--bundle", str(file), "--hide-names")
    everything = "\n".join(unpacked(file).values())
    for name in ("attic", "cellar", "study", "192.168.7.4"):
        assert name not in everything
    assert json.loads(unpacked(file)["status.json"])["peers"][0]["state"] == "dead"


def test_where_it_is_written(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call("--json", "--bundle")
    assert unpacked(tmp_path / "meshd-doctor.tar.gz")
    code, _ = call("--bundle", str(tmp_path / "no" / "such" / "directory.tar.gz"))
    assert code == 1
