"""The shell around the election, where models lie on several nodes: what this one lends, and what
it hosts with memory of others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.election.desk import Wish
from meshd.ids import LoanId, ModelId
from meshd.view import (
    Claim,
    ClaimState,
    Lendable,
    Loan,
    LoanAsk,
    ModelState,
    NodeState,
    Part,
    PeerState,
    Role,
    Suits,
)
from meshd.view.shape import MemoryParts
from tests.election.rooms import CPU, LLAMA, MIB, OTHER, OWN, SHAPE, Stage, a_peer, turns, until

ONE, TWO = LoanId("loan-1"), LoanId("loan-2")
GIB = 1 << 30
LENDER = a_peer(rpc_protocol="7.0.0", lends=(Lendable("CPU", GIB, accelerator=False),))


def a_loan(loan: LoanId, size: int = GIB, model: str = "big") -> Loan:
    part = Part(OWN, "alpha", (("CPU", size),), (8,), 0, False, 0.5)
    return Loan(loan, OTHER, LoanAsk(ModelId(model), 1, "7.0.0", part, None))


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """Of a node that lends, with 4 GiB."""
    made = Stage(tmp_path)
    made.lends_nothing = None
    async with made.running():
        await until(lambda: made.view.lends, "it lends")
        yield made


def lent(stage: Stage) -> int:
    """What others are told that it lends, in bytes."""
    (memory,) = stage.view.lends
    return memory.free_bytes


# -- lending --------------------------------------------------------------------------------------


async def test_what_is_lent_is_told_less_what_is_leased(stage: Stage) -> None:
    before = lent(stage)
    assert before > 3 * GIB
    assert stage.room.lend(a_loan(ONE)) is None
    await until(lambda: lent(stage) <= before - GIB, "it is told")
    stage.room.loan_ended(ONE)
    await until(lambda: lent(stage) == before, "it is told again")


async def test_a_draining_node_lends_nothing_and_ends_its_loans(stage: Stage) -> None:
    assert stage.room.lend(a_loan(ONE)) is None
    stage.now(NodeState.DRAINING)
    await until(lambda: stage.loans_to_end, "it is ordered to end")
    assert stage.loans_to_end == [(ONE, "this node is draining")]
    await until(lambda: stage.view.lends == (), "it is withdrawn")
    assert stage.room.lend(a_loan(TWO)) == "this node is draining"
    stage.room.loan_ended(ONE)
    await turns()
    assert stage.loans_to_end == [(ONE, "this node is draining")]


async def test_a_node_that_cannot_lend_says_nothing_of_its_memory(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        assert stage.view.lends == ()
        stage.lends_nothing = None
        room.look_again()
        await until(lambda: stage.view.lends, "it can now")
        stage.lends_nothing = "it is told to lend nothing (`engine.lend`)"
        room.look_again()
        await until(lambda: stage.view.lends == (), "and again it cannot")


async def test_a_client_lends_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, role=Role.CLIENT)
    stage.lends_nothing = None
    async with stage.running() as room:
        room.look_again()
        await turns()
        assert stage.view.lends == ()


async def test_a_loan_is_granted_at_once_or_refused_with_the_reason(stage: Stage) -> None:
    assert stage.room.lend(a_loan(ONE, 3 * GIB)) is None
    refusal = stage.room.lend(a_loan(TWO, 3 * GIB, "another"))
    assert refusal is not None
    assert refusal.startswith("needs 3.2 GB, ")
    assert refusal.endswith(" free on CPU")
    assert stage.room._orders.answers == {}


async def test_a_room_that_does_not_run_lends_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    words = "this node is about to end, or has just begun"
    assert stage.room.lend(a_loan(ONE)) == words
    async with stage.running():
        await turns()
    assert stage.room.lend(a_loan(ONE)) == words


async def test_a_loan_that_is_renewed_lives_and_one_that_is_not_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshd.election.lending.RENEWED_S", 0.2)
    stage = Stage(tmp_path)
    stage.lends_nothing = None
    async with stage.running() as room:
        await until(lambda: stage.view.lends, "it lends")
        for loan, model in ((ONE, "big"), (TWO, "bigger")):
            assert room.lend(a_loan(loan, GIB, model)) is None
        deadline = asyncio.get_running_loop().time() + 5.0
        while not stage.loans_to_end:
            room.loan_renewed(ONE)
            await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() < deadline
        assert stage.loans_to_end == [(TWO, "its host was not heard of for 0.2 s")]


async def test_memory_is_not_measured_while_it_is_lent(stage: Stage) -> None:
    """What a host has used of it so far is missing from the free memory, and leased as well."""
    memory = stage.room._bidding._memory
    before = memory.capacity["CPU"]
    assert stage.room.lend(a_loan(ONE)) is None
    half = replace(CPU, memory_free_bytes=CPU.memory_free_bytes // 2)
    stage.publish(devices=(half,))
    await turns()
    assert memory.capacity["CPU"] == before
    looks = stage.looked_at_devices
    stage.room.loan_ended(ONE)
    assert stage.looked_at_devices > looks, "it is to be measured when it is free again"
    stage.publish(devices=(replace(half, memory_free_bytes=half.memory_free_bytes + 1),))
    await until(lambda: memory.capacity["CPU"] < before, "it is measured")


# -- hosting --------------------------------------------------------------------------------------


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Stage]:
    """Of a node with an engine that has RPC and room for a layer of the model, beside a lender."""
    made = Stage(tmp_path, max_vram="260MB")
    runtime = made.view.runtime
    assert runtime is not None
    made.publish(runtime=replace(runtime, rpc_protocol="7.0.0"))
    made.sees(LENDER)
    made.shapes["org/llama"] = replace(SHAPE, weights=(100,) * 4, pattern="aaaa")
    async with made.running():
        yield made


async def hosted(stage: Stage) -> Part:
    """Load the model, and have it started with the worker it is to have."""
    await stage.room.desk.load(Wish("org/llama"))
    await until(lambda: stage.plans, "it is started")
    plan = stage.plans[0]
    assert plan is not None, stage.bid()
    (part,) = plan.parts
    return part


async def test_what_fits_on_no_node_is_hosted_with_memory_of_another(small: Stage) -> None:
    part = await hosted(small)
    assert (part.node, part.name) == (OTHER, "beta")
    assert small.bid()[0] == Suits.SPLIT
    (claim,) = small.view.claims
    assert claim.workers == (part.shown,)


async def test_what_fits_here_is_split_only_if_that_is_asked_for(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    runtime = stage.view.runtime
    assert runtime is not None
    stage.publish(runtime=replace(runtime, rpc_protocol="7.0.0"))
    stage.sees(LENDER)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        await room.desk.load(Wish("org/llama", split=True))
        assert stage.record().split
        await until(lambda: len(stage.plans) == 2, "it is started anew")
        assert stage.plans[0] is None
        assert stage.plans[1] is not None


async def test_a_lost_worker_is_avoided_and_the_model_waits_with_what_lacks(
    small: Stage,
) -> None:
    await hosted(small)
    small.becomes(LLAMA, ModelState.READY)
    await until(lambda: small.claim() == "ready", "it serves")
    small.lost_workers.add(LLAMA)
    small.avoided.add(OTHER)
    small.becomes(LLAMA, ModelState.FAILED, reason="worker beta was lost")
    await until(lambda: small.stopped == [(LLAMA, False)], "the engine is ended")
    assert [(c.state, c.reason) for c in small.view.claims] == [
        (ClaimState.PREPARING, "planning anew: worker beta was lost")
    ]
    await until(lambda: small.bid()[0] == "no", "nobody is left to lend")
    reason = small.bid()[1]
    assert "beta lends nothing (it refused, or was lost, a moment ago)" in reason
    small.lost_workers.clear()
    small.avoided.clear()
    small.room.look_again()
    await until(lambda: len(small.plans) == 2, "it is started anew")
    assert [c.epoch for c in small.view.claims] == [1]


async def test_an_engine_that_fails_by_itself_is_no_lost_worker(small: Stage) -> None:
    await hosted(small)
    small.becomes(LLAMA, ModelState.FAILED, reason="out of memory")
    await until(lambda: small.claim() == "failed", "it failed")


async def test_who_is_gone_is_in_no_plan_and_in_no_words(small: Stage) -> None:
    small.sees(replace(LENDER, state=PeerState.DEAD))
    await small.room.desk.load(Wish("org/llama"))
    await until(lambda: small.view.bids, "it bids")
    assert small.bid()[0] == "no"
    assert "beta" not in small.bid()[1]
    small.sees(replace(LENDER, claims=(Claim(ModelId("m"), 1, ClaimState.READY, 0),)))
    await until(lambda: small.plans, "it came back")


async def test_what_a_split_engine_takes_here_is_leased_here_only(small: Stage) -> None:
    part = await hosted(small)
    ledger = small.room._watching._machine.ledger
    small.memory[LLAMA] = {"CPU": MemoryParts(weights=150 * MIB)}
    small.becomes(LLAMA, ModelState.READY)
    await until(lambda: ledger.leases[LLAMA].memory["CPU"] < 200 * MIB, "it is measured")
    assert part.bytes not in ledger.leases[LLAMA].memory.values()
