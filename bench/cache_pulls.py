"""A pull by meshd's fetch child beside `hf download`, from the same hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.cache_calm import calmest
from bench.processes import STOP_LIMIT_S, BenchError, end

PULLERS = ("hf", "meshd")
FILES = 8
REPO = "bench/model"


@dataclass(frozen=True, slots=True)
class Pulling:
    """One round: both, one after the other, each into an empty cache."""

    seconds: dict[str, float]
    """From the start of the process to its end."""
    cpu_s: dict[str, float]
    """Without the hub's."""
    foreign: dict[str, float]
    """Cores taken meanwhile by what does not belong to the benchmark."""


def pull_rounds(work: Path, size: int, rounds: int, say: Callable[[str], None]) -> list[Pulling]:
    # Late: it brings numpy.
    from tests.cache.sets import write_set

    served = work / "served"
    write_set(served, *[size // FILES // 4 * 4] * FILES)
    with _hub(served) as (hub, endpoint):
        found = []
        for number in range(rounds):
            order = PULLERS if number % 2 == 0 else PULLERS[::-1]
            found.append(_round(work, hub, endpoint, order))
            say(f"pulls: round {number + 1} of {rounds}: {found[-1].seconds}")
        return found


def _round(work: Path, hub: int, endpoint: str, order: tuple[str, ...]) -> Pulling:
    home = work / "home"

    def clear() -> None:
        shutil.rmtree(home, ignore_errors=True)
        os.sync()  # what the one before left to be written is not this one's

    timed = {
        name: calmest(
            partial(_PULL[name], home, _environment(home, endpoint)), before=clear, helper=hub
        )
        for name in order
    }
    clear()
    return Pulling(
        {name: one.seconds for name, one in timed.items()},
        {name: one.cpu_s for name, one in timed.items()},
        {name: one.foreign for name, one in timed.items()},
    )


def _hf(home: Path, environment: dict[str, str]) -> None:
    del home  # it is in the environment
    hf = Path(sys.executable).with_name("hf")
    _run([str(hf), "download", REPO], environment, b"")


def _meshd(home: Path, environment: dict[str, str]) -> None:
    order = {
        "ref": REPO,
        "hub_dir": str(home / "hub"),
        "state_dir": str(home / "meshd"),
        "builtin_dir": str(home / "builtin"),
    }
    line = json.dumps(order).encode() + b"\n"
    _run([sys.executable, "-m", "meshd.fetcher"], environment, line)


_PULL: dict[str, Callable[[Path, dict[str, str]], None]] = {"hf": _hf, "meshd": _meshd}


def _run(argv: list[str], environment: dict[str, str], given: bytes) -> None:
    done = subprocess.run(argv, env=environment, input=given, capture_output=True)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).decode(errors="replace")[-1000:]
        raise BenchError(f"{' '.join(argv[:3])} ended with {done.returncode}: {said}")


def _environment(home: Path, endpoint: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MESHD_"))}
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    }


@contextmanager
def _hub(served: Path) -> Iterator[tuple[int, str]]:
    """The tests' hub in a process of its own: pid and endpoint."""
    hub = subprocess.Popen(
        [sys.executable, "-m", "tests.hub", REPO, str(served)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert hub.stdin is not None
    assert hub.stdout is not None
    try:
        endpoint = hub.stdout.readline().decode().strip()
        if not endpoint:
            raise BenchError("the local hub does not start")
        yield hub.pid, endpoint
        hub.stdin.close()  # which ends it
        hub.wait(STOP_LIMIT_S)
    finally:
        end(hub)
