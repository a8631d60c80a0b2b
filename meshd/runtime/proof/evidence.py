"""What was seen of an engine, before anybody judges it. Data only.

A field that is None was not seen; the judge never takes that for good news. `problem` of a part:
why it could not be looked at to its end, in words that say what to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshd.view import DeviceView


@dataclass(frozen=True, slots=True)
class FileSeen:
    """One file of the engine."""

    path: str
    recorded_sha256: str | None
    """From the record made when it was built or adopted; None if that does not know the file."""
    found_sha256: str | None
    """Of the bytes that lie there now; None if there are none."""
    built_sha256: str | None = None
    """As the compiler left it, before it was installed; None if the record does not tell."""


@dataclass(frozen=True, slots=True)
class BinaryEvidence:
    """The files, and what they say of themselves."""

    path: str
    """Of llama-server, as it is asked for."""
    executed: str | None = None
    """What the kernel really ran for it (`/proc/PID/exe`)."""
    files: tuple[FileSeen, ...] = ()
    """Every file of the engine, llama-server first."""
    version_recorded: str = ""
    version_said: str | None = None
    """`--version`, now."""
    linked: tuple[str, ...] | None = None
    """Backends in the libraries it loads (`cpu`, `cuda`, `rpc`); None if that cannot be read."""
    cmake_cache: tuple[tuple[str, str], ...] | None = None
    """The choices of the build that matter here, from its CMakeCache; None if there is none."""
    cache_written_at: float | None = None
    """Unix time of that file, as the build or the disk tells it."""
    built_at: float | None = None
    """Unix time of the file that must be younger than that: the oldest one of a build of meshd's,
    the newest one of an adopted tree."""
    rpc_protocol: str | None = None
    adopted: bool = False
    """Not built by meshd: its record and its files are of one moment, its build is hearsay."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class BackendEvidence:
    """What the engine lists, and what the driver does."""

    listed: tuple[str, ...] | None = None
    """Lines of `--list-devices`, as in `CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)`; None if
    the engine did not answer."""
    devices: tuple[DeviceView, ...] = ()
    """What the driver knows, the CPU included."""
    architectures: str | None = None
    """`CMAKE_CUDA_ARCHITECTURES` of the build; None if that is unknown."""
    problem: str | None = None
    blind: str | None = None
    """Why the driver of this kind of machine can tell nothing although its GPU works (Jetson):
    `devices` are then the engine's own word. None: it can."""


@dataclass(frozen=True, slots=True)
class RuntimeEvidence:
    """A model that ran."""

    device: str
    """As the engine calls it: `CUDA0`."""
    executed: str | None = None
    """The program of the process that ran it."""
    offloaded: tuple[int, int] | None = None
    """(layers on the device, all layers), from the engine's log."""
    buffers: tuple[tuple[str, float], ...] = ()
    """Where its weights lie: (buffer, MiB). The only line a CPU engine cannot fake: one with RPC
    says `offloaded 5/5 layers to GPU` without having any."""
    pid: int | None = None
    driver_sees: bool | None = None
    """Whether the driver counts that process among those on its device; None: no driver tells."""
    driver_said: str = ""
    """In which words."""
    generated: bool = False
    tokens_per_s: float | None = None
    no_memory: bool = False
    """It failed for want of memory, which says nothing of the device."""
    note: str | None = None
    """How this was seen, if not by a run of its own."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    built_for: str
    """`cpu`, `cuda`, …: what the engine's record says."""
    checked_at: float
    """Unix time."""
    binary: BinaryEvidence
    backend: BackendEvidence | None = None
    """None: not looked at (yet)."""
    runtime: RuntimeEvidence | None = None
