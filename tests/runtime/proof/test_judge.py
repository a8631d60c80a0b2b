"""The judge: every lie by name, and no evidence with a missing piece gives a passed layer."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.runtime.proof.architectures import runs_on
from meshd.runtime.proof.backends import devices_of, meant_for
from meshd.runtime.proof.evidence import BackendEvidence, Evidence, FileSeen
from meshd.runtime.proof.judge import judge
from meshd.view import DeviceView, Layer
from tests.runtime.proof.pieces import (
    AT,
    CPU_DEVICE,
    LISTED,
    SERVER,
    backend,
    binary,
    gpu,
    running,
    sound,
)


def test_an_engine_that_is_all_it_claims_to_be() -> None:
    verdict = judge(sound())
    assert [layer.layer for layer in verdict.layers] == list(Layer)
    assert all(layer.passed and layer.problem is None for layer in verdict.layers)
    assert all(layer.checked_at == AT and layer.evidence for layer in verdict.layers)
    assert verdict.backend == "cuda"
    assert (verdict.proof.level, verdict.proof.passed) == ("runtime", True)
    said = " ".join(verdict.proof.evidence)
    for words in ("sha256 aa", "GGML_CUDA=ON", "0.5.0", "RPC protocol 7.0.0", "CUDA0", "GPU-5d1c",
                  "offloaded 5/5", "pid 4711", "900.0 tokens/s", "CUDA0: 4.60 MiB"):  # fmt: skip
        assert words in said


def test_an_engine_for_the_cpu_needs_no_run_of_its_own() -> None:
    before = judge(replace(sound("cpu"), runtime=None))
    assert (before.backend, before.proof.level, before.proof.passed) == ("cpu", "backend", True)
    after = judge(sound("cpu"))
    assert (after.backend, after.proof.level, after.proof.passed) == ("cpu", "runtime", True)


def test_an_engine_for_the_cpu_on_a_machine_with_a_gpu_says_so() -> None:
    seen = replace(backend("cpu"), devices=(gpu(), CPU_DEVICE))
    verdict = judge(replace(sound("cpu"), backend=seen))
    assert verdict.backend == "cpu"
    assert "does not use NVIDIA H200" in " ".join(verdict.proof.evidence)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"executed": None}, "could not be seen"),
        ({"executed": "/usr/local/bin/llama-server"}, "really runs /usr/local/bin/llama-server"),
        ({"executed": f"{SERVER} (deleted)"}, "none of the files"),
        ({"files": ()}, "no file"),
        ({"files": (FileSeen(SERVER, "aa", "old"),)}, "not the file that was built"),
        ({"files": (FileSeen(SERVER, "aa", None),)}, "is gone"),
        ({"files": (FileSeen(SERVER, "aa", "aa", "bb"),)}, "the build linked another"),
        (
            {"files": (FileSeen(SERVER, "aa", "aa"), FileSeen("/opt/engine/libx.so", None, "c"))},
            "libx.so does not belong",
        ),
        ({"version_said": None}, "does not answer --version"),
        ({"version_said": "0.4.0 (build 1)"}, "says it is 0.4.0"),
        ({"cmake_cache": (("GGML_CUDA", "OFF"),)}, "GGML_CUDA=OFF"),
        ({"cmake_cache": ()}, "GGML_CUDA=nothing"),
        ({"cmake_cache": None}, "left no CMakeCache"),
        ({"linked": ("cpu", "rpc")}, "loads no library of cuda"),
        ({"linked": None}, "cannot be read"),
        ({"built_at": 99.0}, "older than their CMakeCache"),
        ({"problem": "llama-server cannot be executed"}, "cannot be executed"),
    ],
)
def test_a_binary_that_is_not_what_it_claims(change: dict[str, Any], words: str) -> None:
    verdict = judge(replace(sound(), binary=replace(binary(), **change)))
    (layer,) = verdict.layers
    assert (verdict.backend, verdict.proof.level) == ("cpu", "none")
    assert not verdict.proof.passed
    assert words in str(layer.problem)
    assert verdict.proof.problem == layer.problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"listed": None}, "does not answer --list-devices"),
        ({"listed": ()}, "models would run on the CPU"),
        ({"listed": ("BLAS: OpenBLAS",)}, "models would run on the CPU"),
        ({"devices": (CPU_DEVICE,)}, "the driver knows no device"),
        ({"devices": (gpu(problem="fell off the bus"),)}, "fell off the bus"),
        ({"listed": (*LISTED, LISTED[0].replace("0:", "1:", 1))}, "2 devices (CUDA0, CUDA1)"),
        ({"listed": ("CUDA0: NVIDIA A10 (22731 MiB, 22000 MiB free)",)}, "knows no such device"),
        ({"devices": (gpu("12.1"),), "architectures": "90-real"}, "--cuda-arch 121"),
        ({"devices": (gpu("8.0"),), "architectures": "90"}, "capability 8.0"),
        ({"devices": (gpu(None),)}, "does not tell its compute capability"),
        ({"problem": "--list-devices did not answer within 20 s"}, "did not answer"),
    ],
)
def test_a_device_its_witnesses_do_not_agree_on(change: dict[str, Any], words: str) -> None:
    verdict = judge(replace(sound(), backend=replace(backend(), **change)))
    assert [layer.passed for layer in verdict.layers] == [True, False]
    assert (verdict.backend, verdict.proof.level) == ("cpu", "binary")
    assert words in str(verdict.proof.problem)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"executed": "/old/llama-server"}, "really runs /old/llama-server"),
        ({"executed": None}, "could not be seen"),
        ({"device": "CPU"}, "no device of cuda"),
        ({"offloaded": None}, "did not say how many layers"),
        ({"offloaded": (0, 5)}, "only 0 of 5 layers"),
        ({"offloaded": (4, 5)}, "only 4 of 5 layers"),
        ({"buffers": (("CPU_Mapped", 4.85),)}, "its weights lie in CPU_Mapped"),
        ({"buffers": (("CUDA01", 4.6), ("CUDA_Host", 1.0))}, "its weights lie in CUDA01"),
        ({"buffers": ()}, "nowhere it told of"),
        ({"buffers": (("CUDA0", 0.0),)}, "computes on the CPU"),
        ({"generated": False}, "no model answered on CUDA0"),
        ({"driver_sees": False, "driver_said": "it names no process"}, "it names no process"),
        ({"driver_sees": None}, "no process of ours (pid 4711)"),
        ({"problem": "the engine ended with status 1"}, "status 1"),
    ],
)
def test_a_run_that_proves_nothing(change: dict[str, Any], words: str) -> None:
    verdict = judge(replace(sound(), runtime=replace(running(), **change)))
    assert [layer.passed for layer in verdict.layers] == [True, True, False]
    assert (verdict.backend, verdict.proof.level) == ("cpu", "backend")
    assert words in str(verdict.proof.problem)


def test_ready_without_a_generation_is_no_proof() -> None:
    for built_for in ("cpu", "cuda"):
        seen = replace(running(built_for), generated=False)
        verdict = judge(replace(sound(built_for), runtime=seen))
        assert not verdict.proof.passed
        assert "no model answered" in str(verdict.proof.problem)


def test_a_device_without_a_run_is_not_proved() -> None:
    verdict = judge(replace(sound(), runtime=None))
    assert (verdict.backend, verdict.proof.level, verdict.proof.passed) == ("cpu", "backend", False)
    assert "no model has been seen to run on cuda" in str(verdict.proof.problem)


def test_an_adopted_engine_is_for_what_its_libraries_are_for() -> None:
    adopted = replace(binary(), adopted=True)
    assert meant_for("cpu", adopted) == "cuda"
    assert meant_for("cpu", replace(adopted, linked=("cpu", "hip"))) == "rocm"
    assert meant_for("cuda", replace(adopted, linked=None)) == "cuda"
    assert meant_for("cpu", binary()) == "cpu"


def test_an_adopted_engine_without_a_cache_is_proved_by_its_run() -> None:
    hearsay = replace(binary(), adopted=True, cmake_cache=None, linked=None, cache_written_at=None)
    evidence = replace(sound(), binary=hearsay, backend=replace(backend(), architectures=None))
    assert judge(evidence).backend == "cuda"
    assert judge(replace(evidence, runtime=None)).backend == "cpu"


def test_a_backend_whose_driver_tells_nothing_needs_no_word_of_it() -> None:
    files = replace(binary(), linked=("cpu", "vulkan"), cmake_cache=(("GGML_VULKAN", "ON"),))
    listed = replace(backend(), listed=("Vulkan0: A GPU (8 MiB)",), devices=(CPU_DEVICE,))
    ran = replace(running(), device="Vulkan0", buffers=(("Vulkan0", 4.0),), driver_sees=None)
    assert judge(Evidence("vulkan", AT, files, listed, ran)).backend == "vulkan"
    denied = replace(ran, driver_sees=False)
    assert judge(Evidence("vulkan", AT, files, listed, denied)).backend == "cpu"


def test_a_jetson_whose_driver_can_tell_nothing() -> None:
    """The engine's word and the buffers have to do, and the proof says that there is no other."""
    listed = ("CUDA0: Orin (62841 MiB, 58000 MiB free)",)
    device = DeviceView("Orin", "cuda", None, 61 << 30, 50 << 30, True, None, engine_name="CUDA0")
    seen = BackendEvidence(listed, (device, CPU_DEVICE), "87", blind="this Jetson's cannot")
    ran = replace(running(), driver_sees=None, driver_said="")
    verdict = judge(Evidence("cuda", AT, binary(), seen, ran))
    assert (verdict.backend, verdict.proof.passed) == ("cuda", True)
    assert "no second witness: this Jetson's cannot" in verdict.proof.evidence
    able = replace(seen, blind=None)
    problem = judge(Evidence("cuda", AT, binary(), able, ran)).proof.problem
    assert problem is not None
    assert "compute capability" in problem
    on_cpu = replace(ran, buffers=(("CPU_Mapped", 4.8),))
    verdict = judge(Evidence("cuda", AT, binary(), seen, on_cpu))
    assert (verdict.backend, verdict.proof.passed) == ("cpu", False)


