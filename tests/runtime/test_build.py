"""Building: choices, resumption, publication. A toy project stands for llama.cpp."""

from __future__ import annotations

import dataclasses
import errno
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
from meshd.runtime.probe import sha256_of
from meshd.runtime.record import RuntimeRecord
from meshd.runtime.registry import Registry
from meshd.view import DeviceView
from tests.conftest import wait_until
from tests.runtime.fake_nvcc import make_nvcc
from tests.runtime.processes import ended
from tests.runtime.toy_source import GATE, toy_files, toy_package, toy_tree

GIB = 1 << 30
CPU = DeviceView("a processor", "cpu", None, 8 * GIB, 4 * GIB, True, None)
GB10 = DeviceView("NVIDIA GB10", "cuda", "GPU-1", 120 * GIB, 100 * GIB, True, "12.1")


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


def test_a_source_with_the_older_name_of_the_rpc_server(cache: Path, tree: Path) -> None:
    project = tree / "CMakeLists.txt"
    project.write_text(project.read_text().replace("ggml-rpc-server", "rpc-server"))
    record = toy_build(cache, tree)
    assert record.rpc_path == str(Path(record.directory) / "rpc-server")


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


# -- what the disk and the machine can do to it ----------------------------------------------------


def test_the_disk_fills_while_it_is_installed(
    cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy2(source: Path, target: Path, *, follow_symlinks: bool = True) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copy2", copy2)
        with pytest.raises(NoSpace, match="is full; make room, or set XDG_CACHE_HOME"):
            toy_build(cache, tree)
    assert not any(name.endswith(".partial") for name in runtimes(cache))
    assert Registry(cache).list() == ()
    heard = Heard()
    toy_build(cache, tree, heard)
    assert "compiling" not in {words for words, fraction in heard.steps if fraction < 1.0}


def test_an_interruption_while_it_is_installed_leaves_nothing(
    cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshd.runtime.publish.probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy_build(cache, tree)
    assert not any(name.endswith(".partial") for name in runtimes(cache))


def test_a_copy_that_is_not_what_was_built_is_refused(
    cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copy2

    def copy2(source: Path, target: Path, *, follow_symlinks: bool = True) -> None:
        real(source, target, follow_symlinks=follow_symlinks)
        if target.name == "llama-bench":
            with target.open("r+b") as file:
                file.seek(100)
                file.write(b"\0lie")

    monkeypatch.setattr("shutil.copy2", copy2)
    with pytest.raises(BuildFailed, match="llama-bench as installed is not llama-bench as built"):
        toy_build(cache, tree)
    assert Registry(cache).list() == ()


def test_a_cache_that_cannot_be_written(cache: Path, tree: Path) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(cache))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshd.runtime.build._check_space", forbidden)
        with pytest.raises(BuildFailed, match=r"cannot be written: Read-only .* XDG_CACHE_HOME"):
            toy_build(cache, tree)


# -- what the record says --------------------------------------------------------------------------


def test_what_was_built_is_what_is_installed_and_younger_than_its_cache(
    cache: Path, tree: Path
) -> None:
    record = toy_build(cache, tree)
    facts = record.build
    assert facts is not None
    assert facts.cache_written_at is not None
    assert [f.name for f in facts.built_files] == [
        *("ggml-rpc-server", "libggml-toy.so.0.1", "llama-bench", "llama-gguf-split"),
        "llama-server",
    ]
    for built in facts.built_files:
        installed = Path(record.directory) / built.name
        assert sha256_of(installed) == built.sha256
        assert installed.stat().st_size == built.size
        assert built.mtime_ns >= facts.cache_written_at * 1e9 - 1e3
    assert RuntimeRecord.model_validate_json(record.model_dump_json()) == record


def interrupted_build(cache: Path, tree: Path) -> Path:
    """A build directory in which all is compiled and nothing was installed."""

    def probe(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshd.runtime.publish.probe", probe)
        with pytest.raises(KeyboardInterrupt):
            toy_build(cache, tree)
    (work,) = (cache / "meshd" / "runtimes").glob(".*.build")
    return work


def test_what_an_earlier_configuration_built_is_linked_again(cache: Path, tree: Path) -> None:
    work = interrupted_build(cache, tree)
    with (work / "CMakeCache.txt").open("a") as file:  # CMake writes it anew, in its own order
        file.write("MY_WORD:STRING=x\n")
    first = (work / "bin" / "llama-server").stat().st_mtime_ns
    record = toy_build(cache, tree)
    assert record.build is not None
    written_at = record.build.cache_written_at
    assert written_at is not None
    assert written_at * 1e9 > first
    assert all(f.mtime_ns / 1e9 >= written_at for f in record.build.built_files)


def test_an_interrupted_build_in_a_cache_that_was_moved_starts_again(
    cache: Path, tree: Path, tmp_path: Path
) -> None:
    interrupted_build(cache, tree)
    cache.rename(tmp_path / "moved")
    assert toy_build(tmp_path / "moved", tree).unchanged()


# -- CUDA ------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc of CUDA 13.0 first on PATH, and no driver; its directory."""
    directory = make_nvcc(tmp_path / "cuda" / "bin").parent
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    monkeypatch.setattr("meshd.runtime.build.can_link_driver", lambda path: False)
    monkeypatch.setattr("meshd.runtime.build.read_devices", lambda: (CPU,))
    return directory


def cuda_build(cache: Path, tree: Path, arch: str | None = "121") -> RuntimeRecord:
    return build(BuildOptions("cuda", arch, str(tree), jobs=2), cache, Heard())


def nothing_was_begun(cache: Path) -> bool:
    return runtimes(cache) == [] and not (cache / "meshd" / "sources").exists()


def test_a_cuda_build_without_a_gpu(cache: Path, tree: Path, cuda: Path) -> None:
    record = cuda_build(cache, tree)
    assert record.backend == "cuda"
    assert record.id.startswith("cuda-unknown-")
    assert record.build is not None
    assert record.build.cmake_cache["CMAKE_CUDA_ARCHITECTURES"] == "121"
    assert record.build.cmake_cache["GGML_CUDA_NO_VMM"] == "ON"
    assert record.build.device_compiler == "13.0"
    assert "libggml-cuda.so" in {f.name for f in record.build.built_files}


def test_architectures_of_the_machine_by_default(
    cache: Path, tree: Path, cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [dataclasses.replace(GB10, compute_capability=c) for c in ("12.1", "9.0", "9.0")]
    monkeypatch.setattr("meshd.runtime.build.read_devices", lambda: (*gpus, CPU))
    record = cuda_build(cache, tree, None)
    assert record.build is not None
    assert record.build.cmake_cache["CMAKE_CUDA_ARCHITECTURES"] == "90;121"


def test_each_architecture_is_an_engine_of_its_own(cache: Path, tree: Path, cuda: Path) -> None:
    ids = {cuda_build(cache, tree, "121").id, cuda_build(cache, tree, "90").id}
    assert {record.id for record in Registry(cache).list()} == ids
    assert len(ids) == 2


def test_a_driver_that_does_not_tell_the_architecture(
    cache: Path, tree: Path, cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = dataclasses.replace(GB10, compute_capability=None)
    monkeypatch.setattr("meshd.runtime.build.read_devices", lambda: (silent, CPU))
    with pytest.raises(BuildFailed, match=r"does not tell the compute capability of NVIDIA GB10"):
        cuda_build(cache, tree, None)


def test_no_driver_and_no_architecture(cache: Path, tree: Path, cuda: Path) -> None:
    with pytest.raises(
        BuildFailed, match=r"no NVIDIA driver answers here.* --cuda-arch 121 is GB10"
    ):
        cuda_build(cache, tree, None)
    assert nothing_was_begun(cache)


@pytest.mark.parametrize(
    ("release", "known", "arch", "words"),
    [
        ("12.4", (80, 90), "121", "sm_121: that needs CUDA 12.9 or newer .13.0 or newer is made"),
        ("13.0", (75, 121), "70", "sm_70: CUDA 12.9 was the last"),
        ("13.0", (75, 121), "999", "sm_999: it knows 75, 121"),
        ("13.0", (75, 121), "fast", "--cuda-arch: `fast` is no CUDA architecture"),
    ],
)
def test_an_architecture_out_of_reach_is_told_before_anything_is_fetched(
    cache: Path,
    tree: Path,
    cuda: Path,
    release: str,
    known: tuple[int, ...],
    arch: str,
    words: str,
) -> None:
    make_nvcc(cuda, release=release, architectures=known)
    with pytest.raises(BuildFailed, match=words):
        cuda_build(cache, tree, arch)
    assert nothing_was_begun(cache)


def test_a_source_that_does_not_know_the_backend(cache: Path, tree: Path, cuda: Path) -> None:
    project = tree / "CMakeLists.txt"
    project.write_text(project.read_text().replace('option(GGML_CUDA "" OFF)\n', ""))
    with pytest.raises(BuildFailed, match="this source has no option GGML_CUDA"):
        cuda_build(cache, tree)
    assert Registry(cache).list() == ()


def test_another_architecture_than_asked_for_is_noticed(
    cache: Path, tree: Path, cuda: Path
) -> None:
    project = tree / "CMakeLists.txt"
    forced = 'set(CMAKE_CUDA_ARCHITECTURES 90 CACHE STRING "" FORCE)\n'
    project.write_text(project.read_text() + forced)
    with pytest.raises(BuildFailed, match="CMAKE_CUDA_ARCHITECTURES is 90, asked for was 121"):
        cuda_build(cache, tree)
    assert not any("compil" in name for name in runtimes(cache))


def test_a_build_without_the_backends_library_is_no_engine_of_it(
    cache: Path, tree: Path, cuda: Path
) -> None:
    project = tree / "CMakeLists.txt"
    project.write_text(project.read_text().replace("if(GGML_CUDA)", "if(FALSE)"))
    with pytest.raises(BuildFailed, match="the build made no libggml-cuda: it would be an engine"):
        cuda_build(cache, tree)
    assert Registry(cache).list() == ()


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
