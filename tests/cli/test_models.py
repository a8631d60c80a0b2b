"""`meshd load`, `unload` and `models`, against a scripted daemon."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from meshd.cli import models, waiting
from tests.cli.scripted import Cli, Daemon, status

NOBODY_FITS = "no node fits: attic has 2.0 GB, needs 4.9 GB"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second status that says the same as the first is a standstill."""
    for module in (waiting, models):
        monkeypatch.setattr(module, "POLL_S", 0.0)
    monkeypatch.setattr(waiting, "STANDSTILL_S", 0.0)


def host(node: str, state: str = "ready", *workers: str) -> dict[str, Any]:
    lenders = [{"node": worker, "share": 0.3, "bytes": 1 << 30} for worker in workers]
    return {
        "plan": {"kind": "split" if workers else "solo", "workers": lenders},
        "node": node,
        "state": state,
        "slots": 4,
        "slots_free": 3,
        "context_length": 8192,
    }


def model(state: str, *hosts: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    usual = {"id": "m", "ref": "owner/m", "progress": None, "fetch": None}
    return usual | {"state": state, "reason": reason, "hosts": list(hosts)}


def seen(*shown: dict[str, Any], deployed: bool = True) -> dict[str, Any]:
    return status(models=list(shown), deployments=[{"model": "m"}] if deployed else [])


def plan(decision: str, *verdicts: str) -> dict[str, Any]:
    return {"decision": decision, "nodes": [{"verdict": verdict} for verdict in verdicts]}


def loading(daemon: Daemon, *statuses: dict[str, Any], plan: dict[str, Any] | None = None) -> None:
    daemon.say("/load", {"model": "m"})
    daemon.say("/status", *statuses)
    if plan is not None:
        daemon.say("/plan", plan)


def orders(daemon: Daemon) -> list[tuple[str, Any]]:
    return [asked for asked in daemon.asked if asked[0] != "/status"]


# -- load: what is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        ((), {}),
        (("--ctx", "4096", "--parallel", "2"), {"context": 4096, "parallel": 2}),
        (("--replicas", "3", "--host", "attic"), {"replicas": 3, "host": "attic"}),
        (("--replicas", "auto"), {"replicas": "auto"}),
        (("--split",), {"split": True}),
    ],
)
def test_what_is_wished_for_is_in_the_order(
    daemon: Daemon, cli: Cli, flags: tuple[str, ...], body: dict[str, Any]
) -> None:
    loading(daemon)
    result = cli("load", "owner/m", *flags, "--no-wait")
    assert (result.exit_code, result.stdout.split(";")[0]) == (0, "loading m")
    nothing = dict.fromkeys(("context", "parallel", "replicas", "host"))
    assert daemon.asked == [("/load", {"ref": "owner/m", "split": False} | nothing | body)]


@pytest.mark.parametrize("count", ["0", "4097", "-1", "1.5", "many", ""])
def test_a_count_of_hosts_that_is_none_is_a_usage_error(
    daemon: Daemon, cli: Cli, count: str
) -> None:
    result = cli("load", "m", "--replicas", count)
    assert result.exit_code == 2
    assert "neither a number from 1 to 4096 nor auto" in result.stderr
    assert daemon.asked == []


# -- load: waiting --------------------------------------------------------------------------------


def test_it_is_loaded_when_a_node_is_ready(daemon: Daemon, cli: Cli) -> None:
    ready = model("ready", host("attic"))
    early = [seen(), seen(model("absent")), seen(model("loading"))]
    loading(daemon, *early, seen(ready), plan=plan("attic is next", "next"))
    assert cli("load", "m").stdout == "m is ready\n"
    assert json.loads(cli("load", "m", "--json").stdout) == ready


@pytest.mark.parametrize(("replicas", "enough"), [("2", 2), ("auto", 1)])
def test_as_many_nodes_as_were_asked_for(
    daemon: Daemon, cli: Cli, replicas: str, enough: int
) -> None:
    grown = [
        model("ready", *(host(name) for name in ("attic", "study", "shed")[:n])) for n in (1, 2, 3)
    ]
    loading(daemon, *map(seen, grown))
    answer = json.loads(cli("load", "m", "--replicas", replicas, "--json").stdout)
    assert answer == grown[enough - 1]


def test_a_host_that_is_not_ready_does_not_count(daemon: Daemon, cli: Cli) -> None:
    half = model("ready", host("attic"), host("study", "loading"))
    whole = model("ready", host("attic"), host("study"))
    loading(daemon, seen(half), seen(whole))
    assert json.loads(cli("load", "m", "--replicas", "2", "--json").stdout) == whole


