"""The table of deployments: the newest writing stands, in whatever order it comes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.deployments import (
    MAX_RECORDS,
    PLAUSIBLE_VERSION,
    DeploymentBook,
    Rejected,
    Written,
)
from meshd.election.records import MAX_VERSION
from meshd.ids import ModelId
from meshd.view import Cause, Deployment
from tests.election.records import NODES, deployments

A, B, C = NODES
M, N = ModelId("m"), ModelId("n")

RECORDS = st.lists(deployments(), max_size=12)


def written(result: Written | Rejected) -> Deployment:
    """The record of a write that changed something."""
    assert isinstance(result, Written)
    assert result.changed
    return result.record


def loaded(model: ModelId = M) -> DeploymentBook:
    book = DeploymentBook()
    written(book.load(model, "owner/repo", A))
    return book


# -- merging --------------------------------------------------------------------------------------


@given(st.data(), RECORDS)
def test_the_order_of_records_does_not_matter(
    data: st.DataObject, records: list[Deployment]
) -> None:
    one, other = DeploymentBook(records), DeploymentBook(data.draw(st.permutations(records)))
    assert one.records == other.records
    assert one.digest == other.digest


@given(RECORDS, RECORDS, RECORDS)
def test_tables_that_meet_in_any_order_become_one(
    first: list[Deployment], second: list[Deployment], third: list[Deployment]
) -> None:
    left = DeploymentBook((*DeploymentBook((*first, *second)).records, *third))
    right = DeploymentBook((*first, *DeploymentBook((*second, *third)).records))
    assert left.records == right.records


@given(RECORDS, RECORDS)
def test_what_came_already_changes_nothing(first: list[Deployment], more: list[Deployment]) -> None:
    book = DeploymentBook(first)
    taken = book.merge(more)
    assert set(taken) <= set(more)
    before = book.digest
    assert book.merge(more) == ()
    assert book.merge(first) == ()
    assert book.digest == before


@given(RECORDS, RECORDS)
def test_digests_are_equal_only_if_tables_are(
    first: list[Deployment], second: list[Deployment]
) -> None:
    one, other = DeploymentBook(first), DeploymentBook(second)
    assert (one.digest == other.digest) == (one.records == other.records)


# -- writing --------------------------------------------------------------------------------------


def test_a_load_says_who_wrote_what() -> None:
    book = DeploymentBook()
    record = written(book.load(M, "owner/repo", A, replicas=None, context=4096, host=B))
    assert record == Deployment(M, "owner/repo", 1, A, None, 4096, None, B)
    assert book.get(M) == record
    assert book.records == (record,)


def test_the_next_version_is_above_all_that_is_known() -> None:
    book = loaded()
    book.merge((Deployment(N, "other", 7, C),))
    record = written(book.change(M, B, replicas=3))
    assert (record.version, record.origin, record.replicas) == (8, B, 3)


def test_a_version_that_was_made_up_drives_up_its_own_model_only() -> None:
    book = loaded()
    book.merge((Deployment(N, "other", PLAUSIBLE_VERSION + 5, C),))
    assert written(book.change(M, A, replicas=2)).version == 2
    assert written(book.unload(N, A)).version == PLAUSIBLE_VERSION + 6


def test_a_model_in_its_last_version_stays_as_it_is() -> None:
    book = DeploymentBook([Deployment(M, "owner/repo", MAX_VERSION, C)])
    assert isinstance(book.unload(M, A), Rejected)
    assert book.records[0].version == MAX_VERSION


def test_loading_the_same_again_is_no_news() -> None:
    book = loaded()
    again = book.load(M, "owner/repo", B)
    assert again == Written(book.records[0], changed=False)
    assert again.record.origin == A


@pytest.mark.parametrize("cause", [Cause.FLAG, Cause.AUTO, Cause.DEMAND])
def test_only_an_operator_changes_what_is_deployed(cause: Cause) -> None:
    book = DeploymentBook()
    record = written(book.load(M, "owner/repo", A, replicas=3))
    assert book.load(M, "owner/repo", B, cause=cause) == Written(record, changed=False)
    asleep = written(book.put_to_sleep(M, A))
    awake = written(book.load(M, "owner/repo", B, cause=cause))
    assert awake == replace(asleep, asleep=False, version=3, origin=B)
    assert written(book.load(M, "owner/repo", B)).replicas == 1


def test_an_operator_who_loads_what_a_flag_loaded_makes_it_his() -> None:
    book = DeploymentBook()
    written(book.load(M, "owner/repo", A, cause=Cause.AUTO))
    assert written(book.load(M, "owner/repo", A)).cause is Cause.OPERATOR


def test_one_name_is_one_reference() -> None:
    book = loaded()
    refused = book.load(M, "another/repo", B)
    assert isinstance(refused, Rejected)
    assert refused.reason.startswith("`m` is the name of owner/repo in this mesh")
    written(book.unload(M, A))
    assert written(book.load(M, "another/repo", B)).ref == "another/repo"


def test_an_unload_leaves_a_tombstone_that_outlives_what_it_buried() -> None:
    book = loaded()
    buried = book.records[0]
    tombstone = written(book.unload(M, B))
    assert (tombstone.removed, tombstone.version, tombstone.ref) == (True, 2, "owner/repo")
    assert book.merge((buried,)) == ()
    assert book.unload(M, B) == Written(tombstone, changed=False)
    assert isinstance(book.unload(N, B), Rejected)


def test_sleep_and_wake() -> None:
    book = loaded()
    assert written(book.put_to_sleep(M, B)).asleep
    assert book.put_to_sleep(M, B) == Written(book.records[0], changed=False)
    assert not written(book.wake(M, B)).asleep
    written(book.put_to_sleep(M, B))
    assert not written(book.load(M, "owner/repo", B)).asleep


def test_what_is_not_deployed_neither_sleeps_nor_changes() -> None:
    book = loaded()
    written(book.unload(M, A))
    for model in (M, N):
        assert isinstance(book.put_to_sleep(model, A), Rejected)
        assert isinstance(book.wake(model, A), Rejected)
        assert isinstance(book.change(model, A, replicas=2), Rejected)


def test_a_change_leaves_what_it_does_not_name() -> None:
    book = DeploymentBook()
    written(book.load(M, "owner/repo", A, context=4096, parallel=2, host=A))
    record = written(book.change(M, B, host=None))
    assert (record.context, record.parallel, record.host) == (4096, 2, None)


def test_what_others_would_not_take_is_not_written() -> None:
    book = DeploymentBook()
    refused = book.load(M, "r" * 1025, A)
    assert isinstance(refused, Rejected)
    assert "ref" in refused.reason
    assert isinstance(loaded().change(M, A, replicas=0), Rejected)
    assert book.records == ()


@given(RECORDS, st.sampled_from(["load", "unload", "sleep", "wake"]), st.sampled_from(NODES))
def test_a_write_stands_against_all_that_was_known(
    records: list[Deployment], what: str, origin: str
) -> None:
    book = DeploymentBook(records)
    writer = next(node for node in NODES if node == origin)
    writes = {
        "load": lambda: book.load(M, "r", writer),
        "unload": lambda: book.unload(M, writer),
        "sleep": lambda: book.put_to_sleep(M, writer),
        "wake": lambda: book.wake(M, writer),
    }
    result = writes[what]()
    book.merge(records)
    if isinstance(result, Written):
        assert book.get(M) == result.record


# -- the bound ------------------------------------------------------------------------------------


def many(count: int, *, removed: bool = False, first: int = 1) -> list[Deployment]:
    numbers = range(first, first + count)
    return [Deployment(ModelId(f"m{n}"), "r", n, A, removed=removed) for n in numbers]


def test_tombstones_go_first_and_the_oldest_of_them() -> None:
    book = DeploymentBook(many(MAX_RECORDS - 2, removed=True))
    served = [Deployment(ModelId(f"live{n}"), "r", 1, A) for n in range(5)]
    assert book.merge(served) == tuple(served)
    assert len(book.records) == MAX_RECORDS
    versions = [r.version for r in book.records if r.removed]
    assert min(versions) == 4
    assert written(book.load(M, "r", A)).version == MAX_RECORDS - 1


def test_a_full_table_keeps_what_is_served_and_takes_no_more() -> None:
    book = DeploymentBook(many(MAX_RECORDS))
    refused = book.load(M, "r", A)
    assert isinstance(refused, Rejected)
    assert "unload one" in refused.reason
    assert book.merge((Deployment(N, "r", 5000, A),)) == ()
    assert len(book.records) == MAX_RECORDS
    written(book.unload(ModelId("m7"), A))
    assert written(book.load(M, "r", A)).model == M
    assert book.get(ModelId("m7")) is None


def test_full_tables_choose_alike() -> None:
    first, second = many(700), many(700, first=701)
    one, other = DeploymentBook(first), DeploymentBook(second)
    one.merge(other.records)
    other.merge(first)
    assert one.records == other.records
    assert one.digest == other.digest
