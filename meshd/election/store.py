"""What an election must not forget: `epochs.json` and `deployments.json` in the data directory.

An epoch of a model must never be used twice by one node, or workers could not tell a claim from an
older one. So an epoch is on the disk before anything is claimed with it, and when the file that
holds them is damaged, no epoch starts below a floor: the Unix time in whole seconds. A node would
have had to claim a model more than once a second for all its life to be above it, and the next
damage finds a later time. It is a floor for this node alone; others follow it as they follow every
epoch they see. A clock that was set back could undercut an older floor, so the highest epoch and
floor that can still be read count as well.

Deployments that were lost come back from other nodes. Files are 0600 and replaced atomically; what
cannot be read is set aside under another name, and said so. Calls block (fsync) and may come from
several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeGuard

import orjson

from meshd.election.records import from_json, to_json
from meshd.errors import NoSpace
from meshd.ids import ModelId
from meshd.kernel.files import write_atomic
from meshd.view import Deployment

EPOCHS: Final = "epochs.json"
DEPLOYMENTS: Final = "deployments.json"
DAMAGED: Final = ".damaged"
"""Suffix of a file that was set aside; the last one of each is kept."""
MAX_EPOCHS: Final = 4096
"""Models whose epochs are kept. Full-policy: the lowest one goes, and lifts the floor to itself."""
MAX_EPOCH: Final = (1 << 53) - 1
MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""Twice what a full table can take; a larger file is not ours."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What earlier runs of this node left."""

    epochs: Mapping[ModelId, int]
    """The highest one by model; none below `floor`."""
    floor: int
    """Of models that are not named; 0 unless epochs were lost."""
    deployments: tuple[Deployment, ...]
    problems: tuple[str, ...]
    """What was damaged, where it lies now and what follows, in words."""


class ElectionStore:
    """Of one data directory, which exists. `wall`: Unix time. `load` comes before any `save_*`."""

    def __init__(self, directory: Path, wall: Callable[[], float] = time.time) -> None:
        self._epochs_path = directory / EPOCHS
        self._deployments_path = directory / DEPLOYMENTS
        self._wall = wall
        self._lock = threading.Lock()
        self._epochs: dict[ModelId, int] = {}
        self._floor = 0

    def load(self) -> Saved:
        """Take what the files hold. Raises OSError if one is there and cannot be read, NoSpace if
        a floor cannot be written down: it must hold after the next start too."""
        problems: list[str] = []
        with self._lock:
            self._load_epochs(problems)
            deployments = self._load_deployments(problems)
            epochs = MappingProxyType(dict(self._epochs))
            return Saved(epochs, self._floor, deployments, tuple(problems))

    def save_epoch(self, model: ModelId, epoch: int) -> None:
        """On the disk when this returns; one that is not higher than what is there changes nothing.

        Raises NoSpace if it cannot be written: nothing may be claimed with it then.
        """
        self.save_epochs({model: epoch})

    def save_epochs(self, epochs: Mapping[ModelId, int]) -> None:
        """The same for several, in one write: those others claimed with are above this node's next
        claim too, after a start at which nobody else is there to tell."""
        with self._lock:
            higher = {
                model: epoch
                for model, epoch in epochs.items()
                if epoch > self._epochs.get(model, self._floor)
            }
            if higher:
                self._write_epochs({**self._epochs, **higher}, self._floor)

    def save_deployments(self, records: Iterable[Deployment]) -> None:
        """The whole table, on the disk when this returns. Raises NoSpace."""
        with self._lock:
            _write(self._deployments_path, _deployments_file(records))

    def _load_epochs(self, problems: list[str]) -> None:
        data = _read(self._epochs_path)
        if data is None:
            return
        epochs, floor, whole = _epochs_from(_parsed(data))
        if whole:
            self._epochs = {model: max(epoch, floor) for model, epoch in epochs.items()}
            self._floor = floor
            return
        floor = max(int(self._wall()), floor, *epochs.values(), 0)
        aside = _set_aside(self._epochs_path, data)
        self._write_epochs({}, floor)
        problems.append(
            f"{self._epochs_path} was damaged and lies in {aside} now; claims of this node go on "
            f"from epoch {floor}, which is above all it can have used"
        )

    def _load_deployments(self, problems: list[str]) -> tuple[Deployment, ...]:
        data = _read(self._deployments_path)
        if data is None:
            return ()
        records, lost = _deployments_from(_parsed(data))
        if lost is None or lost:
            aside = _set_aside(self._deployments_path, data)
            what = "the deployments" if lost is None else f"{lost} of its deployments"
            _write(self._deployments_path, _deployments_file(records))
            problems.append(
                f"{self._deployments_path} was damaged and lies in {aside} now; {what} could not "
                "be read, and come back from other nodes or by `meshd load`"
            )
        return records

    def _write_epochs(self, epochs: dict[ModelId, int], floor: int) -> None:
        """Write, then believe. Called with the lock held."""
        while len(epochs) > MAX_EPOCHS:
            lowest = min(epochs, key=lambda model: epochs[model])
            floor = max(floor, epochs.pop(lowest))
        lifted = {model: max(epoch, floor) for model, epoch in epochs.items()}
        _write(self._epochs_path, orjson.dumps({"floor": floor, "epochs": lifted}))
        self._epochs, self._floor = lifted, floor


def _epochs_from(value: Any) -> tuple[dict[ModelId, int], int, bool]:
    """Epochs, floor, and whether everything in the file could be read."""
    if type(value) is not dict:
        return {}, 0, False
    rows, floor = value.get("epochs"), value.get("floor")
    good = {}
    if type(rows) is dict:
        good = {ModelId(model): epoch for model, epoch in rows.items() if _is_epoch(epoch)}
    whole = type(rows) is dict and len(good) == len(rows) and _is_epoch(floor)
    return good, floor if _is_epoch(floor) else 0, whole


def _is_epoch(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_EPOCH


def _deployments_file(records: Iterable[Deployment]) -> bytes:
    return orjson.dumps({"deployments": [to_json(record) for record in records]})


def _deployments_from(value: Any) -> tuple[tuple[Deployment, ...], int | None]:
    """Those that can be read, and how many cannot; None if nobody can tell."""
    rows = value.get("deployments") if type(value) is dict else None
    if type(rows) is not list:
        return (), None
    found = [from_json(row) for row in rows]
    return tuple(r for r in found if r is not None), found.count(None)


def _read(path: Path) -> bytes | None:
    """None if there is no such file; at most one byte more than a file of ours can have."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None


def _parsed(data: bytes) -> Any:
    """None for what is no JSON, or too much of it."""
    if len(data) > MAX_FILE_BYTES:
        return None
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _set_aside(path: Path, data: bytes) -> Path:
    """A copy: if the file were moved, a crash before the next one is written would look like a
    first start, without a floor."""
    aside = path.with_name(path.name + DAMAGED)
    _write(aside, data)
    return aside


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise NoSpace(f"{path} cannot be written: {error.strerror}") from None
