from __future__ import annotations

import shlex
from typing import Any

import pytest

from bench.figures import Goal
from bench.processes import BenchError
from bench.split import goals_of, main, tables
from bench.split_engines import recipe_of
from bench.split_nodes import Lost
from bench.split_rounds import (
    ALONE,
    EMPTY,
    FILLED,
    LOOPBACK,
    MESHD,
    ONE_NODE,
    WIRE,
    Measured,
    losses,
)
from meshd.election.hosted import REPLANS

ENGINE = shlex.split(
    "/e/llama-server --model /m.gguf --alias m,m~1 --host e.sock --ctx-size 2048 --parallel 1 "
    "--rpc 127.0.0.1:1,127.0.0.1:2 --device RPC0,RPC1 --n-gpu-layers 3 --split-mode layer "
    "--tensor-split 1,2 --fit off --threads 1 --slots"
)
SERVER = shlex.split("/e/ggml-rpc-server -H 127.0.0.1 -p 4711 -d CPU -t 1 -c")


def speed(prompt: float, generated: float, differs: float = 0.0) -> dict[str, Any]:
    values = {"prompt_tok_s": prompt, "generated_tok_s": generated, "differs": differs}
    return {"speed": values}


def load(seconds: float, percent: float = 0.0) -> dict[str, Any]:
    values = {"seconds": seconds, "pushed_bytes": percent * 4e6, "pushed_percent": percent}
    return {"load": values}


def verdicts(goals: list[Goal]) -> dict[str, tuple[float | None, str]]:
    return {goal.what.partition(",")[0]: (goal.value, goal.verdict) for goal in goals}


SPEEDS = [
    {ALONE: speed(100, 20), LOOPBACK: speed(90, 19), WIRE: speed(80, 20), MESHD: speed(76, 19.6)},
    {ALONE: speed(50, 10), LOOPBACK: speed(45, 9), WIRE: speed(40, 8), MESHD: speed(36, 7.2)},
    {ALONE: speed(50, 10), LOOPBACK: speed(45, 9), WIRE: speed(40, 8), MESHD: speed(34, 7.6)},
]
LOADS = [
    {
        ALONE: load(0.3),
        WIRE + EMPTY: load(1.9, 66.7),
        WIRE + FILLED: load(1.1, 0.5),
        ONE_NODE: load(2.0),
        MESHD + EMPTY: load(4.0, 66.7),
        MESHD + FILLED: load(2.5, 0.5),
    }
]


def test_ratios_are_taken_within_each_round() -> None:
    assert verdicts(goals_of(Measured(speeds=SPEEDS))) == {
        "generation": (0.95, "reached"),
        "prompt": (0.9, "reached"),
        "texts that differ from one engine's": (0, "reached"),
    }


def test_a_text_that_differs_is_told_of_every_way() -> None:
    rounds = [*SPEEDS, {**SPEEDS[0], LOOPBACK: speed(1, 1, 1.0), MESHD: speed(1, 1, 1.0)}]
    found = verdicts(goals_of(Measured(speeds=rounds)))
    assert found["texts that differ from one engine's"] == (2, "not reached")


def test_loads_are_held_against_those_of_one_node() -> None:
    assert verdicts(goals_of(Measured(loads=LOADS))) == {
        "load with full caches": (1.25, "reached"),
        "pushed then": (0.5, "reached"),
    }


def test_without_nodes_only_texts_can_be_compared() -> None:
    speeds = [{way: r[way] for way in (ALONE, LOOPBACK, WIRE)} for r in SPEEDS]
    loads = [{way: LOADS[0][way] for way in (ALONE, WIRE + EMPTY, WIRE + FILLED)}]
    found = [goal.verdict for goal in goals_of(Measured(speeds, loads))]
    assert found == ["not measured", "not measured", "reached", "not measured", "not measured"]


def rows_of(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without its head."""
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def test_every_way_has_a_row() -> None:
    lost = [Lost(0.2, 3.0), Lost(0.4, 2.0), Lost(0.3, 9.0)]
    speeds, loads, losses = map(rows_of, tables(Measured(SPEEDS, LOADS, lost)).split("\n\n"))
    assert speeds[1] == ["plain RPC, its own host", "45.0", "1.125", "9.0", "1.125"]
    assert [row[0] for row in speeds][2:] == ["plain RPC, two other hosts", "meshd"]
    assert loads[1][0] == "plain RPC, two other hosts, empty caches"
    assert loads[1][1:] == ["1.90", "1.90", "1.90", "266.8"]
    assert [row[0] for row in loads][3:5] == ["meshd, one node", "meshd, empty caches"]
    assert losses[1][1:] == ["2.00", "3.00", "9.00", "9.00"]


class Nodes:
    """Whose host pauses after `REPLANS` losses since the model was unloaded; nothing else brings
    it back. Of a whole run only `lives` losses come to an end."""

    def __init__(self, lives: int = 100) -> None:
        self.loads = 0
        self._lives = lives
        self._in_a_row = REPLANS

    def load(self) -> float:
        self.loads += 1
        return 1.0

    def unload(self) -> None:
        self._in_a_row = 0

    def lose_worker(self, number: int) -> Lost:
        self._in_a_row += 1
        if self._in_a_row > REPLANS:
            raise BenchError("not within 120 s: it is served again: paused\nmany lines of logs")
        if number >= self._lives:
            raise BenchError("not within 120 s: the host notices\nmany lines of logs")
        return Lost(0.1, number)


def test_no_loss_is_counted_in_which_a_host_pauses() -> None:
    nodes, said = Nodes(), list[str]()
    found, cut_short = losses(nodes, 10, said.append)
    assert [lost.total_s for lost in found] == list(range(10))
    assert (nodes.loads, cut_short, len(said)) == (4, "", 10)


def test_losses_before_one_that_does_not_end_are_kept_and_the_reason_is_told() -> None:
    found, cut_short = losses(Nodes(lives=5), 10, lambda _: None)
    assert len(found) == 5
    told = tables(Measured(recovery=found, cut_short=cut_short)).splitlines()[-1]
    assert told == "Recovery ended after 5 losses: not within 120 s: the host notices"


def test_stock_engines_are_started_as_a_node_starts_its_own() -> None:
    recipe = recipe_of(ENGINE, SERVER)
    assert " ".join(recipe.engine) == (
        "/e/llama-server --model /m.gguf --ctx-size 2048 --parallel 1 --threads 1 --slots"
    )
    assert " ".join(recipe.spread) == (
        "--device RPC0,RPC1 --n-gpu-layers 3 --split-mode layer --tensor-split 1,2 --fit off"
    )
    assert " ".join(recipe.rpc_server) == "/e/ggml-rpc-server -d CPU -t 1"


def test_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "speed"])
    assert "no part is called speed" in capsys.readouterr().err


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err
