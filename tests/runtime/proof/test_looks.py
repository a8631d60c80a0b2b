"""The prover with its real looks: only the driver's word is made up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from meshd.cache.builtin import ensure
from meshd.config import Config
from meshd.errors import GpuRequired
from meshd.ids import NodeId
from meshd.kernel import Board, MonotonicClock, Pool
from meshd.runtime.probe import probe
from meshd.runtime.proof.backend import read_backend
from meshd.runtime.proof.looks import asleep_s, real_looks
from meshd.runtime.proof.prover import Prover
from meshd.runtime.record import BuildFacts, RuntimeRecord
from meshd.view import DeviceView, NodeState, NodeView, ProofView, View
from tests.runtime.proof import pieces
from tests.runtime.proof.native import place_engine

FACTS = BuildFacts(
    source="toy", source_sha256=None, commit="abcdef0", cmake_args=(),
    cmake_cache={"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": "90"}, compiler="c++",
    built_at=0.0,
)  # fmt: skip
LIST = f"Available devices:\n  {pieces.LISTED[0]}"

Prove = Callable[[RuntimeRecord, tuple[DeviceView, ...]], Awaitable[ProofView]]


@pytest.fixture
async def prove(short_dir: Path) -> AsyncIterator[Prove]:
    """Proves as `--require-gpu` does, and tells what was published."""
    pool = Pool("test", workers=2)

    async def once(record: RuntimeRecord, devices: tuple[DeviceView, ...]) -> ProofView:
        node = NodeView(NodeId("n"), "n", "0", "member", NodeState.READY, 0.0, "", None)
        board = Board(View(node=node))
        looks = real_looks(lambda: ensure(short_dir / "models"), pool, random.Random(1))
        backend = partial(read_backend, read_devices=lambda: devices)
        looks = replace(looks, devices=lambda: devices, backend=backend)
        prover = Prover(
            Config(name="n", data_dir=short_dir, cache_dir=short_dir),
            board,
            looks,
            pool=pool,
            clock=MonotonicClock(),
            find=lambda: record,
        )
        with pytest.raises(GpuRequired):
            async with asyncio.timeout(30.0):
                await prover.require_gpu()
        runtime = board.current.runtime
        assert runtime is not None
        assert runtime.backend == "cpu"
        return runtime.proof

    yield once
    pool.close()


def cuda_engine(directory: Path, template: Path, listing: str = LIST) -> RuntimeRecord:
    engine = place_engine(template, directory, devices=listing)
    record = probe(engine, runtime_id="cuda-a", build=FACTS)
    return record.model_copy(update={"backend": "cuda"})


async def test_an_engine_that_lists_a_device_and_runs_nothing_on_it(
    prove: Prove, tmp_path: Path, cuda_program: Path
) -> None:
    record = cuda_engine(tmp_path / "e", cuda_program)
    proof = await prove(record, (pieces.gpu(), pieces.CPU_DEVICE))
    assert proof.level == "backend"
    assert "the engine ended with status 0 on CUDA0" in str(proof.problem)


async def test_a_device_the_driver_does_not_know(
    prove: Prove, tmp_path: Path, cuda_program: Path
) -> None:
    proof = await prove(cuda_engine(tmp_path / "e", cuda_program), (pieces.CPU_DEVICE,))
    assert (proof.level, proof.problem) == (
        "binary",
        "the engine lists CUDA0, the driver knows no device",
    )


async def test_a_device_for_other_code(prove: Prove, tmp_path: Path, cuda_program: Path) -> None:
    record = cuda_engine(tmp_path / "e", cuda_program)
    proof = await prove(record, (pieces.gpu("8.0"), pieces.CPU_DEVICE))
    assert proof.level == "binary"
    assert "compute capability 8.0, the engine was built for 90" in str(proof.problem)


async def test_a_device_the_engine_does_not_list(
    prove: Prove, tmp_path: Path, cuda_program: Path
) -> None:
    record = cuda_engine(tmp_path / "e", cuda_program, "Available devices:\n  (none)")
    proof = await prove(record, (pieces.gpu(), pieces.CPU_DEVICE))
    assert proof.level == "binary"
    assert "models would run on the CPU" in str(proof.problem)


async def test_an_old_binary_put_back(
    prove: Prove, tmp_path: Path, cuda_program: Path, cpu_program: Path
) -> None:
    record = cuda_engine(tmp_path / "e", cuda_program)
    (tmp_path / "e" / "llama-server").write_bytes((cpu_program / "llama-server").read_bytes())
    proof = await prove(record, (pieces.gpu(), pieces.CPU_DEVICE))
    assert proof.level == "none"
    assert "not the file that was built" in str(proof.problem)


@pytest.mark.engine
async def test_a_real_engine_for_the_cpu_that_is_said_to_be_one_for_cuda(
    prove: Prove, engine_dir: Path
) -> None:
    record = probe(engine_dir, build=FACTS).model_copy(update={"backend": "cuda"})
    if record.devices:
        pytest.skip("this engine has a device")
    proof = await prove(record, (pieces.gpu(), pieces.CPU_DEVICE))
    assert "it loads no library of cuda" in str(proof.problem)


def test_time_asleep_does_not_run_while_awake() -> None:
    before = asleep_s()
    assert abs(asleep_s() - before) < 1.0
