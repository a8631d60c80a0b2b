"""The shell around the election: what it sees, orders, shows and keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from meshd.election import orders as orders_module
from meshd.election import room as room_module
from meshd.election import store as store_module
from meshd.election import table as table_module
from meshd.election.desk import Wish
from meshd.election.records import to_json
from meshd.election.store import ElectionStore
from meshd.errors import HubUnavailable, InvalidRequest
from meshd.kernel import ManualClock
from meshd.view import (
    Cause,
    Claim,
    ClaimState,
    Deployment,
    ModelState,
    NodeState,
    PeerState,
    Preparing,
    Role,
)
from meshd.view.shape import MemoryParts
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at every two seconds is looked at all the time."""
    monkeypatch.setattr(room_module, "LOOK_S", 0.01)
    monkeypatch.setattr(orders_module, "SAVE_AGAIN_S", 0.01)
    monkeypatch.setattr(table_module, "SAVE_AGAIN_S", 0.01)


def full(path: Path, data: bytes) -> None:
    raise OSError(28, "No space left on device")


# -- before anything is decided -------------------------------------------------------------------


async def test_a_node_alone_decides_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        assert await room.desk.load(Wish("org/llama")) == LLAMA
        assert [(d.model, d.shape) for d, _ in stage.started] == []
        await stage.serving()
        assert [d.model for d, _ in stage.started] == [LLAMA]
        assert ElectionStore(tmp_path).load().epochs == {LLAMA: 1}


async def test_others_that_are_expected_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock(100.0)
    stage = Stage(tmp_path, clock=clock)
    stage.others_expected = True
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        clock.advance(2.9)
        room.look_again()
        await turns()
        assert stage.started == []
        clock.advance(0.1)
        room.look_again()
        await until(lambda: stage.started, "it decides alone after SETTLE_S")


async def test_what_others_host_is_left_to_them(tmp_path: Path) -> None:
    clock = ManualClock(100.0)
    stage = Stage(tmp_path, clock=clock)
    stage.others_expected = True
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        clock.advance(0.1)
        stage.sees(a_peer(Claim(LLAMA, 3, ClaimState.READY, 0)))
        await turns()
        clock.advance(0.3)
        room.look_again()
        await turns()
        clock.advance(60.0)
        room.look_again()
        await turns()
        assert (stage.started, stage.view.claims) == ([], ())
        stage.sees(a_peer(state=PeerState.DEAD))
        await until(lambda: stage.started, "its host is dead")


