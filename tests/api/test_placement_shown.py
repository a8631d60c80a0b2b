"""What `/mesh/status` and the events say of deployments and claims."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.api.events import changes
from meshd.api.status import status
from meshd.ids import ModelId, NodeId
from meshd.view import (
    Cause,
    Claim,
    ClaimState,
    Deployment,
    ModelState,
    NodeState,
    NodeView,
    PeerState,
    PeerView,
    View,
    with_peers,
    with_wanted,
)
from tests.api.scripted import model_view

M = ModelId("m")
HERE, THERE = NodeId("h" * 52), NodeId("t" * 52)
VIEW = View(node=NodeView(HERE, "here", "0", "member", NodeState.READY, 0.0, "127.0.0.1:1", None))
CLAIM = Claim(M, 3, ClaimState.PREPARING, 9, "most memory: 8 GiB")


def there(*claims: Claim, state: PeerState = PeerState.ALIVE) -> PeerView:
    return PeerView(THERE, "there", state, claims=claims)


def host_event(
    state: str,
    previous: str | None,
    reason: str | None = CLAIM.reason,
    *,
    epoch: int = 3,
    node: str = "here",
) -> dict[str, object]:
    return {
        "type": "host",
        "model": "m",
        "node": node,
        "node_id": {"here": HERE, "there": THERE}[node],
        "epoch": epoch,
        "state": state,
        "previous": previous,
        "reason": reason,
    }


def hosting(old: View, new: View) -> list[dict[str, object]]:
    return [event for event in changes(old, new) if event["type"] == "host"]


def test_deployments_are_told_with_names() -> None:
    view = replace(
        with_peers(VIEW, (there(),)),
        deployments=(
            Deployment(M, "ref", 7, HERE, None, 4096, 2, THERE, Cause.DEMAND, asleep=True),
            Deployment(ModelId("n"), "n", 1, NodeId("x"), host=NodeId("y")),
            Deployment(ModelId("gone"), "gone", 2, HERE, removed=True),
        ),
    )
    assert status(view, "", 0.0, {})["deployments"] == [
        {
            "model": "m",
            "ref": "ref",
            "version": 7,
            "replicas": None,
            "context": 4096,
            "parallel": 2,
            "host": "there",
            "cause": "demand",
            "asleep": True,
            "origin": "here",
        },
        {
            "model": "n",
            "ref": "n",
            "version": 1,
            "replicas": 1,
            "context": None,
            "parallel": None,
            "host": "y",
            "cause": "operator",
            "asleep": False,
            "origin": "x",
        },
    ]


def test_a_model_that_is_only_wanted_has_no_hosts() -> None:
    waiting = model_view(state=ModelState.WAITING, reason="nobody has the memory")
    (model,) = status(with_wanted(VIEW, {M: waiting}), "", 0.0, {})["models"]
    assert (model["state"], model["reason"], model["hosts"]) == (
        "waiting",
        "nobody has the memory",
        [],
    )


def test_each_change_of_an_own_claim_is_an_event() -> None:
    preparing = replace(VIEW, claims=(CLAIM,))
    ready = replace(VIEW, claims=(replace(CLAIM, state=ClaimState.READY),))
    anew = replace(VIEW, claims=(replace(CLAIM, state=ClaimState.READY, epoch=4, reason=""),))
    draining = replace(VIEW, claims=(replace(CLAIM, state=ClaimState.DRAINING, reason="moved"),))
    assert hosting(VIEW, preparing) == [host_event("preparing", None)]
    assert hosting(preparing, ready) == [host_event("ready", "preparing")]
    assert hosting(ready, anew) == [host_event("ready", "ready", None, epoch=4)]
    assert hosting(ready, draining) == [host_event("draining", "ready", "moved")]
    assert hosting(draining, VIEW) == [host_event("gone", "draining", "moved")]
    assert hosting(ready, VIEW) == [host_event("gone", "ready", None)]


def test_what_is_no_change_to_people_is_no_event() -> None:
    preparing = replace(VIEW, claims=(CLAIM,))
    assert hosting(preparing, replace(VIEW, claims=(replace(CLAIM, score=1),))) == []
    both = with_peers(preparing, (there(CLAIM),))
    slower = with_peers(preparing, (replace(there(CLAIM), rtt_s=0.5),))
    assert hosting(both, slower) == []
    assert hosting(both, with_peers(both, (there(CLAIM, state=PeerState.SUSPECT),))) == []


@pytest.mark.parametrize("state", [PeerState.DEAD, PeerState.LEFT])
def test_claims_of_other_nodes_count_while_they_can_be_reached(state: PeerState) -> None:
    empty, known = with_peers(VIEW, (there(),)), with_peers(VIEW, (there(CLAIM),))
    lost = with_peers(VIEW, (there(CLAIM, state=state),))
    assert hosting(VIEW, known) == [host_event("preparing", None, node="there")]
    assert hosting(empty, known) == [host_event("preparing", None, node="there")]
    assert hosting(known, empty) == [host_event("gone", "preparing", None, node="there")]
    why = f"node `there` is {state.value}"
    assert hosting(known, lost) == [host_event("gone", "preparing", why, node="there")]
    assert hosting(lost, VIEW) == []
    assert hosting(lost, known) == [host_event("preparing", None, node="there")]
    (forgotten,) = hosting(known, VIEW)
    assert (forgotten["state"], forgotten["reason"]) == (
        "gone",
        "node `there` is no member of the mesh any more",
    )
