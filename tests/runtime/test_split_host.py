"""`ModelHost` with a model that lies on workers: what of it is shown, and that it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshd.errors import PeerUnreachable
from meshd.runtime.group import LoanOrder
from meshd.runtime.hosting_events import LoadOptions
from meshd.view import ModelState
from tests.runtime.conftest import wait_for
from tests.runtime.house import House, M
from tests.runtime.lender import PLAN, FakeLender
from tests.runtime.scripted_process import ScriptedProcess

pytestmark = pytest.mark.usefixtures("scripted")

SPLIT = LoadOptions(split=PLAN, epoch=7)
LOST = "worker c was lost: its rpc-server ended"


@pytest.fixture
async def lender() -> FakeLender:
    return FakeLender()


@pytest.fixture
async def house(short_dir: Path, lender: FakeLender) -> AsyncIterator[House]:
    house = House(short_dir, lender=lender)
    await house.start()
    yield house
    await house.stop()


async def test_a_split_model_shows_its_workers_from_the_first_moment(
    house: House, lender: FakeLender
) -> None:
    lender.grants.clear()
    house.host.load("m.gguf", SPLIT)
    await wait_for(lambda: lender.orders, "the workers are asked")
    assert lender.orders == [LoanOrder(M, 7, "d1", PLAN)]
    asking = await house.until(ModelState.LOADING)
    assert asking.reason == "asking b, c for memory"
    assert [w.name for w in asking.hosts[0].workers] == ["b", "c"]
    lender.grants.set()
    ready = await house.until(ModelState.READY)
    (host,) = ready.hosts
    assert [(w.name, w.share) for w in host.workers] == [("b", 0.4), ("c", 0.6)]
    assert len(ready.targets) == 1
    (process,) = ScriptedProcess.made
    assert process.argv[process.argv.index("--tensor-split") + 1] == "1,2"


async def test_what_a_split_takes_is_not_kept_for_a_model_alone(house: House) -> None:
    house.host.load("m.gguf", SPLIT)
    await wait_for(lambda: ScriptedProcess.made, "a process")
    ScriptedProcess.made[0].say("sched_reserve: CPU compute buffer size = 2.00 MiB")
    await house.until(ModelState.READY)
    taken = house.host.taken(M)
    assert taken is not None
    assert taken.total == 2 << 20
    house.host.unload("m", 0.0)
    await wait_for(lambda: house.view is None, "gone")
    house.host.load("m.gguf")
    await house.until(ModelState.READY)
    assert "--verbosity" in ScriptedProcess.made[-1].argv  # still unknown, so it is asked
    assert "--rpc" not in ScriptedProcess.made[-1].argv


async def test_a_lost_worker_fails_the_model_and_an_unload_forgets_it(
    house: House, lender: FakeLender
) -> None:
    house.host.load("m.gguf", SPLIT)
    await house.until(ModelState.READY)
    lender.lost(LOST)
    failed = await house.until(ModelState.FAILED)
    assert (failed.reason, failed.targets) == (LOST, ())
    assert house.host.worker_lost(M)
    house.host.unload("m", 0.0)
    await wait_for(lambda: house.view is None, "gone")
    assert not house.host.worker_lost(M)
    assert lender.ended == [LOST]
    assert house.host.restarts == 0


async def test_a_load_after_a_failure_asks_the_workers_anew(
    house: House, lender: FakeLender
) -> None:
    lender.refusal = PeerUnreachable("c did not answer within 5 s")
    house.host.load("m.gguf", SPLIT)
    failed = await house.until(ModelState.FAILED)
    assert failed.reason == "c did not answer within 5 s"
    lender.refusal = None
    house.host.load("m.gguf", SPLIT)
    await house.until(ModelState.READY)
    assert len(lender.orders) == 2


async def test_an_unload_while_workers_are_asked_undoes_it_first(
    house: House, lender: FakeLender
) -> None:
    lender.grants.clear()
    lender.undone.clear()
    house.host.load("m.gguf", SPLIT)
    await wait_for(lambda: lender.orders, "the workers are asked")
    house.host.unload("m", 0.0)
    assert house.view is not None
    assert house.view.state is ModelState.DRAINING
    lender.undone.set()
    await wait_for(lambda: house.view is None, "gone")


@pytest.mark.parametrize("serves", [False, True])
async def test_a_stop_of_the_node_gives_back(
    house: House, lender: FakeLender, serves: bool
) -> None:
    if not serves:
        lender.grants.clear()
    house.host.load("m.gguf", SPLIT)
    await house.until(ModelState.READY if serves else ModelState.LOADING)
    await house.stop()
    assert len(lender.ended) == serves
    assert [len(p.signals) for p in ScriptedProcess.made] == [1] * serves


async def test_a_node_that_borrows_nothing_says_so(short_dir: Path) -> None:
    house = House(short_dir)
    await house.start()
    house.host.load("m.gguf", SPLIT)
    failed = await house.until(ModelState.FAILED)
    assert failed.reason == "m needs memory of other nodes, and this node borrows none"
    await house.stop()
