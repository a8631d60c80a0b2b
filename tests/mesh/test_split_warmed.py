"""A worker that has the model's files: it need not be sent what it can read from its own disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshd.runtime.lending.rpc_words import HASHED_OVER_BYTES
from tests.hub import LocalHub
from tests.mesh.disks import Disk
from tests.mesh.nodes import Lan, Nodes
from tests.mesh.splitting import (
    CAPPED,
    MODEL,
    answer,
    load,
    logged,
    metric,
    of,
    sent,
    wait_placed,
)
from tests.models import WIDE, wide_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REPO = "owner/wide-3x2304-GGUF"
REF = f"{REPO}:F16"
PROMPTS = ("nine bottles of ink", "Once", "", "é")
TOKENS = 64
COUNTED_LIMIT_S = 10.0
LAYER_BYTES = 2 * WIDE.parameters // WIDE.layers
"""Of the matrices of one layer: all are offered by hash, and each worker holds one layer."""


@pytest.mark.timeout(600)
def test_who_has_the_files_is_sent_next_to_nothing_at_the_first_load(
    engine_lan: Lan, tmp_path: Path
) -> None:
    weights = wide_model()
    assert 2 * WIDE.width**2 > HASHED_OVER_BYTES, "the smallest of the matrices"
    with LocalHub() as hub:
        hub.add(REPO, {weights.name: weights})
        disks = {name: Disk(tmp_path / name, hub, REPO) for name in ("a", "b", "c")}
        for name in ("a", "b"):
            disks[name].fill(REF)
    nodes = a, b, c = _start(engine_lan, disks)
    load(a, REF, "--host", "a")
    where = wait_placed(engine_lan, *nodes)
    assert set(where.workers) == {"b", "c"}
    engine_lan.until(
        lambda: logged(a, f"{MODEL} is loaded: "),
        timeout_s=COUNTED_LIMIT_S,
        what="what the load sent is counted",
    )
    carried = sent(a)
    engine_lan.say(f"sent at the first load: {carried}; b has the files, c has none")
    assert carried["b"] < 0.01 * weights.stat().st_size
    assert carried["c"] >= LAYER_BYTES

    # Both sides say so.
    (line,) = logged(b, "warmed ")
    found = re.search(r"warmed (\d+) tensors, (\d+) bytes", line)
    assert found is not None
    assert int(found[2]) == LAYER_BYTES
    assert not logged(c, "warmed ")
    workers = ", ".join(where.workers)
    assert logged(a, f"{workers} lend memory; {LAYER_BYTES} bytes of tensors were there")
    pushed = {node.name: metric(node, "meshd_tensors_pushed_bytes_total") for node in (b, c)}
    assert pushed == {"b": 0, "c": LAYER_BYTES}

    alone = engine_lan.node("alone", "--mesh", "alone").start()
    load(alone, weights)
    expected = [answer(alone, prompt, TOKENS) for prompt in PROMPTS]
    assert [answer(a, prompt, TOKENS) for prompt in PROMPTS] == expected
    assert len(set(expected)) == len(PROMPTS)
    assert wait_placed(engine_lan, *nodes) == where
    assert of(nodes, where.host) is a


def _start(lan: Lan, disks: dict[str, Disk]) -> Nodes:
    """A mesh in which each has a disk of its own, and nobody a hub."""
    founder = lan.node("a", "--mesh", "home", *CAPPED, **disks["a"].environ).start()
    token = founder.invite(uses=len(disks))
    others = [
        lan.node(name, "--join", token, *CAPPED, **disks[name].environ).start()
        for name in disks.keys() - {"a"}
    ]
    lan.wait_whole(founder, *others)
    return (founder, *sorted(others, key=lambda node: node.name))
