"""Workers that have none of a model's files, in a mesh in which others hold them: each fetches the
shards of its layers from those before its host connects, and nobody takes them for the model.

The host is on a slow line, and knows it: it has sent another set of the same tensors before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.hub import LocalHub
from tests.mesh.disks import Disk
from tests.mesh.nodes import Lan, MeshNode
from tests.mesh.splitting import (
    CAPPED,
    MODEL,
    Placed,
    answer,
    load,
    logged,
    metric,
    sent,
    tidy,
    wait_placed,
)
from tests.models import WIDE, split_model, wide_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REPO = "owner/wide-3x2304-GGUF"
REF = f"{REPO}:F16"
HOLDERS, WORKERS = ("a", "d", "e"), ("b", "c")
"""`a` hosts; `d` and `e` lend nothing."""
PROMPTS = ("nine bottles of ink", "Once", "é")
TOKENS = 32
SLOW = "100mbit"
TENSORS_PER_SHARD = 1
COUNTED_LIMIT_S = 10.0
GONE_LIMIT_S = 10.0
LAYER_BYTES = 2 * WIDE.parameters // WIDE.layers
"""Of the matrices of one layer; each worker holds one."""
SERVE_NOTHING = {"MESHD_CACHE__FROM_PEERS": "false"}


@pytest.fixture
def shards(tmp_path: Path, engine_dir: Path) -> list[Path]:
    """Of the model of 418 MB: one for each tensor."""
    copy = tmp_path / "made" / wide_model().name
    copy.parent.mkdir()
    shutil.copy(wide_model(), copy)
    return split_model(copy, engine_dir, tensors_per_shard=TENSORS_PER_SHARD)


@pytest.fixture
def disks(tmp_path: Path, shards: list[Path]) -> dict[str, Disk]:
    with LocalHub() as hub:
        hub.add(REPO, {path.name: path for path in shards})
        disks = {name: Disk(tmp_path / name, hub, REPO) for name in (*HOLDERS, *WORKERS)}
        for name in HOLDERS:
            disks[name].fill(REF)
    return disks


@pytest.mark.timeout(600)
def test_workers_fetch_the_shards_of_their_layers_from_who_holds_them(
    engine_lan: Lan, disks: dict[str, Disk], shards: list[Path]
) -> None:
    nodes = _start(engine_lan, disks)
    a, workers = nodes["a"], [nodes[name] for name in WORKERS]
    before, where = _load(engine_lan, nodes)
    carried = {name: count - before[name] for name, count in sent(a).items()}
    fetched = {n.name: metric(n, "meshd_shards_fetched_bytes_total") for n in workers}
    engine_lan.say(f"sent by the host: {carried}; fetched before: {fetched}")
    total = sum(path.stat().st_size for path in shards)
    for line in (line for worker in workers for line in logged(worker, "warmed ")):
        engine_lan.say(line)
    for worker in workers:
        assert carried[worker.name] < 0.01 * total
        assert LAYER_BYTES <= fetched[worker.name] < 1.2 * LAYER_BYTES
        assert metric(worker, "meshd_tensors_pushed_bytes_total") == LAYER_BYTES, "at first"
        assert logged(worker, f"of {MODEL} from other nodes: that takes some ")
        (line,) = logged(worker, "fetched ")
        assert {"d", "e"} & set(line.rpartition(" from ")[2].partition(" in ")[0].split(", "))
        (line,) = logged(worker, "warmed ")
        assert f", {LAYER_BYTES} bytes, in " in line
    assert any(str(2 * LAYER_BYTES) in line for line in logged(a, "bytes of tensors were there"))

    # What came are whole shards, and the set is known as what it is: not whole.
    for worker in workers:
        content = disks[worker.name].content()
        assert 0 < len(content) < len(shards)
        assert set(content.values()) < {path.read_bytes() for path in shards}
        (listed,) = _listed(worker)
        assert (listed["state"], listed["in_use"]) == ("missing", False)
        refused = worker.meshd("plan", REF, "--json")
        (bid,) = [n for n in json.loads(refused.stdout)["nodes"] if n["name"] == worker.name]
        assert bid["verdict"] != "hosts"
    assert {n["elsewhere"] for n in _listed(a)} == {True}

    # The rest comes when somebody wants all of it, and nothing twice.
    b = workers[0]
    there = sum(map(len, disks["b"].content().values()))
    done = b.meshd("cache", "pull", REF, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["fetched_bytes"] == total - there
    assert _listed(b)[0]["state"] == "ok"

    alone = engine_lan.node("alone", "--mesh", "alone").start()
    load(alone, wide_model())
    expected = [answer(alone, prompt, TOKENS) for prompt in PROMPTS]
    assert [answer(a, prompt, TOKENS) for prompt in PROMPTS] == expected
    assert wait_placed(engine_lan, *nodes.values()) == where


@pytest.mark.timeout(600)
def test_what_cannot_be_fetched_is_sent_by_the_host(
    engine_lan: Lan, disks: dict[str, Disk]
) -> None:
    """They say that they hold it, and give nothing."""
    nodes = _start(engine_lan, disks, **dict.fromkeys(HOLDERS, SERVE_NOTHING))
    before, _ = _load(engine_lan, nodes)
    carried = sent(nodes["a"])
    for name in WORKERS:
        assert carried[name] - before[name] >= LAYER_BYTES
        assert logged(nodes[name], "is given up, its host sends the rest")
        assert metric(nodes[name], "meshd_shards_fetched_bytes_total") == 0
        assert metric(nodes[name], "meshd_tensors_pushed_bytes_total") == 2 * LAYER_BYTES
        assert not disks[name].blobs.exists()
    assert answer(nodes["a"], PROMPTS[0], 4)


def _start(lan: Lan, disks: dict[str, Disk], **environ: dict[str, str]) -> dict[str, MeshNode]:
    """A mesh in which each has a disk of its own, and nobody a hub."""
    more = {name: dict(environ.get(name, {})) for name in disks}
    for name in ("d", "e"):
        more[name]["MESHD_ENGINE__LEND"] = "false"
    settings: dict[str, dict[str, Any]] = {
        name: {**disk.environ, **more[name]} for name, disk in disks.items()
    }
    founder = lan.node("a", "--mesh", "home", *CAPPED, **settings["a"]).start()
    token = founder.invite(uses=len(disks))
    nodes = {"a": founder}
    for name in sorted(disks.keys() - {"a"}):
        nodes[name] = lan.node(name, "--join", token, *CAPPED, **settings[name]).start()
    lan.wait_whole(*nodes.values())
    return nodes


def _load(lan: Lan, nodes: dict[str, MeshNode]) -> tuple[dict[str, int], Placed]:
    """What `a` had sent before, and where it is. Returns when it is served, and what the load sent
    is counted."""
    a = nodes["a"]
    a.host.slow_down(SLOW)
    load(a, wide_model(), "--host", "a")
    wait_placed(lan, *nodes.values())
    _wait_loaded(lan, a, times=1)
    a.unload(MODEL)
    lan.until(lambda: tidy(None, nodes.values()), timeout_s=GONE_LIMIT_S, what="nothing is left")
    before = sent(a)
    lan.until(
        lambda: _listed(a)[0]["elsewhere"], timeout_s=COUNTED_LIMIT_S, what="others hold it too"
    )
    load(a, REF, "--host", "a")
    where = wait_placed(lan, *nodes.values())
    assert set(where.workers) == set(WORKERS)
    _wait_loaded(lan, a, times=2)
    return before, where


def _wait_loaded(lan: Lan, host: MeshNode, *, times: int) -> None:
    lan.until(
        lambda: len(logged(host, f"{MODEL} is loaded: ")) == times,
        timeout_s=COUNTED_LIMIT_S,
        what="what the load sent is counted",
    )


def _listed(node: MeshNode) -> list[dict[str, Any]]:
    """The sets in its cache."""
    done = node.meshd("cache", "ls", "--json")
    assert done.returncode == 0, done.stderr
    sets: list[dict[str, Any]] = json.loads(done.stdout)["sets"]
    return sets
