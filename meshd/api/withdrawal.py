"""A node that is drained by hand: what its engines still take, and what is said of the rest. Pure.

It hands its models over: until another node is ready, or nobody can be, its own claim of a model
stays READY, and its engine takes new requests. After that the engine is *withdrawn*.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from meshd.api.route import find
from meshd.ids import ModelId, NodeId
from meshd.view import ClaimState, ModelState, ModelView, NodeState, View

_NOTHING: frozenset[ModelId] = frozenset()
_NO_HELP = (ModelState.ABSENT, ModelState.DRAINING, ModelState.FAILED)
"""States of a model on another node that promise nothing."""


def withdrawn_models(view: View) -> frozenset[ModelId]:
    """Models of this node whose engines take no new request. Empty unless the node drains."""
    if view.node.state is not NodeState.DRAINING:
        return _NOTHING
    return frozenset(view.local) - {c.model for c in view.claims if c.state is ClaimState.READY}


def without_withdrawn(model: ModelView, withdrawn: Set[ModelId]) -> ModelView:
    """`model` as the node offers it: elsewhere, if it is served elsewhere. Otherwise as it was, for
    the requests that were let in before; new ones are refused."""
    offered = tuple(t for t in model.targets if not t.local or t.model not in withdrawn)
    if not offered or len(offered) == len(model.targets):
        return model
    return replace(model, targets=offered)


def drains_alone(view: View, name: str, *, own: bool) -> bool:
    """Whether a request for `name` that found no engine can blame it on the draining: the mesh
    should serve the model, and no other node is about to. `own`: another node asks, which sees to
    the others itself."""
    if view.node.state is not NodeState.DRAINING:
        return False
    model = find(name, view.models)
    if model is None or model.state is ModelState.ABSENT:
        return any(d.model == name and not d.removed and not d.asleep for d in view.deployments)
    return own or not _is_coming(model, view.node.id)


def _is_coming(model: ModelView, here: NodeId) -> bool:
    return any(h.node_id != here and h.state not in _NO_HELP for h in model.hosts)
