"""Verdicts: what is wrong with a set of weights, or that nothing is. Pure.

`judge` compares a manifest (or, for local files without one, what their names promise) with what
`observe` saw of each file and what the ledger remembers of its hash. Every set of observations has
exactly one verdict a file; only a set whose files are all OK may reach an engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from meshd.cache.facts import FileFacts
from meshd.cache.gguf_header import GgufHeader
from meshd.errors import BrokenWeights
from meshd.sizes import format_size

PADDING_BYTES: Final = 64 * 1024
"""What may follow the last tensor of a file whose size nobody told: writers pad, differently."""
PROJECTOR_ARCHITECTURE: Final = "clip"


class Fault(StrEnum):
    """What a look at one file can come to; the first that applies, in this order."""

    MISSING = "missing"
    """Nothing there, or a link to nothing."""
    ELSEWHERE = "elsewhere"
    """Not there yet: another program is downloading it."""
    FOREIGN = "foreign"
    """Something that is no weights at all: an LFS pointer, a web page, an error message."""
    SHORT = "short"
    LONG = "long"
    CORRUPT = "corrupt"
    """Of the right size and wrong: hash, header, a tensor outside the file, or out of step with the
    rest of the set."""
    UNVERIFIED = "unverified"
    """Nothing wrong to see, but its sha256 was not computed since it last changed."""
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Expected:
    """One file of a set as it should be; what is None nobody has told."""

    path: str
    """On disk, where an engine opens it."""
    size: int | None = None
    sha256: str | None = None
    projector: bool = False
    """It belongs to the set without being one of its shards."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of one file: facts and header, or what stood in their way."""

    path: str
    facts: FileFacts | None = None
    """None if there is no regular file that can be opened."""
    header: GgufHeader | None = None
    fault: Fault | None = None
    """What is wrong whatever was expected; None exactly if `header` is set."""
    problem: str = ""
    """Words for `fault`, to follow the path."""

    def __post_init__(self) -> None:
        good = self.facts is not None and self.header is not None and self.fault is None
        bad = self.header is None and self.fault not in (None, Fault.UNVERIFIED, Fault.OK)
        if not good and not bad:
            raise ValueError(f"{self.path}: seen whole or wrong, not both and not neither")


@dataclass(frozen=True, slots=True)
class FileVerdict:
    path: str
    number: int
    """Of the shard, from 1; 0 for what is none (a projector)."""
    total: int
    """Shards of the set."""
    fault: Fault
    problem: str = ""
    """Words to follow the path; empty if the fault is OK."""
    expected: str | None = None
    """A size or a hash, where one was; so is `found`."""
    found: str | None = None
    sha256: str | None = None
    """Of what is on disk; None if it was not hashed since it last changed."""

    @property
    def shard(self) -> str:
        """`shard 00003-of-00004`; empty for a model in one file."""
        if self.number == 0:
            return "projector"
        return f"shard {self.number:05d}-of-{self.total:05d}" if self.total > 1 else ""

    @property
    def words(self) -> str:
        """One line: which file, and what is wrong with it."""
        told = [f"expected {self.expected}"] if self.expected is not None else []
        told += [f"found {self.found}"] if self.found is not None else []
        line = " ".join(part for part in (self.shard, self.path, self.problem) if part)
        return f"{line} ({', '.join(told)})" if told else line


