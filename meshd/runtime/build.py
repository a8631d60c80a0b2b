"""Builds an engine: configure, compile, probe, publish.

The build directory is kept by source and options until the build is published, so an interrupted
build goes on where it stopped. What is published appears by one rename: nothing is half-installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meshd.errors import BuildFailed, EngineRejected, NoSpace
from meshd.kernel.files import write_atomic
from meshd.runtime.devices import read_memory
from meshd.runtime.probe import RPC_SERVERS, SERVER, probe
from meshd.runtime.record import BuildFacts, RuntimeRecord, cpu_features
from meshd.runtime.registry import RECORD, Registry
from meshd.runtime.sources import PINNED, PinnedSource, Source, obtain
from meshd.runtime.steps import fraction_of, run_step
from meshd.runtime.toolchain import Toolchain, find_toolchain

BACKENDS = ("cpu", "cuda", "rocm", "vulkan", "metal")
TARGETS = (SERVER, RPC_SERVERS[0], "llama-gguf-split", "llama-bench")
BYTES_PER_JOB = 1_610_612_736
"""Memory the heaviest files of llama.cpp need to compile: 1.5 GiB."""
SPACE_BYTES = {"cpu": 500_000_000, "cuda": 4_000_000_000}
"""Free disk a build wants, by backend; others are reckoned like CUDA."""

_BACKEND_FLAGS = {
    "cpu": (),
    "cuda": (
        *("-DGGML_CUDA=ON", "-DGGML_CUDA_FA=ON", "-DGGML_CUDA_FA_ALL_QUANTS=ON"),
        "-DGGML_CUDA_NCCL=OFF",
    ),
    "rocm": ("-DGGML_HIP=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "metal": ("-DGGML_METAL=ON",),
}

Progress = Callable[[str, float], None]
"""Called with words for the current step and the fraction done, 0..1."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    backend: str = "cpu"
    cuda_arch: str | None = None
    """CMake's notation: `121`, `90;100`; None is what this machine has."""
    source: str | None = None
    jobs: int | None = None


def cmake_args(options: BuildOptions, commit: str) -> tuple[str, ...]:
    """Every choice of the build that a machine could make otherwise, explicit.

    The code is for this machine's processor (`GGML_NATIVE`), so an engine's id has its features in
    it, and `Registry.find` passes over engines of another one. `commit` is what `--version` will
    say; an unpacked archive has no git to ask.
    """
    arguments = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_RPC=ON",
        "-DGGML_NATIVE=ON",
        "-DGGML_OPENMP=ON",
        "-DGGML_CCACHE=OFF",
        "-DBUILD_SHARED_LIBS=ON",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        # Binaries find their libraries beside themselves, wherever they are moved.
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
        "-DCMAKE_INSTALL_RPATH=$ORIGIN",
        f"-DLLAMA_BUILD_COMMIT={commit}",
        *_BACKEND_FLAGS[options.backend],
    ]
    if options.backend != "cpu":
        # The vendor's libraries may lie where the loader does not look.
        arguments.append("-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON")
    if options.backend == "cuda":
        arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={options.cuda_arch or 'native'}")
    return tuple(arguments)