def test_a_failure_is_the_nodes_own_words(daemon: Daemon, cli: Cli) -> None:
    loading(daemon, seen(model("loading")), seen(model("failed", reason="m.gguf is cut off")))
    result = cli("load", "m")
    assert (result.exit_code, result.stderr) == (1, "error: m: m.gguf is cut off\n")


@pytest.mark.parametrize("gone", [seen(deployed=False), seen(model("absent"), deployed=False)])
def test_what_is_unloaded_meanwhile_is_not_waited_for(
    daemon: Daemon, cli: Cli, gone: dict[str, Any]
) -> None:
    loading(daemon, seen(model("loading")), gone)
    result = cli("load", "m")
    assert result.exit_code == 1
    assert "m was unloaded while it was loading" in result.stderr


def test_what_no_node_can_host_is_not_waited_for(daemon: Daemon, cli: Cli) -> None:
    waits = seen(model("waiting", reason=NOBODY_FITS))
    loading(daemon, waits, plan=plan("nobody can", "cannot", "cannot"))
    result = cli("load", "owner/m")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: m waits: {NOBODY_FITS}; the deployment stands, `meshd unload m` takes it back\n"
    )
    assert orders(daemon)[1:] == [("/plan", {"ref": "owner/m"})]


def test_so_is_a_host_that_cannot_be_found(daemon: Daemon, cli: Cli) -> None:
    one = seen(model("ready", host("attic")))
    loading(daemon, one, plan=plan("attic hosts m; study has 2.0 GB", "hosts", "cannot"))
    result = cli("load", "m", "--replicas", "2")
    assert result.exit_code == 1
    assert "m is ready on 1 of 2 nodes: attic hosts m; study has 2.0 GB; the" in result.stderr


def test_while_it_is_somebodys_turn_it_is_waited_for(daemon: Daemon, cli: Cli) -> None:
    """A node may wait for somebody else's download, which says the same for minutes."""
    waits = seen(model("waiting", reason="another program fetches it"))
    ready = seen(model("ready", host("attic")))
    loading(daemon, *[waits] * 3, ready, plan=plan("attic prepares m", "hosts"))
    assert cli("load", "m").exit_code == 0
    assert len(orders(daemon)) == 1 + 2


@pytest.mark.parametrize(
    "moves",
    [
        [model("waiting", reason="a"), model("waiting", reason="b")],
        [model("loading", reason="reads the weights")] * 3,
    ],
    ids=["its reason changes", "a node works on it"],
)
def test_what_moves_is_waited_for(daemon: Daemon, cli: Cli, moves: list[dict[str, Any]]) -> None:
    loading(daemon, *map(seen, moves), seen(model("ready", host("attic"))))
    assert cli("load", "m").exit_code == 0


def test_people_at_a_terminal_see_why_it_waits(
    daemon: Daemon, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    loading(
        daemon,
        seen(model("waiting", reason="attic is next")),
        seen(model("loading", reason="starts")),
        seen(model("ready", host("attic"))),
        seen(model("ready", host("attic"), host("study"))),
    )
    said = cli("load", "m", "--replicas", "2").stderr.splitlines()
    assert said == ["waiting: attic is next", "loading: starts", "ready: 1 of 2 nodes: attic"]


# -- unload and models ----------------------------------------------------------------------------


def test_unloaded_is_what_no_node_hosts(daemon: Daemon, cli: Cli) -> None:
    daemon.say("/unload", {"model": "m"})
    daemon.say(
        "/status",
        seen(model("draining", host("attic", "draining"), host("study"))),
        seen(model("draining", host("study", "draining"))),
        seen(model("absent")),
    )
    result = cli("unload", "m", "--drain", "5")
    assert (result.exit_code, result.stdout) == (0, "m is unloaded\n")
    paths = [path for path, _ in daemon.asked]
    assert paths == ["/unload", "/status", "/status", "/status"]
    assert daemon.asked[0][1] == {"model": "m", "drain_s": 5.0}


@pytest.mark.parametrize("command", ["models", "status"])
def test_models_are_shown_with_their_hosts_or_why_there_are_none(
    daemon: Daemon, cli: Cli, command: str
) -> None:
    waits = model("waiting", reason=NOBODY_FITS) | {"id": "big"}
    served = model("ready", host("attic", "ready", "cellar"), host("[shed]", "loading"))
    daemon.say("/status", seen(waits, served))
    *_, head, first, second = cli(command).stdout.splitlines()
    assert head.split() == ["MODEL", "STATE", "HOSTS", "SLOTS", "CONTEXT", "WHY", "/", "REF"]
    assert first.split() == ["big", "waiting", "-", "-", "-", *NOBODY_FITS.split()]
    assert second.split() == [
        *("m", "ready", "attic", "+", "cellar,", "[shed]", "(loading)"),
        *("6/8", "free", "8192", "owner/m"),
    ]
