"""What meshd adds to an engine, beside what other proxies add: `python -m bench.proxy`.

Rounds are interleaved: each measures every front, one kind of measurement after the other, in an
order that rotates. Prints tables and writes bench/results/proxy.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench import machine
from bench.figures import Goal, Rounds, goals_table, show, table
from bench.fronts import AIOHTTP, DIRECT, LITELLM, MESHD, NGINX, Bench, Front, Missing, Places
from bench.measure import (
    FULL,
    QUICK,
    Figures,
    Placement,
    Sizes,
    placements,
    sequential,
    streams,
    throughput,
)
from bench.processes import BenchError, Stable

RESULTS = Path(__file__).with_name("results")
FRONTS = (DIRECT, NGINX, AIOHTTP, LITELLM, MESHD)
KINDS = ("pinned", "unpinned", "load", "sse64", "sse256")


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    sizes = QUICK if options.quick else FULL
    if options.rounds is not None:
        sizes = replace(sizes, rounds=options.rounds)
    wanted = [f for f in FRONTS if f == DIRECT or not options.only or f in options.only]
    work = Path(tempfile.mkdtemp(prefix="meshd-bench-"))
    try:
        with Stable(work) as stable:
            fronts, missing = _start(stable, work, wanted)
            about = machine.describe()
            rounds = _measure(fronts, sizes)
    except BenchError as error:
        print(f"bench.proxy: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = Rounds(rounds)
    names = [f.name for f in fronts]
    goals = goals_of(found) if MESHD in names else []
    print(_tables(found, names, missing, goals))
    document = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": about,
        "versions": machine.versions("meshd", "aiohttp", "uvloop", "httptools")
        | {f.name: f.version for f in fronts if f.version},
        "sizes": asdict(sizes),
        "n": len(rounds),
        "missing": {m.name: m.reason for m in missing},
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in goals],
        "rounds": rounds,
    }
    _write(document, options.out)
    return 0


def goals_of(found: Rounds) -> list[Goal]:
    """The goals, each with the figure that decides it."""
    unpinned = found.added(MESHD, "unpinned", "p50_us")
    rss = found.value(MESHD, "sse256", "rss_mb")
    goals = [
        Goal(
            "added p50, pinned, over nginx's",
            found.added_ratio(MESHD, NGINX, "pinned", "p50_us"),
            5,
            unit=" ×",
        ),
        Goal(
            "added p50, pinned, over the aiohttp proxy's",
            found.added_ratio(MESHD, AIOHTTP, "pinned", "p50_us"),
            1 / 3,
            unit=" ×",
        ),
        Goal("added p50, unpinned", unpinned and unpinned / 1e3, 0.3, unit=" ms"),
        Goal(
            "requests/s at 64 connections over nginx's",
            found.ratio(MESHD, NGINX, "load", "per_s"),
            0.25,
            at_least=True,
            unit=" ×",
        ),
        Goal(
            "requests/s at 64 connections over the aiohttp proxy's",
            found.ratio(MESHD, AIOHTTP, "load", "per_s"),
            3,
            at_least=True,
            unit=" ×",
        ),
    ]
    for kind, limit in (("sse64", 1.5), ("sse256", 1.2)):
        goals.append(
            Goal(
                f"CPU per event at {kind[3:]} streams over nginx's",
                found.ratio(MESHD, NGINX, kind, "cpu_us"),
                limit,
                unit=" ×",
            )
        )
    for kind in ("sse64", "sse256"):
        goals.append(
            Goal(f"events lost at {kind[3:]} streams", found.total(MESHD, kind, "lost"), 0)
        )
        merged = found.beyond(MESHD, kind, "merged")
        goals.append(Goal(f"events merged at {kind[3:]} streams, beyond direct's", merged, 0))
    goals.append(Goal("memory at 256 streams", rss, 80, unit=" MB"))
    errors = [found.total(MESHD, kind, "errors") for kind in KINDS]
    failed = sum(e for e in errors if e is not None)
    goals.append(Goal("failed requests", failed if found.has(MESHD) else None, 0))
    return goals


# -- steps ----------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.proxy", description=__doc__)
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds (default {FULL.rounds})")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter: a first look")
    parser.add_argument(
        "--only", type=_fronts, help=f"fronts beside direct, of {','.join(FRONTS[1:])}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "proxy.json", help="where to write")
    return parser.parse_args(argv)


def _fronts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [n for n in names if n not in FRONTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no front is called {', '.join(unknown)}")
    return names


def _start(stable: Stable, work: Path, wanted: list[str]) -> tuple[list[Front], list[Missing]]:
    # Late: only this needs meshd itself, for a file that passes its checks.
    from meshd.cache.builtin import write_model

    weights = work / "bench.gguf"
    write_model(weights)
    bench = Bench(stable, Places(work, weights))
    fronts: list[Front] = []
    missing: list[Missing] = []
    for name in wanted:
        _say(f"starting {name}")
        front = bench.start(name)
        if isinstance(front, Missing):
            _say(f"{name}: {front.reason}")
            missing.append(front)
        else:
            fronts.append(front)
    return fronts, missing


def _measure(fronts: list[Front], sizes: Sizes) -> list[dict[str, dict[str, Figures]]]:
    where = placements()
    rounds: list[dict[str, dict[str, Figures]]] = []
    for number in range(sizes.rounds):
        began = time.monotonic()
        turn = number % len(fronts)
        order = fronts[turn:] + fronts[:turn]
        result: dict[str, dict[str, Figures]] = {front.name: {} for front in fronts}
        for kind in KINDS:
            for front in order:
                result[front.name][kind] = _figures(front, kind, sizes, where)
        rounds.append(result)
        _say(f"round {number + 1} of {sizes.rounds}: {time.monotonic() - began:.0f} s")
    return rounds


def _figures(front: Front, kind: str, sizes: Sizes, where: dict[str, Placement]) -> Figures:
    match kind:
        case "pinned" | "unpinned":
            return sequential(front, sizes, where[kind])
        case "load":
            return throughput(front, sizes, where["apart"])
        case "sse64" | "sse256":
            return streams(front, sizes, where["apart"], int(kind[3:]))
        case _:
            raise AssertionError(kind)


def _write(document: dict[str, object], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    _say(f"written to {out}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- tables ---------------------------------------------------------------------------------------


def _tables(found: Rounds, names: list[str], missing: list[Missing], goals: list[Goal]) -> str:
    parts = [
        f"Medians of {len(found.rounds)} interleaved rounds; added: beyond direct, per round.",
        _requests_table(found, names),
        *(_streams_table(found, names, kind) for kind in ("sse64", "sse256")),
        *([goals_table(goals)] if goals else []),
        *(f"Not measured: {m.name}, {m.reason}." for m in missing),
    ]
    return "\n\n".join(parts)


def _requests_table(found: Rounds, names: list[str]) -> str:
    head = ["requests", "added p50 µs pinned", "p99", "unpinned p50", "p99"]
    head += ["req/s, 64 conns", "of nginx", "CPU µs/req", "core busy"]
    where = ("pinned", "unpinned")
    rows = [
        [
            name,
            *(_latency(found, name, kind, part) for kind in where for part in ("p50", "p99")),
            show(found.value(name, "load", "per_s"), 0),
            show(found.ratio(name, NGINX, "load", "per_s"), 2),
            *_of_process(found, name, "load"),
        ]
        for name in names
    ]
    return table(head, rows)


def _streams_table(found: Rounds, names: list[str], kind: str) -> str:
    head = [f"{kind[3:]} streams × 100/s", "added µs/event p50", "p99", "CPU µs/event", "core busy"]
    head += ["CPU of nginx's", "added TTFT µs", "merged", "lost", "failed", "MB"]
    rows = []
    for name in names:
        base = name == DIRECT
        delay = (found.value if base else found.added)(name, kind, "delay_p50_us")
        tail = (found.value if base else found.added)(name, kind, "delay_p99_us")
        ttft = (found.value if base else found.added)(name, kind, "ttft_p50_us")
        marks = ["(" + show(v, 0) + ")" if base else show(v, 0) for v in (delay, tail, ttft)]
        rows.append([
            name,
            *marks[:2],
            *_of_process(found, name, kind),
            "–" if base else show(found.ratio(name, NGINX, kind, "cpu_us"), 2),
            marks[2],
            *(show(found.total(name, kind, k), 0) for k in ("merged", "lost", "errors")),
            "–" if base else show(found.value(name, kind, "rss_mb"), 0),
        ])  # fmt: skip
    return table(head, rows)


def _latency(found: Rounds, name: str, kind: str, part: str) -> str:
    """Direct's own in brackets, what the others add without."""
    if name == DIRECT:
        return f"({show(found.value(name, kind, f'{part}_us'), 0)})"
    return show(found.added(name, kind, f"{part}_us"), 0)


def _of_process(found: Rounds, name: str, kind: str) -> list[str]:
    if name == DIRECT:
        return ["–", "–"]
    busy = found.value(name, kind, "busy")
    return [show(found.value(name, kind, "cpu_us")), f"{show(busy and 100 * busy, 0)} %"]


if __name__ == "__main__":
    sys.exit(main())
