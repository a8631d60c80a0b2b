"""What the model cache costs: `python -m bench.cache`.

Verdicts before a load; hashing beside `sha256sum` and `openssl`; a pull from a hub on loopback
beside `hf download`; weights from node to node beside `nc` (`bench.cache_peers`). Prints
tables and writes bench/results/cache.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from bench import machine
from bench.cache_hashing import HASHERS, Hashing, hash_rounds
from bench.cache_pulls import PULLERS, Pulling, pull_rounds
from bench.cache_verdicts import Looks, look_at_sets
from bench.figures import Goal, goals_table, show, table
from bench.processes import BenchError

RESULTS = Path(__file__).with_name("results")
PARTS = ("verdicts", "hashing", "pulls", "peers")
LOOK_LIMIT_MS = 20.0
CORE_SHARE = 0.9
"""Of what the fastest other program reaches on a core."""
GIB = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="meshd-bench-", dir=options.work))
    document: dict[str, object] = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine.describe(),
        "versions": machine.versions("meshd", "huggingface_hub")
        | {"openssl": machine.first_line("openssl", "version")},
    }
    goals: list[Goal] = []
    try:
        for part in options.only:
            rounds, tables, reached = _PARTS[part](work, options)
            document[part] = rounds
            goals += reached
            print(tables, end="\n\n", flush=True)
    except (BenchError, subprocess.SubprocessError, OSError) as error:
        print(f"bench.cache: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(goals_table(goals))
    document["goals"] = [asdict(goal) | {"verdict": goal.verdict} for goal in goals]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    _say(f"written to {options.out}")
    return 0


Part = tuple[object, str, list[Goal]]
"""Rounds for the results, tables, goals."""


def _verdicts(work: Path, options: argparse.Namespace) -> Part:
    looks = look_at_sets(work, 10 if options.quick else 50)
    return [asdict(one) for one in looks], verdict_table(looks), verdict_goals(looks)


def _hashing(work: Path, options: argparse.Namespace) -> Part:
    size = GIB // 4 if options.quick else GIB
    rounds = hash_rounds(work, size, 2 if options.quick else options.rounds, _say)
    return [asdict(one) for one in rounds], hash_table(rounds, size), hash_goals(rounds)


def _pulls(work: Path, options: argparse.Namespace) -> Part:
    size = GIB // 4 if options.quick else GIB
    rounds = pull_rounds(work, size, 2 if options.quick else options.rounds, _say)
    return [asdict(one) for one in rounds], pull_table(rounds, size), pull_goals(rounds)


def _peers(work: Path, options: argparse.Namespace) -> Part:
    del work  # it has a place in memory
    # Late: it brings the tests' network.
    from bench import cache_peers

    if os.geteuid() != 0:
        goal = Goal("weights from node to node (needs root)", None, cache_peers.SHARE, True)
        return None, "Weights from node to node: not measured, which needs root.", [goal]
    if options.quick:
        found = cache_peers.measure(rounds=2, total_bytes=GIB // 4)
    else:
        found = cache_peers.measure()
    goals = [Goal(**{k: v for k, v in goal.items() if k != "verdict"}) for goal in found["goals"]]
    return found, cache_peers.tables(found), goals


_PARTS: dict[str, Callable[[Path, argparse.Namespace], Part]] = {
    "verdicts": _verdicts,
    "hashing": _hashing,
    "pulls": _pulls,
    "peers": _peers,
}


# -- goals and tables -----------------------------------------------------------------------------


def verdict_goals(looks: Sequence[Looks]) -> list[Goal]:
    most = looks[-1]
    return [
        Goal(f"a look at {most.shards} shards, {kind}, longest", max(ms), LOOK_LIMIT_MS, unit=" ms")
        for kind, ms in (("first of a process", most.first_ms), ("unchanged", most.again_ms))
    ]


def hash_goals(rounds: Sequence[Hashing]) -> list[Goal]:
    def share(of: Callable[[Hashing], float], base: Callable[[Hashing], float]) -> float:
        return median(of(one) / base(one) for one in rounds)

    def best(one: Hashing) -> float:
        return max(one.mb_per_s["sha256sum"], one.mb_per_s["openssl"])

    two = [one for one in rounds if "meshd, 2 files" in one.mb_per_s]
    return [
        Goal(
            "hashing on one core, of the faster of the two",
            share(lambda one: one.mb_per_s["meshd"], best),
            CORE_SHARE,
            at_least=True,
        ),
        Goal(
            "hashing two files on two cores, of one",
            share(lambda one: one.mb_per_s["meshd, 2 files"], lambda one: one.mb_per_s["meshd"])
            if two
            else None,
            2 * CORE_SHARE,
            at_least=True,
        ),
    ]


def pull_goals(rounds: Sequence[Pulling]) -> list[Goal]:
    ratio = median(one.seconds["meshd"] / one.seconds["hf"] for one in rounds)
    return [Goal("a pull, of the time of `hf download`", ratio, 1.0)]


def verdict_table(looks: Sequence[Looks]) -> str:
    rows = []
    for one in looks:
        kinds = {
            "never seen": one.unseen_ms,
            "first of a process": one.first_ms,
            "unchanged": one.again_ms,
        }
        for name, values in kinds.items():
            times = [show(median(values), 2), show(max(values), 2), str(len(values))]
            rows.append([f"{one.shards} shards, {name}", *times])
    return table(["ms for a verdict", "median", "most", "n"], rows)


def hash_table(rounds: Sequence[Hashing], size: int) -> str:
    def row(name: str) -> list[str]:
        values = sorted(one.mb_per_s[name] for one in rounds)
        return [name, show(median(values), 0), show(values[0], 0), show(values[-1], 0)]

    head = [f"MB/s, {size / GIB:g} GiB in the page cache", "median", "least", "most"]
    known = [name for name in HASHERS if name in rounds[0].mb_per_s]
    return f"n = {len(rounds)}, interleaved.\n\n" + table(head, [row(name) for name in known])


def pull_table(rounds: Sequence[Pulling], size: int) -> str:
    def row(name: str) -> list[str]:
        values = sorted(one.seconds[name] for one in rounds)
        cpu = median(one.cpu_s[name] for one in rounds)
        return [name, *(show(v, 2) for v in (median(values), values[0], values[-1], cpu))]

    head = [f"s for {size / GIB:g} GiB in 8 files", "median", "least", "most", "CPU"]
    return f"n = {len(rounds)}, interleaved.\n\n" + table(head, [row(name) for name in PULLERS])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of hashing and pulls (default 5)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of a quarter of the bytes")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help=f"some of {','.join(PARTS)}",
    )
    parser.add_argument("--work", type=Path, help="on the disk to measure (default: TMPDIR)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cache.json", help="where to write")
    options = parser.parse_args(argv)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