@dataclass(frozen=True, slots=True)
class SetVerdict:
    """The verdict on a set: one of each, in the same order."""

    files: tuple[FileVerdict, ...]
    expected: tuple[Expected, ...]
    observations: tuple[Observation, ...]

    @property
    def ok(self) -> bool:
        return all(file.fault is Fault.OK for file in self.files)

    @property
    def worst(self) -> FileVerdict:
        """The file that is furthest from being usable, the first of several."""
        order = list(Fault)
        return min(self.files, key=lambda file: order.index(file.fault))

    @property
    def needs_hash(self) -> bool:
        """Nothing is wrong except that something was not hashed."""
        return self.worst.fault is Fault.UNVERIFIED

    @property
    def unverified(self) -> tuple[Expected, ...]:
        """What has to be hashed before more can be said."""
        return tuple(
            expected
            for expected, file in zip(self.expected, self.files, strict=True)
            if file.fault is Fault.UNVERIFIED
        )

    @property
    def unverified_bytes(self) -> int:
        """How much there is to hash."""
        return sum(
            seen.facts.size
            for seen, file in zip(self.observations, self.files, strict=True)
            if seen.facts is not None and file.fault is Fault.UNVERIFIED
        )

    def to_error(self, command: str | None) -> BrokenWeights:
        """One line on the worst file: which, where, what is wrong, what to do.

        `command` mends it, such as `meshd cache repair REF`; None if only a person can.
        """
        remedy = f"run `{command}`" if command is not None else (
            "put the right file there (loading is tried again by itself), or `meshd load` another"
        )  # fmt: skip
        others = sum(file.fault is not Fault.OK for file in self.files) - 1
        more = f"; {others} more of the set not usable" if others > 0 else ""
        return BrokenWeights(f"{self.worst.words}{more}; {remedy}", path=self.worst.path)


def judge(
    expected: Sequence[Expected],
    observations: Sequence[Observation],
    hashes: Sequence[str | None],
) -> SetVerdict:
    """The verdict on a set; the three in the same order, `hashes` as the ledger knows them.

    First each file for itself:
    1. whatever the observation says that needs no expectation, except that
    2. a size other than the expected one goes before damage, which it explains;
    3. without an expected size, a file far longer than its tensors;
    4. a hash other than the expected one; no hash known.
    Then those that nothing was found wrong with so far, whether they are in step with the set.
    """
    if not expected:
        raise ValueError("a set of weights has a file at least")
    total = sum(not one.projector for one in expected)
    files = [
        _judge_file(*one, number=number, total=total)
        for number, one in zip(
            _numbers(expected), zip(expected, observations, hashes, strict=True), strict=True
        )
    ]
    for at, problem in _misfits(expected, [seen.header for seen in observations]):
        if files[at].fault in (Fault.OK, Fault.UNVERIFIED):
            files[at] = replace(
                files[at], fault=Fault.CORRUPT, problem=problem, expected=None, found=None
            )
    return SetVerdict(tuple(files), tuple(expected), tuple(observations))


# -- each file ------------------------------------------------------------------------------------


def _numbers(expected: Sequence[Expected]) -> list[int]:
    count = itertools.count(1)
    return [0 if one.projector else next(count) for one in expected]


def _judge_file(
    expected: Expected,
    seen: Observation,
    sha256: str | None,
    *,
    number: int,
    total: int,
) -> FileVerdict:
    ok = FileVerdict(expected.path, number, total, Fault.OK, sha256=sha256)
    if seen.facts is None or seen.fault in (Fault.MISSING, Fault.ELSEWHERE, Fault.FOREIGN):
        size = exact_size(expected.size) if expected.size is not None else None
        return replace(
            ok, fault=seen.fault or Fault.MISSING, problem=seen.problem, expected=size, sha256=None
        )
    if expected.size is not None and seen.facts.size != expected.size:
        return _of_wrong_size(ok, seen.facts.size, expected.size)
    if seen.header is None:
        # Short by its own header, yet of the size that was told: then the header is what is wrong.
        short = seen.fault is Fault.SHORT and expected.size is None
        fault = Fault.SHORT if short else Fault.CORRUPT
        return replace(ok, fault=fault, problem=seen.problem)
    needed = seen.header.needed_bytes
    if expected.size is None and not needed <= seen.facts.size <= needed + PADDING_BYTES:
        return _of_wrong_size(ok, seen.facts.size, needed)
    if seen.facts.size < needed:
        return replace(ok, fault=Fault.CORRUPT, problem=f"has tensors that end at byte {needed}")
    if sha256 is None:
        return replace(
            ok,
            fault=Fault.UNVERIFIED,
            problem="was not hashed since it last changed",
            expected=_hash_words(expected.sha256),
        )
    if expected.sha256 is not None and sha256 != expected.sha256:
        return replace(
            ok,
            fault=Fault.CORRUPT,
            problem="has the right size and other bytes",
            expected=_hash_words(expected.sha256),
            found=_hash_words(sha256),
        )
    return ok


