"""The commands about meshes, and `status`, against a scripted daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.scripted import BETA, Cli, Daemon, peer, status

TOKEN = "meshd1-secretsecretsecret"


# -- invite ---------------------------------------------------------------------------------------


def test_an_invite_is_a_token_and_the_command_to_paste(daemon: Daemon, cli: Cli) -> None:
    command = f"meshd run --join {TOKEN}"
    answer = {"token": TOKEN, "expires_at": 1_800_000_000, "command": command}
    daemon.answers["/invite"] = (200, answer)
    result = cli("invite")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert (lines[0], lines[-1]) == (TOKEN, command)
    assert "Within 1d 0h, once" in result.stdout
    assert json.loads(cli("invite", "--json").stdout) == answer
    usual = {"ttl_s": 86_400.0, "uses": 1, "role": "member", "issuer": False}
    assert daemon.asked == [("/invite", usual)] * 2


@pytest.mark.parametrize(
    ("ttl", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86_400), ("7D", 604_800)]
)
def test_options_of_an_invite(daemon: Daemon, cli: Cli, ttl: str, seconds: int) -> None:
    daemon.answers["/invite"] = (200, {"token": TOKEN, "expires_at": 1, "command": "x"})
    assert "3 times" in cli("invite", "--ttl", ttl, "--uses", "3", "--issuer").stdout
    cli("invite", "--ttl", ttl, "--role", "client")
    assert daemon.asked == [
        ("/invite", {"ttl_s": seconds, "uses": 3, "role": "member", "issuer": True}),
        ("/invite", {"ttl_s": seconds, "uses": 1, "role": "client", "issuer": False}),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ttl", "soon"), "'soon' is not a length of time; write 30m, 24h or 7d"),
        (("--ttl", "-5m"), "'-5m' is not a length of time"),
        (("--ttl", "59s"), "1m to 30d"),
        (("--ttl", "31d"), "1m to 30d"),
        (("--ttl", "999999999d"), "1m to 30d"),
        (("--uses", "0"), "--uses"),
        (("--uses", "1001"), "--uses"),
        (("--role", "king"), "--role"),
        (("--issuer", "--role", "client"), "a client cannot be an issuer"),
    ],
)
def test_bad_options_are_usage_errors(
    daemon: Daemon, cli: Cli, words: tuple[str, ...], said: str
) -> None:
    result = cli("invite", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert daemon.asked == []


def test_the_daemons_refusal_is_its_own_words(daemon: Daemon, cli: Cli) -> None:
    error = {"message": "this node does not hold the mesh's key; ask study", "code": "not_issuer"}
    daemon.answers["/invite"] = (409, {"error": error})
    result = cli("invite")
    assert result.exit_code == 1
    assert result.stderr == "error: this node does not hold the mesh's key; ask study\n"


# -- peers and status -----------------------------------------------------------------------------


def test_peers_are_a_table(daemon: Daemon, cli: Cli) -> None:
    gone = peer(
        name="[shed]", id="c" * 52, state="dead", address=None, rtt_ms=None, version="", models=[]
    )
    daemon.answers["/status"] = (200, status(peers=[peer(draining=True), gone]))
    result = cli("peers")
    assert result.exit_code == 0
    head, first, second = result.stdout.splitlines()
    assert head.split() == ["NODE", "ID", "STATE", "ADDRESS", "RTT", "VERSION", "ROLE", "MODELS"]
    assert first.split() == [
        *("attic", "bbbbbbbb", "alive,", "draining", "192.168.1.7:9338", "0.34", "ms", "0.2.0"),
        *("member", "builtin,", "llama"),
    ]
    assert second.split() == ["[shed]", "cccccccc", "dead", "-", "-", "-", "member", "-"]
    assert json.loads(cli("peers", "--json").stdout) == [peer(draining=True), gone]


def test_nobody_else_is_said_and_how_to_change_it(daemon: Daemon, cli: Cli) -> None:
    daemon.answers["/status"] = (200, status())
    assert "`meshd invite`" in cli("peers").stdout
    assert json.loads(cli("peers", "--json").stdout) == []


def test_status_shows_the_mesh_and_the_peers(daemon: Daemon, cli: Cli) -> None:
    daemon.answers["/status"] = (200, status(peers=[peer()]))
    result = cli("status")
    assert result.exit_code == 0
    assert "mesh     home (01234567), 2 of 3 nodes alive\n" in result.stdout
    assert "attic" in result.stdout


@pytest.mark.parametrize(
    ("mesh", "line"),
    [
        (
            {"state": "joining", "reason": "no answer yet"},
            "mesh     home, joining: no answer yet\n",
        ),
        ({"state": "refused", "reason": "revoked"}, "mesh     home, refused: revoked\n"),
        ({"state": "none", "reason": "left"}, "mesh     none: left\n"),
        ({"state": "none", "reason": None}, "mesh     none\n"),
    ],
)
def test_status_says_why_it_is_no_member(
    daemon: Daemon, cli: Cli, mesh: dict[str, Any], line: str
) -> None:
    told = {"id": None, "name": "home", "members": 1, "alive": 1} | mesh
    daemon.answers["/status"] = (200, status(mesh=told))
    assert line in cli("status").stdout


# -- the others -----------------------------------------------------------------------------------


def test_revoke(daemon: Daemon, cli: Cli) -> None:
    daemon.answers["/revoke"] = (200, {"node": "attic", "id": BETA})
    assert cli("revoke", "bbbb").stdout == "attic (bbbbbbbb) is revoked\n"
    assert json.loads(cli("revoke", "attic", "--json").stdout)["id"] == BETA
    assert cli("revoke", "--", "-odd").exit_code == 0
    assert [body for _, body in daemon.asked] == [
        {"node": "bbbb"},
        {"node": "attic"},
        {"node": "-odd"},
    ]
    assert cli("revoke").exit_code == 2
    assert cli("revoke", "-odd").exit_code == 2


@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        ("leave", {"mesh": "home"}, "left the mesh home"),
        ("drain", {"state": "draining"}, "`meshd undrain`"),
        ("undrain", {"state": "ready"}, "takes requests again"),
    ],
)
def test_short_orders(
    daemon: Daemon, cli: Cli, command: str, answer: dict[str, str], said: str
) -> None:
    daemon.answers[f"/{command}"] = (200, answer)
    result = cli(command)
    assert (result.exit_code, said in result.stdout) == (0, True)
    assert json.loads(cli(command, "--json").stdout) == answer
    assert daemon.asked == [(f"/{command}", {})] * 2


@pytest.mark.parametrize(
    "words", [("invite",), ("peers",), ("revoke", "x"), ("leave",), ("drain",), ("undrain",)]
)
def test_no_daemon_is_exit_code_3(cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = cli(*words, "--data-dir", str(tmp_path / "none"))
    assert result.exit_code == 3
    assert "meshd run" in result.stderr
    assert not (tmp_path / "none").exists()