def test_a_jetson_whose_driver_adds_to_the_name() -> None:
    device = replace(gpu("8.7"), name="Orin (nvgpu)", unified=True)
    listed = ("CUDA0: Orin (62841 MiB, 58000 MiB free)",)
    seen = BackendEvidence(listed, (device, CPU_DEVICE), "87")
    verdict = judge(Evidence("cuda", AT, binary(), seen, running()))
    assert verdict.proof.passed, verdict.proof.problem


def test_a_device_the_engine_is_kept_from_does_not_matter() -> None:
    other = replace(gpu("7.0"), name="Tesla V100", uuid="GPU-77")
    seen = replace(backend(), devices=(gpu(), other, CPU_DEVICE))
    assert judge(replace(sound(), backend=seen)).backend == "cuda"


# -- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("9.0", "90", True),
        ("12.1", "121", True),
        ("12.1", "121a", True),
        ("12.1", "121a-real", True),
        ("12.0", "121a", False),
        ("12.1", "120f", True),
        ("12.0", "121f", False),
        ("12.1", "120", True),
        ("12.0", "121", False),
        ("12.0", "121-real", False),
        ("8.9", "80-real", True),
        ("8.0", "89", False),
        ("9.0", "80-real", False),
        ("9.0", "80-virtual", True),
        ("9.0", "80", True),
        ("8.0", "90-virtual", False),
        ("9.0", "80-real;90-real", True),
        ("10.0", "80-real;90-real", False),
        ("9.0", "native", True),
        ("9.0", "all-major", True),
        ("9.0", "OFF", False),
        ("9.0", "", False),
        ("gfx1100", "90", False),
    ],
)
def test_what_code_runs_on_a_device(capability: str, architectures: str, runs: bool) -> None:
    assert runs_on(capability, architectures) is runs


