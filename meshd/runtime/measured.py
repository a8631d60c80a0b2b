"""What engines said they take, kept for the next start of the same. Pure.

An engine tells it only if it is started talkative, and then says five times as much about every
request. So it is told to talk when the answer is not known, and to be quiet from then on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson

from meshd.runtime.reported import MemoryReport
from meshd.view.shape import MemoryParts

MAX_KEPT: Final = 256
"""The longest unused is forgotten first."""


@dataclass(frozen=True, slots=True)
class Launch:
    """All that what an engine takes depends on."""

    weights: str
    """Their digest; of a file that has none, its path."""
    bytes: int
    engine: str
    context: int
    """Tokens per slot."""
    parallel: int


class Measured:
    """The reports of a node, by launch."""

    def __init__(self) -> None:
        self._kept: dict[Launch, MemoryReport] = {}

    def find(self, launch: Launch) -> MemoryReport | None:
        return self._kept.get(launch)

    def keep(self, launch: Launch, report: MemoryReport) -> bool:
        """Whether that is news."""
        known = self._kept.pop(launch, None)
        self._kept[launch] = report
        while len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return known != report

    def to_json(self) -> bytes:
        return orjson.dumps(
            [
                {
                    **asdict(launch),
                    "devices": {name: asdict(parts) for name, parts in report.devices.items()},
                    "offloaded": report.offloaded,
                }
                for launch, report in self._kept.items()
            ]
        )

    @classmethod
    def from_json(cls, text: bytes) -> Measured:
        """What `to_json` wrote. What makes no sense is left out, without a word: it is measured
        again."""
        found = cls()
        try:
            rows = orjson.loads(text)
        except orjson.JSONDecodeError:
            return found
        for row in rows[-MAX_KEPT:] if isinstance(rows, list) else ():
            try:
                launch, report = _row(row)
            except (LookupError, AttributeError, TypeError, ValueError):
                continue
            found.keep(launch, report)
        return found


def _row(row: Any) -> tuple[Launch, MemoryReport]:
    """Raises LookupError, AttributeError, TypeError, ValueError."""
    launch = Launch(
        weights=str(row["weights"]),
        bytes=int(row["bytes"]),
        engine=str(row["engine"]),
        context=int(row["context"]),
        parallel=int(row["parallel"]),
    )
    devices = {
        str(name): MemoryParts(**{part: int(size) for part, size in parts.items()})
        for name, parts in dict(row["devices"]).items()
    }
    offloaded = row["offloaded"]
    layers = None if offloaded is None else (int(offloaded[0]), int(offloaded[1]))
    return launch, MemoryReport(devices, layers)
