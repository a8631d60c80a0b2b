"""How long it takes to say that a set of weights may be loaded."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from bench.processes import BenchError

COUNTS = (1, 10, 100)
"""Shards of a set."""
VOCABULARY = 150_000
TENSORS_EACH = 12
REPO = "bench/model"
REVISION = "0" * 40


@dataclass(frozen=True, slots=True)
class Looks:
    shards: int
    first_ms: list[float]
    """Every header read and parsed: the first look of a daemon."""
    again_ms: list[float]
    """Nothing changed since the look before."""


def look_at_sets(work: Path, looks: int) -> list[Looks]:
    """`looks` of each kind at a verified set of each size, in the page cache."""
    return [_look(work / f"set-{count}", count, looks) for count in COUNTS]


def _look(home: Path, count: int, looks: int) -> Looks:
    # Late: only these need meshd itself, and numpy.
    from meshd.cache.hashes import ChunkHashes
    from meshd.cache.hashing import verify_files
    from meshd.cache.ledger import Ledger
    from meshd.cache.manifest import Manifest, Shard
    from meshd.cache.observe import Headers
    from meshd.cache.places import Places
    from meshd.cache.weights import expected_of, look_at

    places = Places(home / "hub", home / "state", home / "builtin")
    shards = []
    for number in range(count):
        path = f"model-{number + 1:05d}-of-{count:05d}.gguf" if count > 1 else "model.gguf"
        made = home / path
        home.mkdir(parents=True, exist_ok=True)
        _write_shard(made, number, count)
        content = made.read_bytes()
        shard = Shard(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        blob = places.blob(REPO, shard.sha256)
        link = places.snapshot(REPO, REVISION, path)
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        made.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
        shards.append(shard)
    manifest = Manifest(repo=REPO, revision=REVISION, shards=tuple(shards))
    ledger, kept = Ledger(places.ledger), Headers()
    verify_files(expected_of(manifest, places), ledger, ChunkHashes(places))

    def timed(headers: Headers | None) -> float:
        began = time.perf_counter()
        verdict = look_at(manifest, places, ledger, headers)
        took_ms = 1e3 * (time.perf_counter() - began)
        if not verdict.ok:
            raise BenchError(verdict.worst.words)
        return took_ms

    for headers in (None, kept):
        timed(headers)
    return Looks(count, [timed(None) for _ in range(looks)], [timed(kept) for _ in range(looks)])


def _write_shard(path: Path, number: int, count: int) -> None:
    """With the header of a real one, and hardly any weights: those are not looked at."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    if number == 0:
        tokens = [f"token{n}" for n in range(VOCABULARY)]
        writer.add_context_length(8192)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * VOCABULARY)
        writer.add_token_merges([f"to ken{n}" for n in range(VOCABULARY)])
    if count > 1:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count * TENSORS_EACH)
    for tensor in range(TENSORS_EACH):
        name = f"blk.{number}.ffn_down_exps.{tensor}.weight"
        writer.add_tensor(name, np.zeros(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
