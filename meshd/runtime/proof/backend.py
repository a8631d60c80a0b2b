"""Asks the engine's own binary and the driver which devices there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from meshd.errors import EngineRejected
from meshd.runtime.devices import Reading, agree, parse_list, take_reading
from meshd.runtime.probe import ask_listing, listed_in
from meshd.runtime.proof.backends import devices_of
from meshd.runtime.proof.evidence import BackendEvidence, BinaryEvidence
from meshd.view import DeviceView

ReadDevices = Callable[[], tuple[DeviceView, ...]]


def read_backend(
    server: Path,
    binary: BinaryEvidence,
    read_devices: ReadDevices,
    read_all: Callable[[], Reading] = take_reading,
) -> BackendEvidence:
    """Blocking, a second or two where a driver has to wake up; nothing is raised.

    `read_all` is asked where only the engine lists a device for CUDA: on a Jetson the driver
    cannot, and the engine's word is all there is.
    """
    architectures = dict(binary.cmake_cache or ()).get("CMAKE_CUDA_ARCHITECTURES")
    devices = read_devices()
    try:
        said = ask_listing(server)
    except EngineRejected as error:
        return BackendEvidence(None, devices, architectures or None, error.message)
    listed, blind = listed_in(said), None
    if devices_of("cuda", listed) and not any(device.backend == "cuda" for device in devices):
        reading = read_all()
        driver = reading.driver_of("cuda")
        if driver is not None and driver.blind:
            blind = driver.problem
            devices = agree(reading, parse_list(said, "cuda"), os.environ).devices
    return BackendEvidence(listed, devices, architectures or None, blind=blind)
