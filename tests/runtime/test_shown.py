"""What is shown of what an engine takes: its word, as far as the proof bears it out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.ids import InstanceId, ModelId, NodeId, RuntimeId
from meshd.runtime.child_events import ChildState
from meshd.runtime.hosting import Entry
from meshd.runtime.hosting_events import LoadOptions
from meshd.runtime.reported import MemoryReport
from meshd.runtime.shown import model_view, proved_memory
from meshd.runtime.supervisor import EngineReport
from meshd.view import (
    ModelState,
    NodeState,
    NodeView,
    Part,
    ProofView,
    RuntimeView,
    SplitPlan,
    WorkerShare,
)
from meshd.view.shape import MemoryParts

NODE = NodeView(NodeId("n"), "n", "1", "member", NodeState.READY, 0.0, "127.0.0.1:9337", None)
PROOF = ProofView("runtime", True, 0.0, ())
GPU = RuntimeView(RuntimeId("r"), "cuda", "b", None, "/e", (), PROOF, built_for="cuda")
CPU = replace(GPU, backend="cpu")
ON_GPU = MemoryReport({"CPU": MemoryParts(weights=10), "CUDA0": MemoryParts(weights=90)}, (5, 5))
ON_CPU = MemoryReport({"CPU": MemoryParts(weights=100)}, (5, 5))
READY = EngineReport(
    model=ModelId("m"),
    state=ChildState.READY,
    reason=None,
    instance=InstanceId("~1"),
    socket_path="/s",
    pid=7,
    attempt=1,
    slots=4,
    context_length=512,
    progress=None,
    degraded=None,
    retry_at=None,
    evidence=(),
)
ENTRY = Entry(ModelId("m"), "m.gguf", LoadOptions(), ModelState.READY)


def test_memory_of_a_proved_device_is_shown() -> None:
    view = model_view(ENTRY, READY, proved_memory(ON_GPU, GPU), NODE, 3, 0.0)
    (host,) = view.hosts
    assert dict(host.memory) == {"CPU": 10, "CUDA0": 90}
    assert (host.offloaded, view.reason) == ((5, 5), None)
    assert [t.slots for t in view.targets] == [4]


def test_workers_are_shown_while_they_are_asked_and_after() -> None:
    part = Part(NodeId("b"), "b", (("CUDA0", 90),), (9,), 1, True, 0.9)
    options = LoadOptions(split=SplitPlan((part,), beside=1))
    entry = replace(ENTRY, options=options, state=ModelState.LOADING, reason="asking b for memory")
    asking = replace(READY, state=ChildState.STARTING, instance=None, socket_path=None)
    view = model_view(entry, asking, None, NODE, 3, 0.0)
    (host,) = view.hosts
    assert host.workers == (WorkerShare(NodeId("b"), "b", 0.9, 90),)
    assert (view.reason, view.targets) == ("asking b for memory", ())
    ready = replace(entry, state=ModelState.READY)
    (host,) = model_view(ready, READY, proved_memory(ON_CPU.own, CPU), NODE, 3, 0.0).hosts
    assert (len(host.workers), dict(host.memory)) == (1, {"CPU": 100})


def test_layers_that_did_not_fit_are_said() -> None:
    part = replace(ON_GPU, offloaded=(3, 5))
    view = model_view(ENTRY, READY, proved_memory(part, GPU), NODE, 3, 0.0)
    assert view.reason == "slow: 2 of 5 layers run on the CPU, for want of device memory"
    worse = replace(READY, degraded="a context of 2048 tokens")
    reason = model_view(ENTRY, worse, proved_memory(part, GPU), NODE, 3, 0.0).reason
    assert reason == "degraded: a context of 2048 tokens"


def test_an_engine_for_the_cpu_that_says_it_offloads_is_not_repeated() -> None:
    (host,) = model_view(ENTRY, READY, proved_memory(ON_CPU, CPU), NODE, 3, 0.0).hosts
    assert (dict(host.memory), host.offloaded) == ({"CPU": 100}, None)


@pytest.mark.parametrize("runtime", [CPU, None])
def test_a_device_that_is_not_proved_is_not_spoken_of(runtime: RuntimeView | None) -> None:
    (host,) = model_view(ENTRY, READY, proved_memory(ON_GPU, runtime), NODE, 3, 0.0).hosts
    assert (host.memory, host.offloaded) == ((), None)
