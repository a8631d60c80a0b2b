"""What the local hub can be told to do wrong, and to whom.

Positions are offsets in the file, not in the answer: a fault at an offset strikes only an answer
that carries this byte, and is used up by no other.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import ClassVar, Final, TypeAlias


class Stage(StrEnum):
    """The requests of one download, as the client makes them."""

    API = "api"
    """`/api/models/…`; the subject is `info` or `tree`."""
    RESOLVE = "resolve"
    """HEAD or GET of `/{repo}/resolve/{revision}/{path}`, before any byte; the subject is the path,
    as in the next one."""
    CONTENT = "content"
    """The GET that carries the file's bytes: of the CDN for LFS files, of the hub for others."""


@dataclass(frozen=True, slots=True)
class Truncate:
    """Close the connection in good order where byte `at` should come."""

    at: int
    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Stall:
    """Send nothing more from byte `at` on, until the client goes."""

    at: int
    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset the connection (RST) once everything before byte `at` has arrived."""

    at: int
    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Flip:
    """Send byte `at` with the bits of `mask` flipped."""

    at: int
    mask: int = 1
    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class WrongLength:
    """Announce `by` bytes more (or, if negative, fewer) than are sent; then close."""

    by: int
    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer a range with 200 and the whole file."""

    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Slow:
    bytes_per_s: float
    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Page:
    """Answer 200 with a web page, as captive portals do."""

    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Pointer:
    """Answer 200 with the LFS pointer in place of the file."""

    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connection without an answer."""

    stage: ClassVar = Stage.CONTENT


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with that status and the headers the real hub sends with it."""

    status: int
    retry_after_s: int | None = None
    error_code: str | None = None
    """`X-Error-Code`, such as `GatedRepo`."""
    error_message: str | None = None
    stage: ClassVar = Stage.RESOLVE


Fault: TypeAlias = (
    Truncate
    | Stall
    | Reset
    | Flip
    | WrongLength
    | IgnoreRange
    | Slow
    | Page
    | Pointer
    | Drop
    | Status
)


INSTEAD: Final = (Page, Pointer, Drop, Status)
"""These have an answer of their own, or none, in place of the right one."""


@dataclass(slots=True)
class _Entry:
    pattern: str
    fault: Fault
    stage: Stage
    left: int | None


class FaultBook:
    """The faults still to come. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []

    def add(
        self, pattern: str, fault: Fault, *, times: int | None = 1, stage: Stage | None = None
    ) -> None:
        """Let `fault` strike the next `times` requests (None: all of them) of files whose path in
        the repository matches `pattern`, as of fnmatch. `stage`: if not where such faults belong.
        """
        with self._lock:
            self._entries.append(_Entry(pattern, fault, stage or fault.stage, times))

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def take(self, subject: str, stage: Stage, span: range | None = None) -> list[Fault]:
        """Those that strike this request; they are used up by it.

        The first that has an answer of its own strikes alone; others, such as slowness and a cut,
        strike together. `span`: the bytes of the file it will carry, as far as that is known.
        """
        with self._lock:
            struck = [
                entry
                for entry in self._entries
                if entry.stage is stage
                and fnmatchcase(subject, entry.pattern)
                and _is_in(entry.fault, span)
            ]
            alone = [entry for entry in struck if isinstance(entry.fault, INSTEAD)]
            struck = alone[:1] or struck
            for entry in struck:
                if entry.left is not None:
                    entry.left -= 1
            self._entries = [entry for entry in self._entries if entry.left != 0]
        return [entry.fault for entry in struck]


def _is_in(fault: Fault, span: range | None) -> bool:
    at: int | None = getattr(fault, "at", None)
    return at is None or span is None or at in span
