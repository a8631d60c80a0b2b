"""Weights of a split's workers, sent by the host or fetched from others:
`python -m bench.push_or_fetch`.

A generated model of 418 MB, a file for each tensor, on a host; two workers in network namespaces
have none of it, and one or two more nodes hold it. Every node sends at a bounded rate. A round:
fresh nodes with empty caches load the same tensors from one local file, which the host has to send;
by that it knows the rate of its line; and then the set, whose shards workers may fetch. Prints a
table and writes bench/results/push_or_fetch.json. Needs root for the namespaces, and an engine
(`make engine`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.figures import show, table
from bench.lan import network
from bench.processes import BenchError
from meshd import config
from meshd.errors import MeshdError
from meshd.runtime.registry import Registry
from tests.hub import LocalHub
from tests.mesh.disks import Disk
from tests.mesh.nodes import Lan, MeshNode
from tests.mesh.splitting import CAPPED, MODEL, load, logged, metric, sent, tidy
from tests.models import split_model, wide_model

RESULTS = Path(__file__).with_name("results")
REPO = "owner/wide-3x2304-GGUF"
REF = f"{REPO}:F16"
HOST, WORKERS, HOLDERS = "a", ("b", "c"), ("d", "e")
COUNTS = (1, 2)
"""Of holders."""
TENSORS_PER_SHARD = 1
KNOWN_LIMIT_S, GONE_LIMIT_S = 10.0, 10.0
LOADED = f"{MODEL} is loaded: "


@dataclass(frozen=True, slots=True)
class Loaded:
    """One first load."""

    seconds: float
    """From the order until the model is ready."""
    sent_bytes: int
    """By the host through its tunnels."""
    fetched_bytes: int
    """By both workers, before."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both ways, by the same nodes."""

    push: Loaded
    fetch: Loaded
    load_1min: float
    """The machine's, before."""


