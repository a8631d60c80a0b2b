"""Checks of an engine as it was built: can one be, for what, for which devices, how and when. The
first five steps of the mission's list; `running` has the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshd.cli.checks.clock import moment
from meshd.cli.checks.subject import Subject
from meshd.errors import MeshdError
from meshd.kernel.findings import Fault, NotApplicable
from meshd.sizes import format_size

if TYPE_CHECKING:
    from meshd.runtime.record import Binary

FLAGS: Final[dict[str, tuple[str, ...]]] = {
    "cuda": ("GGML_CUDA", "GGML_CUDA_FA", "GGML_CUDA_FA_ALL_QUANTS"),
    "rocm": ("GGML_HIP",),
    "vulkan": ("GGML_VULKAN",),
    "metal": ("GGML_METAL",),
}
"""What a build for each backend switches on, beside GGML_RPC."""
ON = ("ON", "1", "TRUE", "YES")
"""How CMake writes that a switch is on."""
ARCHITECTURES = "CMAKE_CUDA_ARCHITECTURES"


def toolchain(subject: Subject) -> str:
    """What a build would need; nothing is installed for it."""
    from meshd.runtime.toolchain import COMPILERS, missing_tools

    backend = subject.wanted_backend
    if backend is None:
        if subject.config.client:
            raise NotApplicable("a client builds no engine")
        if not isinstance(subject.found, MeshdError):
            raise NotApplicable(
                f"{subject.found.id} is there; `meshd doctor --backend cuda` says what a build "
                "would need"
            )
        backend = best_backend(subject)
    missing = missing_tools(backend, subject.around.which)
    if missing:
        named = [words.partition(": ") for words in missing]
        raise Fault(
            f"a build for {backend} lacks {' and '.join(name for name, _, _ in named)}",
            "; ".join(how or name for name, _, how in named),
        )
    compiler = next(filter(None, map(subject.around.which, COMPILERS)), "")
    beside = subject.around.which("nvcc" if backend == "cuda" else "cmake")
    return f"a build for {backend} finds {compiler}{f' and {beside}' if beside else ''}"


def engine(subject: Subject) -> str:
    """The one that the next start runs."""
    if subject.config.client:
        raise NotApplicable("a client runs none")
    record = subject.found
    if isinstance(record, MeshdError):
        raise Fault(
            record.message,
            f"`meshd runtime build --backend {best_backend(subject)}`, or --runtime-dir with "
            "binaries that run here",
        )
    origin = "built here" if record.build is not None else f"adopted from {record.directory}"
    return f"{record.id}: {record.version}, {origin}"


def backend(subject: Subject) -> str:
    """What it was built for, and the libraries it loads, against what there is.

    A CPU engine is no fault beside a GPU that is part of the processor, unless it is NVIDIA's:
    many of the others are no faster.
    """
    from meshd.runtime.proof.backends import linked_as

    record, built_for = subject.record(), subject.built_for
    unused = [gpu for gpu in subject.usable_gpus if gpu.backend == "cuda" or not gpu.unified]
    if built_for == "cpu" and unused:
        raise Fault(
            f"{record.id} is built for the CPU, and this machine has {unused[0].name}",
            f"`meshd runtime build --backend {unused[0].backend}`, then `meshd runtime use ID`",
        )
    linked = subject.binary.linked
    if built_for != "cpu" and linked is not None and linked_as(built_for) not in linked:
        raise Fault(
            f"{record.id} is for {built_for}, and loads no library of it (only "
            f"{', '.join(linked) or 'none'}): it would run on the CPU",
            build_again(subject),
        )
    return f"built for {built_for}" + (f", loads {', '.join(linked)}" if linked else "")


def architecture(subject: Subject) -> str:
    """Whether code for the compute capability of every CUDA device is in it."""
    from meshd.runtime.proof.architectures import runs_on

    if subject.built_for != "cuda":
        raise NotApplicable(f"an engine for {subject.built_for} has none to match")
    built = _cmake_cache(subject).get(ARCHITECTURES, "")
    devices = {d.compute_capability: d.name for d in subject.gpus if d.compute_capability}
    if not built:
        raise NotApplicable(f"its CMake cache has no {ARCHITECTURES}")
    if not devices:
        raise NotApplicable(f"built for {built}; no driver tells a compute capability")
    for capability, name in devices.items():
        if not runs_on(capability, built):
            wanted = capability.replace(".", "")
            raise Fault(
                f"built for {built}, and {name} has compute capability {capability}",
                f"`meshd runtime build --backend cuda --cuda-arch {wanted}`",
            )
    told = ", ".join(f"{name} ({capability})" for capability, name in devices.items())
    return f"built for {built}, which runs on {told}"


def cache_flags(subject: Subject) -> str:
    """The values of the CMake cache that the build really used."""
    flags = _cmake_cache(subject)
    wanted = ("GGML_RPC", *FLAGS.get(subject.built_for, ()))
    wrong = [flag for flag in wanted if flags.get(flag, "").upper() not in ON]
    if subject.built_for == "cuda" and not flags.get(ARCHITECTURES):
        wrong.append(ARCHITECTURES)
    if wrong:
        told = ", ".join(f"{flag}={flags.get(flag) or '(nothing)'}" for flag in wrong)
        raise Fault(f"its CMake cache says {told}", build_again(subject))
    return ", ".join(f"{flag}={flags[flag]}" for flag in (*wanted, ARCHITECTURES) if flag in flags)


def binaries(subject: Subject) -> str:
    """The files that were produced: there, not empty, and written after their CMake cache."""
    record = subject.record()
    for binary in record.binaries:
        if not Path(binary.path).is_file():
            raise Fault(f"{binary.path} is missing", build_again(subject))
        if binary.size == 0:
            raise Fault(f"{binary.path} is empty", build_again(subject))
    cache_at = _check_order(subject)
    programs = [b for b in record.binaries if not b.name.startswith("lib")]
    libraries = [b for b in record.binaries if b.name.startswith("lib")]
    told = [_told(binary) for binary in programs]
    if libraries:
        newest = max(binary.mtime_ns for binary in libraries) / 1e9
        size = format_size(sum(binary.size for binary in libraries))
        told.append(f"{len(libraries)} libraries of {size}, the newest {moment(newest)}")
    if cache_at is not None:
        told.append(f"after its CMake cache of {moment(cache_at)}")
    return "; ".join(told)


def best_backend(subject: Subject) -> str:
    """What an engine of this machine should be for."""
    return next((gpu.backend for gpu in subject.usable_gpus), "cpu")


def build_again(subject: Subject) -> str:
    """The remedy for an engine whose files are not what they should be."""
    record = subject.record()
    command = f"`meshd runtime build --backend {subject.built_for}`"
    if record.build is None:
        return f"build it again and put it into {record.directory}, or {command}"
    return f"{command} makes it anew; `meshd runtime verify {record.id}` says what differs"


def _cmake_cache(subject: Subject) -> dict[str, str]:
    """Raises NotApplicable for an engine whose build nobody recorded."""
    record = subject.record()
    if record.build is not None:
        return record.build.cmake_cache
    found = subject.binary.cmake_cache
    if found is None:
        raise NotApplicable(f"{record.directory} is not from here, and has no CMakeCache.txt")
    return dict(found)


def _check_order(subject: Subject) -> float | None:
    """When the cache was written, None if unknown. Raises Fault if the build did not follow it."""
    build = subject.record().build
    if build is None:
        cache_at, built_at = subject.binary.cache_written_at, subject.binary.built_at
        stale = cache_at is not None and built_at is not None and built_at < cache_at
        names = ["llama-server"] if stale else []
    else:
        cache_at = build.cache_written_at
        names = [b.name for b in build.built_files if b.mtime_ns / 1e9 < (cache_at or 0.0)]
    if names:
        raise Fault(
            f"{', '.join(names)}: older than the CMake cache of {moment(cache_at or 0.0)}, so not "
            "what it configures",
            build_again(subject),
        )
    return cache_at


def _told(binary: Binary) -> str:
    when = moment(binary.mtime_ns / 1e9)
    return f"{binary.name} {format_size(binary.size)}, {when}, sha256 {binary.sha256[:12]}…"