@pytest.mark.usefixtures("quick")
async def test_epochs_of_others_outlive_a_start_of_all(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        stage.sees(
            a_peer(Claim(LLAMA, 41, ClaimState.READY, 0), Claim(QWEN, 1 << 52, ClaimState.READY, 0))
        )
        await room.desk.load(Wish("org/llama"))
        await room.desk.load(Wish("org/qwen"))
        await until(lambda: ElectionStore(tmp_path).load().epochs.get(LLAMA) == 41, "it is kept")
    assert QWEN not in ElectionStore(tmp_path).load().epochs  # nobody came so far
    again = Stage(tmp_path)
    async with again.running():
        await until(lambda: again.view.claims, "it claims alone")
        assert {c.epoch for c in again.view.claims if c.model == LLAMA} == {42}


async def test_nothing_is_lost_that_comes_before_it_runs_or_after(tmp_path: Path) -> None:
    """The mesh is there before the election, and when it has ended."""
    stage = Stage(tmp_path)
    there = Deployment(LLAMA, "org/llama", 5, OTHER, shape=SHAPE)
    assert stage.room.shared.merge([to_json(there)]) == [LLAMA]
    async with stage.running():
        await until(lambda: stage.started, "it is hosted")
    late = Deployment(QWEN, "org/qwen", 6, OTHER)
    assert stage.room.shared.merge([to_json(late)]) == [QWEN]
    assert not stage.room.missing("llama")


async def test_what_was_written_last_is_kept_when_it_ends(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        room.stopping.set()
    (record,) = ElectionStore(tmp_path).load().deployments
    assert (record.model, record.shape) == (LLAMA, SHAPE)


async def test_damage_that_was_found_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "epochs.json").write_bytes(b"damaged")
    Stage(tmp_path).pool.close()
    assert "epochs.json was damaged" in caplog.text


# -- orders ---------------------------------------------------------------------------------------


async def test_a_failed_start_is_a_failed_claim(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start_fails = InvalidRequest("its file has no end")
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.shown() is ModelState.FAILED, "it failed")
        assert stage.claim() == "failed"
        shown = stage.view.wanted[LLAMA]
        assert (shown.state, shown.reason) == (ModelState.FAILED, "its file has no end")
        assert shown.retry_after_s == 10.0
        assert stage.view.models[LLAMA] == shown
        assert stage.stopped == [(LLAMA, False)]


async def test_an_engine_that_failed_is_shown_with_its_last_lines(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.started, "it is started")
        stage.becomes(
            LLAMA,
            ModelState.FAILED,
            reason="out of memory",
            evidence=("cudaMalloc",),
            retry_after_s=900.0,
        )
        await until(lambda: LLAMA not in stage.view.local, "its engine is stopped")
        await until(lambda: stage.shown() is ModelState.FAILED, "it is shown")
        assert stage.view.wanted[LLAMA].reason == "out of memory"
        assert stage.view.wanted[LLAMA].evidence == ("cudaMalloc",)
        assert (stage.claim(), len(stage.started)) == ("failed", 1)
        assert [c.retry_in_s for c in stage.view.claims] == [900.0]

        await room.desk.load(Wish("org/llama"))  # the same again: whoever failed tries at once
        await until(lambda: len(stage.started) == 2, "it is tried again")
        room.desk.unload("llama")
        await until(lambda: stage.claim() is None, "it is gone")
        assert stage.room._watching.failed == {}


async def test_an_engine_that_was_just_started_is_not_taken_for_one_that_ended(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        await room.desk.load(Wish("org/llama", context=512))
        await until(lambda: len(stage.started) == 2, "it is started anew")
        await stage.serving()
        assert [(d.context, stage.stopped) for d, _ in stage.started[1:]] == [
            (512, [(LLAMA, True)])
        ]
        assert room._orders.host_changes == {(LLAMA, "first"): 1}


async def test_unloading_leaves_a_tombstone_and_stops_the_engine(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        assert room.desk.unload("llama") == LLAMA
        await until(lambda: not stage.view.claims, "the claim is gone")
        assert stage.stopped == [(LLAMA, True)]
        assert (stage.record().removed, stage.record().version) == (True, 2)
        await until(lambda: stage.view.bids == (), "the bid is gone")
        assert dict(stage.view.wanted) == {}


async def test_a_disk_that_is_full_keeps_it_from_claiming_until_there_is_room(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        with monkeypatch.context() as broken:
            broken.setattr(store_module, "write_atomic", full)
            await room.desk.load(Wish("org/llama"))
            await until(lambda: stage.view.bids and stage.bid()[0] == "no", "it bids no")
            assert "epochs.json cannot be written: No space left on device" in stage.bid()[1]
            assert (stage.view.claims, stage.started) == ((), [])
            await until(lambda: stage.spread == [(LLAMA,)], "others are told nevertheless")
        await until(lambda: stage.started, "it goes on")
        await until(lambda: stage.bid()[0] == "yes", "it bids again")
        await until(lambda: ElectionStore(tmp_path).load().deployments, "the table is kept too")


async def test_records_of_others_are_kept_and_not_told_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    theirs = Deployment(LLAMA, "org/llama", 5, OTHER, shape=SHAPE)
    async with stage.running() as room:
        assert room.shared.merge([to_json(theirs)]) == [LLAMA]
        assert stage.view.deployments == (theirs,)
        await until(lambda: stage.started, "it is hosted")
    assert ElectionStore(tmp_path).load().deployments == (theirs,)
    assert stage.spread == []


async def test_withdrawing_ends_what_others_are_told(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        room.withdraw()
        assert (stage.view.claims, stage.view.bids) == ((), ())
        stage.becomes(QWEN, ModelState.READY)
        stage.now(NodeState.DRAINING)
        await turns()
        assert (stage.view.claims, stage.view.bids, stage.stopped) == ((), (), [])


async def test_a_draining_node_alone_gives_up_what_it_serves(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        stage.now(NodeState.DRAINING)
        await until(lambda: stage.stopped == [(LLAMA, True)], "it is stopped")
        await until(lambda: stage.bid()[0] == "no", "it bids no")
        assert stage.bid()[1] == "the node is draining: it moves its models away"


async def test_a_client_hosts_nothing_and_shows_what_there_is(tmp_path: Path) -> None:
    stage = Stage(tmp_path, role=Role.CLIENT)
    async with stage.running() as room:
        room.shared.merge([to_json(Deployment(LLAMA, "org/llama", 5, OTHER, shape=SHAPE))])
        await until(lambda: LLAMA in stage.view.wanted, "it is shown")
        assert stage.view.wanted[LLAMA].reason == "no node of this mesh hosts models"
        assert (stage.view.bids, stage.view.claims, stage.started) == ((), (), [])


# -- flags ----------------------------------------------------------------------------------------


async def test_flags_that_are_gone_are_unloaded_and_bad_ones_keep_nothing_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Stage(tmp_path, model=("org/llama",))
    async with first.running():
        await first.serving()
    second = Stage(tmp_path, model=("bad", "org/qwen"))
    async with second.running():
        assert second.record(LLAMA).removed
        assert "--model bad: bad cannot be read" in caplog.text
        await second.serving(QWEN)
        assert [d.model for d, _ in second.started] == [QWEN]


async def test_a_flag_of_another_node_is_not_unloaded_by_who_woke_it(tmp_path: Path) -> None:
    store = ElectionStore(tmp_path)
    store.load()
    woken = Deployment(LLAMA, "org/llama", 5, OWN, cause=Cause.FLAG, shape=SHAPE)
    store.save_deployments([woken])
    for damage in (None, b"{}", b"["):
        if damage is not None:
            (tmp_path / "flags.json").write_bytes(damage)
        stage = Stage(tmp_path)
        async with stage.running():
            assert stage.record() == woken


async def test_what_an_operator_loaded_outlives_its_flag(tmp_path: Path) -> None:
    first = Stage(tmp_path, model=("org/llama",))
    async with first.running() as room:
        await room.desk.load(Wish("org/llama", context=512))
    second = Stage(tmp_path)
    async with second.running():
        assert (second.record().removed, second.record().context) == (False, 512)


async def test_auto_chooses_once_and_only_for_a_mesh_with_nothing_to_do(
    tmp_path: Path, quick: None
) -> None:
    stage = Stage(tmp_path, auto=True)
    stage.auto = "org/qwen"
    async with stage.running() as room:
        await stage.serving(QWEN)
        room.desk.unload("qwen")
        await until(lambda: not stage.view.claims, "it is gone")
        await asyncio.sleep(0.05)
        assert stage.record(QWEN).removed
        assert len(stage.started) == 1


# -- demand and sleep -----------------------------------------------------------------------------


async def test_what_nobody_uses_sleeps_and_a_request_wakes_it(tmp_path: Path, quick: None) -> None:
    clock = ManualClock(100.0)
    stage = Stage(tmp_path, clock=clock, idle_unload_s=10)
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        clock.advance(9.0)
        room.began(LLAMA)
        clock.advance(2.0)
        await asyncio.sleep(0.03)
        assert stage.stopped == []
        room.ended(LLAMA)
        clock.advance(10.0)
        await until(lambda: stage.stopped == [(LLAMA, True)], "it is stopped")
        assert stage.record().asleep
        await until(lambda: not stage.view.claims, "its claim is gone")
        await until(lambda: stage.shown() is ModelState.ABSENT, "it sleeps")
        assert (stage.view.models[LLAMA].reason or "").startswith("asleep")
        assert room.missing("llama")
        assert not room.missing("llama"), "it is on its way"
        assert stage.shown() is not ModelState.ABSENT
        await stage.serving()


@pytest.mark.parametrize(("on_demand", "loaded"), [(False, False), (True, True)])
async def test_weights_on_the_disk_are_loaded_by_a_request_if_that_is_wanted(
    tmp_path: Path, on_demand: bool, loaded: bool
) -> None:
    stage = Stage(tmp_path, on_demand=on_demand)
    async with stage.running() as room:
        assert not room.missing("unknown")
        stage.lists(QWEN)
        assert room.missing("qwen") is loaded
        assert (QWEN in stage.view.wanted) is loaded
        assert [r.cause for r in stage.view.deployments] == [Cause.DEMAND] * loaded
        if loaded:
            await until(lambda: stage.started, "it is loaded")
            assert not room.missing("qwen"), "it is on its way"


async def test_an_unused_model_sleeps_for_one_that_is_wanted(tmp_path: Path, quick: None) -> None:
    clock = ManualClock(100.0)
    stage = Stage(tmp_path, clock=clock, max_vram="300MB")
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await stage.serving()
        await room.desk.load(Wish("org/qwen"))
        await until(lambda: stage.view.bids[-1].model == QWEN, "it bids for the second")
        assert stage.bid(QWEN)[0] == "no"
        clock.advance(59.0)
        room.asked(LLAMA)
        room.began(LLAMA)
        room.ended(LLAMA)
        clock.advance(59.0)
        await asyncio.sleep(0.03)
        assert stage.stopped == [], "it was used a minute ago"
        clock.advance(2.0)
        await until(lambda: stage.stopped == [(LLAMA, True)], "it makes room")
        assert stage.record(LLAMA).asleep
        await stage.serving(QWEN)


# -- memory ---------------------------------------------------------------------------------------


async def test_memory_is_not_measured_while_an_engine_loads(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    taken = {"CPU": MemoryParts(weights=200 * MIB, cache=1 * MIB)}
    stage.memory[LLAMA] = taken
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.started, "it is started")
        before = room._bidding._memory.capacity["CPU"]
        half = replace(CPU, memory_free_bytes=CPU.memory_free_bytes // 2)
        stage.publish(devices=(half,))
        await turns()
        assert room._bidding._memory.capacity["CPU"] == before
        await stage.serving()
        assert room._bidding._memory.capacity["CPU"] == before, "that was half way"
        looks = stage.looked_at_devices
        assert looks > 0
        loaded = replace(CPU, memory_free_bytes=CPU.memory_free_bytes - 1000 * MIB)
        stage.publish(devices=(loaded,))
        await until(
            lambda: room._bidding._memory.capacity["CPU"] == before - 799 * MIB, "it is measured"
        )


async def test_what_an_engine_took_is_leased_and_remembered(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    counted = stage.room._bidding._appraiser.counted(
        Deployment(LLAMA, "org/llama", 1, OTHER, shape=SHAPE)
    )
    assert counted is not None
    assert 0 < counted.prompts == counted.cache
    stage.memory[LLAMA] = {
        "CPU": MemoryParts(weights=200 * MIB, cache=counted.cache * 2, compute=counted.compute)
    }
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.started, "it is started")
        assert [prompts for _, prompts in stage.started] == [counted.prompts]
        ledger = room._watching._machine.ledger
        assert ledger.leases[LLAMA].memory == {"CPU": counted.total}
        stage.becomes(LLAMA, ModelState.READY, digest="sha256:abc")
        taken = 200 * MIB + counted.cache * 2 + counted.compute + counted.prompts
        await until(lambda: ledger.leases[LLAMA].memory == {"CPU": taken}, "the lease is measured")
        path = tmp_path / "corrections.json"
        await until(path.exists, "it is written down")
    again = Stage(tmp_path)
    again.pool.close()
    kept = Deployment(LLAMA, "org/llama", 1, OTHER, shape=SHAPE)
    corrected = again.room._bidding._appraiser.corrected(kept, "sha256:abc", "engine-1")
    assert corrected is not None
    assert corrected.cache == counted.cache * 2
    assert orjson.loads(path.read_bytes()) == [["sha256:abc", "engine-1", 2.0, 1.0]]


async def test_an_engine_that_was_not_tried_on_its_device_hosts_nothing_yet(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path)
    runtime = stage.view.runtime
    assert runtime is not None
    stage.publish(runtime=replace(runtime, built_for="cuda"))
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.shown() is ModelState.WAITING, "it waits")
        await until(lambda: stage.view.bids, "it bids")
        assert stage.bid() == ("no", "its engine is being tried on cuda")
        assert stage.view.wanted[LLAMA].reason == "its engine is being tried on cuda"
        stage.publish(runtime=runtime)
        await until(lambda: stage.started, "it was tried")


async def test_a_limit_of_memory_holds(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_vram="1MB")
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.view.bids, "it bids")
        suits, reason = stage.bid()
        assert suits == "no"
        assert "1.0 MB free" in reason
        shown = stage.view.wanted[LLAMA]
        assert (shown.state, shown.reason) == (ModelState.WAITING, reason)


async def test_a_file_that_is_not_here_is_not_bid_for_until_it_is(
    tmp_path: Path, quick: None
) -> None:
    stage = Stage(tmp_path)
    stage.elsewhere["org/llama"] = "llama.gguf is not on this machine"
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.view.bids, "it bids")
        assert stage.bid() == ("no", "llama.gguf is not on this machine")
        del stage.elsewhere["org/llama"]
        await until(lambda: stage.started, "it came")


# -- shapes ---------------------------------------------------------------------------------------


async def test_a_hub_that_is_away_is_waited_for_without_haste(tmp_path: Path) -> None:
    """Not one look after the other: how long it waits is news every second at most."""
    stage = Stage(tmp_path)
    stage.shapes["org/llama"] = HubUnavailable("the hub is away")
    async with stage.running() as room:
        await room.desk.load(Wish("org/llama"))
        await until(lambda: stage.shown() is ModelState.FAILED, "it is said")
        seen = 0

        def count(_: object) -> None:
            nonlocal seen
            seen += 1

        unsubscribe = stage.board.subscribe(count)
        await turns(200)
        unsubscribe()
        assert seen <= 2
        shown = stage.view.wanted[LLAMA]
        assert (shown.reason, shown.retry_after_s) == ("the hub is away", 5.0)


async def test_what_was_unloaded_meanwhile_gets_no_shape(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.hold = asyncio.Event()
    stage.shapes["org/llama"] = HubUnavailable("headers cannot be read")
    fetching = asyncio.Event()

    async def prepare(moved: Callable[[Preparing], None]) -> object:
        moved(Preparing(ModelState.FETCHING, "fetching weights", 0.5))
        fetching.set()
        return await asyncio.Event().wait()

    stage.preparing = prepare
    async with stage.running() as room:
        stage.hold.set()
        await room.desk.load(Wish("org/llama"))
        await fetching.wait()
        await until(lambda: stage.shown() is ModelState.FETCHING, "it is shown")
        assert (stage.view.wanted[LLAMA].reason, stage.view.wanted[LLAMA].progress) == (
            "fetching weights",
            0.5,
        )
        room.desk.unload("llama")
        await until(lambda: not room._shapes._looking, "fetching has ended")
        await room.desk.load(Wish("other/llama"))
        await until(lambda: stage.started, "the other one has a shape")
        assert stage.started[0][0].ref == "other/llama"
