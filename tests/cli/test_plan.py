"""`meshd plan`, against a scripted daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.scripted import ALPHA, BETA, Cli, Daemon

GIB = 1 << 30
SHAPE = {
    "weights_bytes": 5 * GIB,
    "cache_bytes": 2 * GIB,
    "compute_bytes": GIB // 2,
    "prompts_bytes": 0,
    "context": 8192,
    "slots": 4,
}


def node(name: str, verdict: str, **changes: Any) -> dict[str, Any]:
    usual = {
        "node": BETA,
        "name": name,
        "verdict": verdict,
        "why": "fits with 12/16 to spare",
        "score": 1 << 40,
        "epoch": None,
        "needs_bytes": 7 * GIB,
        "free_bytes": 16 * GIB,
    }
    return usual | changes


def plan(*nodes: dict[str, Any], shape: dict[str, Any] | None = SHAPE) -> dict[str, Any]:
    return {
        "model": "m",
        "ref": "owner/m",
        "deployed": True,
        "wanted": 1,
        "decision": "attic hosts [m]",
        "nodes": list(nodes),
        "shape": shape,
    }


def test_the_decision_then_what_it_needs_then_every_node(daemon: Daemon, cli: Cli) -> None:
    cannot = {"why": "lacks 1.0 GiB", "needs_bytes": None, "free_bytes": None}
    answer = plan(
        node("attic", "hosts", epoch=3), node("[shed]", "stands by"), node("pi", "cannot", **cannot)
    )
    daemon.say("/plan", answer)
    result = cli("plan", "owner/m")
    assert result.exit_code == 0
    decision, needs, head, *rows = result.stdout.splitlines()
    assert decision == "attic hosts [m]"
    assert needs == (
        "weights 5.0 GiB, cache 2.0 GiB (4 slots of 8192 tokens), compute 512.0 MiB, "
        "kept prompts 0 B"
    )
    assert head.split() == ["NODE", "VERDICT", "NEEDS", "FREE", "EPOCH", "WHY"]
    why = ["fits", "with", "12/16", "to", "spare"]
    assert [row.split() for row in rows] == [
        ["attic", "hosts", "7.0", "GiB", "16.0", "GiB", "3", *why],
        ["[shed]", "stands", "by", "7.0", "GiB", "16.0", "GiB", "-", *why],
        ["pi", "cannot", "-", "-", "-", "lacks", "1.0", "GiB"],
    ]
    assert json.loads(cli("plan", "owner/m", "--json").stdout) == answer
    assert daemon.asked == [("/plan", {"ref": "owner/m"})] * 2


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (("hosts", "cannot"), 0),
        (("cannot", "next"), 0),
        (("stands by",), 0),
        (("cannot", "leaves"), 1),
        ((), 1),
    ],
)
def test_the_exit_code_says_whether_any_node_can(
    daemon: Daemon, cli: Cli, verdicts: tuple[str, ...], code: int
) -> None:
    nodes = [node(f"n{i}", verdict, node=ALPHA) for i, verdict in enumerate(verdicts)]
    daemon.say("/plan", plan(*nodes, shape=None))
    assert cli("plan", "m").exit_code == code
    assert cli("plan", "m", "--json").exit_code == code


def test_what_is_unknown_is_the_daemons_own_words(daemon: Daemon, cli: Cli) -> None:
    error = {"message": "there is no model `n`; did you mean `m`?", "code": "model_not_found"}
    daemon.answers["/plan"] = (404, {"error": error})
    result = cli("plan", "n")
    assert (result.exit_code, result.stderr) == (1, f"error: {error['message']}\n")


def test_no_daemon_is_exit_code_3(cli: Cli, tmp_path: Path) -> None:
    assert cli("plan", "m", "--data-dir", str(tmp_path / "none")).exit_code == 3
