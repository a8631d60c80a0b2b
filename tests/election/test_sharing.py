"""The book of deployments as peers use it: tables become equal, whatever is sent."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.deployments import DeploymentBook
from meshd.election.sharing import SharedDeployments
from meshd.ids import ModelId, NodeId
from meshd.view import Deployment

A, B = NodeId("a" * 52), NodeId("b" * 52)

records = st.lists(
    st.builds(
        Deployment,
        st.sampled_from("klmn").map(ModelId),
        st.just("owner/m"),
        st.integers(1, 5),
        st.sampled_from([A, B]),
        removed=st.booleans(),
    ),
    max_size=8,
)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def shared(found: list[Deployment]) -> tuple[DeploymentBook, SharedDeployments]:
    book = DeploymentBook(found)
    return book, SharedDeployments(book, lambda _: None)


def wire(value: Any) -> Any:
    return orjson.loads(orjson.dumps(value))


@given(records, records)
def test_after_one_comparison_two_tables_are_equal(
    ours: list[Deployment], theirs: list[Deployment]
) -> None:
    (one_book, one), (other_book, other) = shared(ours), shared(theirs)
    assert (one.digest == other.digest) == (one_book.records == other_book.records)
    for chunk in wire(other.stamps()):
        difference = one.compare(chunk)
        assert difference is not None
        lacking_there, lacking_here = difference
        other.merge(wire(one.entries(lacking_there)))
        one.merge(wire(other.entries(lacking_here)))
    assert one_book.records == other_book.records
    assert one.digest == other.digest


def test_what_changed_is_told_once_and_before_it_is_passed_on() -> None:
    told: list[tuple[Deployment, ...]] = []
    table = SharedDeployments(DeploymentBook(), told.append)
    record = Deployment(ModelId("m"), "owner/m", 3, A)
    source = shared([record])[1]
    assert table.merge(wire(source.entries([ModelId("m"), ModelId("unknown")]))) == ["m"]
    assert table.merge(wire(source.entries([ModelId("m")]))) == []
    assert told == [(record,)]


@given(st.lists(json, max_size=4))
def test_whatever_comes_is_a_record_or_nothing(entries: list[Any]) -> None:
    book, table = shared([])
    assert table.merge(entries) == []
    assert book.records == ()


@given(json)
def test_whatever_comes_is_a_chunk_or_none(value: Any) -> None:
    assert shared([])[1].compare(value) is None
