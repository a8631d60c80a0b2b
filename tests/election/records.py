"""Deployments for tests, written down or drawn."""

from __future__ import annotations

from hypothesis import strategies as st

from meshd.ids import ModelId, NodeId
from meshd.view import Cause, Deployment

NODES = tuple(NodeId(letter * 52) for letter in "abc")

MODELS = tuple(ModelId(name) for name in ("m", "n", "o", "pq", "Ω"))


def deployments() -> st.SearchStrategy[Deployment]:
    """Few models, versions and writers, so that records meet; equal stamps among them."""
    return st.builds(
        Deployment,
        model=st.sampled_from(MODELS),
        ref=st.sampled_from(["r", "s"]),
        version=st.integers(1, 4),
        origin=st.sampled_from(NODES),
        replicas=st.none() | st.integers(1, 3),
        context=st.none() | st.just(4096),
        parallel=st.none() | st.just(2),
        host=st.none() | st.sampled_from(NODES),
        cause=st.sampled_from(Cause),
        asleep=st.booleans(),
        removed=st.booleans(),
        split=st.booleans(),
    )
