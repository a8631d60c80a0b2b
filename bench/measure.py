"""One measurement: the client's report, and what the proxy's process spent meanwhile.

Placements. *pinned*: client, proxy and engine on one core. Whether a process that is woken finds
its core awake is a lottery of tens of microseconds, more than a proxy costs; on one core nobody
sleeps before the answer is there. *apart*: the proxy has a core of its own, so that CPU time and
throughput are those of one full core. *unpinned*: where the scheduler puts them, as in real life.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from bench.compiled import binary
from bench.fronts import Front
from bench.processes import (
    BenchError,
    cpu_s,
    end,
    machine_cpu_s,
    own_cpu_s,
    place,
    placed_here,
    rss_bytes,
)

POLL_S = 0.05
QUIET_SHARE = 0.2
"""A proxy that uses less of a core than this has finished with the measurement before."""
QUIET_LIMIT_S = 15.0

PEACE = 0.05
"""Share of a core that others may use during a measurement. A few percent more, at the wrong
moment, hold a proxy up for longer than the 10 ms between two events of a stream."""
ATTEMPTS = 3
ATTEMPT_PAUSE_S = 1.0

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Placement:
    proxy: frozenset[int]
    client: frozenset[int]
    engine: frozenset[int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; all bounded by time as well."""

    rounds: int
    sequential: int
    """Requests one after the other."""
    load_s: float
    """Length of the measurement at 64 connections."""
    stream_s: float
    """Length of a stream."""


FULL = Sizes(rounds=7, sequential=3000, load_s=2.0, stream_s=3.0)
QUICK = Sizes(rounds=3, sequential=1000, load_s=1.0, stream_s=1.5)

SEQUENTIAL_LIMIT_S = 4.0
WARM_UP = 100
CONNECTIONS = 64
EVENT_RATE_HZ = 100


def placements() -> dict[str, Placement]:
    """For the cores this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    everywhere = frozenset(cores)
    last = frozenset(cores[-1:])
    # The first core is where interrupts tend to go; the proxy gets the last one.
    before = cores[:-1] or cores
    engine, client = frozenset(before[-1:]), frozenset(before[-2:-1] or before[-1:])
    return {
        "pinned": Placement(last, last, last),
        "apart": Placement(last, client, engine),
        "unpinned": Placement(everywhere, everywhere, everywhere),
    }


def sequential(front: Front, sizes: Sizes, placement: Placement) -> Figures:
    """Latency of requests on one connection, µs."""
    report, spent = _run(front, placement, [
        *("requests", "--body", _body(front), "--count", str(sizes.sequential)),
        *("--warmup", str(WARM_UP), "--max-s", str(SEQUENTIAL_LIMIT_S)),
    ])  # fmt: skip
    latency = report["latency_us"]
    if not latency["n"]:
        raise BenchError(f"{front.name} answered nothing within {SEQUENTIAL_LIMIT_S:g} s: {report}")
    return {
        "p50_us": latency["p50"],
        "p99_us": latency["p99"],
        "n": latency["n"],
        "foreign": spent.foreign,
        "errors": report["errors"],
    }


def throughput(front: Front, sizes: Sizes, placement: Placement) -> Figures:
    """A closed loop of 64 connections."""
    report, spent = _run(front, placement, [
        *("requests", "--body", _body(front), "--connections", str(CONNECTIONS)),
        *("--count", str(10**9), "--warmup", str(CONNECTIONS), "--max-s", str(sizes.load_s)),
    ])  # fmt: skip
    answered = max(1, report["answered"])
    return {
        "per_s": report["per_s"],
        "cpu_us": 1e6 * spent.cpu_s / answered,
        "busy": spent.cpu_s / spent.elapsed_s,
        "foreign": spent.foreign,
        "p50_us": report["latency_us"].get("p50", 0.0),
        "p99_us": report["latency_us"].get("p99", 0.0),
        "errors": report["errors"],
    }


def streams(front: Front, sizes: Sizes, placement: Placement, count: int) -> Figures:
    """`count` streams at once, 100 events/s each."""
    events = round(sizes.stream_s * EVENT_RATE_HZ)
    body = _body(front, stream=True, n_events=events, rate_hz=EVENT_RATE_HZ)
    # Twice the time, for a proxy that does not keep up; what is missing then counts as lost.
    limit_s = 2 * sizes.stream_s + 2
    report, spent = _run(front, placement, [
        *("streams", "--body", body, "--connections", str(count), "--events", str(events)),
        *("--max-s", str(limit_s)),
    ])  # fmt: skip
    return {
        "delay_p50_us": report["delay_us"].get("p50", 0.0),
        "delay_p99_us": report["delay_us"].get("p99", 0.0),
        "ttft_p50_us": report["ttft_us"].get("p50", 0.0),
        "ttft_p99_us": report["ttft_us"].get("p99", 0.0),
        "cpu_us": 1e6 * spent.cpu_s / max(1, report["events"]),
        "busy": spent.cpu_s / spent.elapsed_s,
        "foreign": spent.foreign,
        "events": report["events"],
        "lost": report["lost"],
        "merged": report["merged"],
        "disordered": report["disordered"],
        "errors": report["errors"],
        "rss_mb": spent.rss_bytes / 1e6,
    }


@dataclass(frozen=True, slots=True)
class _Spent:
    """Of the time from the client's start to its end."""

    elapsed_s: float
    cpu_s: float
    """The proxy's."""
    rss_bytes: int
    """The proxy's largest seen."""
    foreign: float
    """Cores taken by what does not belong to the benchmark."""


