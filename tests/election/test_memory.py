"""What of a node's memory may be leased, and which readings count."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.election.fit.budget import ACCELERATOR_MARGIN, HOST_MARGIN
from meshd.election.memory import Memory, untried
from meshd.view import DeviceView, Layer, LayerView, ProofView, RuntimeView

MIB, GIB = 1 << 20, 1 << 30
CPU = DeviceView("CPU", "cpu", None, 8 * GIB, 6 * GIB, True, None)
GPU = DeviceView("GPU", "cuda", "GPU-1", 16 * GIB, 15 * GIB, False, "9.0", engine_name="CUDA0")
SPARK = replace(GPU, unified=True, memory_total_bytes=8 * GIB, memory_free_bytes=6 * GIB)
MAIN = 6 * GIB - HOST_MARGIN - 8 * GIB // 32


NAMELESS = replace(GPU, engine_name=None)


def runtime(built_for: str, *layers: tuple[Layer, bool], backend: str = "cpu") -> RuntimeView:
    seen = tuple(LayerView(layer, passed, 0.0, ()) for layer, passed in layers)
    proof = ProofView("none", False, 0.0, (), seen)
    return RuntimeView("e1", backend, "b1", None, "/", (), proof, built_for)


@pytest.mark.parametrize(
    ("engine", "problem", "words"),
    [
        (None, None, "looking for an engine on this machine"),
        (None, "no llama-server; `meshd runtime build`", "no llama-server; `meshd runtime build`"),
        (runtime("cpu"), None, None),
        (runtime("cuda"), None, "its engine is being tried on cuda"),
        (runtime("cuda", (Layer.BINARY, True)), None, "its engine is being tried on cuda"),
        (runtime("cuda", (Layer.BINARY, False)), None, None),
        (runtime("cuda", (Layer.BINARY, True), (Layer.RUNTIME, True)), None, None),
        (runtime("cuda", (Layer.BINARY, True), (Layer.RUNTIME, False)), None, None),
    ],
)
def test_nothing_is_said_before_it_is_known_on_what_models_run(
    engine: RuntimeView | None, problem: str | None, words: str | None
) -> None:
    assert untried(engine, (NAMELESS, CPU), problem) == words


def test_nothing_is_said_before_the_devices_are_known_by_the_engines_names() -> None:
    proved = runtime("cuda", (Layer.BINARY, True), (Layer.RUNTIME, True), backend="cuda")
    assert untried(proved, (NAMELESS, CPU), None) == "its devices are being looked at"
    assert untried(proved, (GPU, CPU), None) is None
    assert untried(proved, (replace(GPU, problem="it is lost"), CPU), None) is None


def test_the_first_reading_counts_even_while_an_engine_loads() -> None:
    memory = Memory(None)
    assert memory.capacity == {}
    assert not memory.measure((), {}, calm=True)
    assert memory.measure((CPU,), {}, calm=False)
    assert memory.capacity == {"CPU": MAIN}


def test_how_fast_memory_is_counts_from_any_reading() -> None:
    memory = Memory(None)
    memory.measure((CPU,), {}, calm=True)
    assert not memory.measure((replace(CPU, memory_free_bytes=4 * GIB),), {}, calm=False)
    fast = replace(CPU, memory_bytes_per_s=60 * 10**9)
    assert memory.measure((replace(fast, memory_free_bytes=4 * GIB),), {}, calm=False)
    assert memory.capacity == {"CPU": MAIN}
    assert [budget.bytes_per_s for budget in memory.budgets] == [60 * 10**9]
    assert not memory.measure((fast,), {}, calm=True)


def test_a_reading_while_an_engine_loads_does_not_count_later_either() -> None:
    memory = Memory(None)
    memory.measure((CPU,), {}, calm=True)
    half_way = (replace(CPU, memory_free_bytes=4 * GIB),)
    assert not memory.measure(half_way, {}, calm=False)
    assert not memory.measure(half_way, {"CPU": 4 * GIB}, calm=True)
    assert memory.capacity == {"CPU": MAIN}
    loaded = (replace(CPU, memory_free_bytes=1 * GIB),)
    assert memory.measure(loaded, {"CPU": 4 * GIB}, calm=True)
    assert memory.capacity == {"CPU": MAIN - GIB}


def test_what_own_engines_hold_is_no_loss() -> None:
    memory = Memory(None)
    memory.measure((CPU,), {}, calm=True)
    assert not memory.measure(
        (replace(CPU, memory_free_bytes=2 * GIB),), {"CPU": 4 * GIB}, calm=True
    )
    assert memory.capacity == {"CPU": MAIN}


def test_free_memory_that_is_never_still_is_no_news() -> None:
    memory = Memory(None)
    memory.measure((CPU,), {}, calm=True)
    last = MAIN // 32
    still = replace(CPU, memory_free_bytes=CPU.memory_free_bytes - last)
    assert not memory.measure((still,), {}, calm=True)
    moved = replace(CPU, memory_free_bytes=CPU.memory_free_bytes - last - 1)
    assert memory.measure((moved,), {}, calm=True)
    assert memory.capacity == {"CPU": MAIN - last - 1}


def test_a_device_that_is_lost_is_news() -> None:
    memory = Memory(None)
    memory.measure((CPU, GPU), {}, calm=True)
    assert memory.capacity == {"CUDA0": 15 * GIB - ACCELERATOR_MARGIN, "CPU": MAIN}
    assert memory.measure((CPU, replace(GPU, problem="it fell off the bus")), {}, calm=True)
    assert memory.capacity == {"CPU": MAIN}


def test_a_limit_is_for_accelerators_if_there_are_any() -> None:
    memory = Memory(GIB)
    memory.measure((CPU, GPU), {}, calm=True)
    assert memory.capacity == {"CUDA0": GIB, "CPU": MAIN}
    memory = Memory(GIB)
    memory.measure((CPU,), {}, calm=True)
    assert memory.capacity == {"CPU": GIB}


def test_main_memory_is_counted_where_it_is() -> None:
    memory = Memory(None)
    assert memory.counted({"CPU": 5, "CUDA0": 3}) == {"CPU": 5, "CUDA0": 3}, "before it is known"
    memory.measure((CPU, GPU), {}, calm=True)
    assert memory.counted({"CPU": 5, "CUDA0": 3}) == {"CPU": 5, "CUDA0": 3}
    memory = Memory(None)
    memory.measure((CPU, SPARK), {}, calm=True)
    assert list(memory.capacity) == ["CUDA0"]
    assert memory.counted({"CPU": 5, "CUDA0": 3}) == {"CUDA0": 8}
