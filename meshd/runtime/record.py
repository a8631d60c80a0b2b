"""What is known of one engine: the record kept beside it, and what status shows of it."""

from __future__ import annotations

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

    def unchanged(self) -> bool:
        try:
            status = Path(self.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


class BuildFacts(BaseModel):
    """How an engine built here came to be."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    source: str
    source_sha256: str | None
    commit: str
    cmake_args: tuple[str, ...]
    cmake_cache: dict[str, str]
    """The `GGML_*` and `CMAKE_*_ARCHITECTURES` values the build really used."""
    compiler: str
    built_at: float
    """Unix time."""


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
        """Whether every binary is still the file that was hashed, by size and time."""
        return all(binary.unchanged() for binary in self.binaries)

    def to_view(self) -> RuntimeView:
        built = "built here" if self.build is not None else f"adopted from {self.directory}"
        evidence = (
            f"--version: {self.version}",
            f"--list-devices: {', '.join(self.devices) or 'none (CPU only)'}",
            f"{built}; every flag meshd uses is in its --help",
        )
        return RuntimeView(
            id=self.id,
            backend=self.backend,
            build=self.version,
            rpc_protocol=self.rpc_protocol,
            directory=self.directory,
            binaries=tuple(BinaryView(b.name, b.path, b.sha256) for b in self.binaries),
            # Which device runs a model is proved only by a model; `binary` claims no more.
            proof=ProofView("binary", True, self.probed_at, evidence),
        )
