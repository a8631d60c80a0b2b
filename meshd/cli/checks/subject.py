"""Whom the checks look at: one node, its engine and its daemon, each asked once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshd.cli.checks.clock import is_clock_kept
from meshd.cli.client import AdminClient
from meshd.config import Config, hub_cache_dir
from meshd.errors import MeshdError
from meshd.kernel.findings import NotApplicable
from meshd.view import DeviceView

if TYPE_CHECKING:
    from meshd.runtime.proof.evidence import BackendEvidence, BinaryEvidence, Evidence
    from meshd.runtime.record import RuntimeRecord


def devices_of_this_machine() -> tuple[DeviceView, ...]:
    from meshd.runtime.devices import read_devices  # late: the driver's library is not small

    return read_devices()


def program_on_path(name: str) -> str | None:
    """Where `name` is, also where vendors install compilers without telling PATH."""
    from meshd.runtime.toolchain import TOOLKIT_DIRS

    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(TOOLKIT_DIRS))


def files_of_engine(record: RuntimeRecord) -> BinaryEvidence:
    from meshd.runtime.proof.binary import read_binary

    return read_binary(record)


def list_of_engine(
    server: Path, binary: BinaryEvidence, read_devices: Callable[[], tuple[DeviceView, ...]]
) -> BackendEvidence:
    from meshd.runtime.proof.backend import read_backend

    return read_backend(server, binary, read_devices)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The machine, as far as checks look past the configuration; tests give another one."""

    proc: Path = Path("/proc")
    dev: Path = Path("/dev")
    run: Path = Path("/run")
    cgroups: Path = Path("/sys/fs/cgroup")
    hub: Path = field(default_factory=hub_cache_dir)
    """The Hugging Face cache."""
    devices: Callable[[], tuple[DeviceView, ...]] = devices_of_this_machine
    which: Callable[[str], str | None] = program_on_path
    read_binary: Callable[[RuntimeRecord], BinaryEvidence] = files_of_engine
    read_backend: Callable[
        [Path, BinaryEvidence, Callable[[], tuple[DeviceView, ...]]], BackendEvidence
    ] = list_of_engine
    clock_is_kept: Callable[[], bool | None] = is_clock_kept
    answer_s: float = 3.0
    """How long a daemon, a port or a peer may take to answer."""


class Subject:
    """What the checks of one run share. Each property is looked up at its first use. Blocking."""

    def __init__(
        self, config: Config, surroundings: Surroundings, backend: str | None = None
    ) -> None:
        self.config = config
        self.around = surroundings
        self.wanted_backend = backend
        """What a build was asked about."""

    @cached_property
    def answer(self) -> dict[str, Any] | MeshdError:
        """The daemon's status, or why there is none."""
        try:
            client = AdminClient(self.config.admin_socket, timeout_s=self.around.answer_s)
            status: dict[str, Any] = client.get("/status")
        except MeshdError as error:
            return error
        return status

    @property
    def status(self) -> dict[str, Any] | None:
        return None if isinstance(self.answer, MeshdError) else self.answer

    def running(self) -> dict[str, Any]:
        """The daemon's status. Raises NotApplicable if it does not run."""
        if self.status is None:
            raise NotApplicable("meshd does not run")
        return self.status

    @cached_property
    def found(self) -> RuntimeRecord | MeshdError:
        """The engine the next start runs, or why there is none."""
        from meshd.runtime.registry import Registry

        try:
            return Registry(self.config.cache_dir).find(self.config.runtime_dir)
        except MeshdError as error:
            return error

    @cached_property
    def changed(self) -> tuple[RuntimeRecord, ...]:
        """Engines built here that a start would run if their files were still those that were
        built: it passes over them. None if another directory was asked for."""
        from meshd.runtime.registry import Registry

        if self.config.runtime_dir is not None:
            return ()
        registry = Registry(self.config.cache_dir)
        chosen, found = registry.current(), self.found
        since = float("-inf") if isinstance(found, MeshdError) else found.probed_at
        if not isinstance(found, MeshdError) and found.id == chosen:
            return ()
        return tuple(
            record
            for record in registry.list()
            if not record.unchanged() and (record.id == chosen or record.probed_at > since)
        )

    def record(self) -> RuntimeRecord:
        """The engine to look at: the one that runs next, or else the newest that was changed.

        Raises NotApplicable if there is none, or none is needed.
        """
        if self.config.client:
            raise NotApplicable("a client runs no engine")
        if not isinstance(self.found, MeshdError):
            return self.found
        if self.changed:
            return self.changed[0]
        raise NotApplicable("there is no engine to look at")

    @cached_property
    def binary(self) -> BinaryEvidence:
        """That engine's files as they are now. Raises NotApplicable as `record`."""
        return self.around.read_binary(self.record())

    @cached_property
    def built_for(self) -> str:
        """The backend it is meant for. Raises NotApplicable as `record`."""
        from meshd.runtime.proof.backends import meant_for

        return meant_for(self.record().backend, self.binary)

    @cached_property
    def evidence(self) -> Evidence:
        """What the judge of proofs needs, as far as a look that starts no model goes."""
        from meshd.runtime.proof.evidence import Evidence

        server = Path(self.record().server_path)
        listed = self.around.read_backend(server, self.binary, lambda: self.devices)
        return Evidence(self.built_for, time.time(), self.binary, listed)

    @cached_property
    def devices(self) -> tuple[DeviceView, ...]:
        """As drivers list them, the CPU last."""
        return self.around.devices()

    @property
    def gpus(self) -> tuple[DeviceView, ...]:
        return tuple(device for device in self.devices if device.backend != "cpu")

    @property
    def usable_gpus(self) -> tuple[DeviceView, ...]:
        """Those their drivers have nothing against."""
        return tuple(device for device in self.gpus if device.problem is None)

    @cached_property
    def daemon_pid(self) -> int | None:
        """Of the daemon that answers."""
        if self.status is None:
            return None
        try:
            return int((self.config.data_dir / "lock").read_text())
        except (OSError, ValueError):
            return None
