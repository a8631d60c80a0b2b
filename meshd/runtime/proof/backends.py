"""What the backends of llama.cpp call their devices, libraries and switches. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from meshd.runtime.proof.evidence import BinaryEvidence

CPU = "cpu"
WITNESSED = ("cuda",)
"""Backends whose driver tells which processes use a device; a proof without its word is none."""
DEVICE_PREFIXES = {
    "cuda": ("CUDA",),
    "rocm": ("ROCm", "HIP"),
    "vulkan": ("Vulkan",),
    "metal": ("MTL", "Metal"),
}
"""What an engine calls the devices of a backend, without their number."""
SWITCHES = {
    "cuda": ("GGML_CUDA",),
    "rocm": ("GGML_HIP",),
    "vulkan": ("GGML_VULKAN",),
    "metal": ("GGML_METAL",),
}
"""What must be on in the CMakeCache of a build for that backend."""

_LINKED_AS = {"rocm": "hip"}


def devices_of(backend: str, listed: Iterable[str]) -> tuple[str, ...]:
    """Names of the backend's devices in lines of `--list-devices`: `CUDA0`, `CUDA1`."""
    names = [line.partition(":")[0].strip() for line in listed]
    prefixes = DEVICE_PREFIXES.get(backend, (backend,))
    return tuple(
        n for n in names if n.rstrip("0123456789").lower() in [p.lower() for p in prefixes]
    )


def meant_for(recorded: str, binary: BinaryEvidence) -> str:
    """The backend an engine is for. One that was adopted where its device was out of reach lists
    none, and was recorded as one for the CPU: its libraries tell better."""
    if not binary.adopted:
        return recorded
    linked = binary.linked or ()
    return next((b for b in DEVICE_PREFIXES if linked_as(b) in linked), recorded)


def linked_as(backend: str) -> str:
    """What the library of a backend is called: `libggml-hip.so` is ROCm's."""
    return _LINKED_AS.get(backend, backend)


def named_alike(driver: str, line: str) -> bool:
    """Whether a device of the driver's is the one an engine's line is about. NVML calls a Jetson's
    GPU `Orin (nvgpu)`, CUDA calls it `Orin`."""
    return driver.partition(" (")[0] in line
