"""Deployments as JSON, and which of two stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.records import (
    MAX_VERSION,
    canonical,
    fingerprint,
    from_json,
    problem_of,
    supersedes,
    to_json,
)
from meshd.ids import ModelId
from meshd.view import Cause, Deployment
from tests.election.records import NODES, deployments

PLAIN = Deployment(ModelId("m"), "owner/repo", 1, NODES[0])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(deployments())
def test_a_record_survives_the_journey(record: Deployment) -> None:
    assert from_json(orjson.loads(orjson.dumps(to_json(record)))) == record
    assert problem_of(record) is None


def test_defaults_are_left_out_so_that_the_form_is_canonical() -> None:
    assert to_json(PLAIN) == {
        "model": "m",
        "ref": "owner/repo",
        "version": 1,
        "origin": NODES[0],
    }
    assert to_json(replace(PLAIN, replicas=None))["replicas"] is None
    assert to_json(replace(PLAIN, split=True))["split"] is True


def test_what_a_newer_node_says_beside_it_is_ignored() -> None:
    assert from_json({**to_json(PLAIN), "colour": "green"}) == PLAIN


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"model": "m" * 257},
        {"model": 1},
        {"model": "\udcff"},
        {"ref": "r" * 1025},
        {"version": 0},
        {"version": MAX_VERSION + 1},
        {"version": "1"},
        {"version": True},
        {"origin": "somebody"},
        {"replicas": 0},
        {"replicas": 4097},
        {"context": 0},
        {"parallel": 1025},
        {"host": "somebody"},
        {"cause": "whim"},
        {"asleep": 1},
        {"removed": None},
        {"split": "yes"},
    ],
)
def test_what_is_out_of_bounds_is_no_record(wrong: dict[str, Any]) -> None:
    assert from_json({**to_json(PLAIN), **wrong}) is None


@given(JSON | st.fixed_dictionaries(dict.fromkeys(["model", "ref", "version", "origin"], JSON)))
def test_nothing_from_outside_breaks_the_reader(value: Any) -> None:
    record = from_json(value)
    assert record is None or problem_of(record) is None


def test_a_problem_names_the_field() -> None:
    problem = problem_of(replace(PLAIN, replicas=0))
    assert problem is not None
    assert problem.startswith("replicas")


def test_the_higher_version_stands_and_then_the_higher_writer() -> None:
    newer, other = replace(PLAIN, version=2), replace(PLAIN, origin=NODES[1])
    assert supersedes(newer, other)
    assert not supersedes(other, newer)
    assert supersedes(other, PLAIN)
    assert not supersedes(PLAIN, PLAIN)


@given(deployments(), deployments())
def test_of_two_different_records_exactly_one_stands(one: Deployment, other: Deployment) -> None:
    other = replace(other, model=one.model)
    assert supersedes(one, other) + supersedes(other, one) == (one != other)
    assert (canonical(one) == canonical(other)) == (one == other)
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def test_fingerprints_are_the_same_on_every_node_and_version() -> None:
    record = replace(PLAIN, replicas=None, cause=Cause.AUTO, asleep=True)
    assert canonical(record) == (
        b'{"asleep":true,"cause":"auto","model":"m","origin":"' + b"a" * 52 + b'",'
        b'"ref":"owner/repo","replicas":null,"version":1}'
    )
