"""Epochs and deployments on the disk: an epoch never goes back."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshd.election import store as store_module
from meshd.election.store import DEPLOYMENTS, EPOCHS, ElectionStore, Saved
from meshd.errors import NoSpace
from meshd.ids import ModelId
from meshd.view import Deployment
from tests.election.records import NODES

M, N = ModelId("m"), ModelId("n")
WALL = 1_750_000_000
RECORDS = (Deployment(M, "owner/repo", 3, NODES[0]), Deployment(N, "r", 4, NODES[1], removed=True))


def opened(directory: Path, wall: Callable[[], float] = lambda: WALL) -> ElectionStore:
    store = ElectionStore(directory, wall)
    store.load()
    return store


def reloaded(directory: Path, wall: Callable[[], float] = lambda: WALL) -> Saved:
    return ElectionStore(directory, wall).load()


def full_disk(path: Path, data: bytes) -> None:
    raise OSError(28, "No space left on device")


def test_a_new_directory_holds_nothing(tmp_path: Path) -> None:
    assert reloaded(tmp_path) == Saved({}, 0, (), ())
    assert list(tmp_path.iterdir()) == []


def test_what_was_saved_is_there_at_the_next_start(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save_epoch(M, 7)
    store.save_epoch(N, 1)
    store.save_deployments(RECORDS)
    assert reloaded(tmp_path) == Saved({M: 7, N: 1}, 0, RECORDS, ())
    for name in (EPOCHS, DEPLOYMENTS):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_an_epoch_does_not_go_back(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save_epoch(M, 7)
    store.save_epoch(M, 5)
    assert reloaded(tmp_path).epochs == {M: 7}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"epochs": {"m": 7',
        b"[]",
        b'{"epochs": {"m": 7}}',
        b'{"epochs": {"m": "7", "n": 2}, "floor": 0}',
        b'{"epochs": {"m": -1}, "floor": 0}',
        b'{"epochs": {"m": true}, "floor": 0}',
        b'{"epochs": [], "floor": 0}',
    ],
)
def test_damaged_epochs_go_on_above_all_that_were_used(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / EPOCHS).write_bytes(damage)
    saved = reloaded(tmp_path)
    assert (saved.epochs, saved.floor) == ({}, WALL)
    assert (tmp_path / "epochs.json.damaged").read_bytes() == damage
    assert len(saved.problems) == 1
    assert "epochs.json.damaged" in saved.problems[0]
    assert str(WALL) in saved.problems[0]
    assert reloaded(tmp_path, lambda: 0.0) == Saved({}, WALL, (), ())


def test_a_floor_that_cannot_be_written_ends_the_start_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / EPOCHS).write_bytes(b"damaged")
    with monkeypatch.context() as broken:
        broken.setattr(store_module, "write_atomic", full_disk)
        with pytest.raises(NoSpace):
            opened(tmp_path)
    assert reloaded(tmp_path).floor == WALL


def test_the_floor_holds_at_every_later_start(tmp_path: Path) -> None:
    (tmp_path / EPOCHS).write_bytes(b"\0\0\0")
    store = opened(tmp_path)
    store.save_epoch(M, 5)
    store.save_epoch(N, WALL + 1)
    saved = reloaded(tmp_path, lambda: 0.0)
    assert (saved.epochs, saved.floor, saved.problems) == ({N: WALL + 1}, WALL, ())


def test_a_clock_that_was_set_back_does_not_undercut_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / EPOCHS).write_bytes(b'{"epochs": {"m": 900, "n": null}, "floor": 800}')
    assert reloaded(tmp_path, lambda: 10.0).floor == 900


def test_the_lowest_epoch_goes_and_lifts_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_EPOCHS", 2)
    store = opened(tmp_path)
    for model, epoch in (("a", 5), ("b", 3), ("c", 9)):
        store.save_epoch(ModelId(model), epoch)
    saved = reloaded(tmp_path)
    assert (saved.epochs, saved.floor) == ({"a": 5, "c": 9}, 3)
    store.save_epoch(ModelId("d"), 4)
    saved = reloaded(tmp_path)
    assert (saved.epochs, saved.floor) == ({"a": 5, "c": 9}, 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.data())
def test_whatever_a_byte_becomes_no_epoch_goes_back(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / EPOCHS).unlink(missing_ok=True)
    store = opened(tmp_path)
    store.save_epoch(M, 7)
    whole = (tmp_path / EPOCHS).read_bytes()
    (tmp_path / EPOCHS).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    saved = reloaded(tmp_path)
    assert saved.epochs.get(M, saved.floor) >= 7


def test_a_record_that_is_none_leaves_the_others(tmp_path: Path) -> None:
    opened(tmp_path).save_deployments(RECORDS)
    path = tmp_path / DEPLOYMENTS
    rows = orjson.loads(path.read_bytes())["deployments"]
    path.write_bytes(orjson.dumps({"deployments": [rows[0], {"model": ""}, rows[1]]}))
    saved = reloaded(tmp_path)
    assert saved.deployments == RECORDS
    assert "1 of its deployments" in saved.problems[0]
    assert (tmp_path / "deployments.json.damaged").exists()
    assert reloaded(tmp_path) == Saved({}, 0, RECORDS, ())


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b'{"deployments": {}}'])
def test_damaged_deployments_are_set_aside(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / DEPLOYMENTS).write_bytes(damage)
    saved = reloaded(tmp_path)
    assert saved.deployments == ()
    assert "the deployments could not be read" in saved.problems[0]
    assert (tmp_path / "deployments.json.damaged").read_bytes() == damage
    assert reloaded(tmp_path).problems == ()


def test_a_file_larger_than_any_of_ours_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).save_deployments(RECORDS)
    monkeypatch.setattr(store_module, "MAX_FILE_BYTES", 10)
    assert reloaded(tmp_path).deployments == ()


def test_an_epoch_that_cannot_be_written_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.save_epoch(M, 1)

    with monkeypatch.context() as broken:
        broken.setattr(store_module, "write_atomic", full_disk)
        with pytest.raises(NoSpace, match=r"epochs\.json cannot be written: No space"):
            store.save_epoch(M, 2)
        with pytest.raises(NoSpace, match=r"deployments\.json"):
            store.save_deployments(RECORDS)
    store.save_epoch(M, 2)
    assert reloaded(tmp_path).epochs == {M: 2}
