"""Anti-entropy of deployments: two tables become one with few words. Pure.

Nodes compare digests, one number each. Where those differ, one sends the stamps it has in chunks,
each of which covers a range of names; the other answers with what it has that is newer or missing
there, and asks for what it lacks. After that exchange both tables are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from meshd.election.deployments import MAX_RECORDS, DeploymentBook
from meshd.election.records import MAX_VERSION, Node
from meshd.ids import ModelId, NodeId
from meshd.view import Deployment

CHUNK_BYTES: Final = 16 * 1024
"""Estimated size of a chunk as JSON: far below a frame's limit, so that it blocks nothing."""
_ESCAPED: Final = 6
"""Bytes a character of a name takes at most in JSON."""
_FRAME_BYTES: Final = 64 + 2 * 256 * _ESCAPED
"""Of a chunk without entries, with the longest names."""
_ENTRY_BYTES: Final = 140
"""Of an entry but for the name: origin, version, fingerprint, punctuation."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a table has of one model."""

    model: ModelId
    version: int
    origin: NodeId
    mark: int
    """Fingerprint of the record."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a table has of the models whose names come after `after`, up to `until` inclusive: all
    of it. `until` None: to the end."""

    after: str
    until: str | None
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Between a table and a chunk of another one."""

    ours: tuple[Deployment, ...]
    """What the other one lacks, or may: newer, unknown there, or different with the same stamp."""
    wanted: tuple[ModelId, ...]
    """What this one lacks, or may."""


def chunks(book: DeploymentBook, limit_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The whole table, each chunk within `limit_bytes` or of a single entry; at least one."""
    after = ""
    entries: list[Entry] = []
    size = _FRAME_BYTES
    for record in book.records:
        more = _ENTRY_BYTES + _ESCAPED * len(record.model)
        if entries and size + more > limit_bytes:
            until = entries[-1].model
            yield Chunk(after, until, tuple(entries))
            after, entries, size = until, [], _FRAME_BYTES
        mark = book.fingerprint(record.model)
        entries.append(Entry(record.model, record.version, record.origin, mark))
        size += more
    yield Chunk(after, None, tuple(entries))


def difference(book: DeploymentBook, chunk: Chunk) -> Difference:
    """What is to be sent and asked for so that both tables agree in the range of `chunk`."""
    theirs = {entry.model: entry for entry in chunk.entries}
    send: list[Deployment] = []
    wanted: list[ModelId] = []
    for record in book.records:
        if record.model <= chunk.after or (chunk.until is not None and record.model > chunk.until):
            continue
        other = theirs.pop(record.model, None)
        if other is None:
            send.append(record)
        elif other.mark != book.fingerprint(record.model):
            stamp = (other.version, other.origin)
            if record.stamp >= stamp:
                send.append(record)
            if record.stamp <= stamp:
                wanted.append(record.model)
    return Difference(tuple(send), (*wanted, *theirs))


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]
    origin: Node
    mark: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class _Chunk(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    after: Annotated[str, StringConstraints(max_length=256)]
    until: Annotated[str, StringConstraints(max_length=256)] | None
    entries: Annotated[list[_Entry], Field(max_length=MAX_RECORDS)]


def chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    return {
        "after": chunk.after,
        "until": chunk.until,
        "entries": [
            {"model": e.model, "version": e.version, "origin": e.origin, "mark": f"{e.mark:016x}"}
            for e in chunk.entries
        ],
    }


def chunk_from_json(value: object) -> Chunk | None:
    """None for whatever is no chunk within the bounds."""
    try:
        chunk = _Chunk.model_validate(value)
    except ValidationError:
        return None
    entries = tuple(
        Entry(ModelId(e.model), e.version, NodeId(e.origin), int(e.mark, 16)) for e in chunk.entries
    )
    return Chunk(chunk.after, chunk.until, entries)