Round = Mapping[int, Pair]
"""By the number of holders."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="pf-"))
    about = machine.describe()
    try:
        engine = Registry(config.load().config.cache_dir).find(None)
        engine_dir = Path(engine.server_path).parent
        with _hub(work, engine_dir) as hub:
            for name in (HOST, *HOLDERS):
                Disk(work / "disks" / name, hub, REPO).fill(REF)
            rounds = []
            for number in range(options.rounds):
                counts = COUNTS if number % 2 else COUNTS[::-1]
                rounds.append({n: _pair(n, options.rate, work, hub, engine_dir) for n in counts})
                _say(f"round {number + 1} of {options.rounds}: {rounds[-1]}")
    except (BenchError, MeshdError) as error:
        print(f"bench.push_or_fetch: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(tables(rounds))
    document = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": about,
        "versions": machine.versions("meshd", "uvloop", "cryptography"),
        "engine": engine.id,
        "rate": options.rate,
        "rounds": [{str(n): asdict(pair) for n, pair in each.items()} for each in rounds],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    _say(f"written to {options.out}")
    return 0


def tables(rounds: Sequence[Round]) -> str:
    head = [f"first loads, n = {len(rounds)} each", "least s", "median s", "most s", "of the push"]
    head += ["MB sent by the host", "MB fetched before"]
    rows = []
    for count in COUNTS:
        pairs = [each[count] for each in rounds]
        ratio = median(pair.fetch.seconds / pair.push.seconds for pair in pairs)
        holders = "1 holder" if count == 1 else f"{count} holders"
        rows.append(_row(f"push, beside {holders}", [p.push for p in pairs], None))
        rows.append(_row(f"fetch from {holders} and the host", [p.fetch for p in pairs], ratio))
    return table(head, rows)


def _row(name: str, loads: Sequence[Loaded], ratio: float | None) -> list[str]:
    seconds = [each.seconds for each in loads]
    return [
        name,
        *(show(s, 1) for s in (min(seconds), median(seconds), max(seconds))),
        show(ratio, 2),
        show(median(each.sent_bytes for each in loads) / 1e6),
        show(median(each.fetched_bytes for each in loads) / 1e6),
    ]


@contextmanager
def _hub(work: Path, engine_dir: Path) -> Iterator[LocalHub]:
    """Has the model, and no node reaches it."""
    copy = work / "made" / wide_model().name
    copy.parent.mkdir()
    shutil.copy(wide_model(), copy)
    shards = split_model(copy, engine_dir, tensors_per_shard=TENSORS_PER_SHARD)
    with LocalHub() as hub:
        hub.add(REPO, {path.name: path for path in shards})
        yield hub


def _pair(holders: int, rate: str, work: Path, hub: LocalHub, engine_dir: Path) -> Pair:
    """By fresh nodes; those that hold the model keep their caches. Raises BenchError."""
    base = Path(tempfile.mkdtemp(dir=work))
    load_1min = round(os.getloadavg()[0], 2)
    with network() as made:
        lan = Lan(made, base, [], engine_dir)
        try:
            nodes = _mesh(HOLDERS[:holders], work, base, hub, lan)
            for node in nodes.values():
                node.host.slow_down(rate)
            push = _timed(lan, nodes, str(wide_model()))
            nodes[HOST].unload(MODEL)
            lan.until(lambda: tidy(None, nodes.values()), timeout_s=GONE_LIMIT_S, what="its end")
            return Pair(push, _timed(lan, nodes, REF), load_1min)
        finally:
            lan.close()
            shutil.rmtree(base, ignore_errors=True)


def _mesh(
    holders: Sequence[str], work: Path, base: Path, hub: LocalHub, lan: Lan
) -> dict[str, MeshNode]:
    """Returns when each sees all, and those who hold the model know that others do too."""
    disks = {name: Disk(work / "disks" / name, hub, REPO) for name in (HOST, *HOLDERS)}
    disks |= {name: Disk(base / f"disk-{name}", hub, REPO) for name in WORKERS}
    founder = lan.node(HOST, "--mesh", "home", *CAPPED, **disks[HOST].environ).start()
    nodes, token = {HOST: founder}, founder.invite(uses=4)
    for name in (*WORKERS, *holders):
        more = {"MESHD_ENGINE__LEND": "false"} if name in holders else {}
        environ = {**disks[name].environ, **more}
        nodes[name] = lan.node(name, "--join", token, *CAPPED, **environ).start()
    lan.wait_whole(*nodes.values())
    lan.until(
        lambda: all(_elsewhere(nodes[name]) for name in (HOST, *holders)),
        timeout_s=KNOWN_LIMIT_S,
        what="others hold it too",
    )
    return nodes


def _timed(lan: Lan, nodes: Mapping[str, MeshNode], ref: str) -> Loaded:
    host = nodes[HOST]
    sent_before, fetched_before = sum(sent(host).values()), _fetched(nodes)
    loads = len(logged(host, LOADED))
    began = time.monotonic()
    load(host, ref, "--host", HOST)
    seconds = time.monotonic() - began
    lan.until(
        lambda: len(logged(host, LOADED)) > loads, timeout_s=KNOWN_LIMIT_S, what="what was sent"
    )
    return Loaded(seconds, sum(sent(host).values()) - sent_before, _fetched(nodes) - fetched_before)


def _fetched(nodes: Mapping[str, MeshNode]) -> int:
    return round(sum(metric(nodes[name], "meshd_shards_fetched_bytes_total") for name in WORKERS))


def _elsewhere(node: MeshNode) -> bool:
    done = node.meshd("cache", "ls", "--json")
    sets: list[dict[str, Any]] = json.loads(done.stdout)["sets"] if done.returncode == 0 else []
    return any(one["elsewhere"] for one in sets)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.push_or_fetch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--rate", default="100mbit", help="of each host, as tc writes it")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "push_or_fetch.json", help="(default bench/results)"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
