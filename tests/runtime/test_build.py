"""Building: choices, resumption, publication. A toy project stands for llama.cpp."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.errors import BuildFailed, NoSpace
from meshd.runtime.build import build, default_jobs
from meshd.runtime.choices import BuildOptions, cmake_args
from meshd.runtime.record import RuntimeRecord
from meshd.runtime.registry import Registry
from tests.conftest import wait_until
from tests.runtime.processes import ended
from tests.runtime.toy_source import GATE, toy_files, toy_package, toy_tree

GIB = 1 << 30


# -- choices --------------------------------------------------------------------------------------


def test_choices_of_a_cpu_build() -> None:
    arguments = cmake_args(BuildOptions("cpu"), "0c1e570")
    assert {
        *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_RPC=ON", "-DLLAMA_BUILD_TESTS=OFF"),
        *("-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
        *("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"),
        "-DLLAMA_BUILD_COMMIT=0c1e570",
    } <= set(arguments)
    assert not any("CUDA" in argument for argument in arguments)


def test_choices_of_a_cuda_build() -> None:
    arguments = cmake_args(BuildOptions("cuda", cuda_arch="90;121"), "0c1e570")
    assert {
        *("-DGGML_CUDA=ON", "-DGGML_CUDA_FA=ON", "-DGGML_CUDA_FA_ALL_QUANTS=ON"),
        *("-DGGML_CUDA_NCCL=OFF", "-DCMAKE_CUDA_ARCHITECTURES=90;121", "-DGGML_RPC=ON"),
    } <= set(arguments)
    assert "-DGGML_CUDA_NO_VMM=OFF" in arguments
    alone = cmake_args(BuildOptions("cuda", cuda_arch="121", link_driver=False), "0c1e570")
    assert "-DGGML_CUDA_NO_VMM=ON" in alone


@pytest.mark.parametrize(
    ("backend", "flag"),
    [("rocm", "-DGGML_HIP=ON"), ("vulkan", "-DGGML_VULKAN=ON"), ("metal", "-DGGML_METAL=ON")],
)
def test_choices_of_other_backends(backend: str, flag: str) -> None:
    assert flag in cmake_args(BuildOptions(backend), "0c1e570")


@pytest.mark.parametrize(
    ("cpus", "memory", "jobs"),
    [(8, 64 * GIB, 8), (8, 6 * GIB, 4), (8, GIB, 1), (1, 64 * GIB, 1), (4, 0, 4)],
)
def test_compilers_at_once(cpus: int, memory: int, jobs: int) -> None:
    assert default_jobs(cpus, memory) == jobs


# -- building -------------------------------------------------------------------------------------


class Heard:
    """A progress callback that keeps what it heard."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []

    def __call__(self, words: str, fraction: float) -> None:
        self.steps.append((words, fraction))


def toy_build(cache: Path, tree: Path, heard: Heard | None = None) -> RuntimeRecord:
    return build(BuildOptions("cpu", source=str(tree), jobs=2), cache, heard or Heard())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return toy_tree(tmp_path / "tree")


def runtimes(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "meshd" / "runtimes").iterdir())


