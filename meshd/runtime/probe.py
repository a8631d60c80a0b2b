"""Looks at a directory of binaries before it is trusted: what runs there, and can meshd use it?"""

from __future__ import annotations

import hashlib
import re
import subprocess
import time
from pathlib import Path

from meshd.config import environment_of_children
from meshd.errors import EngineRejected
from meshd.runtime.record import Binary, BuildFacts, RuntimeRecord

SERVER = "llama-server"
RPC_SERVERS = ("ggml-rpc-server", "rpc-server")
"""Newer and older name of the same program."""
ANSWER_LIMIT_S = 20.0
"""Listing devices initialises drivers, which takes seconds on some machines."""
NEEDED_FLAGS = (
    *("--model", "--alias", "--host", "--ctx-size", "--parallel", "--no-webui", "--slots"),
    "--offline",
)
"""Features are probed, never assumed: an engine without one of these is too old."""

_LIBRARY = re.compile(r"\.(so|dylib)(\.|$)")
_SYSTEM_PREFIXES = ("", "usr", "local")
_DEVICE = re.compile(r"^\s+(?P<name>[A-Za-z]+\d*): (?P<what>.+)$", re.MULTILINE)
_BACKENDS = {"cuda": "cuda", "rocm": "rocm", "hip": "rocm", "vulkan": "vulkan", "metal": "metal"}


def probe(
    directory: Path,
    *,
    runtime_id: str | None = None,
    build: BuildFacts | None = None,
    rpc_protocol: str | None = None,
) -> RuntimeRecord:
    """Run and hash what is in `directory`. Blocking: up to a few seconds.

    Raises EngineRejected, saying what is missing or wrong.
    """
    server = directory / SERVER
    if not server.is_file():
        raise EngineRejected(f"{directory} has no {SERVER}")
    version = _version(_run(server, "--version"), server)
    help_text = _run(server, "--help")
    missing = [flag for flag in NEEDED_FLAGS if not re.search(rf"{flag}\b", help_text)]
    if missing:
        raise EngineRejected(
            f"{server} ({version}) does not know {', '.join(missing)}; it is too old for meshd: "
            "`meshd runtime build --backend cpu` makes one that fits"
        )
    devices = tuple(
        f"{m['name']}: {m['what'].strip()}"
        for m in _DEVICE.finditer(_run(server, "--list-devices"))
    )
    binaries = [_binary(server)]
    binaries += [_binary(directory / n) for n in RPC_SERVERS if (directory / n).is_file()][:1]
    # The programs are shells around these: a swapped library is a swapped engine.
    libraries = (p for p in directory.glob("lib*") if p.is_file() and not p.is_symlink())
    if directory.name != "bin" or directory.parent.name not in _SYSTEM_PREFIXES:
        binaries += [_binary(path) for path in sorted(libraries) if _LIBRARY.search(path.name)]
    return RuntimeRecord(
        id=runtime_id or f"adopted-{binaries[0].sha256[:8]}",
        directory=str(directory),
        backend=backend_of(devices),
        version=version,
        devices=devices,
        rpc_protocol=rpc_protocol,
        binaries=tuple(binaries),
        probed_at=time.time(),
        build=build,
    )


def backend_of(devices: tuple[str, ...]) -> str:
    """The backend of the first device listed: `CUDA0: NVIDIA …` is `cuda`; none is `cpu`."""
    for device in devices:
        name = re.sub(r"\d*:.*", "", device).lower()
        if name in _BACKENDS:
            return _BACKENDS[name]
    return "cpu"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _binary(path: Path) -> Binary:
    real = path.resolve()
    status = real.stat()
    return Binary(
        name=path.name,
        path=str(path),
        sha256=sha256_of(real),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )


def _run(binary: Path, flag: str) -> str:
    """Both outputs of `binary flag`: which one carries the answer differs between versions."""
    try:
        done = subprocess.run(
            [str(binary), flag],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_LIMIT_S,
            stdin=subprocess.DEVNULL,
            env=environment_of_children(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineRejected(
            f"{binary} {flag} did not answer within {ANSWER_LIMIT_S:.0f} s"
        ) from None
    except OSError as error:
        hint = {
            "Exec format error": "; it was built for another kind of machine",
            "Permission denied": "; `chmod +x` it",
        }.get(error.strerror or "", "")
        raise EngineRejected(f"{binary} cannot be executed: {error.strerror}{hint}") from None
    text = done.stdout + done.stderr
    if done.returncode != 0:
        words = (text.strip().splitlines() or ["no output"])[-1]
        raise EngineRejected(f"{binary} {flag} ended with status {done.returncode}: {words}")
    return text


def _version(text: str, binary: Path) -> str:
    match = re.search(r"version: *(.+)", text)
    if match is None:
        raise EngineRejected(f"{binary} --version names no version; is it llama.cpp's?")
    return match[1].strip()