def _run(front: Front, placement: Placement, arguments: list[str]) -> tuple[Any, _Spent]:
    """The client's report and what was spent. A measurement that others disturbed is done again;
    if none was left in peace, the least disturbed one counts. Which one does not depend on what
    it found."""
    attempts: list[tuple[Any, _Spent]] = []
    while True:
        attempts.append(_run_once(front, placement, arguments))
        if attempts[-1][1].foreign <= PEACE or len(attempts) == ATTEMPTS:
            return min(attempts, key=lambda attempt: attempt[1].foreign)
        time.sleep(ATTEMPT_PAUSE_S)


def _run_once(front: Front, placement: Placement, arguments: list[str]) -> tuple[Any, _Spent]:
    pid = front.proxy_pid
    if pid is not None:
        place(pid, placement.proxy)
        _wait_quiet(pid)
    for other in front.other_pids:
        place(other, placement.proxy)
    place(front.engine_pid, placement.engine)
    before, began = _clocks(front), time.monotonic()
    output, largest = _client(front, placement, arguments)
    elapsed_s = time.monotonic() - began
    proxy_s, ours_s, all_s = (b - a for a, b in zip(before, _clocks(front), strict=True))
    foreign = max(0.0, all_s - ours_s) / elapsed_s
    return json.loads(output), _Spent(elapsed_s, proxy_s, largest, foreign)


def _client(front: Front, placement: Placement, arguments: list[str]) -> tuple[str, int]:
    """What the client printed, and the proxy's largest size meanwhile."""
    argv = [str(binary("load")), *arguments, "--port", str(front.port)]
    with placed_here(placement.client):
        client = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    largest = 0
    try:
        while client.poll() is None:
            if front.proxy_pid is not None:
                largest = max(largest, rss_bytes(front.proxy_pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(POLL_S)
        output, problem = client.communicate()
    finally:
        end(client)
    if client.returncode:
        raise BenchError(f"the client failed on {front.name}: {problem.decode().strip()}")
    return output.decode(), largest


def _clocks(front: Front) -> tuple[float, float, float]:
    """CPU seconds of the proxy, of everything of the benchmark, of the machine."""
    proxy_s = cpu_s(front.proxy_pid) if front.proxy_pid is not None else 0.0
    behind_s = sum(cpu_s(pid) for pid in (front.engine_pid, *front.other_pids))
    return proxy_s, proxy_s + behind_s + own_cpu_s(), machine_cpu_s()


def _wait_quiet(pid: int) -> None:
    """Until a proxy has worked off what it was sent before."""
    deadline = time.monotonic() + QUIET_LIMIT_S
    while time.monotonic() < deadline:
        before = cpu_s(pid)
        time.sleep(POLL_S)
        if cpu_s(pid) - before <= QUIET_SHARE * POLL_S:
            return


def _body(front: Front, **extra: object) -> str:
    """A chat of the size of a short real one."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
        {"role": "user", "content": "What does a proxy cost, and how would one know?"},
    ]
    request = {"model": front.model, "messages": messages, "temperature": 0.7, "max_tokens": 256}
    return json.dumps({**request, **extra})
