"""`meshd run --join`: what cannot work is refused before anything starts; tokens stay secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshd import config
from meshd.cli.main import main
from meshd.cli.run import check_join
from meshd.errors import BadConfig, BadInvite
from meshd.ids import MeshId
from meshd.peers.joining.invites import Invite, encode_invite
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import load_or_create
from meshd.view import Role


def invite(mesh: str = "0" * 32, expires_in_s: float = 3600) -> str:
    return encode_invite(
        Invite(
            mesh_id=MeshId(mesh),
            mesh_name="home",
            ca_fingerprint=b"f" * 32,
            invite_id=b"i" * 8,
            secret=b"s" * 16,
            expires_at=int(time.time() + expires_in_s),
            role=Role.MEMBER,
            issuer=False,
            addresses=("192.168.1.7:9338",),
        )
    )


def run(
    data_dir: Path, *joins: str, file: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    flags = [word for join in joins for word in ("--join", join)]
    if file is not None:
        flags += ["--config", str(file)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MESHD_")}
    return subprocess.run(
        [
            *(sys.executable, "-m", "meshd", "run", "--data-dir", str(data_dir)),
            *("--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", *flags),
        ],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


GOOD = invite()
BAD = [
    (GOOD[:-1], "cut off or mistyped"),
    (GOOD[:20], "cut off or mistyped"),
    (GOOD[:30] + ("a" if GOOD[30] != "a" else "b") + GOOD[31:], "cut off or mistyped"),
    ("meshd1-", "cut off or mistyped"),
    ("meshd2-aaaa", "another version"),
    (invite(expires_in_s=-60), "expired"),
    ("-x", "no invite token"),
    ("with space", "no invite token"),
    ("host:0", "no invite token"),
    ("host:99999", "no invite token"),
    (GOOD.removeprefix("meshd1-"), "no invite token"),
]


@pytest.mark.parametrize(("join", "words"), BAD)
def test_what_can_never_let_a_node_in(join: str, words: str, tmp_path: Path) -> None:
    loaded = config.load({"data_dir": str(tmp_path), "join": (GOOD, join)}, environ={"HOME": "/"})
    with pytest.raises((BadConfig, BadInvite), match=words) as caught:
        check_join(loaded.config)
    assert caught.value.exit_code == 78
    assert len(join) < 30 or join[8:] not in caught.value.message


@pytest.mark.parametrize("join", [GOOD, f" {GOOD.upper()}\n", "home", "a.b:9338", "[fd00::1]:9338"])
def test_what_might(join: str, tmp_path: Path) -> None:
    loaded = config.load({"data_dir": str(tmp_path), "join": (join,)}, environ={"HOME": "/"})
    check_join(loaded.config)


def test_an_invite_that_did_its_work_may_run_out(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path)
    mine = MeshStore(tmp_path / "mesh", identity).found("home")
    used, foreign = invite(mine.mesh_id, expires_in_s=-60), invite(expires_in_s=-60)
    environ = {"HOME": "/"}
    check_join(config.load({"data_dir": str(tmp_path), "join": (used,)}, environ=environ).config)
    loaded = config.load({"data_dir": str(tmp_path), "join": (used, foreign)}, environ=environ)
    with pytest.raises(BadInvite, match="expired"):
        check_join(loaded.config)


@pytest.mark.parametrize("join", [GOOD[:-5], "meshd1-nonsense", invite(expires_in_s=-60)])
def test_a_bad_token_is_one_line_and_nothing_on_disk(join: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    done = run(data_dir, join)
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith("error: this invite")
    assert done.stderr.count("\n") == 1
    assert join not in done.stderr
    assert not data_dir.exists()


def test_a_bad_token_from_the_environment_or_the_file_is_the_same(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert run(data_dir, MESHD_JOIN=GOOD[:-5]).returncode == 78
    file = tmp_path / "c.toml"
    file.write_text(f'join = ["{GOOD[:-5]}"]\n')
    assert run(data_dir, file=file).returncode == 78
    assert not data_dir.exists()


def test_errors_of_the_configuration_hide_tokens(tmp_path: Path) -> None:
    for text in (f'join = "{GOOD}"', f'mesh = "{GOOD}"', f'join = [["{GOOD}"]]', "join = [3]"):
        file = tmp_path / "c.toml"
        file.write_text(text)
        with pytest.raises(BadConfig) as caught:
            config.load(file=file, environ={"HOME": "/"})
        assert GOOD[10:] not in caught.value.message
    loaded = config.load({"join": (GOOD,)}, environ={"HOME": "/"})
    assert GOOD[10:] not in repr(loaded.config)


def test_config_show_hides_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MESHD_JOIN", f"{GOOD},home")
    for flags in ([], ["--json"]):
        with pytest.raises(SystemExit) as left:
            main(["config", "show", "--data-dir", str(tmp_path), *flags])
        assert left.value.code == 0
        out = capsys.readouterr().out
        assert GOOD[10:] not in out
        assert "(invite)" in out
        assert "home" in out
        if flags:
            shown = json.loads(out)["join"]
            assert shown == {"value": ["(invite)", "home"], "source": "environment MESHD_JOIN"}


@pytest.mark.parametrize("address", ["host:0", "host:70000", "[fd00::1]", "hüb:9338", "a" * 300])
def test_addresses_to_advertise_must_be_worth_dialling(address: str) -> None:
    with pytest.raises(BadConfig, match="advertise"):
        config.load({"advertise": (address,)}, environ={"HOME": "/"})
    for port in ("0", "65535"):
        config.load({"peer_listen": f"0.0.0.0:{port}"}, environ={"HOME": "/"})
    with pytest.raises(BadConfig, match="peer_listen"):
        config.load({"peer_listen": "0.0.0.0:65536"}, environ={"HOME": "/"})
