from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from bench.failover import goals_of, main, times_table
from bench.processes import (
    TICK_S,
    BenchError,
    Stable,
    argv_of,
    cpu_s,
    family_cpu_s,
    own_cpu_s,
    wait_for,
)
from bench.replacing import MODEL, Times, times_of

TIMES = Times(0.3, 0.1, 0.1, 0.4, 0.1, 1.0, 0.0)


def peer(at: float, name: str, state: str) -> dict[str, Any]:
    return {"type": "peer", "peer": name, "state": state, "previous": "alive", "at": at}


def host(at: float, name: str, state: str) -> dict[str, Any]:
    return {"type": "host", "model": MODEL, "node": name, "epoch": 2, "state": state, "at": at}


def model(at: float, state: str) -> dict[str, Any]:
    return {"type": "model", "model": MODEL, "state": state, "at": at}


EVENTS = [
    host(99.0, "n2", "preparing"),  # of an earlier round
    peer(100.01, "n1", "suspect"),
    peer(100.25, "n1", "dead"),
    host(100.25, "n1", "gone"),
    host(100.5, "n2", "preparing"),
    model(100.5, "verifying"),
    model(101.0, "loading"),
    model(103.0, "ready"),
    host(103.0, "n2", "ready"),
]


def times(events: list[dict[str, Any]]) -> Times:
    return times_of(
        events, victim="n1", node="n2", killed_at=100.0, answered_at=107.0, foreign=0.25
    )


def test_each_part_ends_with_its_event() -> None:
    assert times(EVENTS) == Times(0.25, 0.25, 0.5, 2.0, 4.0, 7.0, 0.25)


@pytest.mark.parametrize("number", [2, 4, 6, 8])
def test_a_part_without_its_event_is_no_round(number: int) -> None:
    with pytest.raises(BenchError, match="no event says"):
        times([*EVENTS[:number], *EVENTS[number + 1 :]])


def test_goals_take_the_longest_round() -> None:
    assert [g.verdict for g in goals_of([TIMES] * 30)] == ["reached", "reached"]
    late = replace(TIMES, detect_s=1.6, total_s=4.1)
    found = goals_of([*[TIMES] * 29, late])
    assert [(g.value, g.verdict) for g in found] == [(4.1, "not reached"), (1.6, "not reached")]


def test_every_time_has_a_row() -> None:
    rows = times_table([TIMES, replace(TIMES, load_s=2.0)]).splitlines()[2:]
    assert len(rows) == 6
    assert [cell.strip() for cell in rows[3].split("|")[2:6]] == [
        "0.400",
        "1.200",
        "2.000",
        "2.000",
    ]


def test_no_rounds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_a_family_is_all_that_a_process_started(stable: Stable) -> None:
    burn = "x=0; while [ $x -lt 100000 ]; do x=$((x+1)); done"
    child = stable.start("child", ["sh", "-c", f"sh -c '{burn}'; {burn}; exec sleep 60"])
    wait_for(lambda: argv_of(child.pid)[:1] == ("sleep",), limit_s=20, what="both have worked")
    of_child = family_cpu_s(child.pid)
    assert of_child > 1.2 * cpu_s(child.pid) > 0
    assert family_cpu_s(os.getpid()) >= own_cpu_s() + of_child - 2 * TICK_S
    stable.end(child)
    assert family_cpu_s(child.pid) == 0
