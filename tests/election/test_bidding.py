"""What a node bids, and what a plan makes up for others, in a room that runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshd.election.bidding import names_a_file
from meshd.election.desk import FILE_ELSEWHERE, Wish
from meshd.ids import ModelId, NodeId
from meshd.view import Bid, NodeState, WeightsView
from tests.election.rooms import CPU, LLAMA, MIB, QWEN, Stage, a_peer, until

BETA = a_peer(devices=(CPU,))
DIGEST = "sha256:1"


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    made = Stage(tmp_path)
    made.sees(BETA)
    async with made.running():
        yield made


async def planned(stage: Stage, ref: str) -> dict[str, dict[str, Any]]:
    plan = await stage.room.desk.plan(ref)
    return {node["name"]: node for node in plan["nodes"]}


async def bid_of(stage: Stage, ref: str, model: ModelId) -> Bid:
    await stage.room.desk.load(Wish(ref))
    await until(lambda: any(b.model == model for b in stage.view.bids), "a bid")
    return next(b for b in stage.view.bids if b.model == model)


async def test_weights_are_known_by_name_or_by_reference(stage: Stage) -> None:
    """A model of the catalog has another name than its file."""
    by_name = WeightsView(LLAMA, "org/llama@main", DIGEST, MIB)
    by_reference = WeightsView(ModelId("qwen-file"), "org/qwen", "sha256:2", MIB)
    stage.publish(weights=(by_name, by_reference))
    for ref, model in (("org/llama", LLAMA), ("org/qwen", QWEN)):
        assert (await bid_of(stage, ref, model)).weights
    assert not (await bid_of(stage, "org/other", ModelId("other"))).weights


async def test_a_file_is_on_the_disk_that_it_can_be_read_from(stage: Stage) -> None:
    assert (await bid_of(stage, "/models/llama", LLAMA)).weights
    assert all(map(names_a_file, ("/a", "./a", "../a", "~/a")))
    assert not any(map(names_a_file, ("org/repo", "builtin", "Qwen3-8B")))


async def test_a_plan_has_the_bid_that_follows(stage: Stage) -> None:
    stage.publish(weights=(WeightsView(LLAMA, "org/llama", DIGEST, MIB),))
    stage.sees()
    before = await planned(stage, "org/llama")
    bid = await bid_of(stage, "org/llama", LLAMA)
    assert before["alpha"]["needs_bytes"] == bid.needs_bytes
    assert before["alpha"]["free_bytes"] == bid.free_bytes
    assert f"weights on disk, {bid.headroom}/16 of its memory left over" in before["alpha"]["why"]


async def test_a_plan_counts_leases(stage: Stage) -> None:
    stage.sees()
    free = (await planned(stage, "org/qwen"))["alpha"]["free_bytes"]
    await stage.room.desk.load(Wish("org/llama"))
    await stage.serving()
    assert (await planned(stage, "org/qwen"))["alpha"]["free_bytes"] < free


async def test_a_draining_node_plans_to_host_nothing(stage: Stage) -> None:
    stage.now(NodeState.DRAINING)
    stage.sees()
    assert (await planned(stage, "org/llama"))["alpha"]["verdict"] == "cannot"


async def test_a_plan_knows_who_else_has_the_weights(stage: Stage) -> None:
    stage.publish(weights=(WeightsView(LLAMA, "org/llama", DIGEST, MIB),))
    gamma = replace(BETA, id=NodeId("c" * 52), name="gamma", weights=frozenset({DIGEST}))
    stage.sees(BETA, gamma)
    nodes = await planned(stage, "org/llama")
    assert nodes["beta"]["why"].startswith("would have to fetch the weights (")
    assert "fetch" not in nodes["gamma"]["why"]


async def test_a_plan_of_a_file_is_for_its_own_machine(stage: Stage) -> None:
    nodes = await planned(stage, "/models/llama")
    assert nodes["alpha"]["verdict"] == "next"
    assert (nodes["beta"]["verdict"], nodes["beta"]["why"]) == ("cannot", FILE_ELSEWHERE)
