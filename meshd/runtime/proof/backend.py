"""Asks the engine's own binary and the driver which devices there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from meshd.errors import EngineRejected
from meshd.runtime.probe import ask_devices
from meshd.runtime.proof.evidence import BackendEvidence, BinaryEvidence
from meshd.view import DeviceView

ReadDevices = Callable[[], tuple[DeviceView, ...]]


def read_backend(
    server: Path, binary: BinaryEvidence, read_devices: ReadDevices
) -> BackendEvidence:
    """Blocking, a second or two where a driver has to wake up; nothing is raised."""
    architectures = dict(binary.cmake_cache or ()).get("CMAKE_CUDA_ARCHITECTURES")
    devices = read_devices()
    try:
        listed, problem = ask_devices(server), None
    except EngineRejected as error:
        listed, problem = None, error.message
    return BackendEvidence(listed, devices, architectures or None, problem)
