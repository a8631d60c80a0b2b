"""Split sets of weights with as many bytes as a test wants, without an engine to make them."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np


def write_set(directory: Path, *sizes: int, stem: str = "model", seed: int = 1) -> list[Path]:
    """One shard with a tensor of random bytes for each of `sizes`, as llama.cpp splits; in order.

    Sizes are of the tensors, multiples of 4; headers add some hundred bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    count = len(sizes)
    chance = random.Random(seed)
    paths = []
    for number, size in enumerate(sizes):
        path = directory / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            writer.add_context_length(512)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        content = np.frombuffer(chance.randbytes(size), dtype=np.float32)
        writer.add_tensor(f"t{number}", content)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths
