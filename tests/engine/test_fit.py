"""The estimate of a model's memory against what a real llama-server reports after loading it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cache.gguf_header import parse_header
from meshd.cache.shape import shape_of
from meshd.election.fit import HOST, Budget, Estimate, estimate, fit, observed
from meshd.ids import InstanceId, ModelId
from meshd.runtime.launch import LaunchSpec, server_argv
from meshd.runtime.reported import VERBOSITY, MemoryHeard, MemoryReport
from meshd.view.shape import ModelShape
from tests.conftest import wait_until
from tests.shapes import Latent, Recipe, write_shape, write_sparse

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MIB = 1 << 20
TOLERANCE = 0.10
HEADER_BYTES = 32 * MIB
"""More than any header made here has."""

RECIPES = {
    "llama": Recipe("llama"),
    "llama, GQA": Recipe("llama", kv_heads=2, layers=6),
    "llama, Q8_0": Recipe("llama", kv_heads=4, weights="Q8_0", layers=8),
    "llama, Q4_0": Recipe("llama", kv_heads=4, weights="Q4_0", layers=12),
    "llama, wide vocabulary": Recipe("llama", kv_heads=4, layers=2, vocabulary=20_000),
    "llama, experts": Recipe(
        "llama", kv_heads=2, experts=8, experts_used=2, feed_forward=512, layers=3
    ),
    "qwen2": Recipe("qwen2", kv_heads=2, tied=True),
    "qwen3": Recipe("qwen3", kv_heads=2, head=128),
    "qwen3moe": Recipe(
        "qwen3moe", kv_heads=2, head=128, experts=16, experts_used=4, expert_ff=256, layers=3
    ),
    "qwen3moe, narrow": Recipe(
        "qwen3moe", kv_heads=2, head=64, experts=16, experts_used=8, expert_ff=160, layers=3
    ),
    "gemma2": Recipe("gemma2", kv_heads=4, head=128, window=1024, tied=True, vocabulary=16_384),
    "gemma3": Recipe(
        "gemma3", kv_heads=2, head=128, window=512, layers=9, feed_forward=1024, tied=True
    ),
    "phi3": Recipe("phi3"),
    "gpt-oss": Recipe(
        "gpt-oss", kv_heads=2, window=128, experts=8, experts_used=2, expert_ff=384, layers=4
    ),
    "deepseek2": Recipe("deepseek2", experts=8, experts_used=2, expert_ff=256),
    "deepseek2, many heads": Recipe(
        "deepseek2", heads=16, experts=8, experts_used=2, expert_ff=256, layers=3
    ),
    "mamba": Recipe("mamba", layers=6),
    "jamba": Recipe("jamba", layers=6, attention_every=3, kv_heads=2),
}
REAL = {
    "Llama 3 8B": Recipe("llama", 2, 4096, heads=32, kv_heads=8, feed_forward=14_336),
    "Mixtral 8x7B": Recipe(
        "llama", 2, 4096, heads=32, kv_heads=8, feed_forward=14_336, experts=4, experts_used=2
    ),
    "Qwen2.5 7B": Recipe("qwen2", 2, 3584, heads=28, kv_heads=4, feed_forward=18_944),
    "Qwen3 30B A3B": Recipe(
        "qwen3moe", 2, 2048, heads=32, kv_heads=4, head=128,
        experts=32, experts_used=8, expert_ff=768,
    ),
    "gpt-oss 20B": Recipe(
        "gpt-oss", 2, 2880, heads=64, kv_heads=8, head=64, window=128,
        experts=8, experts_used=4, expert_ff=2880,
    ),
    "Gemma 2 9B": Recipe(
        "gemma2", 2, 3584, heads=16, kv_heads=8, head=256, feed_forward=14_336, window=4096,
        tied=True,
    ),
    "Phi 3 mini": Recipe("phi3", 2, 3072, heads=32, kv_heads=32, feed_forward=8192),
    "DeepSeek V3": Recipe(
        "deepseek2", 2, 7168, heads=128, feed_forward=18_432, experts=9, experts_used=8,
        expert_ff=2048, latent=Latent(512, 1536, 64, 128, 128),
    ),
    "Mamba 2.8B": Recipe("mamba", 2, 2560),
}  # fmt: skip
"""As wide as real models, with few layers, experts and words: the buffer for computing depends on
widths alone."""
SETTINGS = ((1024, 1, "f16"), (5000, 2, "f16"), (4096, 2, "q4_0"), (8192, 4, "q8_0"))
"""Tokens per slot, slots, type of the cache."""


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines to print when all is done."""
    lines: list[str] = []
    yield lines
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print("\n| model | tokens | slots | cache | estimate | reported | difference |")  # noqa: T201
        print("|---|---:|---:|---|---:|---:|---:|", *lines, sep="\n")  # noqa: T201


@pytest.mark.parametrize("name", RECIPES)
def test_the_estimate_is_what_the_engine_takes(
    name: str, short_dir: Path, engine_dir: Path, table: list[str]
) -> None:
    weights = write_shape(short_dir / "m.gguf", RECIPES[name])
    assert weights.stat().st_size < 60e6
    shape = _shape_at(weights)
    for context, slots, kv_type in SETTINGS:
        spec = LaunchSpec(ModelId("m"), str(weights), context, slots, kv_type=kv_type)
        report = _run(engine_dir, spec, short_dir)
        guess = estimate(shape, context=context, slots=slots, kv_type=kv_type)
        table.append(_row(name, spec, guess, report))
        assert guess.total == pytest.approx(report.total, rel=TOLERANCE)
        seen = report.devices["CPU"]
        assert guess.cache == pytest.approx(seen.cache, abs=MIB / 16)
        corrected = observed(guess, report.devices).apply(guess)
        assert corrected.total - seen.total == pytest.approx(guess.weights - seen.weights, abs=MIB)