def test_built_probed_and_published(cache: Path, tree: Path) -> None:
    heard = Heard()
    record = toy_build(cache, tree, heard)
    assert re.fullmatch(r"cpu-unknown-[0-9a-f]{8}", record.id)
    assert record.version == "0.1 (build 1, commit toy)"
    assert record.rpc_protocol == "7.1.2"
    assert record.build is not None
    assert record.build.cmake_cache["GGML_RPC"] == "ON"
    assert record.build.cmake_cache["CMAKE_BUILD_TYPE"] == "Release"
    assert record.build.source == str(tree)
    directory = Path(record.directory)
    assert sorted(p.name for p in directory.iterdir()) == [
        *("ggml-rpc-server", "libggml-toy.so", "libggml-toy.so.0", "libggml-toy.so.0.1"),
        *("llama-bench", "llama-gguf-split", "llama-server", "record.json"),
    ]
    # No build directory, no half-published one; the log stays.
    assert runtimes(cache) == [f".{record.id}.lock", record.id, f"{record.id}.log"]
    fractions = [fraction for words, fraction in heard.steps if words == "compiling"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    registry = Registry(cache)
    assert registry.list() == (record,)
    assert registry.find(None) == record
    assert registry.verify(record.id) == ()


def test_a_published_engine_can_be_moved(cache: Path, tree: Path, tmp_path: Path) -> None:
    record = toy_build(cache, tree)
    moved = tmp_path / "moved"
    Path(record.directory).rename(moved)
    shutil.rmtree(tree)
    done = subprocess.run([moved / "llama-server", "--version"], capture_output=True, text=True)
    assert done.stdout == "version: 0.1 (build 1, commit toy)\n"


def test_the_same_again_builds_nothing(cache: Path, tree: Path) -> None:
    first = toy_build(cache, tree)
    heard = Heard()
    assert toy_build(cache, tree, heard) == first
    assert "compiling" not in {words for words, _ in heard.steps}


def test_a_damaged_engine_is_built_again(cache: Path, tree: Path) -> None:
    first = toy_build(cache, tree)
    Path(first.server_path).unlink()
    second = toy_build(cache, tree)
    assert second.id == first.id
    assert second.unchanged()


def test_a_changed_source_is_another_engine(cache: Path, tree: Path) -> None:
    first = toy_build(cache, tree)
    toy_tree(tree, toy_files(version="version: 0.2"))
    second = toy_build(cache, tree)
    assert second.id != first.id
    assert Registry(cache).find(None).version == "0.2"
    assert Registry(cache).verify(first.id) == ()


def test_built_from_the_index(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    pinned = toy_package(tmp_path / "index")
    record = build(BuildOptions(), cache, Heard(), pinned=pinned)
    assert record.id.startswith("cpu-feedbee-")
    assert record.build is not None
    assert (record.build.source, record.build.source_sha256) == ("toy-engine==1.0", pinned.sha256)


def test_an_error_in_the_source_is_told_and_the_rest_kept(cache: Path, tree: Path) -> None:
    good = (tree / "server.cpp").read_text()
    (tree / "server.cpp").write_text(good + "\nnonsense here;\n")
    with pytest.raises(BuildFailed, match=r"ninja failed .*server\.cpp:\d+:\d+: error: .nonsense"):
        toy_build(cache, tree)
    assert Registry(cache).list() == ()
    assert any(name.endswith(".build") for name in runtimes(cache))


def test_an_error_in_the_project_is_told(cache: Path, tree: Path) -> None:
    (tree / "CMakeLists.txt").write_text('project(x)\nmessage(FATAL_ERROR "needs more cowbell")\n')
    with pytest.raises(BuildFailed, match="needs more cowbell"):
        toy_build(cache, tree)


def test_what_does_not_run_is_not_published(cache: Path, tree: Path) -> None:
    toy_tree(tree, toy_files(help_text="--alias only"))
    with pytest.raises(BuildFailed, match=r"what was built does not run: .*does not know --model"):
        toy_build(cache, tree)
    assert Registry(cache).list() == ()


def test_ninja_settings_of_the_user_do_not_hide_the_steps(
    cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NINJA_STATUS", "%p ")
    heard = Heard()
    toy_build(cache, tree, heard)
    assert ("compiling", 1.0) in heard.steps


def test_no_space(cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(NoSpace, match=r"wants 0\.5 GB .* XDG_CACHE_HOME"):
        toy_build(cache, tree)
    assert runtimes(cache) == []


# -- interruption ---------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A build waits before its last steps until this file is removed."""
    path = tmp_path / "gate"
    path.write_text("")
    monkeypatch.setenv(GATE, str(path))
    yield path
    path.unlink(missing_ok=True)


def at_gate(gate: Path, builder: subprocess.Popen[str] | None = None) -> int:
    """Wait until a build stands at the gate; the pid of what waits there."""
    pid = gate.with_name("gate.pid")

    def there() -> bool:
        if builder is not None and builder.poll() is not None:
            pytest.fail(f"the build ended: {builder.communicate()[1]}")
        return pid.exists() and pid.read_text().endswith("\n")

    wait_until(there, timeout_s=30, what="a build at the gate")
    number = int(pid.read_text())
    pid.unlink()
    return number


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nobody_and_goes_on(
    cache: Path, tree: Path, gate: Path, short_dir: Path, number: signal.Signals
) -> None:
    command = [*(sys.executable, "-m", "meshd", "runtime", "build"), "--backend", "cpu"]
    environ = {**os.environ, "XDG_CACHE_HOME": str(cache), "MESHD_DATA_DIR": str(short_dir)}
    builder = subprocess.Popen(
        [*command, "--source", str(tree), "--jobs", "1"],
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        waiting = at_gate(gate, builder)
        builder.send_signal(number)
        _, said = builder.communicate(timeout=20)
    finally:
        builder.kill()
        builder.wait(10)
        if builder.stderr is not None:
            builder.stderr.close()
    assert builder.returncode == (130 if number is signal.SIGINT else -number)
    if number is signal.SIGINT:
        assert "interrupted; the same command goes on from here" in said
    wait_until(lambda: ended(waiting), what="the end of the compiler")
    assert Registry(cache).list() == ()

    (work,) = (cache / "meshd" / "runtimes").glob(".*.build")
    library = work / "bin" / "libggml-toy.so.0.1"
    built_at = library.stat().st_mtime_ns
    gate.unlink()
    record = toy_build(cache, tree)
    assert record.unchanged()
    # copy2 keeps times: the library of the first run was used, not built again.
    assert (Path(record.directory) / library.name).stat().st_mtime_ns == built_at
    assert not work.exists()


def test_two_builds_of_one_engine(cache: Path, tree: Path, gate: Path) -> None:
    records: list[RuntimeRecord] = []
    heard = (Heard(), Heard())
    threads = [
        threading.Thread(target=lambda h=h: records.append(toy_build(cache, tree, h)))
        for h in heard
    ]
    for thread in threads:
        thread.start()
    at_gate(gate)
    waiting = "waiting for another build of the same engine"
    wait_until(
        lambda: any(words == waiting for h in heard for words, _ in h.steps),
        what="the second to wait",
    )
    gate.unlink()
    for thread in threads:
        thread.join(60)
    assert len(records) == 2
    assert records[0] == records[1]
    compiled = [h for h in heard if any(words == "compiling" for words, _ in h.steps)]
    assert len(compiled) == 1
