"""How soon a model is served again after its host was killed: `python -m bench.failover`.

Three nodes on a LAN of network namespaces, each with the weights on its disk; one of them hosts the
built-in model, and a client asks another one all the time. The host's daemon is killed, the next
node takes over, the killed one comes back as a standby: that is a round. Prints a table and writes
bench/results/failover.json. Needs root for the namespaces, and an engine (`make engine`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from bench import machine
from bench.figures import Goal, goals_table, show, table
from bench.lan import network
from bench.mesh import p95
from bench.processes import BenchError, Stable
from bench.replacing import NAMES, Replacing, Times
from meshd import config
from meshd.errors import MeshdError
from meshd.runtime.registry import Registry

RESULTS = Path(__file__).with_name("results")
DISTURBED = 0.5
"""Cores that others had during a round, from where on it is called disturbed. The end of the killed
node and of its engine, some 0.1 to 0.3 of them, cannot be told from others."""

_ROWS = {
    "detect_s": "SIGKILL → the next host knows",
    "claim_s": "→ it has claimed the model",
    "verify_s": "→ weights verified, engine started",
    "load_s": "→ weights loaded, engine tried",
    "first_token_s": "→ first token at the client",
    "total_s": "SIGKILL → first token at the client",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="fb-"))
    about = machine.describe()
    rounds: list[Times] = []
    try:
        engine = Registry(config.load().config.cache_dir).find(None)
        with Stable(work) as stable, network() as lan:
            mesh = Replacing(stable, lan, work, Path(engine.server_path).parent)
            mesh.begin()
            for number in range(options.rounds):
                rounds.append(mesh.round())
                print(f"{number + 1} of {options.rounds}: {rounds[-1]}", file=sys.stderr)
    except (BenchError, MeshdError) as error:
        print(f"bench.failover: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    goals = goals_of(rounds)
    disturbed = sum(times.foreign > DISTURBED for times in rounds)
    print(
        f"{len(NAMES)} nodes, {len(rounds)} hosts killed, disturbed by others: {disturbed} times."
    )
    print(f"\n{times_table(rounds)}\n\n{goals_table(goals)}")
    document = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": about,
        "versions": machine.versions("meshd", "aiohttp", "uvloop", "cryptography"),
        "engine": engine.id,
        "n": len(rounds),
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in goals],
        "rounds": [asdict(times) for times in rounds],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {options.out}", file=sys.stderr)
    return 0


def goals_of(rounds: Sequence[Times]) -> list[Goal]:
    """What was to be reached; the longest of all rounds counts."""
    return [
        Goal("kill to first token, most", max(t.total_s for t in rounds), 4, unit=" s"),
        Goal("kill to detected, most", max(t.detect_s for t in rounds), 1.5, unit=" s"),
    ]


def times_table(rounds: Sequence[Times]) -> str:
    rows = []
    for field, name in _ROWS.items():
        values = sorted(getattr(times, field) for times in rounds)
        figures = (values[0], median(values), p95(values), values[-1])
        rows.append([name, *(show(v, 3) for v in figures)])
    return table(["seconds", "least", "median", "p95", "most"], rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.failover", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="hosts killed (default 30)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "failover.json", help="(default bench/results)"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
