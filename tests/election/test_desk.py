"""What is asked of the mesh from outside, in a room that runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.election import desk as desk_module
from meshd.election.desk import Desk, Wish
from meshd.election.records import to_json
from meshd.errors import (
    BadReference,
    HubUnavailable,
    InvalidRequest,
    MeshdError,
    ModelNotFound,
    NotFound,
)
from meshd.ids import NodeId
from meshd.view import (
    Bid,
    Cause,
    Claim,
    ClaimState,
    Deployment,
    DeviceView,
    Lendable,
    Role,
    Suits,
    WorkerShare,
)
from tests.election.rooms import (
    CPU,
    LLAMA,
    MIB,
    OTHER,
    OWN,
    QWEN,
    SHAPE,
    Stage,
    a_peer,
    turns,
    until,
)

BETA = a_peer(devices=(CPU,))


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """Of a node that hosts nothing by itself, with one other."""
    made = Stage(tmp_path, max_vram="1MB")
    made.sees(BETA)
    async with made.running():
        yield made


def desk(stage: Stage) -> Desk:
    return stage.room.desk


# -- load -----------------------------------------------------------------------------------------


async def test_what_is_loaded_is_written_down(stage: Stage) -> None:
    wish = Wish("org/llama", context=512, parallel=2, replicas=3, host="beta")
    assert await desk(stage).load(wish) == LLAMA
    assert stage.record() == Deployment(
        LLAMA, "org/llama", 1, OWN, replicas=3, context=512, parallel=2, host=OTHER, shape=SHAPE
    )
    await until(lambda: stage.spread == [(LLAMA,)], "the others are told")


async def test_loading_the_same_again_changes_nothing(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama"))
    await desk(stage).load(Wish("org/llama"))
    assert stage.record().version == 1


async def test_loading_what_failed_somewhere_tries_again(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama"))
    stage.sees(replace(BETA, claims=(Claim(LLAMA, 3, ClaimState.FAILED, 0, "out of memory"),)))
    await desk(stage).load(Wish("org/llama"))
    assert stage.record() == Deployment(LLAMA, "org/llama", 2, OWN, shape=SHAPE)


async def test_loading_what_nobody_can_count_tries_again(stage: Stage) -> None:
    stage.shapes["org/llama"] = HubUnavailable("the hub is away")
    await desk(stage).load(Wish("org/llama"))
    await until(lambda: stage.room._shapes.problem(stage.record()), "the hub was asked")
    assert stage.record().shape is None
    await desk(stage).load(Wish("org/llama"))
    assert stage.record().version == 2


@pytest.mark.parametrize(
    ("first", "again", "replicas"),
    [(None, None, 1), (3, None, 3), (3, 2, 2), ("auto", None, None), (2, "auto", None)],
)
async def test_the_number_of_hosts_stays_unless_another_is_said(
    stage: Stage, first: int | None, again: int | None, replicas: int | None
) -> None:
    await desk(stage).load(Wish("org/llama", replicas=first))
    await desk(stage).load(Wish("org/llama", replicas=again, context=512))
    assert stage.record().replicas == replicas


async def test_a_split_is_asked_for_each_time(stage: Stage) -> None:
    for split, version in ((True, 1), (True, 1), (False, 2), (True, 3)):
        await desk(stage).load(Wish("org/llama", split=split))
        assert (stage.record().split, stage.record().version) == (split, version)


async def test_what_was_unloaded_starts_from_one_host(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama", replicas=3))
    desk(stage).unload("llama")
    await desk(stage).load(Wish("org/llama"))
    assert stage.record().replicas == 1


async def test_what_others_write_while_headers_are_read_counts(stage: Stage) -> None:
    stage.hold = asyncio.Event()
    loading = asyncio.create_task(desk(stage).load(Wish("org/llama")))
    await turns()
    theirs = Deployment(LLAMA, "org/llama", 7, OTHER, replicas=3)
    stage.room.shared.merge([to_json(theirs)])
    stage.hold.set()
    await loading
    assert (stage.record().version, stage.record().replicas) == (8, 3)


async def test_headers_that_take_long_are_not_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "SHAPE_WAIT_S", 0.01)
    stage.hold = asyncio.Event()
    await desk(stage).load(Wish("org/llama"))
    assert stage.record().shape is None
    stage.hold.set()
    await until(lambda: stage.record().shape == SHAPE, "they came")
    assert stage.record().version == 2


@pytest.mark.parametrize(
    ("wish", "error", "words"),
    [
        (Wish("bad"), BadReference, "bad cannot be read"),
        (Wish("org/llama", host="nobody"), NotFound, "no node nobody"),
        (Wish("org/llama", replicas=0), InvalidRequest, "replicas"),
        (Wish("org/qwen"), BadReference, "no such file"),
    ],
)
async def test_what_cannot_be_is_refused(
    stage: Stage, wish: Wish, error: type[MeshdError], words: str
) -> None:
    stage.shapes["org/qwen"] = BadReference("no such file")
    with pytest.raises(error, match=words):
        await desk(stage).load(wish)
    assert stage.view.deployments == ()


async def test_a_file_of_another_node_is_its_own_to_find(stage: Stage) -> None:
    stage.shapes["org/qwen"] = BadReference("no such file")
    await desk(stage).load(Wish("org/qwen", host="beta"))
    await turns()
    assert (stage.record(QWEN).host, stage.record(QWEN).shape) == (OTHER, None)
    assert stage.room._shapes.problem(stage.record(QWEN)) is None, "it is not looked for here"


async def test_a_client_node_is_no_host(stage: Stage) -> None:
    stage.sees(replace(BETA, role=Role.CLIENT))
    with pytest.raises(InvalidRequest, match="beta is a client node"):
        await desk(stage).load(Wish("org/llama", host="beta"))


async def test_this_node_can_be_named_by_name_and_id(stage: Stage) -> None:
    for name in ("alpha", OWN):
        await desk(stage).load(Wish("org/llama", host=name))
        assert stage.record().host == OWN


async def test_a_name_that_means_other_weights_is_refused(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama"))
    with pytest.raises(InvalidRequest, match="`llama` is the name of org/llama"):
        await desk(stage).load(Wish("other/llama"))


async def test_a_client_writes_nothing(tmp_path: Path) -> None:
    client = Stage(tmp_path, role=Role.CLIENT, on_demand=True)
    async with client.running() as room:
        room.shared.merge([to_json(Deployment(LLAMA, "org/llama", 5, OTHER, asleep=True))])
        client.lists(QWEN)
        with pytest.raises(InvalidRequest, match="a client node hosts no models"):
            await room.desk.load(Wish("org/qwen"))
        with pytest.raises(InvalidRequest, match="a client node hosts no models"):
            room.desk.unload("llama")
        assert not room.missing("llama")
        assert not room.missing("qwen")
        assert client.record().version == 5


# -- unload ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "org/llama"])
async def test_it_is_unloaded_by_name_or_reference(stage: Stage, name: str) -> None:
    await desk(stage).load(Wish("org/llama"))
    assert desk(stage).unload(name) == LLAMA
    assert stage.record() == Deployment(LLAMA, "org/llama", 2, OWN, removed=True)
    with pytest.raises(ModelNotFound, match="no model `llama` is loaded; loaded are: none"):
        desk(stage).unload("llama")


async def test_what_others_wrote_can_be_unloaded_here(stage: Stage) -> None:
    stage.room.shared.merge([to_json(Deployment(LLAMA, "org/llama", 5, OTHER, shape=SHAPE))])
    desk(stage).unload("llama")
    assert (stage.record().removed, stage.record().version) == (True, 6)
    await until(lambda: stage.spread == [(LLAMA,)], "the others are told")


async def test_nothing_is_unloaded_that_is_not_there(stage: Stage) -> None:
    await desk(stage).load(Wish("org/qwen"))
    for name in ("llama", "bad"):
        with pytest.raises(ModelNotFound, match=f"`{name}` is loaded; loaded are: qwen"):
            desk(stage).unload(name)


# -- requests -------------------------------------------------------------------------------------


async def test_a_request_wakes_what_sleeps_once(stage: Stage) -> None:
    asleep = Deployment(LLAMA, "org/llama", 5, OTHER, replicas=2, shape=SHAPE, asleep=True)
    stage.room.shared.merge([to_json(asleep)])
    assert desk(stage).missing("llama")
    assert stage.record() == replace(asleep, version=6, origin=OWN, asleep=False)
    assert not desk(stage).missing("llama")
    assert not desk(stage).missing("qwen")


async def test_what_was_unloaded_is_not_loaded_by_a_request(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama"))
    desk(stage).unload("llama")
    stage.lists(LLAMA)
    assert not desk(stage).missing("llama")


# -- plans ----------------------------------------------------------------------------------------


async def test_a_plan_of_what_is_not_deployed_leaves_no_trace(stage: Stage) -> None:
    plan = await desk(stage).plan("org/llama")
    assert (plan["ref"], plan["deployed"]) == ("org/llama", False)
    assert plan["shape"]["weights_bytes"] == 200 * MIB
    assert (plan["shape"]["context"], plan["shape"]["slots"]) == (1024, 4)
    verdicts = {node["name"]: str(node["verdict"]) for node in plan["nodes"]}
    assert verdicts == {"alpha": "cannot", "beta": "next"}, "alpha may use 1 MB"
    assert stage.view.deployments == ()
    with pytest.raises(ModelNotFound, match="`org/llama` is not deployed"):
        desk(stage).planned("org/llama")


async def test_a_plan_of_what_is_deployed_is_what_nodes_say(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama"))
    said = Bid(LLAMA, 1, Suits.NO, "its disk is full")
    stage.sees(replace(BETA, bids=(said,)))
    await until(lambda: stage.view.bids, "this node bids as well")
    for plan in (await desk(stage).plan("llama"), desk(stage).planned("llama")):
        why = {node["name"]: node["why"] for node in plan["nodes"]}
        assert (plan["deployed"], why["beta"]) == (True, "its disk is full")
        assert "1.0 MB free here" in why["alpha"]


async def test_a_plan_names_workers_and_who_could_be_one(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama"))
    share = WorkerShare(NodeId("c" * 52), "gamma", 0.25, 10)
    stage.sees(
        replace(
            BETA,
            claims=(Claim(LLAMA, 1, ClaimState.READY, 0, workers=(share,)),),
            lends=(Lendable("CPU", 64 * MIB, accelerator=False),),
        )
    )
    await until(lambda: stage.view.bids, "this node bids as well")
    plan = await desk(stage).plan("llama")
    told = {node["name"]: node for node in plan["nodes"]}
    assert [w["name"] for w in told["beta"]["workers"]] == ["gamma"]
    assert told["beta"]["why"].endswith("with memory of gamma (25%)")
    assert "short even if it is split: beta lends nothing" in told["alpha"]["why"]


async def test_a_plan_says_why_it_cannot_be_made(stage: Stage) -> None:
    stage.shapes["org/llama"] = HubUnavailable("the hub is away")
    with pytest.raises(HubUnavailable):
        await desk(stage).plan("org/llama")
    with pytest.raises(BadReference):
        await desk(stage).plan("bad")


async def test_a_plan_counts_what_a_device_of_another_node_has(stage: Stage) -> None:
    small: DeviceView = replace(CPU, memory_free_bytes=500 * MIB)
    stage.sees(replace(BETA, devices=(small,)), a_peer(id=NodeId("c" * 52), name="gamma"))
    plan = await desk(stage).plan("org/llama")
    why = {node["name"]: node["why"] for node in plan["nodes"]}
    assert "short" in why["beta"]
    assert why["gamma"] == "no memory of this node is known"


async def test_causes_are_told_apart(stage: Stage) -> None:
    await desk(stage).load(Wish("org/llama"), Cause.FLAG)
    assert stage.record().cause is Cause.FLAG
    await desk(stage).load(Wish("org/llama", context=512), Cause.AUTO)
    assert stage.record().context is None, "only an operator changes what is deployed"
