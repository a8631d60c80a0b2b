"""Small models for tests: real GGUF files with random weights."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from meshd.cache.builtin import write_model


def small_model(path: Path, *, seed: int = 1) -> Path:
    """A llama of 2 layers × d 64; loads in some 20 ms."""
    write_model(path, layers=2, width=64, feed_forward=128, seed=seed, name=path.stem)
    return path


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
