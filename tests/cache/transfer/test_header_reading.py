"""Shapes of sets that are elsewhere: only headers travel, and what is wrong with them is told."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

from meshd.cache.builtin import write_model
from meshd.cache.gguf_header import GgufHeader, parse_header
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.manifests import ManifestStore
from meshd.cache.references import parse_hub_ref
from meshd.cache.shape import shape_of
from meshd.cache.transfer import header_reading, pace
from meshd.cache.transfer.words import News, Shape
from meshd.view.shape import ModelShape
from tests.cache.sets import write_set
from tests.cache.transfer.world import (
    REPO,
    Dying,
    Neighbour,
    carry_out,
    done,
    failed,
    manifest_of,
    neighbourhood,
    order_for,
    peer,
    places_in,
    sha256,
)
from tests.hub import LocalHub, Reset, Slow, Stage, Status

MIB = 1024 * 1024
SET = ("Name-Q4_K_M-00001-of-00003.gguf", "Name-Q4_K_M-00002-of-00003.gguf",
       "Name-Q4_K_M-00003-of-00003.gguf")  # fmt: skip


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_DELAY_S", 0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("model") / "Name-Q4_K_M.gguf"
    write_model(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    paths = write_set(
        tmp_path_factory.mktemp("set"), 3_000_000, 2_000_000, 2_500_000, stem="Name-Q4_K_M"
    )
    return {path.name: path.read_bytes() for path in paths}


def projector(path: Path, width: int) -> bytes:
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_uint32("clip.vision.projection_dim", width)
    writer.add_tensor("v.patch_embd.weight", np.zeros((1000, 500), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def headers(files: dict[str, bytes]) -> list[GgufHeader]:
    return [parse_header(data, len(data)) for data in files.values()]


def shape_in(news: list[News]) -> ModelShape:
    done(news)
    (found,) = [one for one in news if isinstance(one, Shape)]
    return ModelShape.from_json(found.shape.encode())


def read(
    home: Path, manifest: Manifest | None, *neighbours: Neighbour, hub: bool = True
) -> list[News]:
    with neighbourhood(*neighbours) as open_stream:
        more = {"peers": tuple(peer(n.name) for n in neighbours)} if neighbours else {}
        order = order_for(home, manifest, headers_only=True, offline=not hub, **more)
        return carry_out(order, open_stream)


def holder(tmp_path: Path, name: str, files: dict[str, bytes]) -> Neighbour:
    neighbour = Neighbour(name, manifests=[manifest_of(files)])
    for path, data in files.items():
        neighbour.has(tmp_path / name / path, data)
    return neighbour


def test_a_reference_becomes_a_shape_and_nothing_comes_to_the_disk(
    hub: LocalHub, tmp_path: Path, model: bytes
) -> None:
    manifest = manifest_of({"Name-Q4_K_M.gguf": model}, hub.add(REPO, {"Name-Q4_K_M.gguf": model}))
    news = read(tmp_path, None)
    assert shape_in(news) == shape_of([parse_header(model, len(model))])
    assert shape_in(news).layers
    hub.wait_idle()
    assert hub.sent() == done(news).fetched_bytes == MIB < len(model) / 4
    assert done(news).sources == {"hub": MIB}
    places = places_in(tmp_path)
    assert ManifestStore(places.manifests).find(parse_hub_ref(REPO)) == manifest
    assert not places.hub.exists()


def test_of_later_shards_less_is_read(
    hub: LocalHub, tmp_path: Path, shards: dict[str, bytes]
) -> None:
    hub.add(REPO, shards)
    shape = shape_in(read(tmp_path, None))
    assert shape == shape_of(headers(shards))
    assert shape.output_bytes == 7_500_000
    hub.wait_idle()
    assert [hub.sent(name) for name in SET] == [MIB, 65_536, 65_536]


def test_a_long_header_is_read_piece_by_piece_and_no_byte_twice(
    hub: LocalHub, tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_reading, "FIRST_BYTES", 1000)
    hub.add(REPO, {"Name-Q4_K_M.gguf": model})
    header = parse_header(model, len(model))
    assert shape_in(read(tmp_path, None)) == shape_of([header])
    hub.wait_idle()
    ranges = [request.range for request in hub.content_requests()]
    assert ranges[:3] == [(0, 1000), (1000, 2000), (2000, 4000)]
    assert header.data_offset - 32 < hub.sent() <= 2 * header.data_offset


def test_a_header_without_end_is_given_up(
    hub: LocalHub, tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_reading, "FIRST_BYTES", 1000)
    monkeypatch.setattr(header_reading, "MAX_HEADER_BYTES", 3000)
    hub.add(REPO, {"Name-Q4_K_M.gguf": model})
    end = failed(read(tmp_path, None))
    assert (end.code, end.permanent) == ("hub_refused", True)
    assert "more than 3000 bytes" in end.message
    hub.wait_idle()
    assert hub.sent() == 3000


@pytest.mark.parametrize(("width", "counted"), [(256, 2_000_000), (300, 0)])
def test_a_projector_counts_if_it_fits(
    hub: LocalHub, tmp_path: Path, model: bytes, width: int, counted: int
) -> None:
    mmproj = projector(tmp_path / "mmproj.gguf", width)
    commit = hub.add(REPO, {"Name-Q4_K_M.gguf": model, "mmproj-F16.gguf": mmproj})
    beside = Shard(path="mmproj-F16.gguf", size=len(mmproj), sha256=sha256(mmproj))
    manifest = manifest_of({"Name-Q4_K_M.gguf": model}, commit)
    news = read(tmp_path / "home", manifest.model_copy(update={"mmproj": beside}))
    assert shape_in(news).mmproj_bytes == counted


def test_a_file_that_ends_within_its_header_is_refused_for_good(
    hub: LocalHub, tmp_path: Path, model: bytes
) -> None:
    hub.add(REPO, {"Name-Q4_K_M.gguf": model[:500]})
    end = failed(read(tmp_path, None))
    assert (end.code, end.permanent) == ("hub_refused", True)
    assert "Name-Q4_K_M.gguf of owner/Name-GGUF is no model" in end.message
    assert "cut off" in end.message


def test_a_hub_that_is_ill_for_a_moment_is_asked_again(
    hub: LocalHub, tmp_path: Path, shards: dict[str, bytes]
) -> None:
    hub.add(REPO, shards)
    hub.faults.add(SET[0], Reset(1000), times=2)
    hub.faults.add(SET[2], Status(503, None, None, None), times=2)
    assert shape_in(read(tmp_path, None)) == shape_of(headers(shards))


def test_a_hub_that_refuses_ends_it(
    hub: LocalHub, tmp_path: Path, shards: dict[str, bytes]
) -> None:
    manifest = manifest_of(shards, hub.add(REPO, shards))
    hub.faults.add(SET[1], Status(404), times=None)
    end = failed(read(tmp_path, manifest))
    assert (end.code, end.permanent) == ("hub_refused", True)


# -- from other nodes -----------------------------------------------------------------------------


def test_a_node_that_holds_it_spares_the_hub(
    hub: LocalHub, tmp_path: Path, shards: dict[str, bytes]
) -> None:
    manifest = manifest_of(shards, hub.add(REPO, shards))
    news = read(tmp_path / "home", manifest, holder(tmp_path, "ada", shards))
    assert shape_in(news) == shape_of(headers(shards))
    assert done(news).sources == {"ada": MIB + 2 * 65_536}
    assert not hub.requests


def test_without_a_hub_the_last_of_many_nodes_will_do(
    tmp_path: Path, shards: dict[str, bytes]
) -> None:
    others = [Neighbour(name) for name in ("ada", "bob", "cid")]
    news = read(tmp_path / "home", None, *others, holder(tmp_path, "dan", shards), hub=False)
    assert shape_in(news) == shape_of(headers(shards))
    assert set(done(news).sources) == {"dan"}


def test_nodes_that_fail_are_left_and_the_hub_is_asked(
    hub: LocalHub, tmp_path: Path, model: bytes
) -> None:
    files = {"Name-Q4_K_M.gguf": model}
    manifest = manifest_of(files, hub.add(REPO, files))
    dying = holder(tmp_path, "ada", files)
    dying.stream = lambda connection: Dying(connection, 2000)
    lying = Neighbour("bob")
    lying.has(tmp_path / "wrong", bytes(len(model)), sha256_of=model)
    never = holder(tmp_path, "cid", files)
    news = read(tmp_path / "home", manifest, dying, lying, never)
    assert shape_in(news) == shape_of([parse_header(model, len(model))])
    assert "hub" in done(news).sources
    assert (dying.opened, lying.opened, never.opened) == (1, 1, 0)


def test_a_hub_that_was_just_away_is_not_waited_for(
    hub: LocalHub, tmp_path: Path, shards: dict[str, bytes]
) -> None:
    hub.faults.add("info", Status(503), times=1, stage=Stage.API)
    others = [Neighbour(name) for name in ("ada", "bob", "cid")]
    news = read(tmp_path / "home", None, *others, holder(tmp_path, "dan", shards))
    assert shape_in(news) == shape_of(headers(shards))
    assert [request.stage for request in hub.requests] == [Stage.API]


def test_nobody_has_it(tmp_path: Path, shards: dict[str, bytes]) -> None:
    end = failed(read(tmp_path / "home", manifest_of(shards), Neighbour("ada"), hub=False))
    assert (end.code, end.permanent) == ("hub_unavailable", False)
    assert "no other node has Name-Q4_K_M-0000" in end.message


def test_it_is_cancelled_between_two_ranges(
    hub: LocalHub, tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_reading, "FIRST_BYTES", 1000)
    hub.add(REPO, {"Name-Q4_K_M.gguf": model})
    hub.faults.add("*", Slow(4000), times=None)

    def end() -> None:
        hub.wait_sent("*", 100)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    news = read(tmp_path, None)
    thread.join()
    assert failed(news).code == "cancelled"
