"""The looks a proof is made of, as one thing that tests can replace, and the order they go in."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from meshd.kernel import Pool
from meshd.runtime.devices import read_devices
from meshd.runtime.probe import ask_devices
from meshd.runtime.proof.backend import read_backend
from meshd.runtime.proof.binary import read_binary
from meshd.runtime.proof.evidence import BackendEvidence, BinaryEvidence, RuntimeEvidence
from meshd.runtime.proof.running import Trial, run_model
from meshd.runtime.proof.witness import Usage, read_usage
from meshd.runtime.record import RuntimeRecord
from meshd.view import DeviceView


def asleep_s() -> float:
    """Seconds this machine has been suspended since it was booted; 0.0 where the kernel does not
    tell. CLOCK_BOOTTIME goes on in suspend and CLOCK_MONOTONIC does not (clock_gettime(2))."""
    if sys.platform != "linux":
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class Looks:
    """All but `run` block and are called in a pool. Those that can fail raise MeshdError."""

    weights: Callable[[], Path]
    """The model that is run for a proof."""
    run: Callable[[Trial], Awaitable[RuntimeEvidence]]
    binary: Callable[[RuntimeRecord], BinaryEvidence] = read_binary
    backend: Callable[[Path, BinaryEvidence], BackendEvidence] = lambda server, binary: (
        read_backend(server, binary, read_devices)
    )
    devices: Callable[[], tuple[DeviceView, ...]] = read_devices
    listed: Callable[[Path], tuple[str, ...]] = ask_devices
    usage: Callable[[], Usage | None] = read_usage
    asleep_s: Callable[[], float] = asleep_s


def real_looks(weights: Callable[[], Path], pool: Pool, rng: random.Random) -> Looks:
    """`weights`: makes the model if it is not there; blocking."""
    return Looks(weights=weights, run=lambda trial: run_model(trial, pool, rng))


def still_there(
    before: RuntimeEvidence, failed: RuntimeEvidence, serving: frozenset[int], now: Usage | None
) -> RuntimeEvidence:
    """What counts when a run found no memory on a device that serves models: their engines.

    The last run's evidence stands while the driver sees an engine of ours that answers; else the
    run has failed. Pure.
    """
    found = sorted(serving & set(now.pids)) if now is not None else []
    if not failed.no_memory or not found:
        return failed
    return replace(
        before,
        pid=found[0],
        driver_sees=True,
        driver_said=f"pid {found[0]} uses {now.pids[found[0]] >> 20} MiB" if now else "",
        note="the device is full of models that are served: not run again, their engine is seen",
    )
