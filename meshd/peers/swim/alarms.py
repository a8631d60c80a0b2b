"""What membership wants to be woken for; keys of its agenda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from meshd.ids import NodeId


@dataclass(frozen=True, slots=True)
class NextProbe:
    pass


@dataclass(frozen=True, slots=True)
class NextPush:
    pass


@dataclass(frozen=True, slots=True)
class NextDigest:
    pass


@dataclass(frozen=True, slots=True)
class NextRetry:
    pass


@dataclass(frozen=True, slots=True)
class DirectTimeout:
    seq: int


@dataclass(frozen=True, slots=True)
class ProbeTimeout:
    seq: int


@dataclass(frozen=True, slots=True)
class ErrandTimeout:
    """A ping for somebody else."""

    seq: int


@dataclass(frozen=True, slots=True)
class NextReprobe:
    node: NodeId


@dataclass(frozen=True, slots=True)
class SuspicionEnds:
    node: NodeId


@dataclass(frozen=True, slots=True)
class TombstoneAges:
    node: NodeId


Alarm: TypeAlias = (
    NextProbe
    | NextPush
    | NextDigest
    | NextRetry
    | DirectTimeout
    | ProbeTimeout
    | ErrandTimeout
    | NextReprobe
    | SuspicionEnds
    | TombstoneAges
)
