"""When proofs are made, and what the view says meanwhile: the looks are scripted, the service is
real."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.config import Config
from meshd.errors import EngineMissing, EngineRejected, GpuRequired
from meshd.ids import ModelId, NodeId
from meshd.kernel import Board, ManualClock, Pool
from meshd.runtime.proof.evidence import BackendEvidence, BinaryEvidence, RuntimeEvidence
from meshd.runtime.proof.looks import Looks
from meshd.runtime.proof.prover import Prover
from meshd.runtime.proof.running import LIMIT_S, Trial
from meshd.runtime.proof.witness import Usage
from meshd.runtime.record import RuntimeRecord
from meshd.view import (
    DeviceView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    RuntimeView,
    View,
    with_local,
)
from tests.runtime.proof import pieces


class Machine:
    """What there is to be seen; every look is counted."""

    def __init__(self, built_for: str) -> None:
        self.binary = pieces.binary(built_for)
        self.backend = pieces.backend(built_for)
        self.running = pieces.running(built_for)
        self.devices: tuple[DeviceView, ...] = self.backend.devices
        self.asleep_s = 0.0
        self.usage: Usage | None = Usage()
        self.trials: list[Trial] = []
        self.driver_answers = threading.Event()
        self.driver_answers.set()
        self.may_run = asyncio.Event()
        self.may_run.set()

    async def run(self, trial: Trial) -> RuntimeEvidence:
        self.trials.append(trial)
        await self.may_run.wait()
        return self.running

    def looks(self) -> Looks:
        return Looks(
            weights=lambda: Path("/models/builtin.gguf"),
            run=self.run,
            binary=lambda _: self.binary,
            backend=self._backend,
            devices=self._devices,
            listed=lambda _: self.backend.listed or (),
            usage=lambda: self.usage,
            asleep_s=lambda: self.asleep_s,
        )

    def _devices(self) -> tuple[DeviceView, ...]:
        assert self.driver_answers.wait(10.0)
        return self.devices

    def _backend(self, server: Path, binary: BinaryEvidence) -> BackendEvidence:
        return replace(self.backend, devices=self.devices)


class Bench:
    def __init__(
        self,
        directory: Path,
        built_for: str,
        *,
        glance_s: float = 0.02,
        model: tuple[str, ...] = (),
    ) -> None:
        node = NodeView(NodeId("n"), "n", "0", "member", NodeState.READY, 0.0, "", None)
        self.board = Board(View(node=node))
        self.clock = ManualClock(1000.0)
        self.machine = Machine(built_for)
        self.record = record(built_for)
        self.serving: frozenset[int] = frozenset()
        self.missing = False
        self.pool = Pool("test", workers=2)
        config = Config(name="n", data_dir=directory, cache_dir=directory, model=model)
        self.prover = Prover(
            config,
            self.board,
            self.machine.looks(),
            pool=self.pool,
            clock=self.clock,
            find=self._find,
            serving=lambda: self.serving,
            glance_s=glance_s,
            glance_limit_s=0.3,
        )
        self._task: asyncio.Task[None] | None = None

    def _find(self) -> RuntimeRecord:
        if self.missing:
            raise EngineMissing("there is no llama.cpp engine for this machine")
        return self.record

    def start(self, engine: RuntimeRecord | None = None) -> None:
        self._task = asyncio.create_task(self.prover.run())
        self.find(engine or self.record)

    def find(self, engine: RuntimeRecord) -> None:
        """As ModelHost does it."""
        shown = self.prover.engine_found(engine)
        self.board.publish(replace(self.board.current, runtime=shown))

    @property
    def runtime(self) -> RuntimeView:
        runtime = self.board.current.runtime
        assert runtime is not None
        return runtime

    async def until(self, condition: Callable[[], object], what: str) -> None:
        changed = asyncio.Event()
        unsubscribe = self.board.subscribe(lambda _: changed.set())
        try:
            async with asyncio.timeout(5.0):
                while not condition():
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            pytest.fail(f"not within 5 s: {what}; {self.runtime}")
        finally:
            unsubscribe()

    async def settled(self) -> None:
        """Until all that was begun in the pool and the loop has gone as far as it goes."""
        for _ in range(5):
            await self.pool.run(lambda: None)

    async def until_backend(self, backend: str, problem: str = "") -> None:
        await self.until(
            lambda: self.runtime.backend == backend and problem in str(self.runtime.proof.problem),
            f"{backend} {problem}",
        )

    async def stop(self) -> None:
        self.machine.driver_answers.set()
        self.prover.stopping.set()
        if self._task is not None:
            async with asyncio.timeout(5.0):
                await self._task
        self.pool.close()


def record(built_for: str, name: str = "e1") -> RuntimeRecord:
    return RuntimeRecord(
        id=name, directory="/opt/engine", backend=built_for, version="0.5.0 (build 7)",
        devices=pieces.LISTED if built_for == "cuda" else (), rpc_protocol="7.0.0",
        binaries=({"name": "llama-server", "path": pieces.SERVER, "sha256": "aa", "size": 1,
                   "mtime_ns": 1},),
        probed_at=1.0,
    )  # fmt: skip


@pytest.fixture
async def cuda(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, "cuda")
    yield bench
    await bench.stop()


@pytest.fixture
async def cpu(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, "cpu")
    yield bench
    await bench.stop()


async def test_nothing_is_claimed_before_it_is_proved(cuda: Bench) -> None:
    cuda.machine.may_run.clear()
    cuda.start()
    assert (cuda.runtime.backend, cuda.runtime.built_for) == ("cpu", "cuda")
    await cuda.until(lambda: cuda.runtime.proof.level == "backend", "two layers")
    assert (cuda.runtime.backend, cuda.runtime.proof.passed) == ("cpu", False)
    cuda.machine.may_run.set()
    await cuda.until_backend("cuda")
    assert cuda.runtime.proof.passed
    assert cuda.runtime.proof.level == "runtime"
    (trial,) = cuda.machine.trials
    assert (trial.device, trial.server, trial.witnessed) == ("CUDA0", Path(pieces.SERVER), True)


async def test_ready_is_not_delayed(cuda: Bench) -> None:
    cuda.machine.may_run.clear()
    cuda.start()
    async with asyncio.timeout(1.0):
        await cuda.prover.ready.wait()
    assert cuda.runtime.backend == "cpu"


async def test_an_engine_for_the_cpu_is_proved_by_the_first_answer(cpu: Bench) -> None:
    cpu.start()
    await cpu.until(lambda: cpu.runtime.proof.level == "backend", "two layers")
    model = ModelId("m")
    ready = ModelView(model, "m", ModelState.READY)
    cpu.board.publish(with_local(cpu.board.current, {model: ready}))
    await cpu.until(lambda: cpu.runtime.proof.level == "runtime", "the third")
    assert cpu.runtime.proof.passed
    assert cpu.machine.trials == []


async def test_a_proof_is_not_in_the_way_of_the_first_model_on_a_cpu(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "cpu", glance_s=3600.0, model=("m",))
    bench.start()
    await bench.prover.ready.wait()
    model = ModelId("m")
    loading = ModelView(model, "m", ModelState.LOADING)
    bench.board.publish(with_local(bench.board.current, {model: loading}))
    await bench.settled()
    assert bench.runtime.proof.layers == ()
    ready = replace(loading, state=ModelState.READY)
    bench.board.publish(with_local(bench.board.current, {model: ready}))
    await bench.until(lambda: bench.runtime.proof.level == "runtime", "all layers")
    await bench.stop()


async def test_a_device_that_falls_off_the_bus(cuda: Bench) -> None:
    cuda.start()
    await cuda.until_backend("cuda")
    cuda.machine.devices = (pieces.CPU_DEVICE,)
    await cuda.until_backend("cpu", "the driver knows no device")
    assert len(cuda.machine.trials) == 1
    cuda.machine.devices = (pieces.gpu(), pieces.CPU_DEVICE)
    await cuda.until_backend("cuda")


async def test_a_driver_that_hangs(cuda: Bench) -> None:
    """The call never comes back, and does not keep the loss from being told."""
    cuda.start()
    await cuda.until_backend("cuda")
    cuda.machine.driver_answers.clear()
    await cuda.until_backend("cpu", "have not answered for 0.3 s")
    assert not cuda.runtime.proof.passed
    cuda.machine.driver_answers.set()
    cuda.clock.advance(61.0)
    await cuda.until_backend("cuda")


async def test_silent_fallback_after_suspend(cuda: Bench) -> None:
    """The driver still lists the device, the engine does not."""
    cuda.start()
    await cuda.until_backend("cuda")
    cuda.machine.backend = replace(cuda.machine.backend, listed=())
    cuda.machine.asleep_s = 3600.0
    await cuda.until_backend("cpu", "models would run on the CPU")


async def test_silent_fallback_without_any_other_sign(cuda: Bench) -> None:
    cuda.start()
    await cuda.until_backend("cuda")
    cuda.machine.backend = replace(cuda.machine.backend, listed=())
    await cuda.until_backend("cpu", "models would run on the CPU")


async def test_silent_fallback_at_the_start(cuda: Bench) -> None:
    cuda.machine.running = replace(
        cuda.machine.running, buffers=(("CPU_Mapped", 4.85),), driver_sees=False
    )
    cuda.start()
    await cuda.until_backend("cpu", "its weights lie in CPU_Mapped")


async def test_a_new_driver_is_a_reason(cuda: Bench) -> None:
    cuda.start()
    await cuda.until_backend("cuda")
    newer = replace(pieces.gpu(), driver="590.10")
    cuda.machine.running = replace(cuda.machine.running, driver_sees=False, driver_said="it names")
    cuda.machine.devices = (newer, pieces.CPU_DEVICE)
    await cuda.until_backend("cpu", "no process of ours")
    assert cuda.machine.trials[-1].limit_s == LIMIT_S


async def test_time_is_a_reason_and_failure_is_tried_again_sooner(cuda: Bench) -> None:
    cuda.machine.running = replace(cuda.machine.running, generated=False)
    cuda.start()
    await cuda.until_backend("cpu", "no model answered")
    cuda.machine.running = pieces.running()
    cuda.clock.advance(61.0)
    await cuda.until_backend("cuda")
    checked_at = cuda.runtime.proof.checked_at
    cuda.clock.advance(3601.0)
    await cuda.until(lambda: cuda.runtime.proof.checked_at > checked_at, "another proof")
    assert cuda.runtime.backend == "cuda"


async def test_another_engine_starts_from_nothing(cuda: Bench) -> None:
    cuda.start()
    await cuda.until_backend("cuda")
    cuda.machine.may_run.clear()
    cuda.find(record("cuda", "e2"))
    assert (cuda.runtime.id, cuda.runtime.backend) == ("e2", "cpu")
    cuda.machine.may_run.set()
    await cuda.until_backend("cuda")
    assert cuda.runtime.id == "e2"


async def test_an_engine_found_again_keeps_its_proof(cuda: Bench) -> None:
    cuda.start()
    await cuda.until_backend("cuda")
    cuda.find(cuda.record)
    assert cuda.runtime.backend == "cuda"


async def test_a_device_full_of_served_models_is_not_taken_for_lost(cuda: Bench) -> None:
    cuda.start()
    await cuda.until_backend("cuda")
    cuda.serving = frozenset({77})
    cuda.machine.usage = Usage({77: 130 << 30})
    cuda.machine.running = RuntimeEvidence("CUDA0", no_memory=True, problem="out of memory")
    before = cuda.runtime.proof.checked_at
    cuda.clock.advance(3601.0)
    await cuda.until(lambda: cuda.runtime.proof.checked_at > before, "another proof")
    assert cuda.runtime.backend == "cuda"
    assert "full of models that are served" in " ".join(cuda.runtime.proof.evidence)
    cuda.machine.usage = Usage()
    cuda.clock.advance(3601.0)
    await cuda.until_backend("cpu", "out of memory")


async def test_a_stop_does_not_wait_for_a_run(cuda: Bench) -> None:
    cuda.machine.may_run.clear()
    cuda.start()
    await cuda.until(lambda: cuda.runtime.proof.level == "backend", "the run begins")
    await cuda.stop()


async def test_what_cannot_be_looked_at_now_is_looked_at_later(cuda: Bench) -> None:
    looks, failing = cuda.machine.looks(), [True]

    def weights() -> Path:
        if failing:
            raise EngineRejected("no space for the model")
        return Path("/models/builtin.gguf")

    cuda.prover._looks = replace(looks, weights=weights)
    cuda.start()
    await cuda.until(lambda: cuda.runtime.proof.level == "backend", "two layers")
    failing.clear()
    cuda.clock.advance(61.0)
    await cuda.until_backend("cuda")


# -- --require-gpu --------------------------------------------------------------------------------


async def test_a_gpu_that_is_required_and_there(cuda: Bench) -> None:
    await cuda.prover.require_gpu()
    assert cuda.runtime.backend == "cuda"


async def test_a_gpu_that_is_required_and_not_proved(cuda: Bench) -> None:
    cuda.machine.backend = replace(cuda.machine.backend, listed=())
    with pytest.raises(GpuRequired, match="models would run on the CPU") as caught:
        await cuda.prover.require_gpu()
    assert caught.value.exit_code == 78


async def test_an_engine_for_the_cpu_is_no_gpu(cpu: Bench) -> None:
    with pytest.raises(GpuRequired, match="built for the CPU"):
        await cpu.prover.require_gpu()


async def test_no_engine_at_all_is_no_gpu(cuda: Bench) -> None:
    cuda.missing = True
    with pytest.raises(GpuRequired, match=r"no llama\.cpp engine"):
        await cuda.prover.require_gpu()
