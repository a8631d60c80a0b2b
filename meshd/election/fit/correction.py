"""What engines reported after loading, against what was estimated: kept and applied. Pure.

Weights are known to the byte from their headers and are not corrected. Caches and buffers for
computing are counted by rules that another build of the engine, or a device's backend, may not
keep: the ratio of what was seen to what was estimated is kept for each digest and engine, within
bounds, so that one misread log cannot make a node refuse everything, or accept anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import orjson

from meshd.election.fit.budget import HOST
from meshd.election.fit.estimate import Estimate, LayerNeed
from meshd.view.shape import MemoryParts

CACHE_BOUNDS: Final = (0.5, 2.0)
COMPUTE_BOUNDS: Final = (0.25, 8.0)
"""Wider: builds differ in what they keep room for, such as logits of a whole batch."""
MAX_KEPT: Final = 512
"""The longest unused is forgotten first."""
MAX_NAME_CHARS: Final = 160


@dataclass(frozen=True, slots=True)
class Correction:
    """Factors for what was estimated."""

    cache: float = 1.0
    compute: float = 1.0

    def apply(self, estimate: Estimate) -> Estimate:
        return replace(
            estimate,
            layers=tuple(
                LayerNeed(layer.weights, round(layer.cache * self.cache))
                for layer in estimate.layers
            ),
            compute=round(estimate.compute * self.compute),
        )


def observed(estimate: Estimate, seen: Mapping[str, MemoryParts]) -> Correction:
    """The correction that would have made `estimate` what an engine with the same context, slots
    and types said it took, by device. The largest buffer counts: each device is given as much."""
    cache = sum(parts.cache for parts in seen.values())
    holders = {name: parts for name, parts in seen.items() if parts.cache} or seen
    shared = 1 if HOST in holders else len(holders)
    compute = max((parts.compute for parts in holders.values()), default=0)
    return Correction(
        _ratio(cache, estimate.cache, CACHE_BOUNDS),
        _ratio(compute, estimate.compute_on_each(shared), COMPUTE_BOUNDS),
    )


class Corrections:
    """The corrections of a node, by (digest of the weights, id of the engine)."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Correction] = {}

    def find(self, digest: str, engine: str) -> Correction:
        """One that changes nothing if none is known."""
        return self._kept.get((digest, engine), Correction())

    def keep(self, digest: str, engine: str, correction: Correction) -> None:
        """In place of what was known: the same engine takes the same again."""
        self._kept.pop((digest, engine), None)
        self._kept[digest, engine] = correction
        while len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]

    def to_json(self) -> bytes:
        return orjson.dumps(
            [
                [digest, engine, kept.cache, kept.compute]
                for (digest, engine), kept in self._kept.items()
            ]
        )

    @classmethod
    def from_json(cls, text: bytes) -> Corrections:
        """What `to_json` wrote. Entries that make no sense are left out, without a word: losing a
        correction costs accuracy, never a start."""
        found = cls()
        try:
            rows = orjson.loads(text)
        except orjson.JSONDecodeError:
            return found
        for row in rows if isinstance(rows, list) else ():
            match row:
                case [
                    str(digest),
                    str(engine),
                    float(cache),
                    float(compute),
                ]:
                    if max(len(digest), len(engine)) <= MAX_NAME_CHARS:
                        kept = Correction(
                            _bounded(cache, CACHE_BOUNDS), _bounded(compute, COMPUTE_BOUNDS)
                        )
                        found.keep(digest, engine, kept)
        return found


def _ratio(seen: int, estimated: int, bounds: tuple[float, float]) -> float:
    """1 where one of them is nothing: there is nothing to learn from."""
    return _bounded(seen / estimated, bounds) if seen > 0 and estimated > 0 else 1.0


def _bounded(factor: float, bounds: tuple[float, float]) -> float:
    return min(max(round(factor, 3), bounds[0]), bounds[1])