def _of_wrong_size(ok: FileVerdict, found: int, expected: int) -> FileVerdict:
    apart = abs(found - expected)
    return replace(
        ok,
        fault=Fault.SHORT if found < expected else Fault.LONG,
        problem=f"is {apart} bytes too {'short' if found < expected else 'long'}",
        expected=exact_size(expected),
        found=exact_size(found),
    )


def exact_size(count: int) -> str:
    """`4.8 GB, 4812345678 bytes`: for people and for comparing."""
    return f"{format_size(count)}, {count} bytes" if count >= 1000 else f"{count} bytes"


def _hash_words(sha256: str | None) -> str | None:
    return f"sha256 {sha256}" if sha256 is not None else None


# -- the set --------------------------------------------------------------------------------------


def _misfits(
    expected: Sequence[Expected], headers: Sequence[GgufHeader | None]
) -> list[tuple[int, str]]:
    """(index, words) of files that do not belong to the others."""
    shards = [at for at, one in enumerate(expected) if not one.projector]
    found = []
    for at, (one, header) in enumerate(zip(expected, headers, strict=True)):
        if header is None:
            continue
        if one.projector:
            problem = _projector_problem(header)
        else:
            problem = _split_problem(header, shards.index(at), len(shards))
        if problem is not None:
            found.append((at, problem))
    read = [(at, header) for at in shards if (header := headers[at]) is not None]
    if found or not read or len(read) < len(shards):
        return found
    if not read[0][1].architecture:
        return [(read[0][0], "names no architecture (general.architecture)")]
    return _tensor_misfits(read) if len(read) > 1 else []


def _projector_problem(header: GgufHeader) -> str | None:
    if header.architecture == PROJECTOR_ARCHITECTURE:
        return None
    return (
        f"is no projector: its architecture is {header.architecture or 'not named'}, not "
        f"{PROJECTOR_ARCHITECTURE}"
    )


def _split_problem(header: GgufHeader, number: int, total: int) -> str | None:
    """`number` from 0."""
    split = header.split
    if total == 1:
        if split is None:
            return None
        return (
            f"is shard {split[0] + 1} of {split[1]}, but its name does not say so, and the others "
            "cannot be found"
        )
    if split is None or split[1] != total:
        said = f"of {split[1]} shards" if split else "not split"
        return f"says it is {said}, its name says {total}"
    return f"holds shard {split[0] + 1}" if split[0] != number else None


def _tensor_misfits(shards: Sequence[tuple[int, GgufHeader]]) -> list[tuple[int, str]]:
    """The same for tensors, in a set whose every shard could be read."""
    first_at, first = shards[0]
    declared = first.integer("split.tensors.count")
    for at, header in shards[1:]:
        said = header.integer("split.tensors.count")
        if said is not None and said != declared:
            return [(at, f"promises {said} tensors in the set, its first shard {declared}")]
    found = sum(len(header.tensors) for _, header in shards)
    if declared != found:
        return [(first_at, f"promises {declared} tensors, the set holds {found}")]
    owners: dict[str, int] = {}
    for number, (at, header) in enumerate(shards, start=1):
        for tensor in header.tensors:
            other = owners.setdefault(tensor.name, number)
            if other != number:
                return [(at, f"holds tensor {tensor.name!r}, which shard {other} holds too")]
    return []
