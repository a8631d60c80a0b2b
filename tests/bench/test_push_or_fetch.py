from __future__ import annotations

import pytest

from bench.push_or_fetch import Loaded, Pair, main, tables


def pair(push_s: float, fetch_s: float) -> Pair:
    return Pair(Loaded(push_s, 278_000_000, 0), Loaded(fetch_s, 2_000_000, 277_000_000), 0.5)


def test_the_table_compares_within_each_round() -> None:
    rounds = [
        {1: pair(20, 16), 2: pair(20, 10)},
        {1: pair(40, 20), 2: pair(20, 12)},
        {1: pair(30, 18), 2: pair(10, 8)},
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in tables(rounds).split("\n")
    ]
    assert lines[0][:2] == ["first loads, n = 3 each", "least s"]
    assert lines[2:] == [
        ["push, beside 1 holder", "20.0", "30.0", "40.0", "–", "278.0", "0.0"],
        ["fetch from 1 holder and the host", "16.0", "18.0", "20.0", "0.60", "2.0", "277.0"],
        ["push, beside 2 holders", "10.0", "20.0", "20.0", "–", "278.0", "0.0"],
        ["fetch from 2 holders and the host", "8.0", "10.0", "12.0", "0.60", "2.0", "277.0"],
    ]


def test_no_rounds_are_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds: at least 1" in capsys.readouterr().err
