"""What a request pays for being served by another node.

Two nodes on loopback. The client asks the node whose engine it is (`host`), or a node without one
(`remote`), which relays through an encrypted stream to the first: one hop, the longest there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.chats import chat_status
from bench.compiled import binary
from bench.fronts import SLOTS, Front
from bench.lan import invite_from
from bench.measure import Figures, Placement, Sizes, placements, sequential, streams, throughput
from bench.processes import BenchError, Stable, argv_of, children_of, free_port, wait_for

HOST, REMOTE = "host", "remote"
KINDS = ("one", "load", "sse1", "sse64")
FULL = Sizes(rounds=7, sequential=2000, load_s=2.0, stream_s=3.0)
QUICK = Sizes(rounds=2, sequential=500, load_s=1.0, stream_s=1.5)
START_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Daemon:
    pid: int
    api_port: int
    data_dir: Path


def start(stable: Stable, work: Path) -> tuple[Front, Front]:
    """A host with the mock engine, and a client node of the same mesh."""
    # Late: only this needs meshd itself, for a file that passes its checks.
    from meshd.cache.builtin import write_model

    runtime = work / "mock-engine"
    runtime.mkdir()
    (runtime / "llama-server").symlink_to(binary("mock_engine"))
    weights = work / "bench.gguf"
    write_model(weights)
    model = weights.stem
    host = _daemon(stable, work, HOST, runtime, "--mesh", "hop", "--model", str(weights))
    _wait(stable, HOST, lambda: chat_status(host.api_port, model) == 200)
    token = invite_from(host.data_dir, uses=1)
    remote = _daemon(stable, work, REMOTE, runtime, "--client", "--join", token)
    _wait(stable, REMOTE, lambda: chat_status(remote.api_port, model) == 200)
    engine = next((p for p in children_of(host.pid) if "--alias" in argv_of(p)), None)
    if engine is None:
        raise BenchError("the host serves a model but runs no engine")
    return (
        Front(HOST, host.api_port, model, host.pid, engine, "", (remote.pid,)),
        Front(REMOTE, remote.api_port, model, remote.pid, engine, "", (host.pid,)),
    )


def measure(
    fronts: tuple[Front, Front], sizes: Sizes, say: Callable[[str], None]
) -> list[dict[str, dict[str, Figures]]]:
    """Rounds: both fronts, one kind of measurement after the other, in turns."""
    where = placements()["unpinned"]
    rounds: list[dict[str, dict[str, Figures]]] = []
    for number in range(sizes.rounds):
        order = fronts if number % 2 == 0 else fronts[::-1]
        result: dict[str, dict[str, Figures]] = {front.name: {} for front in fronts}
        for kind in KINDS:
            for front in order:
                result[front.name][kind] = _figures(front, kind, sizes, where)
        rounds.append(result)
        say(f"hop: round {number + 1} of {sizes.rounds}")
    return rounds


def _figures(front: Front, kind: str, sizes: Sizes, where: Placement) -> Figures:
    match kind:
        case "one":
            return sequential(front, sizes, where)
        case "load":
            return throughput(front, sizes, where)
        case "sse1" | "sse64":
            return streams(front, sizes, where, int(kind[3:]))
        case _:
            raise AssertionError(kind)


def _daemon(stable: Stable, work: Path, name: str, runtime: Path, *flags: str) -> Daemon:
    port, data_dir = free_port(), work / f"hop-{name}"
    argv = [str(Path(sys.executable).with_name("meshd")), "run", "--name", name]
    argv += ["--runtime-dir", str(runtime), "--data-dir", str(data_dir)]
    argv += ["--listen", f"127.0.0.1:{port}", "--peer-listen", f"127.0.0.1:{free_port()}"]
    argv += ["--no-mdns", "--log-level", "warning", *flags]
    settings = {"MESHD_ENGINE__PARALLEL": str(SLOTS), "XDG_CACHE_HOME": str(work / "cache")}
    return Daemon(stable.start(f"hop-{name}", argv, env=settings).pid, port, data_dir)


def _wait(stable: Stable, name: str, done: Callable[[], bool]) -> None:
    try:
        wait_for(done, limit_s=START_LIMIT_S, what="a chat is answered 200", step_s=0.1)
    except BenchError as error:
        raise BenchError(f"{name}: {error}\n{stable.log_of(f'hop-{name}')}") from None
