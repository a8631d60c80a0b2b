"""Weights from node to node: `python -m bench.cache_peers`.

Two daemons on two hosts of a LAN of namespaces. A set goes from one to the other, in turns: through
the carrier to a reader that hashes chunks, with TLS; by the daemon's fetch child, which also hashes
the files whole and lands them; and by `cat | nc` over the same wire, with neither. Then a chat is
relayed between the two daemons, alone and while the set is fetched, and the delay of its events is
measured. Needs root.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.figures import Goal, goals_table, show, table
from bench.lan import network
from bench.peer_wire import SHARDS, Transfer, Wire, chat
from bench.processes import BenchError, Stable

RESULTS = Path(__file__).with_name("results") / "cache_peers.json"
MEMORY = Path("/dev/shm")
ROUNDS = 7
TOTAL_BYTES = 2 << 30
STREAMS = 4
SHARE = 0.7
DELAY_LIMIT_MS = 10.0
EVENT_RATE_HZ = 100
ALONE_S, MEANWHILE_S = 5.0, 15.0


@dataclass(frozen=True, slots=True)
class Chat:
    """Events of one relayed stream, each timed against its schedule."""

    events: int
    lost: int
    delay_p50_ms: float
    delay_p99_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cache_peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--mib", type=int, default=TOTAL_BYTES >> 20, help="size of the set")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    try:
        found = measure(
            rounds=options.rounds, total_bytes=options.mib << 20, streams=options.streams
        )
    except BenchError as error:
        print(f"bench.cache_peers: {error}", file=sys.stderr)
        return 1
    print(tables(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(
    *, rounds: int = ROUNDS, total_bytes: int = TOTAL_BYTES, streams: int = STREAMS
) -> dict[str, Any]:
    """Everything, as JSON. Raises BenchError."""
    work = Path(tempfile.mkdtemp(prefix="mp-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        with Stable(work) as stable, network() as lan:
            wire = Wire(stable, work, lan.add("here"), lan.add("there"), total_bytes)
            turns = [_turn(wire, number, streams) for number in range(rounds)]
            alone, meanwhile = _chats(wire, streams)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shares = {
        way: median(turn[way].mb_per_s / turn["nc"].mb_per_s for turn in turns)
        for way in Wire.WAYS
        if way != "nc"
    }
    goals = [
        *(
            Goal(f"{way} beside nc, median", share, SHARE, at_least=True)
            for way, share in shares.items()
        ),
        Goal("event delay meanwhile, p99", meanwhile.delay_p99_ms, DELAY_LIMIT_MS, unit=" ms"),
        Goal("events lost meanwhile", meanwhile.lost, 0),
    ]
    return {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine.describe(),
        "versions": machine.versions("meshd", "uvloop"),
        "bytes": total_bytes,
        "files": SHARDS,
        "streams": streams,
        "turns": [{way: asdict(one) for way, one in turn.items()} for turn in turns],
        "shares_of_nc": shares,
        "chat": {"alone": asdict(alone), "meanwhile": asdict(meanwhile)},
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in goals],
    }


def tables(found: dict[str, Any]) -> str:
    """For people, of what `measure` found."""
    turns = found["turns"]
    head = f"{found['bytes'] >> 20} MiB in {found['files']} files, {found['streams']} streams"
    rows = [
        [
            f"{way}, {words}",
            *(show(of(turn[way][figure] for turn in turns), digits) for of in (min, median, max)),
        ]
        for figure, words, digits in (("mb_per_s", "MB/s", 0), ("cores", "cores busy", 2))
        for way in Wire.WAYS
    ]
    chats = [
        [name, show(one["delay_p50_ms"], 2), show(one["delay_p99_ms"], 2), str(one["lost"])]
        for name, one in found["chat"].items()
    ]
    goals = [Goal(**{k: v for k, v in goal.items() if k != "verdict"}) for goal in found["goals"]]
    return "\n\n".join(
        [
            table([head, "least", "median", "most"], rows),
            table(["events of a relayed chat, ms", "p50", "p99", "lost"], chats),
            goals_table(goals),
        ]
    )


# -- parts ----------------------------------------------------------------------------------------


def _turn(wire: Wire, number: int, streams: int) -> dict[str, Transfer]:
    """Each way once; who begins changes."""
    start = number % len(Wire.WAYS)
    order = (*Wire.WAYS[start:], *Wire.WAYS[:start])
    turn = {way: wire.transfer(way, streams) for way in order}
    _say(f"turn {number + 1}: " + ", ".join(f"{w} {t.mb_per_s:.0f} MB/s" for w, t in turn.items()))
    return turn


def _chats(wire: Wire, streams: int) -> tuple[Chat, Chat]:
    """A relayed stream alone, and while the set is fetched again and again."""
    alone = _chat(wire, ALONE_S)
    _say(f"chat alone: {alone}")
    found: list[Chat] = []
    done = threading.Event()

    def talk() -> None:
        try:
            found.append(_chat(wire, MEANWHILE_S))
        finally:
            done.set()

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        while not done.is_set():
            _say(f"meanwhile: {wire.transfer('fetch', streams).mb_per_s:.0f} MB/s")
    finally:
        talking.join()
    if not found:
        raise BenchError("the chat ended early")
    _say(f"chat meanwhile: {found[0]}")
    return alone, found[0]


def _chat(wire: Wire, seconds: float) -> Chat:
    report = chat(wire.there, wire.model, seconds=seconds, rate_hz=EVENT_RATE_HZ)
    delay = report["delay_us"]
    return Chat(
        report["events"],
        report["lost"],
        round(delay.get("p50", 0.0) / 1e3, 3),
        round(delay.get("p99", 0.0) / 1e3, 3),
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
