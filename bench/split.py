"""What it costs that a model lies on several machines: `python -m bench.split`.

A generated model of 417 MB on one host and two more in network namespaces, joined by a bridge.
Speeds: one engine alone, stock llama.cpp over RPC servers on its own host and over those of the
other two, and meshd, whose tunnels encrypt the same way; in turns. Loads: with empty and with full
tensor caches. Recovery: a worker is killed. Prints tables and writes bench/results/split.json.
Needs root for the namespaces, and an engine (`make engine`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.figures import Goal, Rounds, goals_table, show, table
from bench.lan import network
from bench.mesh import p95
from bench.processes import BenchError, Stable
from bench.split_nodes import Lost
from bench.split_rounds import (
    ALONE,
    FILLED,
    FRONTS,
    LOOPBACK,
    MESHD,
    ONE_NODE,
    WIRE,
    Lab,
    Measured,
    Sizes,
    measure,
)
from meshd import config
from meshd.election.hosted import REPLANS
from meshd.errors import MeshdError
from meshd.runtime.registry import Registry
from tests.models import wide_model

RESULTS = Path(__file__).with_name("results")
PARTS = ("speeds", "loads", "recovery")
FULL, QUICK = Sizes(speeds=10, loads=5, recovery=10), Sizes(speeds=2, loads=1, recovery=2)

_NAMES = {
    ALONE: "one engine, not split",
    LOOPBACK: "plain RPC, its own host",
    WIRE: "plain RPC, two other hosts",
    MESHD: "meshd",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="sb-"))
    about = machine.describe()
    try:
        engine = Registry(config.load().config.cache_dir).find(None)
        with Stable(work) as stable, network() as lan:
            lab = Lab(stable, lan, work, Path(engine.server_path).parent, wide_model())
            measured = measure(lab, options.sizes, _say, nodes=not options.stock)
    except (BenchError, MeshdError) as error:
        print(f"bench.split: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    goals = goals_of(measured)
    print(f"{tables(measured)}\n\n{goals_table(goals)}")
    document = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": about,
        "versions": machine.versions("meshd", "uvloop", "cryptography"),
        "engine": engine.id,
        "n": asdict(options.sizes),
        "losses_in_a_row": REPLANS,
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in goals],
        **asdict(measured),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    _say(f"written to {options.out}")
    return 1 if measured.cut_short else 0


def goals_of(measured: Measured) -> list[Goal]:
    """What was to be reached, of the parts that were measured."""
    goals: list[Goal] = []
    if measured.speeds:
        rounds = Rounds(measured.speeds)
        generated = rounds.ratio(MESHD, WIRE, "speed", "generated_tok_s")
        prompt = rounds.ratio(MESHD, WIRE, "speed", "prompt_tok_s")
        others = [front for front in FRONTS if front != ALONE and rounds.has(front)]
        differing = sum(rounds.total(front, "speed", "differs") or 0 for front in others)
        goals += [
            Goal("generation, of plain RPC on the wire", generated, 0.95, at_least=True, unit=" ×"),
            Goal("prompt, of plain RPC on the wire", prompt, 0.90, at_least=True, unit=" ×"),
            Goal("texts that differ from one engine's", differing, 0),
        ]
    if measured.loads:
        loads = Rounds(measured.loads)
        slower = loads.ratio(MESHD + FILLED, ONE_NODE, "load", "seconds")
        pushed = loads.value(MESHD + FILLED, "load", "pushed_percent")
        goals += [
            Goal("load with full caches, of one node's load", slower, 1.3, unit=" ×"),
            Goal("pushed then, of the weights", pushed, 1, unit=" %"),
        ]
    return goals


# -- text -----------------------------------------------------------------------------------------


def tables(measured: Measured) -> str:
    """One for each part that was measured."""
    parts = []
    if measured.speeds:
        parts.append(_speeds_table(Rounds(measured.speeds)))
    if measured.loads:
        parts.append(_loads_table(measured.loads))
    if measured.recovery:
        parts.append(_recovery_table(measured.recovery))
    if measured.cut_short:
        parts.append(f"Recovery ended after {len(measured.recovery)} losses: {measured.cut_short}")
    return "\n\n".join(parts)


def _speeds_table(rounds: Rounds) -> str:
    head = [f"n = {len(rounds.rounds)}, medians", "prompt tok/s", "of plain", "tok/s", "of plain"]
    rows = []
    for front in (front for front in FRONTS if rounds.has(front)):
        row = [_NAMES[front]]
        for key in ("prompt_tok_s", "generated_tok_s"):
            row.append(show(rounds.value(front, "speed", key)))
            row.append(show(rounds.ratio(front, WIRE, "speed", key), 3))
        rows.append(row)
    return table(head, rows)


def _loads_table(loads: Sequence[Mapping[str, Any]]) -> str:
    head = [f"loads, n = {len(loads)}", "least s", "median s", "most s", "MB to the others"]
    rows = []
    for way in loads[0]:
        seconds = [each[way]["load"]["seconds"] for each in loads]
        pushed = median(each[way]["load"]["pushed_bytes"] for each in loads)
        figures = (min(seconds), median(seconds), max(seconds))
        front, *state = way.split(", ")
        rows.append(
            [", ".join([_NAMES[front], *state]), *(show(s, 2) for s in figures), show(pushed / 1e6)]
        )
    return table(head, rows)


def _recovery_table(lost: Sequence[Lost]) -> str:
    rows = []
    for field, name in (
        ("noticed_s", "SIGKILL of a worker → the host has ended the engine"),
        ("total_s", "SIGKILL of a worker → first token of the next plan"),
    ):
        values = sorted(getattr(each, field) for each in lost)
        figures = (values[0], median(values), p95(values), values[-1])
        rows.append([name, *(show(v, 2) for v in figures)])
    head = f"seconds, n = {len(lost)}, loaded anew after {REPLANS} each"
    return table([head, "least", "median", "p95", "most"], rows)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.split", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a first look")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each part that is measured")
    parser.add_argument("--only", metavar="PARTS", help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--stock", action="store_true", help="llama.cpp only, no nodes of meshd")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "split.json", help="(default bench/results)"
    )
    options = parser.parse_args(argv)
    chosen = options.only.split(",") if options.only else PARTS
    for part in chosen:
        if part not in PARTS:
            parser.error(f"no part is called {part}; there are {', '.join(PARTS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    sizes = asdict(QUICK if options.quick else FULL)
    if options.rounds is not None:
        sizes = dict.fromkeys(sizes, options.rounds)
    options.sizes = Sizes(**{part: n if part in chosen else 0 for part, n in sizes.items()})
    return options


if __name__ == "__main__":
    sys.exit(main())
