"""The seven steps of `meshd doctor`: each lie of an engine is caught by the step it belongs to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshd.cli.checks import Surroundings, examine
from meshd.cli.client import AdminClient
from meshd.config import Config, load
from meshd.kernel.findings import Finding, Verdict
from meshd.runtime.proof.evidence import FileSeen
from meshd.runtime.record import RuntimeRecord
from meshd.runtime.registry import Registry
from meshd.view import DeviceView
from tests.cli.patients import CPU, CUDA_CACHE, H200, LISTED, built_engine, machine
from tests.runtime.fake_engine import VERSION, make_engine

SEVEN = ("toolchain", "backend", "architecture", "cache flags", "binaries", "installed", "gpu")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def configure(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no llama-server to fall back to

    def make(**flags: Any) -> Config:
        usual = {"data_dir": str(tmp_path / "data"), "listen": "127.0.0.1:0"}
        environ = {"HOME": "/", "XDG_CACHE_HOME": str(cache), "MESHD_PEER_LISTEN": "127.0.0.1:0"}
        return load(usual | flags, environ=environ).config

    return make


def looked(config: Config, around: Surroundings, **more: Any) -> dict[str, Finding]:
    return {f.step: f for f in examine(config, surroundings=around, **more)}


def gpu_machine(tmp_path: Path, **changes: Any) -> Surroundings:
    return machine(tmp_path, **{"devices": (H200, CPU), "listed": (LISTED,)} | changes)


def failed(found: dict[str, Finding]) -> list[str]:
    return [step for step, finding in found.items() if finding.state is Verdict.FAILED]


def test_a_gpu_engine_that_is_what_it_claims(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    record = built_engine(cache)
    found = looked(configure(), gpu_machine(tmp_path))
    assert failed(found) == []
    assert found["engine"].evidence.startswith(f"{record.id}: ")
    assert found["backend"].evidence == "built for cuda, loads cpu, cuda, rpc"
    assert found["architecture"].evidence == "built for 90, which runs on NVIDIA H200 (9.0)"
    assert "GGML_CUDA=ON, GGML_CUDA_FA=ON, GGML_CUDA_FA_ALL_QUANTS=ON" in (
        found["cache flags"].evidence
    )
    assert "sha256" in found["binaries"].evidence
    assert "have the hash that was recorded" in found["installed"].evidence
    assert found["gpu"].evidence == LISTED


# -- 1: toolchain ---------------------------------------------------------------------------------


def test_what_a_build_would_need(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    def no_nvcc(name: str) -> str | None:
        return None if name == "nvcc" else f"/usr/bin/{name}"

    finding = looked(configure(), gpu_machine(tmp_path, which=no_nvcc))["toolchain"]
    assert finding.state is Verdict.FAILED, "there is no engine, and a GPU to build one for"
    assert finding.evidence == "a build for cuda lacks the CUDA toolkit's nvcc"
    assert "apt install" in str(finding.remedy)
    found = looked(configure(), machine(tmp_path, which=no_nvcc))
    assert found["toolchain"].evidence.startswith("a build for cpu finds /usr/bin/c++")
    built_engine(cache)
    assert looked(configure(), gpu_machine(tmp_path))["toolchain"].state is Verdict.SKIPPED
    asked = looked(configure(), machine(tmp_path, which=no_nvcc), backend="cuda")
    assert asked["toolchain"].state is Verdict.FAILED


def test_no_engine_at_all(configure: Callable[..., Config], tmp_path: Path) -> None:
    found = looked(configure(), gpu_machine(tmp_path))
    assert failed(found) == ["engine"]
    assert "meshd runtime build --backend cuda" in str(found["engine"].remedy)
    assert {found[step].state for step in SEVEN[1:]} == {Verdict.SKIPPED}


# -- 2 and 3: for what it was built ---------------------------------------------------------------


def test_a_cpu_engine_on_a_machine_with_a_gpu(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    built_engine(cache, "cpu")
    found = looked(configure(), gpu_machine(tmp_path, listed=()))
    assert failed(found) == ["backend"]
    assert "built for the CPU, and this machine has NVIDIA H200" in found["backend"].evidence
    assert "--backend cuda" in str(found["backend"].remedy)


@pytest.mark.parametrize(
    "device",
    [
        replace(H200, problem="it is bound to nouveau"),
        replace(H200, name="AMD Radeon Graphics", backend="rocm", unified=True),
    ],
)
def test_a_cpu_engine_beside_a_gpu_that_is_none(
    configure: Callable[..., Config], tmp_path: Path, cache: Path, device: DeviceView
) -> None:
    built_engine(cache, "cpu")
    assert failed(looked(configure(), gpu_machine(tmp_path, devices=(device, CPU)))) == []


def test_a_gpu_engine_without_the_library(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    built_engine(cache)
    around = gpu_machine(tmp_path, binary={"linked": ("cpu", "rpc")})
    finding = looked(configure(), around)["backend"]
    assert finding.state is Verdict.FAILED
    assert "loads no library of it (only cpu, rpc)" in finding.evidence


def test_an_adopted_engine_is_known_by_its_libraries(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    directory = make_engine(tmp_path / "own")
    around = gpu_machine(tmp_path, listed=(), binary={"linked": ("cpu", "cuda")})
    found = looked(configure(runtime_dir=str(directory)), around)
    assert failed(found) == ["gpu"]
    assert "built for cuda" in found["backend"].evidence
    assert found["cache flags"].state is Verdict.SKIPPED


@pytest.mark.parametrize(
    ("built", "capability", "state"),
    [
        ("121", "12.1", Verdict.PASSED),
        ("121a-real", "12.1", Verdict.PASSED),
        ("90;100", "9.0", Verdict.PASSED),
        ("90-virtual", "12.1", Verdict.PASSED),
        ("90-real", "12.1", Verdict.FAILED),
        ("121", "9.0", Verdict.FAILED),
        ("", "9.0", Verdict.SKIPPED),
    ],
)
def test_architectures(
    configure: Callable[..., Config],
    tmp_path: Path,
    cache: Path,
    built: str,
    capability: str,
    state: Verdict,
) -> None:
    built_engine(cache, cache=CUDA_CACHE | {"CMAKE_CUDA_ARCHITECTURES": built})
    device = replace(H200, compute_capability=capability)
    finding = looked(configure(), gpu_machine(tmp_path, devices=(device, CPU)))["architecture"]
    assert finding.state is state
    if state is Verdict.FAILED:
        assert f"compute capability {capability}" in finding.evidence
        assert f"--cuda-arch {capability.replace('.', '')}`" in str(finding.remedy)


# -- 4 and 5: flags and files ---------------------------------------------------------------------


@pytest.mark.parametrize("flag", CUDA_CACHE)
def test_each_flag_that_is_off(
    configure: Callable[..., Config], tmp_path: Path, cache: Path, flag: str
) -> None:
    flags = CUDA_CACHE | {flag: "" if flag.startswith("CMAKE") else "OFF"}
    built_engine(cache, cache=flags)
    finding = looked(configure(), gpu_machine(tmp_path))["cache flags"]
    assert finding.state is Verdict.FAILED
    assert f"{flag}={flags[flag] or '(nothing)'}" in finding.evidence
    assert "meshd runtime build --backend cuda" in str(finding.remedy)


def test_binaries_older_than_their_cache(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    at = 1_764_000_000
    files = [
        {"name": name, "sha256": "0" * 64, "size": 1, "mtime_ns": (at + after) * 10**9}
        for name, after in (("llama-server", -3600), ("libggml-cuda.so", 60))
    ]
    built_engine(cache, cache_written_at=float(at), built_files=files)
    finding = looked(configure(), gpu_machine(tmp_path))["binaries"]
    assert finding.state is Verdict.FAILED
    assert finding.evidence.startswith("llama-server: older than the CMake cache of 2025-11-24")
    shutil.rmtree(cache)
    built_engine(cache, cache_written_at=float(at), built_files=files[1:])
    assert (
        "after its CMake cache" in looked(configure(), gpu_machine(tmp_path))["binaries"].evidence
    )


def test_the_build_tree_of_somebody_else(configure: Callable[..., Config], tmp_path: Path) -> None:
    directory = make_engine(tmp_path / "own")
    seen = {"cache_written_at": 2000.0, "built_at": 1000.0, "cmake_cache": (("GGML_RPC", "OFF"),)}
    around = machine(tmp_path, binary=seen)
    found = looked(configure(runtime_dir=str(directory)), around)
    assert failed(found) == ["cache flags", "binaries"]
    assert "build it again and put it into" in str(found["binaries"].remedy)


# -- 6: installed = fresh -------------------------------------------------------------------------


def test_an_old_binary_put_back(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    record = built_engine(cache)
    server = Path(record.server_path)
    server.write_text(server.read_text() + "# of another day\n")
    found = looked(configure(), gpu_machine(tmp_path))
    assert "engine" in failed(found), "a start passes over it"
    assert found["installed"].state is Verdict.FAILED
    assert f"{server}: not the file that was built" in found["installed"].evidence


def test_an_engine_that_changed_and_is_not_wanted(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    old = built_engine(cache, "cpu")
    chosen = built_engine(cache)
    Path(old.server_path).unlink()
    assert looked(configure(), gpu_machine(tmp_path))["installed"].state is Verdict.PASSED
    Path(chosen.server_path).write_text("#!/bin/sh\n")
    built_engine(cache, "vulkan", cache={})
    registry = Registry(cache)
    (registry.directory / "current").write_text(f"{chosen.id}\n")
    finding = looked(configure(), gpu_machine(tmp_path))["installed"]
    assert finding.state is Verdict.FAILED
    assert f"not the file that was built for {chosen.id}" in finding.evidence


def test_an_old_binary_put_back_with_size_and_time_of_the_new_one(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    server = built_engine(cache).server_path
    files = (FileSeen(server, "a" * 64, "b" * 64),)
    found = looked(configure(), gpu_machine(tmp_path, binary={"files": files}))
    assert found["engine"].state is Verdict.PASSED
    assert f"{server} is not the file that was built (sha256 bbbbbbbbbbbb…" in (
        found["installed"].evidence
    )
    assert found["gpu"].state is Verdict.SKIPPED


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((FileSeen("/e/llama-server", "a" * 64, None),), "/e/llama-server is gone"),
        ((FileSeen("/e/libggml-cuda.so", None, "a" * 64),), "does not belong to what was built"),
    ],
)
def test_files_that_went_or_came(
    configure: Callable[..., Config],
    tmp_path: Path,
    cache: Path,
    files: tuple[FileSeen, ...],
    words: str,
) -> None:
    built_engine(cache)
    finding = looked(configure(), gpu_machine(tmp_path, binary={"files": files}))["installed"]
    assert finding.state is Verdict.FAILED
    assert words in finding.evidence


def test_a_file_that_is_missing(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    Path(built_engine(cache).server_path).unlink()
    finding = looked(configure(), gpu_machine(tmp_path))["binaries"]
    assert finding.state is Verdict.FAILED
    assert "llama-server is missing" in finding.evidence


@pytest.mark.parametrize(
    ("executed", "words"),
    [("/opt/old/llama-server", "/opt/old/llama-server"), (None, "what could not be seen")],
)
def test_another_program_behind_the_name(
    configure: Callable[..., Config],
    tmp_path: Path,
    cache: Path,
    executed: str | None,
    words: str,
) -> None:
    built_engine(cache)
    finding = looked(configure(), gpu_machine(tmp_path, binary={"executed": executed}))["installed"]
    assert finding.state is Verdict.FAILED
    assert f"really runs {words}, which is no file of this engine" in finding.evidence


def test_a_version_that_is_not_the_recorded_one(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    built_engine(cache)
    around = gpu_machine(tmp_path, binary={"version_said": "0.4.0 (build 1)"})
    finding = looked(configure(), around)["installed"]
    assert finding.state is Verdict.FAILED
    assert f"it says 0.4.0 (build 1); its record says {VERSION[9:]}" in finding.evidence


# -- 7: the runtime sees the GPU ------------------------------------------------------------------


def test_silent_fallback_to_the_cpu(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    built_engine(cache)
    found = looked(configure(), gpu_machine(tmp_path, listed=()))
    assert failed(found) == ["gpu"]
    assert "models would run on the CPU" in found["gpu"].evidence
    assert "the driver has NVIDIA H200" in found["gpu"].evidence


def test_devices_hidden_by_a_variable(
    configure: Callable[..., Config],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built_engine(cache)
    config = configure()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = looked(config, gpu_machine(tmp_path, listed=()))["gpu"]
    assert "CUDA_VISIBLE_DEVICES=''" in finding.evidence
    assert finding.remedy == "unset CUDA_VISIBLE_DEVICES where meshd is started"


def test_no_driver(configure: Callable[..., Config], tmp_path: Path, cache: Path) -> None:
    built_engine(cache)
    finding = looked(configure(), gpu_machine(tmp_path, devices=(CPU,), listed=()))["gpu"]
    assert "no driver lists a device" in finding.evidence
    assert "nvidia-smi" in str(finding.remedy)


def test_a_device_that_is_lost(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    built_engine(cache)
    lost = replace(H200, problem="it has fallen off the bus; restart the machine")
    finding = looked(configure(), gpu_machine(tmp_path, devices=(lost, CPU)))["gpu"]
    assert finding.state is Verdict.FAILED
    assert "fallen off the bus" in finding.evidence


def daemon_with(record: RuntimeRecord, **proof: Any) -> dict[str, Any]:
    from meshd import __version__

    passed: dict[str, Any] = {"level": "runtime", "passed": True, "evidence": [], "problem": None}
    return {
        "node": {"name": "n", "state": "ready", "version": __version__, "listen": "127.0.0.1:1",
                 "peer_listen": None},
        "mesh": {"name": "home", "members": 1, "alive": 1, "state": "member"},
        "models": [],
        "peers": [],
        "runtime": {
            "id": record.id,
            "backend": "cuda" if proof.get("passed", True) else "cpu",
            "binaries": [b.model_dump(include={"name", "sha256"}) for b in record.binaries],
            "proof": passed | proof,
        },
    }  # fmt: skip


def test_what_the_daemon_proved(
    configure: Callable[..., Config],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = built_engine(cache)
    answer = daemon_with(record)
    monkeypatch.setattr(AdminClient, "get", lambda _self, _path: answer)
    found = looked(configure(), gpu_machine(tmp_path))
    assert found["gpu"].evidence == f"{LISTED}; the daemon proved it up to runtime"
    assert found["installed"].evidence.endswith("the daemon runs them")
    answer = daemon_with(record, passed=False, problem="only 3 of 33 layers went to CUDA0")
    found = looked(configure(), gpu_machine(tmp_path))
    assert found["gpu"].evidence == (
        "the daemon runs models on cpu: only 3 of 33 layers went to CUDA0"
    )
    answer["runtime"]["binaries"][0]["sha256"] = "f" * 64
    finding = looked(configure(), gpu_machine(tmp_path))["installed"]
    assert finding.state is Verdict.FAILED
    assert "restart the daemon" in str(finding.remedy)


def test_a_client_needs_none_of_it(configure: Callable[..., Config], tmp_path: Path) -> None:
    found = looked(configure(client=True), gpu_machine(tmp_path))
    assert {found[step].state for step in (*SEVEN, "engine", "gpu access")} == {Verdict.SKIPPED}


def test_what_cannot_be_read_is_no_good_news(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    built_engine(cache)

    def refuse(record: RuntimeRecord) -> Any:
        raise PermissionError(13, os.strerror(13), record.server_path)

    finding = looked(configure(), gpu_machine(tmp_path, read_binary=refuse))["installed"]
    assert finding.state is Verdict.FAILED
    assert "Permission denied" in finding.evidence
