"""Builds an engine: configure, compile, probe, publish.

The build directory is kept by source and options until the build is published, so an interrupted
build goes on where it stopped. What is published appears by one rename: nothing is half-installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from meshd.errors import BuildFailed, NoSpace, ToolMissing
from meshd.runtime.choices import BuildOptions, cmake_args, not_taken, read_cache
from meshd.runtime.devices import read_devices, read_memory
from meshd.runtime.nvcc import architectures_of, parse_architectures, why_unfit
from meshd.runtime.probe import RPC_SERVERS
from meshd.runtime.publish import PROGRAMS, publish
from meshd.runtime.record import BuildFacts, RuntimeRecord, cpu_features
from meshd.runtime.registry import Registry
from meshd.runtime.sources import PINNED, PinnedSource, Source, obtain
from meshd.runtime.steps import fraction_of, run_step
from meshd.runtime.toolchain import Toolchain, ask_nvcc, can_link_driver, find_toolchain

BYTES_PER_JOB = 1_610_612_736
"""Memory the heaviest files of llama.cpp need to compile: 1.5 GiB."""
SPACE_BYTES = {"cpu": 500_000_000, "cuda": 4_000_000_000}
"""Free disk a build wants, by backend; others are reckoned like CUDA."""

_UNFINISHED = ".build"

Progress = Callable[[str, float], None]
"""Called with words for the current step and the fraction done, 0..1."""


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
    with _disk_told(registry.directory):
        registry.directory.mkdir(parents=True, exist_ok=True)
        _check_space(registry.directory, options.backend)
        progress("looking for the tools", 0.0)
        tools = find_toolchain(options.backend, cache_dir / "meshd" / "tools")
        if options.backend == "cuda":
            options, tools = _settled(options, tools)
        progress("fetching the source", 0.0)
        source = obtain(options.source, cache_dir / "meshd" / "sources", pinned)
        runtime_id = _runtime_id(source, options, tools)
        with _lock(registry.directory / f".{runtime_id}.lock", progress):
            for record in registry.list():
                if record.id == runtime_id and record.unchanged():
                    return record
            return _build(registry, runtime_id, source, options, tools, progress)


def _build(
    registry: Registry,
    runtime_id: str,
    source: Source,
    options: BuildOptions,
    tools: Toolchain,
    progress: Progress,
) -> RuntimeRecord:
    work = registry.directory / f".{runtime_id}{_UNFINISHED}"
    if _was_moved(work):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    log = registry.directory / f"{runtime_id}.log"
    log.write_bytes(b"")
    _configure(tools, source, options, work, log, progress)
    _compile(tools, options, work, log, progress)
    progress("checking what was built", 1.0)
    cache = work / "CMakeCache.txt"
    facts = BuildFacts(
        source=source.name,
        source_sha256=source.sha256,
        commit=source.commit,
        cmake_args=cmake_args(options, source.commit),
        cmake_cache=read_cache(cache.read_text(errors="replace")),
        compiler=tools.compiler,
        cpu=cpu_features(),
        built_at=time.time(),
        device_compiler=tools.device_release,
        cache_written_at=cache.stat().st_mtime,
    )
    record = publish(registry, runtime_id, options.backend, work / "bin", facts, _protocol(source))
    shutil.rmtree(work, ignore_errors=True)
    progress("done", 1.0)
    return record


def _was_moved(work: Path) -> bool:
    """CMake does not go on in a build directory that lay elsewhere when it was configured."""
    try:
        text = (work / "CMakeCache.txt").read_text(errors="replace")
    except FileNotFoundError:
        return False
    match = re.search(r"^CMAKE_CACHEFILE_DIR:INTERNAL=(.+)$", text, re.MULTILINE)
    return match is not None and Path(match[1]).resolve() != work.resolve()


def _settled(options: BuildOptions, tools: Toolchain) -> tuple[BuildOptions, Toolchain]:
    """The architectures of a CUDA build, named and within reach of this nvcc; how it links.

    Raises BuildFailed before anything is fetched or compiled.
    """
    assert tools.device_compiler is not None, "the toolchain of CUDA has an nvcc"
    nvcc = ask_nvcc(tools.device_compiler)
    if options.cuda_arch is None:
        architectures = _architectures_here()
    else:
        try:
            architectures = parse_architectures(options.cuda_arch)
        except ValueError as error:
            raise BuildFailed(f"--cuda-arch: {error}") from None
    unfit = why_unfit(architectures, nvcc)
    if unfit is not None:
        raise ToolMissing(unfit)
    settled = dataclasses.replace(
        options, cuda_arch=";".join(architectures), link_driver=can_link_driver(nvcc.path)
    )
    return settled, dataclasses.replace(tools, device_release=nvcc.words)


def _architectures_here() -> tuple[str, ...]:
    devices = [device for device in read_devices() if device.backend == "cuda"]
    found = architectures_of(d.compute_capability for d in devices if d.compute_capability)
    if not found:
        why = (
            f"the driver does not tell the compute capability of {devices[0].name}"
            if devices
            else "no NVIDIA driver answers here (`meshd gpus` says why)"
        )
        raise BuildFailed(
            f"the architecture is unknown: {why}; name it: --cuda-arch 121 is GB10, 90 H100 and "
            "H200, 89 RTX 40, 120 RTX 50; "
            "`nvidia-smi --query-gpu=compute_cap --format=csv` on the machine that will run it "
            "tells it (12.1 is 121)"
        )
    return found


def _runtime_id(source: Source, options: BuildOptions, tools: Toolchain) -> str:
    facts = [source.sha256, tools.compiler, platform.machine(), cpu_features()]
    facts += cmake_args(options, source.commit)
    if tools.device_release:
        facts.append(f"nvcc {tools.device_release}")
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
    return f"{options.backend}-{source.commit}-{digest}"


@contextlib.contextmanager
def _disk_told(directory: Path) -> Iterator[None]:
    """Errors of the disk in words; what is missing there is what to change."""
    try:
        yield
    except OSError as error:
        elsewhere = "or set XDG_CACHE_HOME to another disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"the disk of {directory} is full; make room, {elsewhere}, then build again: it "
                "goes on"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BuildFailed(
                f"{error.filename or directory} cannot be written: {error.strerror}; change its "
                f"owner, {elsewhere}"
            ) from None
        raise


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


def unfinished(cache_dir: Path) -> tuple[tuple[str, Path, int], ...]:
    """(id, directory, bytes) of each build that was begun and neither published nor given up; one
    that is running is among them."""
    found = sorted(Registry(cache_dir).directory.glob(f".*{_UNFINISHED}"))
    return tuple((w.name[1:].removesuffix(_UNFINISHED), w, _bytes_of(w)) for w in found)


def _bytes_of(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # that build may be running
            total += path.lstat().st_size
    return total


def _check_space(directory: Path, backend: str) -> None:
    """What an interrupted build already wrote need not be free again."""
    written = sum(_bytes_of(work) for work in directory.glob(f".{backend}-*{_UNFINISHED}"))
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
    cache = work / "CMakeCache.txt"
    text = cache.read_text(errors="replace")
    wrong = not_taken(cmake_args(options, source.commit), options.backend, text)
    if wrong:
        raise BuildFailed(
            f"CMake did not take the choices of this build: {'; '.join(wrong)} (all of it is in "
            f"{log} and {cache})"
        )
    # A program older than its configuration could be of another one: it is linked again. (CMake
    # leaves the cache alone when nothing in it changes.)
    written_at = cache.stat().st_mtime_ns
    for path in (work / "bin").glob("*"):
        if path.lstat().st_mtime_ns < written_at:
            path.unlink()


def _compile(
    tools: Toolchain, options: BuildOptions, work: Path, log: Path, progress: Progress
) -> None:
    jobs = options.jobs or default_jobs(_cpus(), read_memory()[0])

    def hear(line: str) -> None:
        fraction = fraction_of(line)
        if fraction is not None:
            progress("compiling", fraction)

    command = [tools.ninja, "-C", str(work), "-j", str(jobs), *_targets(work)]
    run_step(command, log, hear, {"NINJA_STATUS": "[%f/%t] "})


def _targets(work: Path) -> list[str]:
    """Sources from before the RPC server was renamed have it under its older name."""
    text = (work / "build.ninja").read_text(errors="replace")
    server = next((n for n in RPC_SERVERS if re.search(rf"^build {n}:", text, re.MULTILINE)), "")
    # One that has neither is ninja's to complain of, by the name of today.
    others = set(RPC_SERVERS) - {server or RPC_SERVERS[0]}
    return [name for name in PROGRAMS if name not in others]


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
