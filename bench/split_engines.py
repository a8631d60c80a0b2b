"""Stock engines for the benchmark of splits: one alone, and one over RPC servers of others."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Protocol

from bench.chats import get_status, greedy
from bench.processes import BenchError, Stable
from tests.mesh.network import Host

CONTEXT = 2048
THREADS = 1
"""Of each engine and RPC server: they take turns, but threads that wait for each other spin, and
several sets of them on few cores hold each other up."""
PROMPT_TOKENS, TOKENS = 512, 64
FIRST_TOKEN, LAST_TOKEN = 3, 353
"""Of the vocabulary of generated models, less what begins and ends a text."""
LOAD_LIMIT_S = 120.0
FIRST_PORT = 50061
POLL_S = 0.01

_LISTENS = frozenset({"--host", "--port", "--alias"})
_SPREADS = frozenset({"--device", "--n-gpu-layers", "--split-mode", "--tensor-split", "--fit"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """How engines are started, alone or split, and RPC servers for them."""

    engine: tuple[str, ...]
    """Without where it listens, and without what spreads it."""
    spread: tuple[str, ...]
    """What spreads it, beside the servers' addresses."""
    rpc_server: tuple[str, ...]
    """Without where it listens and without its cache."""


def plain_recipe(engine_dir: Path, weights: Path) -> Recipe:
    """One layer in the host's memory and one on the first server; the rest on the second."""
    engine = [str(engine_dir / "llama-server"), "--model", str(weights)]
    engine += ["--ctx-size", str(CONTEXT), "--parallel", "1", "--threads", str(THREADS)]
    engine += ["--no-webui", "--offline"]
    spread = ["--n-gpu-layers", "3", "--split-mode", "layer", "--tensor-split", "1,2"]
    rpc_server = [str(engine_dir / "ggml-rpc-server"), "-t", str(THREADS)]
    return Recipe(tuple(engine), (*spread, "--fit", "off"), tuple(rpc_server))


def recipe_of(engine: Sequence[str], rpc_server: Sequence[str]) -> Recipe:
    """As these command lines of a node's processes say."""
    return Recipe(
        _without(engine, _LISTENS | _SPREADS | {"--rpc"}),
        tuple(w for n, word in enumerate(engine) if word in _SPREADS for w in engine[n : n + 2]),
        _without([word for word in rpc_server if word != "-c"], {"-H", "-p"}),
    )


def _without(argv: Sequence[str], flags: Collection[str]) -> tuple[str, ...]:
    """`argv` less these flags and the one argument of each."""
    before = ("", *argv)
    return tuple(w for w, b in zip(argv, before, strict=False) if not {w, b} & set(flags))


class Inside(Protocol):
    """Where processes are started: a host, or this machine."""

    def inside(self) -> AbstractContextManager[None]: ...


Lender = tuple[Inside, str]
"""Where an RPC server runs, and the address it listens on there."""


@dataclass(frozen=True, slots=True)
class Engine:
    where: Path
    """Its socket."""
    load_s: float
    """From the start of its process to its being ready; RPC servers run by then."""
    processes: tuple[Popen[bytes], ...]
    """Its own, then its RPC servers'."""


class Engines:
    """Starts them."""

    def __init__(self, stable: Stable, work: Path, recipe: Recipe) -> None:
        self._stable = stable
        self._work = work
        self._recipe = recipe

    def start(self, way: str, host: Inside, *lenders: Lender) -> Engine:
        """A loaded engine on `host`, over RPC servers if there are `lenders`. Their tensor caches
        are those of the last time that `way` was started, unless they were forgotten."""
        servers = [self._lend(way, n, *lender) for n, lender in enumerate(lenders)]
        where = self._work / f"{way}.sock"
        where.unlink(missing_ok=True)
        argv = [*self._recipe.engine, "--host", str(where)]
        if lenders:
            ends = ",".join(f"{address}:{_port(n)}" for n, (_, address) in enumerate(lenders))
            argv += ["--rpc", ends, *self._recipe.spread]
        began = time.monotonic()
        with host.inside():
            child = self._stable.start(way, argv)
        self._until(way, child, lambda: get_status(where, "/health") == 200)
        return Engine(where, time.monotonic() - began, (child, *servers))

    def end(self, engine: Engine) -> None:
        for child in engine.processes:
            self._stable.end(child)

    def forget_tensors(self, way: str) -> None:
        for cache in self._work.glob(f"{way}-*-tensors"):
            shutil.rmtree(cache)

    def _lend(self, way: str, number: int, host: Inside, address: str) -> Popen[bytes]:
        name, port = f"{way}-{number}", _port(number)
        argv = [*self._recipe.rpc_server, "-H", address, "-p", str(port), "-c"]
        cache = self._work / f"{name}-tensors"
        with host.inside():
            environ = {"LLAMA_CACHE": str(cache), "GGML_RPC_NO_RDMA": "1"}
            child = self._stable.start(name, argv, env=environ)
            self._until(name, child, lambda: _accepts(address, port))
        return child

    def _until(self, name: str, child: Popen[bytes], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LOAD_LIMIT_S
        while not condition():
            if child.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{name} does not get ready\n{self._stable.log_of(name)}")
            time.sleep(POLL_S)


def _port(number: int) -> int:
    """Of an RPC server; nothing else on these hosts has a fixed one there."""
    return FIRST_PORT + number


# -- what is measured -----------------------------------------------------------------------------


def speeds(where: Path, number: int) -> tuple[dict[str, float], list[int]]:
    """Tokens a second, by the engine's own account, of the `number`th prompt and of what it says;
    and what that is. Raises BenchError if it does not answer."""
    drawn = random.Random(number)
    prompt = [drawn.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(PROMPT_TOKENS)]
    said = greedy(where, prompt, TOKENS)
    if said is None or len(said["tokens"]) != TOKENS:
        raise BenchError(f"no answer from {where}")
    timings = said["timings"]
    figures = {
        "prompt_tok_s": round(timings["prompt_per_second"], 3),
        "generated_tok_s": round(timings["predicted_per_second"], 3),
    }
    return figures, said["tokens"]


def received_bytes(*hosts: Host) -> int:
    """What came to these hosts over their wires so far."""
    return sum(map(_received, hosts))


def _received(host: Host) -> int:
    with host.inside():
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("eth0:"))
    return int(line.partition(":")[2].split()[0])


def _accepts(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False
