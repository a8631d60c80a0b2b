"""Plans over workers against what a real llama-server with RPC servers says it put where."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from meshd.cache.gguf_header import parse_header
from meshd.cache.shape import shape_of
from meshd.election.fit import HOST, Budget, Estimate, LayerNeed, WorkerMemory, estimate, split_fit
from meshd.election.fit.rows import WORKER_MARGIN
from meshd.ids import InstanceId, ModelId, NodeId
from meshd.runtime.launch import LaunchSpec, on_workers, server_argv
from meshd.runtime.reported import MemoryHeard, MemoryReport
from meshd.view import Lendable, SplitPlan
from tests.conftest import wait_until
from tests.shapes import Recipe, write_shape

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MIB = 1 << 20
TOLERANCE = 0.10
CONTEXT, SLOTS = 4096, 2
SOCKET = "e.sock"

LLAMA = Recipe("llama", kv_heads=4, layers=10, vocabulary=8000)
WINDOWS = Recipe(
    "gemma3", 9, kv_heads=2, head=128, window=512, feed_forward=1024, tied=True
)  # fmt: skip
"""Layers differ, and the output layer is the embedding."""


@dataclass(frozen=True)
class Case:
    recipe: Recipe
    host: int
    """MiB free of the host's main memory."""
    workers: tuple[int, ...]
    """MiB each lends."""
    beside: int
    layers: tuple[int, ...]
    """On each worker, and on the host's accelerator."""
    own: int | None = None
    """MiB free of an accelerator of the host."""
    speeds: tuple[int | None, ...] = ()
    """Of main memory, of the host and of each worker; none is known if there are none."""