def test_names_of_devices() -> None:
    listed = ("CUDA0: a", "CUDA12: b: c", "CPU: d", "Vulkan0: e", "ROCm0: f", "SYCL0: g")
    assert devices_of("cuda", listed) == ("CUDA0", "CUDA12")
    assert devices_of("rocm", listed) == ("ROCm0",)
    assert devices_of("sycl", listed) == ("SYCL0",)


# -- whatever was seen ----------------------------------------------------------------------------

ESSENTIAL = {
    "binary": ("executed", "files", "version_said", "linked", "cmake_cache"),
    "backend": ("listed", "devices"),
    "runtime": ("executed", "offloaded", "buffers", "driver_sees", "generated"),
}
NOTHING: dict[str, Any] = {"files": (), "devices": (), "buffers": (), "generated": False}


@given(
    st.sampled_from(sorted(ESSENTIAL)).flatmap(
        lambda part: st.tuples(st.just(part), st.sampled_from(ESSENTIAL[part]))
    )
)
def test_a_missing_piece_never_passes(missing: tuple[str, str]) -> None:
    part, name = missing
    evidence = sound()
    lacking = replace(getattr(evidence, part), **{name: NOTHING.get(name)})
    verdict = judge(replace(evidence, **{part: lacking}))
    assert not verdict.proof.passed
    assert verdict.backend == "cpu"
    assert verdict.proof.problem


def _variants(part: Any) -> st.SearchStrategy[Any]:
    """Every field as it is, or as nothing."""
    empty: dict[str, Any] = {
        f.name: NOTHING.get(f.name, f.default if not isinstance(f.default, type) else None)
        for f in fields(part)
    }
    kept = {"path", "device", "version_recorded"}
    return st.sets(st.sampled_from([f.name for f in fields(part) if f.name not in kept])).map(
        lambda names: replace(part, **{n: empty[n] for n in names})
    )


@given(
    st.sampled_from(["cuda", "cpu", "vulkan"]),
    _variants(binary()),
    st.none() | _variants(backend()),
    st.none() | _variants(running()),
)
def test_layers_stand_on_each_other(built_for: str, files: Any, listed: Any, ran: Any) -> None:
    verdict = judge(Evidence(built_for, AT, files, listed, ran))
    assert [layer.layer for layer in verdict.layers] == list(Layer)[: len(verdict.layers)]
    assert all(layer.passed for layer in verdict.layers[:-1])
    assert all((layer.problem is None) == layer.passed for layer in verdict.layers)
    assert verdict.backend in ("cpu", built_for)
    if verdict.backend != "cpu":
        assert len(verdict.layers) == 3
        assert verdict.proof.passed
    assert (verdict.proof.problem is None) == verdict.proof.passed
