"""The steps of split.sh: one finding each, printed as a table at the end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from prove import WORK, Lab
from split_nodes import SplitNode

from bench.chats import greedy
from bench.processes import Stable, argv_of
from bench.split_engines import Engines, Recipe, recipe_of
from tests.models import WIDE, Wide, write_wide

PROMPT_TOKENS = 512
END_LIMIT_S = 10.0
"""For what has to end with something else."""


@dataclass(frozen=True)
class Backend:
    name: str
    shape: Wide
    room: str
    """`--max-vram` of each of two nodes: less than the model, more than half of it."""
    context: int
    tokens: int
    """That an engine writes when its speed is measured."""
    times: int
    """How often that is done."""
    environ: tuple[dict[str, str], dict[str, str]]
    """Of the two nodes."""


BACKENDS = {
    "cuda": Backend(
        "cuda",
        Wide(layers=32, width=4096, feed_forward=11008, heads=32),
        "10GiB",
        4096,
        128,
        5,
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}),
    ),
    # Threads of two engines that wait for each other would hold both up on few cores.
    "cpu": Backend("cpu", WIDE, "560MB", 2048, 32, 1, ({"MESHD_ENGINE__THREADS": "1"},) * 2),
}


@dataclass(frozen=True)
class Speed:
    prompt: float
    generated: float
    """Tokens a second, medians."""
    text: tuple[int, ...]
    """The first answer."""

    @classmethod
    def of(cls, runs: Sequence[list[dict[str, Any]]]) -> Speed:
        """Of answers, in runs of which the first answer does not count."""
        timings = [answer["timings"] for answers in runs for answer in answers[1:]]
        return cls(
            median(t["prompt_per_second"] for t in timings),
            median(t["predicted_per_second"] for t in timings),
            tuple(runs[0][0]["tokens"]),
        )

    def of_another(self, other: Speed) -> str:
        prompt, generated = self.prompt / other.prompt, self.generated / other.generated
        return f"{prompt:.2f} and {generated:.2f}"

    def __str__(self) -> str:
        return f"prompt {self.prompt:.0f} tok/s, generation {self.generated:.1f} tok/s"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nodes are stopped on that way, too
    lab = Lab()
    backend = BACKENDS[os.environ.get("SPLIT_BACKEND", "cuda")]
    machine(lab, backend)
    directory = os.environ.get("RUNTIME_DIR") or lab.build(backend.name)["directory"]
    model = generated(lab, backend)
    nodes = [
        SplitNode(lab, name, number, model, directory, **environ)
        for number, (name, environ) in enumerate(zip("ab", backend.environ, strict=True))
    ]
    lone = SplitNode(lab, "lone", 2, model, directory, **backend.environ[0])
    for node in (lone, *nodes):
        shutil.rmtree(node.data_dir, ignore_errors=True)
    try:
        solo = alone(lab, backend, lone)
        host, worker = nodes
        split(lab, backend, host, worker, solo)
        worker_killed(lab, backend, host, worker)
    finally:
        for node in (lone, *nodes):
            node.stop()
    print("\n" + lab.table())
    return 0 if all(finding.good for finding in lab.findings) else 1


def machine(lab: Lab, backend: Backend) -> None:
    if backend.name == "cpu":
        lab.note("machine", True, f"no GPU asked for, {os.cpu_count()} cores")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    seen = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    lab.note("two GPUs", len(seen) >= 2, "; ".join(seen))
    if len(seen) < 2:
        raise SystemExit(lab.table())


def generated(lab: Lab, backend: Backend) -> Path:
    shape = backend.shape
    path = WORK / f"split-{shape.layers}x{shape.width}-F16.gguf"
    began = time.monotonic()
    if not path.exists():
        write_wide(path.with_suffix(".partial"), shape).replace(path)
    size = path.stat().st_size
    took = time.monotonic() - began
    lab.note("generated model", True, f"{size / 1e9:.2f} GB, {shape.layers} layers, {took:.0f} s")
    return path


def alone(lab: Lab, backend: Backend, node: SplitNode) -> Speed:
    """One node that may use all the memory there is."""
    node.start("--mesh", "lone")
    first = node.load(context=backend.context)
    speed = Speed.of([answers_of(node.engine_socket(), backend)])
    lab.note("one node", node.plan().get("kind") == "solo", str(speed))
    node.unload()
    again = node.load(context=backend.context)
    lab.note("one node: load", True, f"{first:.1f} s the first time, {again:.1f} s again")
    node.stop()
    return speed


def split(lab: Lab, backend: Backend, host: SplitNode, worker: SplitNode, solo: Speed) -> None:
    """Two nodes, neither of which may use enough."""
    host.start("--mesh", "split", "--max-vram", backend.room)
    worker.start("--join", host.invite(), "--max-vram", backend.room)
    host.wait(lambda: host.sees(worker.name), "it sees the other node")
    size = backend.shape.parameters * 2
    runs, plain_runs = [], []
    with Stable(WORK) as stable:
        for what in ("first", "second"):
            before = host.tunnel_bytes()
            seconds = host.load(context=backend.context, host=host.name, split=True)
            percent = 100 * (host.tunnel_bytes() - before) / size
            seen = f"{seconds:.1f} s, {percent:.2f} % of the weights through tunnels"
            lab.note(f"two nodes: {what} load", what == "first" or percent < 1, seen)
            if what == "first":
                planned(lab, host, worker)
            runs.append(answers_of(host.engine_socket(), backend))
            recipe = plain_recipe(backend, host, worker)
            host.unload()
            engines = Engines(stable, WORK, recipe)
            engine = engines.start("plain", Here(), (Here(), "127.0.0.1"))
            lab.note(f"plain RPC: {what} load", True, f"{engine.load_s:.1f} s")
            plain_runs.append(answers_of(engine.where, backend))
            engines.end(engine)
    host.load(context=backend.context, host=host.name, split=True)
    speed, plain = Speed.of(runs), Speed.of(plain_runs)
    pairs = zip(speed.text, solo.text, strict=True)
    same = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), backend.tokens)
    lab.note("plain RPC", True, f"{plain}; {plain.of_another(solo)} of one node")
    lab.note(
        "two nodes",
        same > 0,
        f"{speed}; {speed.of_another(solo)} of one node; {speed.of_another(plain)} of plain RPC; "
        f"the same text as one node for {same} of {backend.tokens} tokens",
    )
    devices(lab, backend, host, worker)


class Here:
    """This machine, for engines of the benchmarks."""

    inside = staticmethod(contextlib.nullcontext)


def plain_recipe(backend: Backend, host: SplitNode, worker: SplitNode) -> Recipe:
    """The host's engine and the worker's RPC server as they run, without meshd between them."""
    (engine,), (server,) = host.running("llama-server"), worker.running("rpc-server")
    recipe = recipe_of(argv_of(engine) or (), argv_of(server) or ())
    of_host, of_worker = (
        ("env", *(f"{name}={value}" for name, value in environ.items()))
        for environ in backend.environ
    )
    return replace(
        recipe,
        engine=(*of_host, *recipe.engine),
        rpc_server=(*of_worker, *recipe.rpc_server),
    )


def planned(lab: Lab, host: SplitNode, worker: SplitNode) -> None:
    plan = host.plan()
    workers = plan.get("workers", [])
    told = ", ".join(f"{w['node']} {w['share']:.0%}, {w['bytes'] / 1e9:.2f} GB" for w in workers)
    names = [w["node"] for w in workers]
    lab.note("two nodes: plan", names == [worker.name], f"{plan.get('kind')}: {told or 'nobody'}")
    if names != [worker.name]:
        raise SystemExit(lab.table())


def devices(lab: Lab, backend: Backend, host: SplitNode, worker: SplitNode) -> None:
    """Each node's process has memory of a GPU of its own."""
    pids = [*host.running("llama-server"), *worker.running("rpc-server")]
    if backend.name == "cpu":
        sizes = [f"{pid}: {psutil.Process(pid).memory_info().rss >> 20} MiB" for pid in pids]
        lab.note("processes", len(pids) == 2, ", ".join(sizes))
        return
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid,used_memory"]
    out = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.split(",")] for line in out.strip().splitlines()]
    ours = [row for row in rows if row[0].isdigit() and int(row[0]) in pids]
    lab.note(
        "both GPUs in the driver's list",
        len(ours) == len({row[1] for row in ours}) == len({row[0] for row in ours}) == 2,
        f"llama-server and rpc-server are {pids}; {'; '.join(', '.join(r) for r in rows)}",
    )