CASES = {
    "layers beside": Case(LLAMA, 200, (220, 260), 4, (2, 4)),
    "no layers beside": Case(LLAMA, 98, (230, 260), 0, (4, 6)),
    "one layer on a worker": Case(LLAMA, 98, (180, 400), 0, (1, 9)),
    "one worker": Case(LLAMA, 98, (500,), 0, (10,)),
    "one worker and layers beside": Case(LLAMA, 200, (300,), 4, (6,)),
    "an accelerator of the host": Case(LLAMA, 98, (250,), 0, (5, 5), own=180),
    "uneven layers beside": Case(WINDOWS, 180, (220, 220), 4, (2, 3)),
    "uneven layers": Case(WINDOWS, 94, (200, 300), 0, (2, 7)),
    "a fast worker is full": Case(LLAMA, 98, (260, 280), 0, (7, 3), speeds=(9, 50, 9)),
    "a fast worker is enough": Case(LLAMA, 200, (220, 400), 0, (10,), speeds=(9, 9, 50)),
    "a fast host is full": Case(LLAMA, 180, (280,), 6, (4,), speeds=(50, 9)),
    "uneven layers, one worker full": Case(WINDOWS, 94, (200, 300), 0, (5, 4), speeds=(9, 50, 9)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_memory_holds_what_was_planned(name: str, short_dir: Path, engine_dir: Path) -> None:
    case = CASES[name]
    weights = write_shape(short_dir / "m.gguf", case.recipe)
    shape = shape_of([parse_header(weights.read_bytes()[: 32 * MIB], weights.stat().st_size)])
    need = estimate(shape, context=CONTEXT, slots=SLOTS)
    plan, memory = _planned(need, case)
    assert (plan.beside, plan.tensor_split[:-1]) == (case.beside, case.layers[:-1])
    assert plan.tensor_split[-1] == case.layers[-1] + 1
    with _rpc_servers(engine_dir, len(plan.tensor_split)) as servers:
        endpoints = tuple(servers)
        spec = LaunchSpec(ModelId("m"), str(weights), CONTEXT, SLOTS)
        with _loaded(engine_dir, on_workers(spec, plan, endpoints), short_dir) as report:
            _ask(short_dir / SOCKET, [5] * 600)
            resident = [psutil.Process(process).memory_info().rss for process in servers.values()]
    assert report.offloaded == (plan.gpu_layers, case.recipe.layers + 1)
    leased = [size for part in plan.parts for _, size in part.memory]
    buffers = [size - WORKER_MARGIN for size in leased]
    buffers += [memory[device] for device, _ in plan.own]
    for endpoint, held, size in zip(
        endpoints, _held(need, plan.beside, case.layers), buffers, strict=True
    ):
        seen = report.devices[f"RPC0[{endpoint}]"]
        assert seen.weights == pytest.approx(held.weights, abs=MIB / 8)
        assert seen.cache == pytest.approx(held.cache, abs=MIB / 16)
        assert seen.total <= size + MIB / 4
        if case.recipe is LLAMA:  # where all layers here have windows it computes with less
            assert seen.total == pytest.approx(size, rel=TOLERANCE)
    assert report.devices[HOST].total == pytest.approx(memory[HOST], rel=TOLERANCE)
    for size, rss in zip(leased, resident, strict=False):
        assert rss <= size


def _held(need: Estimate, beside: int, counts: Sequence[int]) -> list[LayerNeed]:
    """What lies on each device, the output layer on the last one."""
    found = []
    for count in counts:
        row = need.layers[beside : beside + count]
        beside += count
        weights, cache = sum(n.weights for n in row), sum(n.cache for n in row)
        found.append(LayerNeed(weights, cache))
    last = found[-1]
    output = need.output + need.output_copy
    return [*found[:-1], LayerNeed(last.weights + output, last.cache)]


def _planned(need: Estimate, case: Case) -> tuple[SplitPlan, Mapping[str, int]]:
    """The plan, and what is leased on the host."""
    main, *speeds = case.speeds or (None,) * (len(case.workers) + 1)
    own = [Budget(HOST, case.host * MIB, host=True, accelerator=False, bytes_per_s=main)]
    if case.own is not None:  # a second RPC server stands for it
        own.append(Budget("RPC1", case.own * MIB, host=False, accelerator=True))
    workers = [
        WorkerMemory(NodeId(f"w{n}"), f"w{n}", (Lendable(HOST, size * MIB, False, speed),))
        for n, (size, speed) in enumerate(zip(case.workers, speeds, strict=True))
    ]
    found = split_fit(need, own, None, workers)
    assert found.plan is not None, found.words
    return found.plan, found.memory


@contextlib.contextmanager
def _rpc_servers(engine_dir: Path, count: int) -> Iterator[dict[str, int]]:
    """HOST:PORT and process id of this many RPC servers on loopback."""
    with contextlib.ExitStack() as stack:
        found = {}
        for _ in range(count):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            where = ("-H", "127.0.0.1", "-p", str(port), "-d", "CPU")
            process = stack.enter_context(
                subprocess.Popen(
                    [engine_dir / "ggml-rpc-server", *where],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"GGML_RPC_NO_RDMA": "1"},
                )
            )
            stack.callback(process.kill)
            found[f"127.0.0.1:{port}"] = process.pid
            wait_until(lambda: _listens(port), what=f"RPC server on {port}")  # noqa: B023
        yield found


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def _loaded(engine_dir: Path, spec: LaunchSpec, cwd: Path) -> Iterator[MemoryReport]:
    """What an engine says it took; it serves until the end of the context."""
    heard = MemoryHeard()
    said = []
    argv = server_argv(str(engine_dir / "llama-server"), spec, InstanceId("~1"), SOCKET)
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(argv, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
    try:
        with (cwd / "log").open() as lines:

            def is_ready() -> bool:
                said.extend(new := lines.readlines())
                assert process.poll() is None, "".join(said[-10:])
                return any("all slots are idle" in line for line in new)

            wait_until(is_ready, timeout_s=60.0, what="the engine serves")
        for line in said:
            heard.line(line)
        report = heard.report()
        assert report is not None, "".join(said[-10:])
        yield report
    finally:
        process.kill()
        process.wait()


def _ask(path: Path, prompt: Sequence[int]) -> None:
    """Have the engine work through a prompt of tokens."""
    body = json.dumps({"prompt": list(prompt), "n_predict": 4}).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: m\r\nContent-Length: {len(body)}\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60.0)
        client.connect(str(path))
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        answer = b""
        while got := client.recv(1 << 16):
            answer += got
    assert answer.startswith(b"HTTP/1.1 200"), answer
