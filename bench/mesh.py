"""What a mesh costs, and how soon it notices things: `python -m bench.mesh`.

Cycles of joining, killing, cutting off and healing on a LAN of network namespaces; then what a
hop to another node adds to a request; then idle nodes in a small mesh and in a large one. Prints
tables and writes bench/results/mesh.json. Needs root for the namespaces.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any

from bench import crowd, hop, machine
from bench.crowd import Crowd
from bench.figures import Goal, Rounds, goals_table, show, table
from bench.hop import HOST, REMOTE
from bench.lan import network
from bench.measure import Figures
from bench.membership import Cycles, Times
from bench.processes import BenchError, Stable

RESULTS = Path(__file__).with_name("results")
PARTS = ("cycles", "hop", "crowd")
MESH_SIZE = 4
CROWDS = (3, 30)

_ROWS: tuple[tuple[str, Callable[[Times], float]], ...] = (
    ("start of a new node → seen by all, static address", lambda t: t.join_static.seconds),
    ("start of a new node → seen by all, mDNS", lambda t: t.join_mdns.seconds),
    ("SIGKILL → routed to by nobody", lambda t: t.kill_unrouted_s),
    ("SIGKILL → dead to all", lambda t: t.kill_dead_s),
    ("start of a killed node → itself again to all", lambda t: t.restart_s),
    ("silent partition → routed to by nobody", lambda t: t.partition_unrouted_s),
    ("silent partition → dead to all", lambda t: t.partition_dead_s),
    ("partition healed → one view", lambda t: t.heal_s),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="mb-"))
    about = machine.describe()
    times: list[Times] = []
    rounds: list[dict[str, dict[str, Figures]]] = []
    crowds: list[Crowd] = []
    try:
        if "cycles" in options.only:
            times = _cycles(work, options.cycles)
        if "hop" in options.only:
            rounds = _hop(work, options.quick)
        if "crowd" in options.only:
            crowds = [_crowd(work, size, options.idle_s) for size in options.crowds]
    except BenchError as error:
        print(f"bench.mesh: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    goals = goals_of(times, Rounds(rounds), crowds)
    print(_tables(times, Rounds(rounds), crowds, goals))
    document = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": about,
        "versions": machine.versions("meshd", "aiohttp", "uvloop", "cryptography", "zeroconf"),
        "mesh_size": MESH_SIZE,
        "n": {"cycles": len(times), "hop": len(rounds)},
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in goals],
        "cycles": [asdict(t) for t in times],
        "hop": rounds,
        "crowds": [asdict(c) for c in crowds],
    }
    if options.out is not None:
        _write(document, options.out)
    return 0


def goals_of(times: Sequence[Times], hops: Rounds, crowds: Sequence[Crowd]) -> list[Goal]:
    """What was to be reached, of the parts that were measured."""
    goals: list[Goal] = []
    if times:
        goals += [
            Goal("join, static, p95", p95([t.join_static.seconds for t in times]), 1.5, unit=" s"),
            Goal("join, mDNS, p95", p95([t.join_mdns.seconds for t in times]), 3, unit=" s"),
            Goal("kill to unrouted, most", max(t.kill_unrouted_s for t in times), 1.5, unit=" s"),
            Goal("kill to dead, most", max(t.kill_dead_s for t in times), 1.5, unit=" s"),
            Goal("partition to dead, most", max(t.partition_dead_s for t in times), 4, unit=" s"),
            Goal("heal to one view, most", max(t.heal_s for t in times), 5, unit=" s"),
        ]
    if hops.rounds:
        added_us = hops.added(REMOTE, "one", "p50_us", HOST)
        added_ms = None if added_us is None else added_us / 1e3
        goals.append(Goal("a hop adds, p50 at one connection", added_ms, 0.6, unit=" ms"))
        failed = [hops.total(name, k, "errors") or 0 for name in (HOST, REMOTE) for k in hop.KINDS]
        goals.append(Goal("failed requests", sum(failed), 0))
    if crowds:
        largest = max(crowds, key=lambda c: c.nodes)
        where = f"idle among {largest.nodes}"
        goals += [
            Goal(f"memory, {where}, most", largest.rss_mb_most, 90, unit=" MB"),
            Goal(f"CPU, {where}, most", largest.cpu_percent_most, 1, unit=" %"),
        ]
    return goals


def p95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 % of all do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


# -- parts ----------------------------------------------------------------------------------------


def _cycles(work: Path, count: int) -> list[Times]:
    times: list[Times] = []
    with Stable(work) as stable, network() as lan:
        cycles = Cycles(stable, lan, work, _no_engine(work), size=MESH_SIZE)
        cycles.begin(count)
        for number in range(count):
            times.append(cycles.cycle())
            _say(f"cycle {number + 1} of {count}: {times[-1]}")
    return times


def _hop(work: Path, quick: bool) -> list[dict[str, dict[str, Figures]]]:
    with Stable(work) as stable:
        fronts = hop.start(stable, work)
        return hop.measure(fronts, hop.QUICK if quick else hop.FULL, _say)


def _crowd(work: Path, size: int, seconds: float) -> Crowd:
    _say(f"{size} idle nodes, {seconds:g} s")
    with Stable(work) as stable, network() as lan:
        found = crowd.idle(stable, lan, work, _no_engine(work), size=size, seconds=seconds)
    _say(str(found))
    return found


def _no_engine(work: Path) -> Path:
    """Nodes without a model never look for an engine; this one would not be found."""
    directory = work / "no-engine"
    directory.mkdir(exist_ok=True)
    return directory


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.mesh", description=__doc__)
    parser.add_argument("--cycles", type=int, help="of joining, killing, healing (default 30)")
    parser.add_argument("--idle-s", type=float, help="length of an idle measurement (default 60)")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter, smaller")
    parser.add_argument(
        "--only", type=_parts, default=PARTS, help=f"parts, of {','.join(PARTS)} (default all)"
    )
    parser.add_argument("--out", type=Path, help="where to write (default, if all: bench/results)")
    options = parser.parse_args(argv)
    if options.out is None and options.only == PARTS:
        options.out = RESULTS / "mesh.json"
    options.cycles = options.cycles or (3 if options.quick else 30)
    options.idle_s = options.idle_s or (10.0 if options.quick else 60.0)
    options.crowds = CROWDS[:1] if options.quick else CROWDS
    return options


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [n for n in names if n not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(unknown)}")
    return names


def _write(document: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    _say(f"written to {out}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- tables ---------------------------------------------------------------------------------------


def _tables(
    times: Sequence[Times], hops: Rounds, crowds: Sequence[Crowd], goals: Sequence[Goal]
) -> str:
    parts = []
    if times:
        parts += [f"A mesh of {MESH_SIZE}, {len(times)} cycles.", _times_table(times)]
    if hops.rounds:
        parts += [f"Medians of {len(hops.rounds)} interleaved rounds.", _hop_table(hops)]
    if crowds:
        parts.append(_crowds_table(crowds))
    return "\n\n".join([*parts, goals_table(goals)])


def _times_table(times: Sequence[Times]) -> str:
    assert len(_ROWS) == len(fields(Times))
    rows = []
    for name, of in _ROWS:
        values = sorted(of(t) for t in times)
        figures = (values[0], median(values), p95(values), values[-1])
        rows.append([name, *(show(v, 2) for v in figures)])
    return table(["seconds", "least", "median", "p95", "most"], rows)


def _hop_table(hops: Rounds) -> str:
    wanted = (
        ("1 connection, µs", "one", "p50_us", "p99_us"),
        ("64 connections, closed loop, µs", "load", "p50_us", "p99_us"),
        ("an event of 1 stream × 100/s, µs", "sse1", "delay_p50_us", "delay_p99_us"),
        ("an event of 64 streams × 100/s, µs", "sse64", "delay_p50_us", "delay_p99_us"),
        ("first event, 1 stream, µs", "sse1", "ttft_p50_us", "ttft_p99_us"),
        ("first event, 64 streams, µs", "sse64", "ttft_p50_us", "ttft_p99_us"),
    )
    rows = [
        [
            name,
            *(show(hops.value(front, kind, p50), 0) for front in (HOST, REMOTE)),
            show(hops.added(REMOTE, kind, p50, HOST), 0),
            *(show(hops.value(front, kind, p99), 0) for front in (HOST, REMOTE)),
            show(hops.added(REMOTE, kind, p99, HOST), 0),
        ]
        for name, kind, p50, p99 in wanted
    ]
    for front in (HOST, REMOTE):
        rate = show(hops.value(front, "load", "per_s"), 0)
        rows.append([f"requests/s at 64 connections, {front}", rate, *["–"] * 5])
    return table(["", "host p50", "remote p50", "added", "host p99", "remote p99", "added"], rows)


def _crowds_table(crowds: Sequence[Crowd]) -> str:
    rows = [
        [
            f"{c.nodes} nodes, {c.seconds:.0f} s",
            show(c.rss_mb_median),
            show(c.rss_mb_most),
            show(c.cpu_percent_median, 2),
            show(c.cpu_percent_most, 2),
        ]
        for c in crowds
    ]
    head = ["an idle node among", "MB, median", "most", "CPU % of a core, median", "most"]
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