def default_jobs(cpus: int, memory_bytes: int) -> int:
    """Compilers at once; memory 0 is unknown."""
    return max(1, min(cpus, memory_bytes // BYTES_PER_JOB)) if memory_bytes else cpus


def build(
    options: BuildOptions,
    cache_dir: Path,
    progress: Progress,
    *,
    pinned: PinnedSource = PINNED,
) -> RuntimeRecord:
    """Build and publish; returns the record. Blocking, minutes. Raises BuildFailed and kin.

    A finished build of the same source and options is returned as it is.
    """
    registry = Registry(cache_dir)
    registry.directory.mkdir(parents=True, exist_ok=True)
    _check_space(registry.directory, options.backend)
    progress("looking for the tools", 0.0)
    tools = find_toolchain(options.backend, cache_dir / "meshd" / "tools")
    progress("fetching the source", 0.0)
    source = obtain(options.source, cache_dir / "meshd" / "sources", pinned)
    runtime_id = _runtime_id(source, options, tools)
    with _lock(registry.directory / f".{runtime_id}.lock", progress):
        for record in registry.list():
            if record.id == runtime_id and record.unchanged():
                return record
        work = registry.directory / f".{runtime_id}.build"
        work.mkdir(exist_ok=True)
        log = registry.directory / f"{runtime_id}.log"
        log.write_bytes(b"")
        _configure(tools, source, options, work, log, progress)
        _compile(tools, options, work, log, progress)
        progress("checking what was built", 1.0)
        record = _publish(registry, runtime_id, source, options, tools, work)
        shutil.rmtree(work, ignore_errors=True)
        progress("done", 1.0)
        return record


def _runtime_id(source: Source, options: BuildOptions, tools: Toolchain) -> str:
    facts = [source.sha256 or source.name, tools.compiler, platform.machine(), cpu_features()]
    facts += cmake_args(options, source.commit)
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
    return f"{options.backend}-{source.commit}-{digest}"


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Two builds of one engine: the second waits, and finds it done."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build of the same engine", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_space(directory: Path, backend: str) -> None:
    """What an interrupted build already wrote need not be free again."""
    written = 0
    for work in directory.glob(f".{backend}-*.build"):
        for path in work.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # that build may be running
                written += path.lstat().st_size
    wanted = SPACE_BYTES.get(backend, SPACE_BYTES["cuda"]) - written
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise NoSpace(
            f"the build wants {wanted / 1e9:.1f} GB on the disk of {directory}, {free / 1e9:.1f} "
            "GB are free; make room, or set XDG_CACHE_HOME to another disk"
        )


def _configure(
    tools: Toolchain,
    source: Source,
    options: BuildOptions,
    work: Path,
    log: Path,
    progress: Progress,
) -> None:
    progress("configuring", 0.0)
    command = [
        *(tools.cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"),
        *("-S", str(source.directory), "-B", str(work), *cmake_args(options, source.commit)),
    ]
    if tools.device_compiler is not None and options.backend == "cuda":
        command.append(f"-DCMAKE_CUDA_COMPILER={tools.device_compiler}")
    # An unpacked tree is no repository; git must not take one around the cache for it.
    environ = {"GIT_CEILING_DIRECTORIES": str(source.directory.parent)}
    run_step(command, log, lambda line: None, environ)


def _compile(
    tools: Toolchain, options: BuildOptions, work: Path, log: Path, progress: Progress
) -> None:
    jobs = options.jobs or default_jobs(_cpus(), read_memory()[0])

    def hear(line: str) -> None:
        fraction = fraction_of(line)
        if fraction is not None:
            progress("compiling", fraction)

    command = [tools.ninja, "-C", str(work), "-j", str(jobs), *TARGETS]
    run_step(command, log, hear, {"NINJA_STATUS": "[%f/%t] "})


def _publish(
    registry: Registry,
    runtime_id: str,
    source: Source,
    options: BuildOptions,
    tools: Toolchain,
    work: Path,
) -> RuntimeRecord:
    """Copy programs and libraries, probe the copies where they will run, then let them appear."""
    partial = registry.directory / f"{runtime_id}.partial"
    final = registry.directory / runtime_id
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in sorted((work / "bin").iterdir()):
        if path.name in TARGETS or re.search(r"\.(so|dylib)(\.|$)", path.name):
            shutil.copy2(path, partial / path.name, follow_symlinks=False)
    facts = BuildFacts(
        source=source.name,
        source_sha256=source.sha256,
        commit=source.commit,
        cmake_args=cmake_args(options, source.commit),
        cmake_cache=_cmake_cache(work / "CMakeCache.txt"),
        compiler=tools.compiler,
        cpu=cpu_features(),
        built_at=time.time(),
    )
    try:
        seen = probe(partial, runtime_id=runtime_id, build=facts, rpc_protocol=_protocol(source))
    except EngineRejected as error:
        raise BuildFailed(f"what was built does not run: {error.message}") from None
    moved = [b.model_copy(update={"path": str(final / b.name)}) for b in seen.binaries]
    record = seen.model_copy(
        # A GPU engine built where there is no GPU lists no device; it is what it was built as.
        update={
            "directory": str(final),
            "binaries": tuple(moved),
            "backend": options.backend,
        }
    )
    write_atomic(partial / RECORD, record.model_dump_json(indent=1).encode(), mode=0o644)
    # A changed engine of this id makes way by a rename too: a crash here leaves one or the other.
    old = registry.directory / f".{runtime_id}.old"
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return record


def _cmake_cache(path: Path) -> dict[str, str]:
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        match = re.match(r"(GGML_\w+|CMAKE_CUDA_ARCHITECTURES|CMAKE_BUILD_TYPE):\w+=(.*)", line)
        if match and not match[1].endswith("-ADVANCED"):
            found[match[1]] = match[2]
    return found


def _protocol(source: Source) -> str | None:
    """RPC protocol version: three numbers in ggml-rpc.h; both ends of a link must have the same."""
    try:
        text = (source.directory / "ggml" / "include" / "ggml-rpc.h").read_text()
    except OSError:
        return None
    parts = [
        re.search(rf"#define\s+RPC_PROTO_{part}_VERSION\s+(\d+)", text)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    return ".".join(m[1] for m in parts if m) if all(parts) else None


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
