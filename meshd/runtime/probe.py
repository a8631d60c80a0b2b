"""Looks at a directory of binaries before it is trusted: what runs there, and can meshd use it?"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from meshd.config import environment_of_children
from meshd.errors import EngineRejected
from meshd.runtime.devices import engine_list
from meshd.runtime.lending.asking import ask_protocol
from meshd.runtime.record import Binary, BuildFacts, RuntimeRecord

SERVER = "llama-server"
RPC_SERVERS = ("ggml-rpc-server", "rpc-server")
"""Newer and older name of the same program."""
ANSWER_LIMIT_S = 20.0
"""Listing devices initialises drivers, which takes seconds on some machines."""
NEEDED_FLAGS = (
    *("--model", "--alias", "--host", "--ctx-size", "--parallel", "--n-gpu-layers", "--threads"),
    *(
        "--cache-type-k",
        "--cache-type-v",
        "--no-webui",
        "--slots",
        "--offline",
        "--mmproj",
        "--verbosity",
        "--cache-ram",
    ),
)
"""All that `launch.server_argv` may say of a model on one machine. Features are probed, never
assumed: an engine without one of these is too old."""

_LIBRARY = re.compile(r"\.(so|dylib)(\.|$)")
_SYSTEM_PREFIXES = ("", "usr", "local")
_DEVICE = re.compile(r"^\s+(?P<name>[A-Za-z]+\d*): (?P<what>.+)$", re.MULTILINE)
_MISSING_LIBRARY = re.compile(r"error while loading shared libraries: ([^\s:]+)")
_EXECUTION_HINTS = {
    "Exec format error": "; it was built for another kind of machine",
    "Permission denied": "; `chmod +x` it",
    "No such file or directory": "; its interpreter or loader is missing: it was built for another "
    "system",
}
_REBUILD = "`meshd runtime build --backend cpu` makes one that fits"


def probe(
    directory: Path,
    *,
    runtime_id: str | None = None,
    build: BuildFacts | None = None,
    rpc_protocol: str | None = None,
    limit_s: float = ANSWER_LIMIT_S,
) -> RuntimeRecord:
    """Run and hash what is in `directory`. Blocking: usually 0.1 s, at most three times `limit_s`,
    and another 5 s if its RPC server does not answer. `rpc_protocol`: where it is known; else it is
    asked.

    Raises EngineRejected, saying what is missing or wrong.
    """
    server = directory / SERVER
    if not server.is_file():
        raise EngineRejected(f"{directory} has no {SERVER}")
    version = ask_version(server, limit_s)
    missing = missing_features(_ask(server, "--help", limit_s))
    if missing:
        raise EngineRejected(
            f"{server} ({version}) does not know {', '.join(missing)}; it is too old for meshd: "
            + _REBUILD
        )
    devices = ask_devices(server, limit_s)
    try:
        binaries = tuple(_binary(path) for path in engine_files(directory))
    except OSError as error:
        raise EngineRejected(f"{error.filename} cannot be read: {error.strerror}") from None
    if rpc_protocol is None:
        servers = [path for path in engine_files(directory) if path.name in RPC_SERVERS]
        rpc_protocol = ask_protocol(servers[0]) if servers else None
    return RuntimeRecord(
        id=runtime_id or f"adopted-{binaries[0].sha256[:8]}",
        directory=str(directory),
        backend=backend_of(devices),
        version=version,
        devices=devices,
        rpc_protocol=rpc_protocol,
        binaries=binaries,
        probed_at=time.time(),
        build=build,
    )


def ask_version(server: Path, limit_s: float = ANSWER_LIMIT_S) -> str:
    """What `--version` says. Blocking. Raises EngineRejected."""
    return _version(_ask(server, "--version", limit_s), server)


def ask_devices(server: Path, limit_s: float = ANSWER_LIMIT_S) -> tuple[str, ...]:
    """What `--list-devices` says, as in `CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)`.
    Blocking; initialises drivers. Raises EngineRejected."""
    return listed_in(ask_listing(server, limit_s))


def listed_in(listing: str) -> tuple[str, ...]:
    """The lines of devices in what `ask_listing` returned."""
    return tuple(f"{m['name']}: {m['what'].strip()}" for m in _DEVICE.finditer(listing))


def ask_listing(server: Path, limit_s: float = ANSWER_LIMIT_S) -> str:
    """All that `--list-devices` prints, for `devices.parse_list`. As `ask_devices` otherwise."""
    return _ask(server, "--list-devices", limit_s)


def engine_files(directory: Path) -> tuple[Path, ...]:
    """The files that make up the engine in `directory`, llama-server first.

    The programs are shells around the libraries beside them: a swapped library is a swapped engine.
    A system's `bin` has no libraries of the engine's own beside it.
    """
    files = [directory / SERVER]
    files += [directory / n for n in RPC_SERVERS if (directory / n).is_file()][:1]
    if directory.name != "bin" or directory.parent.name not in _SYSTEM_PREFIXES:
        libraries = (p for p in directory.glob("lib*") if p.is_file() and not p.is_symlink())
        files += [path for path in sorted(libraries) if _LIBRARY.search(path.name)]
    return tuple(files)


def missing_features(help_text: str) -> tuple[str, ...]:
    """What meshd needs and this `--help` does not offer."""
    missing = [f for f in NEEDED_FLAGS if not re.search(rf"(?<![\w-]){f}(?![\w-])", help_text)]
    if not missing and not re.search(r"unix socket", help_text, re.IGNORECASE):
        missing.append("--host with a unix socket")
    return tuple(missing)


def backend_of(devices: tuple[str, ...]) -> str:
    """The backend of the first device that is not the CPU: `CUDA0: NVIDIA …` is `cuda`.

    None is `cpu`; one that meshd does not know keeps the name the engine gives it.
    """
    backends = (engine_list.backend_of(device.partition(":")[0]) for device in devices)
    return next((b for b in backends if b != "cpu"), "cpu")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _binary(path: Path) -> Binary:
    status = path.stat()
    return Binary(
        name=path.name,
        path=str(path),
        sha256=sha256_of(path),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
    )


def _ask(binary: Path, flag: str, limit_s: float) -> str:
    """Both outputs of `binary flag`: which one carries the answer differs between versions."""
    try:
        process = subprocess.Popen(
            [str(binary), flag],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment_of_children(),
            start_new_session=True,
        )
    except OSError as error:
        hint = _EXECUTION_HINTS.get(error.strerror or "", "")
        raise EngineRejected(f"{binary} cannot be executed: {error.strerror}{hint}") from None
    with process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except BaseException as error:
            # The group, not the child alone: a wrapper script's program would hold the pipe open.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise EngineRejected(f"{binary} {flag} did not answer within {limit_s:g} s") from None
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise EngineRejected(f"{binary} {flag} {_why_it_ended(process.returncode, text)}")
    return text


def _why_it_ended(status: int, text: str) -> str:
    words = (text.strip().splitlines() or ["no output"])[-1]
    if status == -signal.SIGILL:
        return "used an instruction this CPU does not have: it was built for another one; " + (
            _REBUILD
        )
    if status < 0:
        return f"was ended by signal {-status}: {words}"
    library = _MISSING_LIBRARY.search(text)
    if library is not None:
        return (
            f"needs {library[1]}, which is not on this machine; put it beside the program, or "
            "install the package that has it"
        )
    return f"ended with status {status}: {words}"


def _version(text: str, binary: Path) -> str:
    match = re.search(r"version: *(.+)", text)
    if match is None:
        raise EngineRejected(f"{binary} --version names no version; is it llama.cpp's?")
    return match[1].strip()
