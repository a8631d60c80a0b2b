"""How long it takes to say that a set of weights may be loaded."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.processes import BenchError

if TYPE_CHECKING:
    from meshd.cache.verdict import SetVerdict

COUNTS = (1, 10, 100)
"""Shards of a set."""
VOCABULARY = 150_000
TENSORS_EACH = 12
REPO = "bench/model"
REVISION = "0" * 40


@dataclass(frozen=True, slots=True)
class Looks:
    shards: int
    unseen_ms: list[float]
    """Every header is parsed as if never before: once in the life of a file."""
    first_ms: list[float]
    """The first look of a process."""
    again_ms: list[float]
    """Nothing changed since the look before."""


def look_at_sets(work: Path, looks: int, counts: Sequence[int] = COUNTS) -> list[Looks]:
    """`looks` of each kind at a verified set of each size, in the page cache."""
    return [_look(work / f"set-{count}", count, looks) for count in counts]


def _look(home: Path, count: int, looks: int) -> Looks:
    # Late: only these need meshd itself, and numpy.
    from meshd.cache.hashing import verify_files
    from meshd.cache.manifest import Manifest, Shard
    from meshd.cache.places import Places
    from meshd.cache.store import Store
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
    store = Store.at(places)
    verify_files(expected_of(manifest, places), store.ledger, store.chunks)

    def timed(look: Callable[[], SetVerdict]) -> float:
        began = time.perf_counter()
        verdict = look()
        took_ms = 1e3 * (time.perf_counter() - began)
        if not verdict.ok:
            raise BenchError(verdict.worst.words)
        return took_ms

    def unseen() -> SetVerdict:
        return look_at(manifest, places, store.ledger)

    def first() -> SetVerdict:
        return Store.at(places).look(manifest)

    def again() -> SetVerdict:
        return store.look(manifest)

    def many(look: Callable[[], SetVerdict]) -> list[float]:
        gc.collect()
        gc.freeze()  # as the daemon does, so that no look pays for what was there before
        timed(look)
        return [timed(look) for _ in range(looks)]

    return Looks(count, many(unseen), many(first), many(again))


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
