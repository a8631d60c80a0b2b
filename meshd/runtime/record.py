"""What is known of one engine: the record kept beside it, and what status shows of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from meshd.view import BinaryView, ProofView, RuntimeView


class Binary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str
    path: str
    sha256: str
    size: int
    mtime_ns: int
    """With the size, tells cheaply that the file is still the one that was hashed."""

    inode: int = 0
    """Tells a file that was put in place of another with the same size and time."""

    def unchanged(self, *, same_inode: bool = False) -> bool:
        try:
            status = Path(self.path).stat()
        except OSError:
            return False
        if same_inode and status.st_ino != self.inode:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


class BuiltFile(BaseModel):
    """A program or library as the compiler left it, before it was installed."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str
    sha256: str
    size: int
    mtime_ns: int
    """When it was linked."""


class BuildFacts(BaseModel):
    """How an engine built here came to be. Fields with a default are not in older records."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    source: str
    source_sha256: str | None
    commit: str
    cmake_args: tuple[str, ...]
    cmake_cache: dict[str, str]
    """The `GGML_*` and `CMAKE_*_ARCHITECTURES` values the build really used."""
    compiler: str
    cpu: str = ""
    """`cpu_features()` of the machine it was built on and for; empty if unknown."""
    built_at: float
    """Unix time."""
    device_compiler: str = ""
    """Release of nvcc, as in `13.0`; empty for other backends."""
    cache_written_at: float | None = None
    """Unix time of its CMakeCache.txt; every file of `built_files` is younger."""
    built_files: tuple[BuiltFile, ...] = ()
    """Regular files of the build that were installed, by name. Their hashes were compared with
    those of the installed copies."""


def cpu_features(proc: Path = Path("/proc")) -> str:
    """Short hash of the instruction sets this processor has; empty where that cannot be told.

    Code built for one set dies with SIGILL on a smaller one, and a cache can be shared by machines.
    """
    try:
        lines = (proc / "cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return hashlib.sha256(" ".join(sorted(value.split())).encode()).hexdigest()[:8]
    return ""


class RuntimeRecord(BaseModel):
    """An engine that was probed. `build` is None for one that was adopted."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    id: str
    directory: str
    backend: str
    version: str
    """What `--version` said."""
    devices: tuple[str, ...]
    """What `--list-devices` listed; a CPU engine lists none."""
    rpc_protocol: str | None
    """From the source it was built from; binaries do not tell."""
    binaries: tuple[Binary, ...]
    probed_at: float
    """Unix time."""
    build: BuildFacts | None = None

    @property
    def server_path(self) -> str:
        return next(b.path for b in self.binaries if b.name == "llama-server")

    @property
    def rpc_path(self) -> str | None:
        return next((b.path for b in self.binaries if b.name.endswith("rpc-server")), None)

    def unchanged(self) -> bool:
        """Whether every binary is still the file that was hashed, by size and time; for one that
        was adopted by inode too (ours may have come back from a backup)."""
        adopted = self.build is None
        return all(binary.unchanged(same_inode=adopted) for binary in self.binaries)

    def placed_in(self, directory: Path) -> RuntimeRecord:
        """The same engine, found in `directory`: a cache may be moved or mounted elsewhere."""
        if str(directory) == self.directory:
            return self
        moved = [b.model_copy(update={"path": str(directory / b.name)}) for b in self.binaries]
        return self.model_copy(update={"directory": str(directory), "binaries": tuple(moved)})

    @property
    def lists_its_devices(self) -> bool:
        """Whether the probe saw a device it was built for; an engine for the CPU needs none."""
        return bool(self.devices) or self.backend == "cpu"

    def to_view(self) -> RuntimeView:
        """What status shows before the engine is proved (`runtime/proof`): what the probe saw, and
        `cpu` whatever it was built for. No model ran yet, so only one for the CPU passes."""
        built = "built here" if self.build is not None else f"adopted from {self.directory}"
        on_cpu = self.backend == "cpu"
        evidence = (
            f"--version: {self.version}",
            f"--list-devices: {', '.join(self.devices) or 'none'}"
            + (" (CPU only)" if on_cpu else "")
            + (
                ""
                if self.lists_its_devices
                else f"; it is for {self.backend} but would run on the CPU here"
            ),
            f"{built}; every flag meshd uses is in its --help",
        )
        problem = None if on_cpu else f"no model has been seen to run on {self.backend} here yet"
        return RuntimeView(
            id=self.id,
            backend="cpu",
            build=self.version,
            rpc_protocol=self.rpc_protocol,
            directory=self.directory,
            binaries=tuple(BinaryView(b.name, b.path, b.sha256) for b in self.binaries),
            proof=ProofView("binary", on_cpu, self.probed_at, evidence, problem=problem),
            built_for=self.backend,
        )
