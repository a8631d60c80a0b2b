"""Hashing a file in the page cache, beside the two programs everybody has for it.

The two programs and meshd's whole hash run on one core. With two, meshd makes the hashes of chunks
as well, or hashes two files at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.cache_calm import calmest
from bench.processes import placed_here

HASHERS = ("sha256sum", "openssl", "meshd", "meshd, chunks too", "meshd, 2 files")
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Hashing:
    """One round."""

    mb_per_s: dict[str, float]
    """All on one core, except the last two, which are given two if there are two."""
    foreign: dict[str, float]
    """Cores taken meanwhile by what does not belong to the benchmark."""


def hash_rounds(work: Path, size: int, rounds: int, say: Callable[[str], None]) -> list[Hashing]:
    path = work / "hashed.bin"
    with path.open("wb") as file:
        for _ in range(size // BLOCK_BYTES):
            file.write(os.urandom(BLOCK_BYTES))
    half = work / "half.bin"
    with path.open("rb") as file, half.open("wb") as out:
        shutil.copyfileobj(file, out, BLOCK_BYTES)
    found = []
    for number in range(rounds):
        found.append(_round(path, half, size))
        say(f"hashing: round {number + 1} of {rounds}: {found[-1].mb_per_s}")
    path.unlink()
    half.unlink()
    return found


def _round(path: Path, other: Path, size: int) -> Hashing:
    # Late: only this needs meshd itself.
    from meshd.cache.hashing import hash_file

    one = frozenset(sorted(os.sched_getaffinity(0))[-1:])
    both = frozenset(sorted(os.sched_getaffinity(0))[-2:])
    ways: dict[str, tuple[frozenset[int], int, Callable[[], object]]] = {
        "sha256sum": (one, size, partial(_run, "sha256sum", str(path))),
        "openssl": (one, size, partial(_run, "openssl", "dgst", "-sha256", str(path))),
        "meshd": (one, size, partial(hash_file, path, chunks=False)),
    }
    if len(both) == 2:
        ways["meshd, chunks too"] = (both, size, partial(hash_file, path))
        ways["meshd, 2 files"] = (both, 2 * size, partial(_two, path, other))
    speeds, foreign = {}, {}
    for name, (cores, count, work) in ways.items():
        with placed_here(cores):
            timed = calmest(work)
        speeds[name], foreign[name] = count / timed.seconds / 1e6, timed.foreign
    return Hashing(speeds, foreign)


def _two(path: Path, other: Path) -> None:
    """As verifying a set whose chunk hashes are known does it: a thread a file."""
    from concurrent.futures import ThreadPoolExecutor

    from meshd.cache.hashing import hash_file

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(hash_file, file, chunks=False) for file in (path, other)]:
            done.result()


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
