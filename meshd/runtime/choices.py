"""The choices of a build, and whether CMake took them. Pure.

Every choice that a machine could make otherwise is explicit, and after configuring it is looked up
in `CMakeCache.txt`: an option that a source does not know is silently ignored by CMake.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from meshd.runtime.proof.backends import CPU, SWITCHES, linked_as

BACKENDS = ("cpu", "cuda", "rocm", "vulkan", "metal")

_FLAGS: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": (
        *("-DGGML_CUDA=ON", "-DGGML_CUDA_FA=ON", "-DGGML_CUDA_FA_ALL_QUANTS=ON"),
        "-DGGML_CUDA_NCCL=OFF",
    ),
    "rocm": ("-DGGML_HIP=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "metal": ("-DGGML_METAL=ON",),
}
_ENTRY = re.compile(r"^(?P<name>[A-Za-z]\w*):(?P<kind>\w+)=(?P<value>.*)$")
_KEPT = re.compile(r"GGML_\w+|CMAKE_(CUDA|HIP)_(ARCHITECTURES|COMPILER)|CMAKE_BUILD_TYPE")
_TRUE, _FALSE = ("ON", "YES", "TRUE", "Y", "1"), ("OFF", "NO", "FALSE", "N", "0")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    backend: str = "cpu"
    cuda_arch: str | None = None
    """CMake's notation: `121`, `90;100`; None is what this machine has."""
    source: str | None = None
    jobs: int | None = None
    link_driver: bool = True
    """Whether the CUDA driver's library is there to be linked and loaded. An engine built without
    it runs where there is none, as a CPU engine; on a GPU it takes memory in fewer, larger pieces
    (`GGML_CUDA_NO_VMM`)."""


def cmake_args(options: BuildOptions, commit: str) -> tuple[str, ...]:
    """Every choice of the build that a machine could make otherwise, explicit.

    The code is for this machine's processor (`GGML_NATIVE`), so an engine's id has its features in
    it, and `Registry.find` passes over engines of another one. `commit` is what `--version` will
    say; an unpacked archive has no git to ask. A CUDA build wants `options.cuda_arch`.
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
        *_FLAGS[options.backend],
    ]
    if options.backend != "cpu":
        # The vendor's libraries may lie where the loader does not look.
        arguments.append("-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON")
    if options.backend == "cuda":
        assert options.cuda_arch is not None, "`native` would be settled by CMake, out of sight"
        arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={options.cuda_arch}")
        arguments.append(f"-DGGML_CUDA_NO_VMM={'OFF' if options.link_driver else 'ON'}")
    return tuple(arguments)


def read_cache(text: str) -> dict[str, str]:
    """The entries of a `CMakeCache.txt` that say what was built."""
    return {name: value for name, (_, value) in _entries(text).items() if _KEPT.fullmatch(name)}


def not_taken(arguments: Sequence[str], backend: str, cache: str) -> tuple[str, ...]:
    """What CMake made differently of `arguments`, by the text of its cache; nothing if all is well.

    1. a choice has another value there than was asked for;
    2. the switch of the backend, or of RPC, is no option of this source: the cache has it without
       a type, as it keeps any word of the command line;
    3. the source lists the backends it will build, and this one is not among them.
    """
    entries = _entries(cache)
    findings = []
    for argument in arguments:
        name, _, asked = argument.removeprefix("-D").partition("=")
        kind, value = entries.get(name, ("", "nothing"))
        if _KEPT.fullmatch(name) and _plain(value) != _plain(asked):  # 1
            findings.append(f"{name} is {value}, asked for was {asked}")
        elif name in ("GGML_RPC", *SWITCHES.get(backend, ())) and kind == "UNINITIALIZED":  # 2
            findings.append(f"this source has no option {name}")
    library = _library(backend)
    available = entries.get("GGML_AVAILABLE_BACKENDS", ("", ""))[1]
    if library is not None and available and library not in available.split(";"):  # 3
        findings.append(f"it will build {available.replace(';', ', ')}, but not {library}")
    return tuple(findings)


def backend_library(backend: str) -> str | None:
    """Name of the library that an engine for `backend` is nothing without; None for the CPU."""
    library = _library(backend)
    return f"lib{library}" if library is not None else None


def _library(backend: str) -> str | None:
    return None if backend == CPU else f"ggml-{linked_as(backend)}"


def _entries(cache: str) -> dict[str, tuple[str, str]]:
    """Name to (type, value)."""
    matches = (_ENTRY.match(line) for line in cache.splitlines())
    return {m["name"]: (m["kind"], m["value"]) for m in matches if m is not None}


def _plain(value: str) -> str:
    """CMake's words for true and for false are many."""
    upper = value.upper()
    return "ON" if upper in _TRUE else "OFF" if upper in _FALSE else value
