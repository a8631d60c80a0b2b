"""The classic cases of an election, told as transcripts and compared with those in `golden/`.

`MESHD_WRITE_GOLDEN=1` writes them anew; read the difference before you commit it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshd.ids import NodeId
from meshd.view import ModelState
from tests.election.table import Table
from tests.election.words import GB, M, bid, record

GOLDEN = Path(__file__).parent / "golden"
LOADING, READY, ABSENT = ModelState.LOADING, ModelState.READY, ModelState.ABSENT


def _table(**headroom: int) -> Table:
    table = Table()
    for name, value in headroom.items():
        table.join(name, bid(value), size=4 * GB, capacity=10 * GB)
    table.lines.clear()
    return table


def _served(**headroom: int) -> Table:
    """A table at which the node with most headroom has come to serve."""
    table = _table(**headroom)
    table.write(record())
    table.report(max(headroom, key=lambda n: headroom[n]), READY, M)
    table.lines.clear()
    table.now = 10.0
    return table


def first_claim() -> Table:
    table = _table(ash=3, birch=9, cedar=5)
    table.say("a model is asked for: the node with most memory left claims it")
    table.write(record())
    table.say("its engine loads and serves")
    table.report("birch", LOADING, M)
    table.wait_until(5.0)
    table.report("birch", READY, M)
    table.say("it is unloaded")
    table.write(record(2, removed=True))
    table.report("birch", ABSENT, M)
    return table


def tie() -> Table:
    table = _table(ash=5, birch=5, cedar=5)
    table.part(["ash"], ["birch"], ["cedar"])
    table.say("equal nodes that do not see each other: all of them claim")
    table.write(record())
    table.say("they see each other: one claim stands, the others give up")
    table.part(["ash", "birch", "cedar"])
    for name in ("ash", "birch", "cedar"):
        if any(c.state == "draining" for c in table.seats[name].claims):
            table.report(name, ABSENT, M)
    return table


def host_death() -> Table:
    table = _served(ash=3, birch=9, cedar=5)
    table.say("the host dies: the next of the ranking claims at once")
    table.part(["ash", "cedar"])
    table.report("cedar", READY, M)
    table.say("it comes back with the epoch it had saved: nothing moves")
    table.now = 30.0
    table.join("birch", bid(9), size=4 * GB, capacity=10 * GB)
    return table


def partition_and_heal() -> Table:
    table = _served(ash=3, birch=9, cedar=5)
    table.say("the host is cut off: both sides serve")
    table.part(["ash", "cedar"], ["birch"])
    table.report("cedar", READY, M)
    table.say("heal: the higher epoch stands, its engine is not touched")
    table.now = 60.0
    table.part(["ash", "birch", "cedar"])
    table.report("birch", ABSENT, M)
    return table


def heal_while_loading() -> Table:
    table = _served(ash=3, birch=9, cedar=5)
    table.say("the host is cut off: the other side begins to load")
    table.part(["ash", "cedar"], ["birch"])
    table.report("cedar", LOADING, M)
    table.say("heal before that serves: who serves stands, with an epoch above both")
    table.now = 12.0
    table.part(["ash", "birch", "cedar"])
    table.report("cedar", ABSENT, M)
    return table


def drain() -> Table:
    table = _served(ash=3, birch=9, cedar=5)
    table.say("the host drains: it serves on until the next one does")
    table.drain("birch")
    table.wait_until(20.0)
    table.report("cedar", READY, M)
    table.report("birch", ABSENT, M)
    table.say("the last nodes drain too: nobody is left to wait for")
    table.drain("ash")
    table.drain("cedar")
    return table


def pin_moved() -> Table:
    table = _served(ash=3, birch=9, cedar=5)
    table.say("pinned to another node: the old host serves until that does")
    table.write(record(2, host=NodeId("ash")))
    table.report("ash", READY, M)
    table.report("birch", ABSENT, M)
    return table


def failed_load() -> Table:
    table = _table(ash=3, birch=9, cedar=5)
    table.say("the first of the ranking cannot load: the next one claims")
    table.write(record())
    table.report("birch", ModelState.FAILED, M, "CUDA error: out of memory")
    table.report("birch", ABSENT, M)
    table.say("that one fails too, and so does the last")
    table.report("cedar", ModelState.FAILED, M, "CUDA error: out of memory")
    table.report("cedar", ABSENT, M)
    table.wait_until(4.0)
    table.report("ash", ModelState.FAILED, M, "disk full")
    table.report("ash", ABSENT, M)
    table.say("the back-off that ends first tries again")
    table.wait_until(10.0)
    table.report("birch", READY, M)
    table.wait_until(14.0)
    return table


def worker_loss() -> Table:
    table = Table(splits=True)
    for name, headroom in {"ash": 9, "birch": 5, "cedar": 3}.items():
        table.join(name, bid(headroom), size=8 * GB, capacity=5 * GB)
    table.lines.clear()
    table.say("a model fits on no node: the best host claims it, with memory of another")
    table.write(record())
    table.report("ash", READY, M)
    table.say("the loan is renewed; the worker is cut off: the host keeps its claim and plans anew")
    for second in (4.0, 8.0):
        table.wait_until(second)
    table.now = 10.0
    _lose_worker(table, "birch", ["ash", "cedar"], ["birch"])
    table.report("ash", READY, M)
    table.say("the worker has not heard of its host, and ends what it lent")
    table.wait_until(13.0)
    table.returned("birch")
    table.now = 15.0
    table.say("the other worker is lost too: nothing fits, and the host gives up after a while")
    _lose_worker(table, "cedar", ["ash"], ["birch"], ["cedar"])
    table.wait_until(18.0)
    table.returned("cedar")
    table.wait_until(21.0)
    table.say("a worker is back: the model is claimed anew")
    table.wait_until(60.0)
    table.part(["ash", "birch"], ["cedar"])
    table.report("ash", READY, M)
    return table


def _lose_worker(table: Table, worker: str, *groups: list[str]) -> None:
    table.part(*groups)
    table.report("ash", ModelState.FAILED, M, f"worker {worker} was lost", lost=True)
    table.report("ash", ABSENT, M)


SCENES: list[Callable[[], Table]] = [
    first_claim,
    tie,
    host_death,
    partition_and_heal,
    heal_while_loading,
    drain,
    pin_moved,
    failed_load,
    worker_loss,
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_it_goes_as_it_is_written(scene: Callable[[], Table]) -> None:
    told = "\n".join(scene().lines) + "\n"
    golden = GOLDEN / f"{scene.__name__}.txt"
    if os.environ.get("MESHD_WRITE_GOLDEN"):
        golden.write_text(told)
    assert told == golden.read_text()
