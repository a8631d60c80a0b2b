"""The generated models are what tests of splits rely on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import gguf
import pytest

from bench.chats import get_status, greedy
from tests.conftest import wait_until
from tests.models import WIDE, Wide, wide_model, write_wide
from tests.node.conftest import short_dir

__all__ = ["short_dir"]

KEPT_BYTES = 10 * 2**20
"""Tensors of an RPC server's cache are larger."""
WEIGHTS = [0.099365234375, -0.10308837890625, 0.0953369140625, 0.11199951171875]
"""The first ones of a matrix, in every run on every machine."""
TOKENS = 32


def test_the_same_seed_gives_the_same_bytes_and_no_matrix_twice(tmp_path: Path) -> None:
    tiny = Wide(layers=2, width=64, feed_forward=128, heads=2)
    first = write_wide(tmp_path / "m.gguf", tiny)
    before = first.read_bytes()
    assert write_wide(first, tiny).read_bytes() == before
    other = write_wide(tmp_path / "other.gguf", tiny, seed=2)
    matrices = [t.data.tobytes() for p in (first, other) for t in _matrices(p)]
    assert len(matrices) == len(set(matrices)) == 2 * (2 * 7 + 2)


def test_weights_stay_those_of_other_runs(tmp_path: Path) -> None:
    tiny = write_wide(tmp_path / "m.gguf", Wide(layers=1, width=64, feed_forward=128, heads=2))
    query = next(t for t in _matrices(tiny) if t.name == "blk.0.attn_q.weight")
    assert query.data[0, :4].tolist() == WEIGHTS


def test_nearly_all_of_it_is_kept_by_an_rpc_server() -> None:
    kept = [t.n_bytes for t in _matrices(wide_model()) if t.n_bytes > KEPT_BYTES]
    assert len(kept) == WIDE.layers * 7
    assert sum(kept) == 2 * WIDE.parameters > 0.99 * wide_model().stat().st_size


@pytest.mark.engine
@pytest.mark.slow
def test_greedy_text_is_always_the_same_and_not_one_token(
    short_dir: Path, engine_dir: Path
) -> None:
    where = short_dir / "e.sock"
    argv = [str(engine_dir / "llama-server"), "-m", str(wide_model()), "--host", str(where)]
    argv += ["-c", "1024", "-np", "1", "-t", "1", "-fit", "off"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as engine:
        try:
            wait_until(lambda: get_status(where, "/health") == 200, timeout_s=60, what="it loads")
            said = [greedy(where, prompt, TOKENS) for prompt in ("Hello", "Hello", "Others")]
        finally:
            engine.kill()
    first, again, other = (answer["tokens"] if answer else [] for answer in said)
    assert first == again
    assert first != other
    assert all(len(tokens) == TOKENS < 4 * len(set(tokens)) for tokens in (first, other))


def _matrices(path: Path) -> list[gguf.ReaderTensor]:
    return [t for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2]
