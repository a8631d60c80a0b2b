"""The shape of any reference: from the disk if its files are there, else from where they are."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cache import builtin
from meshd.cache.gguf_header import parse_header
from meshd.cache.shape import shape_of
from meshd.errors import BadReference, BrokenWeights, HubRefused, HubUnavailable
from meshd.view.shape import ModelShape
from tests.cache.rooms import REPO, Moves, RoomMaker
from tests.cache.sets import write_set
from tests.hub import LocalHub
from tests.models import small_model

REF = f"{REPO}:Q4_K_M"
SIZES = (1_600_000, 900_000)


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RoomMaker]:
    """No hub can be reached."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    maker = RoomMaker(tmp_path / "home", monkeypatch, None)
    maker.use_none()
    yield maker
    maker.close()


@pytest.fixture
def hub(rooms: RoomMaker) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        rooms.use(hub)
        yield hub


def shape_in(*paths: Path) -> ModelShape:
    return shape_of([parse_header(path.read_bytes(), path.stat().st_size) for path in paths])


# -- from the disk --------------------------------------------------------------------------------


async def test_of_local_files_nothing_is_hashed(rooms: RoomMaker, tmp_path: Path) -> None:
    path = small_model(tmp_path / "m.gguf")
    room = rooms.make()
    shape = await room.shape(str(path))
    assert shape == shape_in(path)
    assert (len(shape.layers), shape.trained_context) == (2, 8192)
    assert not room.store.places.ledger.exists()
    assert room.verifier.verified_bytes == 0


async def test_any_shard_names_the_set(rooms: RoomMaker, tmp_path: Path) -> None:
    shards = write_set(tmp_path, *SIZES)
    assert await rooms.make().shape(str(shards[1])) == shape_in(*shards)


async def test_the_builtin_model_is_made(rooms: RoomMaker) -> None:
    room = rooms.make()
    shape = await room.shape("builtin")
    path = room.store.places.builtin / builtin.FILE_NAME
    assert shape == shape_in(path)
    assert len(shape.layers) == builtin.LAYERS
    assert await room.shape("builtin") == shape


async def test_what_is_not_there_or_broken_has_none(rooms: RoomMaker, tmp_path: Path) -> None:
    room = rooms.make()
    with pytest.raises(BadReference, match=r"none\.gguf: is missing"):
        await room.shape(str(tmp_path / "none.gguf"))
    with pytest.raises(BadReference, match="00001-of-00002"):
        await room.shape(str(tmp_path / "none-00001-of-00002.gguf"))
    with pytest.raises(BadReference, match="catalog"):
        await room.shape("no-such-name")
    shards = write_set(tmp_path, *SIZES)
    shards[1].write_bytes(shards[1].read_bytes()[:-1000])
    with pytest.raises(BrokenWeights, match="00002-of-00002"):
        await room.shape(str(shards[0]))


# -- from elsewhere; real children ----------------------------------------------------------------


@pytest.mark.slow
async def test_it_is_the_same_here_and_there(
    rooms: RoomMaker, hub: LocalHub, tmp_path: Path
) -> None:
    shards = write_set(tmp_path / "set", *SIZES, stem="model-Q4_K_M")
    hub.add(REPO, {path.name: path for path in shards})
    room = rooms.make()
    there = await room.shape(REF)
    assert there == shape_in(*shards)
    hub.wait_idle()
    assert hub.sent() == 1024 * 1024 + 64 * 1024
    assert not room.store.places.repo(REPO).exists()
    weights = await room.prepare(REF, Moves())
    hub.forget_requests()
    assert await room.shape(REF) == there
    assert not hub.requests
    weights.paths[1].resolve().unlink()  # then it is to be mended first
    with pytest.raises(BrokenWeights, match="shard 00002-of-00002"):
        await room.shape(REF)
    assert not hub.requests


@pytest.mark.slow
async def test_headers_that_are_here_are_not_fetched(
    rooms: RoomMaker, hub: LocalHub, tmp_path: Path
) -> None:
    """Another tool left a part of the set, and no word of what it is."""
    shards = write_set(tmp_path / "set", *SIZES, stem="model-Q4_K_M")
    hub.add(REPO, {path.name: path for path in shards})
    room = rooms.make()
    blob = room.store.places.blob(REPO, hashlib.sha256(shards[0].read_bytes()).hexdigest())
    blob.parent.mkdir(parents=True)
    shutil.copyfile(shards[0], blob)
    assert await room.shape(REF) == shape_in(*shards)
    hub.wait_idle()
    assert hub.sent() == 64 * 1024


@pytest.mark.slow
async def test_the_hub_refuses_or_is_away(rooms: RoomMaker, hub: LocalHub) -> None:
    with pytest.raises(HubRefused, match="no-such-GGUF") as refused:
        await rooms.make().shape("acme/no-such-GGUF:Q4_K_M")
    assert not refused.value.retryable
    rooms.use_none()
    with pytest.raises(HubUnavailable) as away:
        await rooms.make().shape(REF)
    assert away.value.retryable


# -- whether it could be used here ----------------------------------------------------------------


def test_what_a_node_could_use(rooms: RoomMaker, tmp_path: Path) -> None:
    room = rooms.make()
    path = small_model(tmp_path / "m.gguf")
    inside = room.store.places.snapshot(REPO, "c0" * 20, "model.gguf")
    for ref in (str(path), "builtin", REF, f"{REPO}/model.gguf", "qwen3-8b-q4_k_m", str(inside)):
        assert room.here(ref) is None
    path.unlink()
    assert room.here(str(path)) == f"{path} is not on this machine"
    assert room.here(str(tmp_path)) == f"{tmp_path} is not on this machine"
    assert "not in the catalog" in (room.here("no-such-name") or "")