def worker_killed(lab: Lab, backend: Backend, host: SplitNode, worker: SplitNode) -> None:
    """First what the worker runs, then the worker: nothing is left of either, and it comes back."""
    (pid,) = worker.running("rpc-server")
    psutil.Process(pid).kill()
    killed_at = time.monotonic()
    ended_s = host.wait(lambda: host.chat()[0] != 200, "it notices") - killed_at
    back_s = host.wait(lambda: host.chat()[0] == 200, "it serves again") - killed_at
    lab.note(
        "kill -9 of the rpc-server",
        len(worker.running("rpc-server")) == 1,
        f"refused after {ended_s:.2f} s, served again after {back_s:.2f} s",
    )
    left = [psutil.Process(pid) for pid in worker.running("rpc-server")]
    engines = [psutil.Process(pid) for pid in host.running("llama-server")]
    killed_at = worker.kill()
    ended_s = host.wait(lambda: host.chat()[0] != 200, "it notices") - killed_at
    refusal = host.chat()
    _, alive = psutil.wait_procs([*left, *engines], timeout=END_LIMIT_S)
    lab.note(
        "kill -9 of the worker",
        refusal[0] == 503 and not alive,
        f"refused after {ended_s:.2f} s ({refusal[0]} {refusal[1]}); of its rpc-server and the "
        f"host's llama-server {len(alive)} live on",
    )
    host.wait(lambda: lacks(host.model().get("reason") or ""), "it says what lacks")
    lab.note("without it", host.model()["state"] == "waiting", host.model()["reason"][:300])
    began = worker.start("--max-vram", backend.room)
    back_s = host.wait(lambda: host.chat()[0] == 200, "it serves again") - began
    lab.note("the worker comes back", True, f"served again {back_s:.2f} s after its start")


def lacks(reason: str) -> bool:
    """Whether these words say that memory lacks. A host with a GPU could hold the rest of the model
    in its main memory, were it not told to split it."""
    return " short" in reason or "no other node" in reason


def answers_of(where: Path, backend: Backend) -> list[dict[str, Any]]:
    """What the engine at this socket says, and by its own account how fast."""
    drawn = random.Random(7)
    answers = []
    for _ in range(backend.times + 1):
        prompt = [drawn.randint(3, 353) for _ in range(PROMPT_TOKENS)]
        answer = greedy(where, prompt, backend.tokens)
        if answer is None:
            raise SystemExit(f"the engine at {where} does not answer")
        answers.append(answer)
    return answers


if __name__ == "__main__":
    sys.exit(main())
