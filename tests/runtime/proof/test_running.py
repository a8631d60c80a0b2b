"""A model that is run for a proof: what is seen of it, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.cache.builtin import ensure
from meshd.kernel import Pool
from meshd.runtime.probe import probe
from meshd.runtime.proof.backend import read_backend
from meshd.runtime.proof.binary import read_binary
from meshd.runtime.proof.evidence import Evidence, RuntimeEvidence
from meshd.runtime.proof.judge import judge
from meshd.runtime.proof.running import Trial, run_model
from meshd.runtime.proof.witness import Usage
from tests.runtime.conftest import wait_for
from tests.runtime.processes import ended
from tests.runtime.proof import pieces
from tests.runtime.proof.fake_server import make_server


class Field:
    """Runs trials in a directory; `usages` is what the driver says, first before the run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pool = Pool("test", workers=1)
        self.usage: Callable[[], Usage | None] = self._ours

    def trial(self, mode: str, *, limit_s: float = 20.0) -> Trial:
        return Trial(
            server=make_server(self.directory / "engine", mode),
            weights=Path("/models/builtin.gguf"),
            device="CUDA0",
            run_dir=self.directory / "run",
            limit_s=limit_s,
            witnessed=True,
        )

    async def run(self, trial: Trial) -> RuntimeEvidence:
        return await run_model(
            trial, self.pool, random.Random(1), usage=self.usage, own_pids=lambda: True
        )

    def _ours(self) -> Usage:
        pid = self.pid()
        return Usage({pid: 530 << 20} if pid else {}, 0)

    def pid(self) -> int:
        path = self.directory / "engine" / "pid.txt"
        return int(path.read_text()) if path.exists() and path.read_text() else 0

    def argv(self) -> list[str]:
        words: list[str] = json.loads((self.directory / "engine" / "argv.json").read_text())
        return words

    def listens(self) -> bool:
        run_dir = self.directory / "run"
        return run_dir.exists() and any(run_dir.glob("*.sock"))

    def left(self) -> list[str]:
        return [path.name for path in (self.directory / "run").iterdir()]


@pytest.fixture
async def field(short_dir: Path) -> AsyncIterator[Field]:
    field = Field(short_dir)
    yield field
    field.pool.close()
    assert field.left() == []
    assert not field.pid() or ended(field.pid())


def problem_of(seen: RuntimeEvidence) -> str:
    """What the judge finds wrong with a run of an engine that is otherwise sound."""
    seen = replace(seen, executed=pieces.SERVER)  # that it is a script is another test's matter
    return str(judge(replace(pieces.sound(), runtime=seen)).proof.problem)


async def test_a_run_on_the_device(field: Field) -> None:
    seen = await field.run(field.trial("gpu"))
    assert seen.problem is None
    assert (seen.offloaded, seen.generated, seen.tokens_per_s) == ((5, 5), True, 812.5)
    assert dict(seen.buffers) == {"CPU_Mapped": 0.25, "CUDA0": 4.6}
    assert (seen.driver_sees, seen.driver_said) == (True, f"pid {seen.pid} uses 530 MiB")
    assert seen.executed is not None
    assert "python" in seen.executed
    assert problem_of(seen) == "None"
    argv = field.argv()
    assert argv[argv.index("--device") + 1] == "CUDA0"
    assert int(argv[argv.index("--n-gpu-layers") + 1]) > 100
    assert argv[argv.index("--host") + 1].endswith(".sock")


async def test_silent_fallback_to_the_cpu(field: Field) -> None:
    """What a CPU engine with RPC really says: all layers are on a GPU it does not have."""
    seen = await field.run(field.trial("cpu"))
    assert seen.offloaded == (5, 5)
    assert "its weights lie in CPU_Mapped: it computes on the CPU" in problem_of(seen)


async def test_layers_that_were_left_on_the_cpu(field: Field) -> None:
    assert "only 3 of 5 layers" in problem_of(await field.run(field.trial("partial")))


async def test_a_process_the_driver_does_not_know(field: Field) -> None:
    field.usage = lambda: Usage({1: 1 << 30})
    seen = await field.run(field.trial("gpu"))
    assert seen.driver_sees is False
    assert f"no process of ours (pid {seen.pid}) on CUDA0: it names 1" in problem_of(seen)


async def test_ready_without_a_token(field: Field) -> None:
    began = time.monotonic()
    seen = await field.run(field.trial("mute", limit_s=1.0))
    assert not seen.generated
    assert "no answer on CUDA0 within 1 s" in problem_of(seen)
    assert time.monotonic() - began < 10.0


async def test_an_answer_that_tells_no_speed(field: Field) -> None:
    assert "an answer of 32 tokens came as 200" in problem_of(await field.run(field.trial("empty")))


async def test_a_model_that_never_loads(field: Field) -> None:
    seen = await field.run(field.trial("loading", limit_s=1.0))
    assert "no answer on CUDA0 within 1 s" in problem_of(seen)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("crash", "no kernel image is available"),
        ("device", "invalid device: CUDA0"),
        ("memory", "out of memory"),
    ],
)
async def test_an_engine_that_ends(field: Field, mode: str, words: str) -> None:
    seen = await field.run(field.trial(mode))
    assert words in problem_of(seen)
    assert seen.no_memory == (mode == "memory")


async def test_no_program_to_run(field: Field) -> None:
    trial = replace(field.trial("gpu"), server=Path("/none/llama-server"))
    seen = await field.run(trial)
    assert "status 127" in problem_of(seen)


async def test_a_run_that_is_cancelled_leaves_nothing(field: Field) -> None:
    run = asyncio.create_task(field.run(field.trial("mute")))
    await wait_for(field.listens, "it runs")
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


@pytest.mark.engine
async def test_the_real_engine_does_not_pass_for_a_gpu(
    field: Field, engine_dir: Path, tmp_path: Path
) -> None:
    """Told to put all layers on a device, on a machine where it lists none."""
    record = probe(engine_dir)
    if record.devices:
        pytest.skip("this engine has a device")
    trial = replace(
        field.trial("gpu"),
        server=engine_dir / "llama-server",
        weights=ensure(tmp_path),
        device="none",
    )
    seen = await field.run(replace(trial, witnessed=False))
    assert seen.generated
    assert seen.tokens_per_s
    assert seen.executed == str((engine_dir / "llama-server").resolve())
    binary = read_binary(record)
    backend = read_backend(engine_dir / "llama-server", binary, lambda: (pieces.CPU_DEVICE,))
    found = judge(Evidence("cuda", 1.0, pieces.binary(), pieces.backend(), seen))
    assert found.backend == "cpu"
    assert judge(Evidence("cuda", 1.0, binary, backend, seen)).backend == "cpu"
    assert judge(Evidence("cpu", 1.0, binary, backend, seen)).proof.level == "runtime"
