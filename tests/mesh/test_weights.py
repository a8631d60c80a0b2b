"""Weights from node to node: the hub is out of reach, and only one machine has the model.

The hub of these tests runs where no node can reach it; caches are filled before their nodes start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd.cache.builtin import write_model
from meshd.cache.chunks import CHUNK_BYTES
from tests.hub import LocalHub
from tests.mesh.disks import Disk
from tests.mesh.nodes import Lan, MeshNode
from tests.models import split_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REPO = "owner/shared-GGUF"
REF = f"{REPO}:F16"
MODEL = "shared-F16"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, engine_dir: Path) -> list[Path]:
    """Three of together some 30 MB."""
    whole = tmp_path_factory.mktemp("shared") / "shared-F16.gguf"
    write_model(whole, layers=6, width=512, feed_forward=1024, name="shared")
    return split_model(whole, engine_dir, tensors_per_shard=19)


@pytest.fixture
def hub(shards: list[Path]) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {path.name: path for path in shards})
        yield hub


@pytest.fixture
def disks(tmp_path: Path, hub: LocalHub) -> dict[str, Disk]:
    return {name: Disk(tmp_path / name, hub, REPO) for name in "abc"}


def start(lan: Lan, disks: dict[str, Disk], *names: str) -> list[MeshNode]:
    """A mesh of nodes that have their own disks and no hub."""
    founder = lan.node(names[0], "--mesh", "home", **disks[names[0]].environ).start()
    token = founder.invite(uses=len(names))
    others = [lan.node(n, "--join", token, **disks[n].environ).start() for n in names[1:]]
    lan.wait_whole(founder, *others)
    return [founder, *others]


def pull(node: MeshNode) -> dict[str, Any]:
    """The last event of `meshd cache pull --json`, typed on that node's machine."""
    done = node.meshd("cache", "pull", REF, "--json")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def test_one_peer_has_it_and_the_hub_is_away(lan: Lan, disks: dict[str, Disk]) -> None:
    disks["a"].fill(REF)
    a, b = start(lan, disks, "a", "b")
    done = pull(b)
    assert done["t"] == "done"
    assert set(done["sources"]) == {a.name}
    assert disks["b"].content() == disks["a"].content()
    listed = disks["b"].hf("cache", "ls")
    assert REPO in listed
    assert "All checksums match" in disks["b"].hf("cache", "verify", REPO)
    lan.until(
        lambda: [w for w in json.loads(b.meshd("cache", "ls", "--json").stdout)["sets"]
                 if w["state"] == "ok" and w["elsewhere"]],
        timeout_s=10,
        what="b knows that a has it too",
    )  # fmt: skip
    assert pull(b)["fetched_bytes"] == 0


def test_a_node_serves_what_only_another_had_on_disk(
    engine_lan: Lan, disks: dict[str, Disk]
) -> None:
    disks["a"].fill(REF)
    _, b = start(engine_lan, disks, "a", "b")
    loaded = b.meshd("load", REF, "--host", "b")
    assert loaded.returncode == 0, loaded.stderr
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    status, headers, answer = b.request("POST", "/v1/chat/completions", body)
    assert (status, headers["x-meshd-route"]) == (200, "local"), answer


def test_a_source_that_lies_is_left_and_the_truth_arrives(
    lan: Lan, disks: dict[str, Disk], shards: list[Path]
) -> None:
    for name in "ab":
        disks[name].fill(REF)
    for blob in disks["a"].blobs.iterdir():  # as a disk that forgets: size and time are the same
        status = blob.stat()
        with blob.open("r+b") as file:
            for at in range(1000, status.st_size, CHUNK_BYTES):
                file.seek(at)
                file.write(b"\x5a\xa5\x5a\xa5")
        os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
    *_, c = start(lan, disks, "a", "b", "c")
    lan.network.hosts["b"].slow_down("80mbit")  # or it may have sent all before a is asked
    done = pull(c)
    assert disks["c"].content() == disks["b"].content()
    assert done["sources"]["b"] >= sum(path.stat().st_size for path in shards)
    assert "a is not asked for" in c.stderr()
    assert "b is not asked for" not in c.stderr()


def test_a_source_that_dies_is_survived(lan: Lan, disks: dict[str, Disk]) -> None:
    for name in "ab":
        disks[name].fill(REF)
    a, _, c = start(lan, disks, "a", "b", "c")
    lan.network.hosts["a"].slow_down("20mbit")
    lan.network.hosts["b"].slow_down("40mbit")
    last: dict[str, Any] = {}
    # To its daemon's socket, which is a file: the command need not be on the node's host.
    for last in c.admin.post_lines("/cache/pull", {"ref": REF}):
        if last["t"] == "progress" and len(last["sources"]) == 2:
            a.close()  # SIGKILL
    assert last["t"] == "done", last
    assert set(last["sources"]) == {"a", "b"}
    assert disks["c"].content() == disks["b"].content()