@pytest.mark.parametrize("name", REAL)
def test_the_estimate_holds_at_real_widths(
    name: str, short_dir: Path, engine_dir: Path, table: list[str]
) -> None:
    weights = write_sparse(short_dir / "m.gguf", REAL[name])
    spec = LaunchSpec(ModelId("m"), str(weights), 8192, 4, extra=("--no-warmup", "-fit", "off"))
    report = _run(engine_dir, spec, short_dir)
    guess = estimate(_shape_at(weights), context=8192, slots=4)
    table.append(_row(f"as wide as {name}", spec, guess, report))
    assert guess.total == pytest.approx(report.total, rel=0.01)
    assert guess.compute == pytest.approx(report.devices["CPU"].compute, rel=TOLERANCE)


SPLITS = {
    "one device": ((300 * MIB, 40 * MIB), False),
    "two devices": ((100 * MIB, 140 * MIB), False),
    "two devices and the CPU": ((60 * MIB, 60 * MIB), True),
}
"""Room on each device, and whether layers may stay on the CPU."""


@pytest.mark.parametrize("room", SPLITS)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("llama", kv_heads=4, layers=10, vocabulary=8000),
        Recipe("gemma3", 9, kv_heads=2, head=128, window=512, feed_forward=1024, tied=True),
    ],
    ids=lambda recipe: recipe.architecture,
)
def test_each_device_holds_what_was_planned(
    recipe: Recipe, room: str, short_dir: Path, engine_dir: Path, devices: tuple[str, str]
) -> None:
    weights = write_shape(short_dir / "m.gguf", recipe)
    rooms, spill = SPLITS[room]
    places = [
        *(Budget(f"RPC{n}", size, host=False, accelerator=True) for n, size in enumerate(rooms)),
        Budget(HOST, 500 * MIB, host=True, accelerator=False),
    ]
    guess = estimate(_shape_at(weights), context=4096, slots=2)
    plan = fit(guess, places, spill=spill)
    assert plan.fits, plan.words
    split = ("--tensor-split", ",".join(map(str, plan.tensor_split)))
    where = ("--rpc", ",".join(devices), "--device", ",".join(plan.layers), "-fit", "off")
    spec = LaunchSpec(
        ModelId("m"), str(weights), 4096, 2, gpu_layers=plan.gpu_layers, extra=(*where, *split)
    )
    report = _run(engine_dir, spec, short_dir)
    assert report.offloaded == (plan.gpu_layers, recipe.layers + 1)
    # A buffer of an RPC server is named after the server's own device: `RPC0[127.0.0.1:5000]`.
    names = {f"RPC0[{address}]": f"RPC{number}" for number, address in enumerate(devices)}
    seen = {names.get(name, name): parts for name, parts in report.devices.items()}
    assert seen.keys() == plan.memory.keys()
    for name, parts in seen.items():
        # Never more; a device that holds little but the last layer computes with less.
        assert parts.total <= plan.memory[name] * 1.02, name
        assert parts.total >= plan.memory[name] - guess.compute / 2, name


@pytest.fixture
def devices(engine_dir: Path) -> Iterator[tuple[str, str]]:
    """Addresses of two devices of their own, as the engine sees them: RPC servers on loopback."""
    with contextlib.ExitStack() as stack:
        addresses = []
        for _ in range(2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            process = stack.enter_context(
                subprocess.Popen(
                    [engine_dir / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port)],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"GGML_RPC_NO_RDMA": "1"},
                )
            )
            stack.callback(process.kill)
            wait_until(lambda: _listens(port), what=f"RPC server on {port}")  # noqa: B023
            addresses.append(f"127.0.0.1:{port}")
        yield addresses[0], addresses[1]


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_what_travels_says_the_same(short_dir: Path) -> None:
    for number, recipe in enumerate(RECIPES.values()):
        shape = _shape_at(write_shape(short_dir / f"{number}.gguf", recipe))
        (short_dir / f"{number}.gguf").unlink()
        assert len(shape.to_json()) < 512
        assert ModelShape.from_json(shape.to_json()) == shape


def _row(name: str, spec: LaunchSpec, guess: Estimate, report: MemoryReport) -> str:
    figures = (f"{guess.total / MIB:.1f} MiB", f"{report.total / MIB:.1f} MiB")
    off = f"{guess.total / report.total - 1:+.1%}"
    cells = (name, spec.context, spec.parallel, spec.kv_type or "f16", *figures, off)
    return f"| {' | '.join(map(str, cells))} |"


def _shape_at(weights: Path) -> ModelShape:
    with weights.open("rb") as file:
        return shape_of([parse_header(file.read(HEADER_BYTES), weights.stat().st_size)])


def _run(engine_dir: Path, spec: LaunchSpec, cwd: Path) -> MemoryReport:
    """Load the model and listen until it can serve; the process is gone afterwards."""
    heard, last = MemoryHeard(), ""
    argv = server_argv(str(engine_dir / "llama-server"), spec, InstanceId("~1"), "e.sock")
    argv += ("--verbosity", str(VERBOSITY))
    (cwd / "e.sock").unlink(missing_ok=True)
    process = subprocess.Popen(
        argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            for line in process.stdout:
                heard.line(line)
                last = line if " E " in line else last
                if "model loaded" in line:
                    break
        finally:
            process.kill()
            process.wait()
    report = heard.report()
    assert report is not None, f"{spec}: {last}"
    return report
