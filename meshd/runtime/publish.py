"""Installs what was built: copied, compared with what the compiler left, probed, and only then
there, by one rename. Nothing is half-installed."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from meshd.errors import BuildFailed, EngineRejected
from meshd.kernel.files import write_atomic
from meshd.runtime.choices import backend_library
from meshd.runtime.probe import RPC_SERVERS, SERVER, probe, sha256_of
from meshd.runtime.record import BuildFacts, BuiltFile, RuntimeRecord
from meshd.runtime.registry import RECORD, Registry

PROGRAMS = (SERVER, *RPC_SERVERS, "llama-gguf-split", "llama-bench")
"""What is built and installed; of the names of the RPC server, the one the source has."""

_LIBRARY = re.compile(r"\.(so|dylib)(\.|$)")


def publish(
    registry: Registry,
    runtime_id: str,
    backend: str,
    bin_dir: Path,
    facts: BuildFacts,
    rpc_protocol: str | None,
) -> RuntimeRecord:
    """Install the programs and libraries of `bin_dir` as the engine `runtime_id`. Blocking.

    An engine of that id which is there already makes way. On any way out but success nothing of
    the new one is left. Raises BuildFailed if it lacks a part, is not copied whole, or does not
    run; OSError of the disk is the caller's.
    """
    partial = registry.directory / f"{runtime_id}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        facts = facts.model_copy(update={"built_files": _install(bin_dir, partial, backend)})
        record = _probed(partial, registry.directory / runtime_id, backend, facts, rpc_protocol)
        write_atomic(partial / RECORD, record.model_dump_json(indent=1).encode(), mode=0o644)
        _appear(partial, registry.directory / runtime_id)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record


def _install(bin_dir: Path, partial: Path, backend: str) -> tuple[BuiltFile, ...]:
    """Copy, and compare each copy with the file the compiler left."""
    files = [
        path
        for path in sorted(bin_dir.iterdir())
        if path.name in PROGRAMS or _LIBRARY.search(path.name)
    ]
    library = backend_library(backend)
    if library is not None and not any(path.name.startswith(f"{library}.") for path in files):
        raise BuildFailed(
            f"the build made no {library}: it would be an engine for the CPU under the name of "
            f"{backend}; does this source know that backend?"
        )
    built = []
    for path in files:
        shutil.copy2(path, partial / path.name, follow_symlinks=False)
        if path.is_symlink():
            continue
        status = path.stat()
        digest = sha256_of(path)
        if sha256_of(partial / path.name) != digest:
            raise BuildFailed(
                f"{path.name} as installed is not {path.name} as built (its sha256 differs): "
                f"the disk of {partial.parent} or this machine's memory is not to be trusted"
            )
        built.append(
            BuiltFile(
                name=path.name, sha256=digest, size=status.st_size, mtime_ns=status.st_mtime_ns
            )
        )
    return tuple(built)


def _probed(
    partial: Path, final: Path, backend: str, facts: BuildFacts, rpc_protocol: str | None
) -> RuntimeRecord:
    """What the installed copies say, with the paths they will have."""
    try:
        seen = probe(partial, runtime_id=final.name, build=facts, rpc_protocol=rpc_protocol)
    except EngineRejected as error:
        raise BuildFailed(f"what was built does not run: {error.message}") from None
    # A GPU engine built where there is no GPU lists no device; it is what it was built as.
    built_as = seen.model_copy(update={"backend": backend})
    return built_as.placed_in(final)


def _appear(partial: Path, final: Path) -> None:
    # A changed engine of this id makes way by a rename too: a crash here leaves one or the other.
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
