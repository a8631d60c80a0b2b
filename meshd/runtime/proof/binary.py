"""Looks at the files of an engine: what they are, what they say, and what the kernel runs for them.

Blocking, well under a second for an engine of 100 MB; nothing is raised.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from meshd.config import environment_of_children
from meshd.errors import EngineRejected
from meshd.runtime.probe import ask_version, engine_files, sha256_of
from meshd.runtime.proof.elf import needed
from meshd.runtime.proof.evidence import BinaryEvidence, FileSeen
from meshd.runtime.record import RuntimeRecord

CHOICES = (
    "GGML_CUDA",
    "GGML_CUDA_FA",
    "GGML_CUDA_FA_ALL_QUANTS",
    "GGML_HIP",
    "GGML_VULKAN",
    "GGML_METAL",
    "GGML_RPC",
    "CMAKE_CUDA_ARCHITECTURES",
)
"""Values of the CMakeCache that go into the evidence, in this order."""
CACHE = "CMakeCache.txt"
ANSWER_LIMIT_S = 20.0
WRAPPER_S = 1.0
"""A script has become the program it starts by then, or it never does."""
POLL_S = 0.01
FILL_BYTES = 4096

_BACKEND_LIBRARY = re.compile(r"libggml-(?!base\b)([a-z]+)[\w-]*\.(?:so|dylib)")
_VENDOR_LIBRARY = {"libcudart": "cuda", "libcuda": "cuda", "libamdhip64": "hip"}
"""What a program that has its backend inside itself asks for."""
_CACHE_LINE = re.compile(r"(\w+):\w+=(.*)")


def read_binary(record: RuntimeRecord) -> BinaryEvidence:
    """All of the binary layer, for the engine as it lies there now."""
    server = Path(record.server_path)
    values, written_at = _cache(record)
    try:
        version, problem = ask_version(server, ANSWER_LIMIT_S), None
    except EngineRejected as error:
        version, problem = None, error.message
    return BinaryEvidence(
        path=str(server),
        executed=executed(server),
        files=_files(record),
        version_recorded=record.version,
        version_said=version,
        linked=linked_backends(server),
        cmake_cache=values,
        cache_written_at=written_at,
        built_at=None if written_at is None else _built_at(record),
        rpc_protocol=record.rpc_protocol,
        adopted=record.build is None,
        problem=problem,
    )


def executed(server: Path) -> str | None:
    """The file the kernel runs when `server` is started: a link's end, the program that a wrapper
    becomes, or the shell of a wrapper that stays.

    None if it cannot be seen. Where there is no /proc, the end of the link.
    """
    if sys.platform != "linux":
        return str(server.resolve()) if server.exists() else None
    reader, writer = _full_pipe()
    try:
        process = subprocess.Popen(
            [str(server), "--help"],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=environment_of_children(),
            start_new_session=True,
        )
    except OSError:
        return None
    finally:
        os.close(writer)
    with process:
        try:
            return _settled(process.pid, str(server.resolve()))
        except OSError:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            os.close(reader)


def _full_pipe() -> tuple[int, int]:
    """A pipe that takes no byte more: whoever has something to say blocks, and does not end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(FILL_BYTES))
    os.set_blocking(writer, True)
    return reader, writer


def _settled(pid: int, expected: str) -> str:
    """What `pid` runs: `expected` at once, anything else after the time a wrapper may take.
    Raises OSError if it has ended."""
    deadline = time.monotonic() + WRAPPER_S
    while True:
        program = str(Path(f"/proc/{pid}/exe").readlink())
        if program == expected or time.monotonic() > deadline:
            return program
        time.sleep(POLL_S)


def linked_backends(server: Path) -> tuple[str, ...] | None:
    """Backends in the libraries that `server` loads from beside itself; None if that cannot be
    read. An engine that loads its backends by itself (GGML_BACKEND_DL) has those beside it."""
    directory, waiting = server.resolve().parent, [server.resolve()]
    names: set[str] = set()
    if needed(waiting[0]) is None:
        return None
    while waiting:
        for name in needed(waiting.pop()) or ():
            if name not in names:
                names.add(name)
                if (directory / name).is_file():
                    waiting.append(directory / name)
    found = {m[1] for m in map(_BACKEND_LIBRARY.match, names) if m}
    found |= {b for name in names for stem, b in _VENDOR_LIBRARY.items() if f"{stem}.so" in name}
    if "cpu" not in found:
        found |= {
            m[1] for p in directory.glob("libggml-*") if (m := _BACKEND_LIBRARY.match(p.name))
        }
    return tuple(sorted(found))


def _files(record: RuntimeRecord) -> tuple[FileSeen, ...]:
    known = {binary.name: binary for binary in record.binaries}
    found = {path.name: path for path in engine_files(Path(record.directory))}
    linked = {f.name: f.sha256 for f in record.build.built_files} if record.build else {}
    seen = [
        FileSeen(str(Path(b.path).resolve()), b.sha256, _sha256(Path(b.path)), linked.get(b.name))
        for b in record.binaries
    ]
    strangers = [path for name, path in found.items() if name not in known]
    return (*seen, *(FileSeen(str(p.resolve()), None, _sha256(p)) for p in strangers))


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None


def _cache(record: RuntimeRecord) -> tuple[tuple[tuple[str, str], ...] | None, float | None]:
    """(values, Unix time of the cache): of the build's own record, else of the tree the engine
    still lies in."""
    if record.build is not None:
        return _choices(record.build.cmake_cache), record.build.cache_written_at
    for path in (Path(record.directory) / CACHE, Path(record.directory).parent / CACHE):
        try:
            lines = path.read_text(errors="replace").splitlines()
            written_at = path.stat().st_mtime
        except OSError:
            continue
        return _choices({m[1]: m[2] for m in map(_CACHE_LINE.match, lines) if m}), written_at
    return None, None


def _choices(values: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, values[name]) for name in CHOICES if name in values)


def _built_at(record: RuntimeRecord) -> float | None:
    """Unix time of the oldest file, all of which a build of meshd's links after it configures; of
    the newest one in a tree of somebody's own, where building again leaves most files alone."""
    times = []
    for binary in record.binaries:
        with contextlib.suppress(OSError):
            times.append(Path(binary.path).stat().st_mtime)
    choose = max if record.build is None else min
    return choose(times, default=None)
