"""The estimate of a model's memory against what a real llama-server reports after loading it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cache.gguf_header import parse_header
from meshd.cache.shape import shape_of
from meshd.election.fit import estimate, observed
from meshd.ids import InstanceId, ModelId
from meshd.runtime.launch import LaunchSpec, server_argv
from meshd.runtime.reported import VERBOSITY, MemoryHeard, MemoryReport
from meshd.view.shape import ModelShape
from tests.shapes import Recipe, write_shape

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MIB = 1 << 20
TOLERANCE = 0.10

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
        spec = LaunchSpec(
            ModelId("m"),
            str(weights),
            context,
            slots,
            kv_type=kv_type,
            extra=("--verbosity", str(VERBOSITY)),
        )
        report = _run(engine_dir, spec, short_dir)
        guess = estimate(shape, context=context, slots=slots, kv_type=kv_type)
        off = guess.total / report.total - 1
        table.append(
            f"| {name} | {context} | {slots} | {kv_type} | {guess.total / MIB:.1f} MiB | "
            f"{report.total / MIB:.1f} MiB | {off:+.1%} |"
        )
        assert abs(off) < TOLERANCE, (guess, report)
        seen = report.devices["CPU"]
        assert guess.cache == pytest.approx(seen.cache, abs=MIB / 16)
        corrected = observed(guess, report.devices).apply(guess)
        assert corrected.total - seen.total == pytest.approx(guess.weights - seen.weights, abs=MIB)


def test_what_travels_says_the_same(short_dir: Path) -> None:
    for number, recipe in enumerate(RECIPES.values()):
        shape = _shape_at(write_shape(short_dir / f"{number}.gguf", recipe))
        (short_dir / f"{number}.gguf").unlink()
        assert len(shape.to_json()) < 512
        assert ModelShape.from_json(shape.to_json()) == shape


def _shape_at(weights: Path) -> ModelShape:
    content = weights.read_bytes()
    return shape_of([parse_header(content, len(content))])


def _run(engine_dir: Path, spec: LaunchSpec, cwd: Path) -> MemoryReport:
    """Load the model and listen until it can serve; the process is gone afterwards."""
    heard, last = MemoryHeard(), ""
    argv = server_argv(str(engine_dir / "llama-server"), spec, InstanceId("~1"), "e.sock")
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
