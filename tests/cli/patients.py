"""A machine for `meshd doctor` to look at: nothing of the one the tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshd.cli.checks import Surroundings
from meshd.runtime.probe import probe
from meshd.runtime.proof.evidence import BackendEvidence, BinaryEvidence, FileSeen
from meshd.runtime.record import BuildFacts, RuntimeRecord
from meshd.view import DeviceView
from tests.runtime.fake_engine import make_engine

GB = 1_000_000_000
CPU = DeviceView("Some CPU", "cpu", None, 64 * GB, 32 * GB, True, None)
H200 = DeviceView(
    "NVIDIA H200", "cuda", "GPU-5e1c3a52-91d4-4c1e-8f0a-6f1f7c3d2b10", 150 * GB, 149 * GB, False,
    "9.0", driver="580.95.05",
)  # fmt: skip
LISTED = "CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)"
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max open files            {soft}                 {hard}               files
Max locked memory         8388608              8388608              bytes
Max file locks            unlimited            unlimited            locks
"""
"""As in `/proc/PID/limits`."""


CUDA_CACHE = {
    "GGML_CUDA": "ON",
    "GGML_CUDA_FA": "ON",
    "GGML_CUDA_FA_ALL_QUANTS": "ON",
    "GGML_RPC": "ON",
    "CMAKE_CUDA_ARCHITECTURES": "90",
}


def built_engine(
    cache_dir: Path, backend: str = "cuda", cache: dict[str, str] | None = None, **facts: Any
) -> RuntimeRecord:
    """An engine as `meshd runtime build` leaves it; `cache`: values of its CMakeCache."""
    name = f"{backend}-0c1e570-1a2b3c4d"
    directory = make_engine(cache_dir / "meshd" / "runtimes" / name)
    flags = cache if cache is not None else {"cpu": {"GGML_RPC": "ON"}}.get(backend, CUDA_CACHE)
    build = {
        "source": "llama_cpp_python-0.3.36.tar.gz",
        "source_sha256": "0" * 64,
        "commit": "0c1e570",
        "cmake_args": (),
        "cmake_cache": flags,
        "compiler": "c++ (Debian 12.2.0-14) 12.2.0",
        "built_at": 1_764_000_000.0,
    }
    record = probe(directory, runtime_id=name, build=BuildFacts.model_validate(build | facts))
    record = record.model_copy(update={"backend": backend})
    (directory / "record.json").write_text(record.model_dump_json())
    return record


def files_seen(record: RuntimeRecord, **changes: Any) -> BinaryEvidence:
    """What a look finds if every file is as it was recorded."""
    usual: dict[str, Any] = {
        "path": record.server_path,
        "executed": record.server_path,
        "files": tuple(FileSeen(b.path, b.sha256, b.sha256) for b in record.binaries),
        "version_recorded": record.version,
        "version_said": record.version,
        "linked": ("cpu", "rpc") if record.backend == "cpu" else ("cpu", record.backend, "rpc"),
        "cmake_cache": None if record.build is None else tuple(record.build.cmake_cache.items()),
        "adopted": record.build is None,
    }
    return BinaryEvidence(**usual | changes)


def machine(
    tmp_path: Path,
    *,
    devices: tuple[DeviceView, ...] = (CPU,),
    listed: tuple[str, ...] = (),
    binary: dict[str, Any] | None = None,
    soft: int = 524288,
    **changes: Any,
) -> Surroundings:
    """`listed`: what the engine lists now; `binary`: how its files differ from the record;
    `soft`: open files."""
    roots: dict[str, Any] = {
        name: tmp_path / name for name in ("proc", "dev", "run", "cgroups", "hub")
    }
    for root in roots.values():
        root.mkdir(exist_ok=True)
    (roots["proc"] / "self").mkdir(exist_ok=True)
    (roots["proc"] / "self" / "limits").write_text(LIMITS.format(soft=soft, hard=524288))
    (roots["proc"] / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n")

    def look(record: RuntimeRecord) -> BinaryEvidence:
        return files_seen(record, **binary or {})

    def ask(server: Path, seen: BinaryEvidence, read: Any) -> BackendEvidence:
        built = dict(seen.cmake_cache or ()).get("CMAKE_CUDA_ARCHITECTURES")
        return BackendEvidence(listed, read(), built)

    usual: dict[str, Any] = {
        "devices": lambda: devices,
        "read_binary": look,
        "read_backend": ask,
        "clock_is_kept": lambda: True,
        "which": lambda name: f"/usr/bin/{name}",
        "answer_s": 0.5,
    }
    return Surroundings(**roots, **usual | changes)
