"""Two tables become one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.deployments import DeploymentBook
from meshd.election.reconciling import (
    CHUNK_BYTES,
    Chunk,
    chunk_from_json,
    chunk_to_json,
    chunks,
    difference,
)
from meshd.ids import ModelId
from meshd.view import Deployment
from tests.election.records import NODES, deployments

RECORDS = st.lists(deployments(), max_size=10)
PLAIN = Deployment(ModelId("m"), "r", 2, NODES[0])


def exchange(here: DeploymentBook, there: DeploymentBook, limit_bytes: int) -> int:
    """One round as two nodes make it; how many records crossed."""
    crossed = 0
    for chunk in list(chunks(here, limit_bytes)):
        carried = chunk_from_json(orjson.loads(orjson.dumps(chunk_to_json(chunk))))
        assert carried == chunk
        found = difference(there, carried)
        asked = [record for m in found.wanted if (record := here.get(m)) is not None]
        assert len(asked) == len(found.wanted)
        here.merge(found.ours)
        there.merge(asked)
        crossed += len(found.ours) + len(asked)
    return crossed


@given(RECORDS, RECORDS, st.sampled_from([1, 300, CHUNK_BYTES]))
def test_one_round_makes_tables_equal_and_the_next_is_silent(
    first: list[Deployment], second: list[Deployment], limit_bytes: int
) -> None:
    here, there = DeploymentBook(first), DeploymentBook(second)
    union = DeploymentBook((*first, *second))
    exchange(here, there, limit_bytes)
    assert here.records == there.records == union.records
    assert here.digest == there.digest
    assert exchange(here, there, limit_bytes) == 0


def test_only_what_differs_crosses() -> None:
    same = [Deployment(ModelId(f"m{n}"), "r", 1, NODES[0]) for n in range(20)]
    here = DeploymentBook((*same, PLAIN))
    there = DeploymentBook((*same, replace(PLAIN, version=1), replace(PLAIN, model=ModelId("z"))))
    assert exchange(here, there, CHUNK_BYTES) == 2


def test_what_is_older_there_is_not_asked_for() -> None:
    older = replace(PLAIN, version=1)
    for ours, theirs, sent, wanted in ((PLAIN, older, (PLAIN,), ()), (older, PLAIN, (), ("m",))):
        (chunk,) = chunks(DeploymentBook([theirs]))
        found = difference(DeploymentBook([ours]), chunk)
        assert (found.ours, found.wanted) == (sent, wanted)


def test_of_one_stamp_with_two_contents_both_cross() -> None:
    here, there = DeploymentBook([PLAIN]), DeploymentBook([replace(PLAIN, asleep=True)])
    assert exchange(here, there, CHUNK_BYTES) == 2
    assert here.records == there.records


def test_chunks_are_bounded_and_cover_every_name() -> None:
    book = DeploymentBook(
        Deployment(ModelId(f"{n:04d}" + "\x01" * 252), "r", 1, NODES[0]) for n in range(100)
    )
    parts = list(chunks(book))
    assert len(parts) > 1
    assert all(len(orjson.dumps(chunk_to_json(part))) <= CHUNK_BYTES for part in parts)
    assert [e.model for part in parts for e in part.entries] == [r.model for r in book.records]
    assert parts[0].after == ""
    assert parts[-1].until is None
    assert all(a.until == b.after for a, b in pairwise(parts))


def test_an_empty_table_asks_for_everything() -> None:
    parts = list(chunks(DeploymentBook()))
    assert parts == [Chunk("", None, ())]
    assert difference(DeploymentBook([PLAIN]), parts[0]).ours == (PLAIN,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"after": 1},
        {"after": "a" * 257},
        {"until": 5},
        {"entries": {}},
        {"entries": [{"model": "m", "version": 1, "origin": NODES[0], "mark": "xyz"}]},
        {"entries": [{"model": "m", "version": 0, "origin": NODES[0], "mark": "0" * 16}]},
        {"entries": [{"model": "m", "version": 1, "origin": "n", "mark": "0" * 16}]},
        {"entries": [None]},
    ],
)
def test_what_is_out_of_bounds_is_no_chunk(wrong: dict[str, Any]) -> None:
    good = chunk_to_json(Chunk("", None, ()))
    assert chunk_from_json({**good, **wrong}) is None
    assert chunk_from_json(None) is None
