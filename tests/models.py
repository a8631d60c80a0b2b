"""Models for tests: real GGUF files with random weights."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshd import config
from meshd.cache.builtin import add_vocabulary, write_model


def small_model(path: Path, *, seed: int = 1) -> Path:
    """A llama of 2 layers × d 64; loads in some 20 ms."""
    write_model(path, layers=2, width=64, feed_forward=128, seed=seed, name=path.stem)
    return path


@dataclass(frozen=True)
class Wide:
    """A llama whose matrices are as wide as those of a real one; keys and values of all heads."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    context: int = 8192

    @property
    def parameters(self) -> int:
        """Of all layers; the vocabulary is small."""
        return self.layers * self.width * (4 * self.width + 3 * self.feed_forward)


WIDE = Wide(layers=3, width=2304, feed_forward=6912, heads=18)
"""418 MB in F16. All matrices but the vocabulary's are over 10 MiB, from where on an RPC server
keeps tensors."""


def wide_model() -> Path:
    """A file of `WIDE`, the same bytes in every run; written once, in about a second, and kept in
    the cache."""
    directory = config.load().config.cache_dir / "meshd" / "tests"
    path = directory / f"wide-{WIDE.layers}x{WIDE.width}-F16.gguf"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # Whole or not there: several runs may write it at once.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".wide-") as temporary:
            write_wide(Path(temporary) / path.name, WIDE).replace(path)
    return path


def write_wide(path: Path, shape: Wide, *, seed: int = 1) -> Path:
    """Write a model of `shape`, with weights out of `seed` and no two matrices alike; as fast as
    the disk takes it, with one matrix at a time in memory."""
    # Late: numpy costs 20 MB, and most tests make no such model.
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_description("Random weights: its text is noise.")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tensors = list(_wide_tensors(shape, add_vocabulary(writer)))
    for name, rows, columns in tensors:
        if rows:
            size = rows * columns * 2
            writer.add_tensor_info(name, (rows, columns), np.dtype(np.float16), size)
        else:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), columns * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    bits = np.random.PCG64(seed)
    for name, rows, columns in tensors:
        if rows:
            writer.write_tensor_data(_noise(bits, rows, columns, large=name == "token_embd.weight"))
        else:
            writer.write_tensor_data(np.ones(columns, dtype=np.float32))
    writer.close()
    return path


def _wide_tensors(shape: Wide, vocabulary: int) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns; a vector has 0 rows."""
    width, feed_forward = shape.width, shape.feed_forward
    yield "token_embd.weight", vocabulary, width
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_norm.weight", 0, width
        for name in ("q", "k", "v", "output"):
            yield f"blk.{layer}.attn_{name}.weight", width, width
        yield f"blk.{layer}.ffn_norm.weight", 0, width
        yield f"blk.{layer}.ffn_gate.weight", feed_forward, width
        yield f"blk.{layer}.ffn_up.weight", feed_forward, width
        yield f"blk.{layer}.ffn_down.weight", width, feed_forward
    yield "output_norm.weight", 0, width
    yield "output.weight", vocabulary, width


def _noise(bits: Any, rows: int, columns: int, *, large: bool) -> Any:
    """F16 numbers of either sign, each a random fraction times one power of two: random bits need
    no arithmetic then. Rows have length 1 or so; if `large`, numbers have."""
    import numpy as np

    halves = bits.random_raw(-(-rows * columns // 4)).astype("<u8", copy=False).view("<u2")
    exponent = 15 - (0 if large else round(math.log2(1.5 * math.sqrt(columns))))
    halves &= np.uint16(0x83FF)  # sign and fraction
    halves |= np.uint16(exponent << 10)
    return halves[: rows * columns].view("<f2").reshape(rows, columns)


def split_model(path: Path, engine_dir: Path, *, tensors_per_shard: int = 6) -> list[Path]:
    """`path` split by llama.cpp's own tool, in order; the unsplit file is removed."""
    splitter = engine_dir / "llama-gguf-split"
    stem = path.with_suffix("")
    subprocess.run(
        [splitter, "--split-max-tensors", str(tensors_per_shard), path, stem],
        check=True,
        capture_output=True,
    )
    path.unlink()
    shard = re.compile(rf"{re.escape(stem.name)}-\d{{5}}-of-\d{{5}}\.gguf")
    return sorted(p for p in path.parent.iterdir() if shard.fullmatch(p.name))
