"""Elections under faults, seed after seed. To see one run again: `MESHD_SIM=SEED:SIZE pytest
tests/sim/test_election.py -k one_run`; its failure tells the last that happened."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from statistics import median

import pytest

from tests.sim.placement.crowd import crowd
from tests.sim.placement.troubles import Failure, Outcome, play

SOAK = pytest.mark.skipif("SOAK_TEST" not in os.environ, reason="minutes long: `make soak`")
SOAK_SEEDS = 500
SIZES = (3, 8, 32)
ONE_RUN = os.environ.get("MESHD_SIM", "0:3")


@pytest.mark.parametrize(
    ("size", "first", "count"),
    [(3, 0, 30), (3, 30, 30), (8, 0, 10), (8, 10, 10), (32, 0, 2)],
)
def test_seeds(size: int, first: int, count: int) -> None:
    for seed in range(first, first + count):
        play(seed, size)


def test_one_run() -> None:
    seed, size = map(int, ONE_RUN.split(":"))
    play(seed, size)


def test_equal_seeds_give_equal_runs() -> None:
    one, same, other = (play(seed, 3) for seed in (7, 7, 8))
    assert one == same
    assert one.trace != other.trace


@SOAK
@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_five_hundred_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    failures: list[str] = []
    lines = []
    for size in SIZES:
        with ProcessPoolExecutor() as pool:
            results = list(pool.map(_outcome, range(SOAK_SEEDS), repeat(size), chunksize=4))
        failures += [r for r in results if isinstance(r, str)]
        lines.append(_row(size, [r for r in results if isinstance(r, Outcome)]))
    with capsys.disabled():
        print(f"\n{_HEAD}\n" + "\n".join(lines))  # noqa: T201
    assert not failures, f"{len(failures)} runs failed; the first:\n{failures[0]}"


@SOAK
@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_a_thousand_nodes_and_two_hundred_models(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    told = crowd(1, nodes=1000, models=200)
    with capsys.disabled():
        print(f"\n1,000 nodes, 200 models: {time.monotonic() - start:.0f} s; {told}")  # noqa: T201


_HEAD = "{:>6} {:>6} {:>8} {:>10} {:>22} {:>8}".format(
    "nodes", "runs", "starts", "events", "at rest after, median", "max"
)


def _row(size: int, outcomes: list[Outcome]) -> str:
    rests = [o.rest_s for o in outcomes] or [0.0]
    return (
        f"{size:>6} {len(outcomes):>6} {sum(o.starts for o in outcomes):>8} "
        f"{sum(o.events for o in outcomes):>10} {median(rests):>20.1f} s {max(rests):>6.1f} s"
    )


def _outcome(seed: int, size: int) -> Outcome | str:
    """In a process of its own, from which a failure comes back as words."""
    try:
        return play(seed, size)
    except Failure as failure:
        return str(failure)
