"""Which node a person means."""

from __future__ import annotations

import base64

import pytest

from meshd.errors import NotFound
from meshd.ids import NodeId
from meshd.peers.naming import resolve_node
from meshd.view import PeerState, PeerView


def node_id(seed: int) -> NodeId:
    return NodeId(base64.b32encode(bytes([seed]) * 32).decode().rstrip("=").lower())


ATTIC, SHED = node_id(1), node_id(2)
PEERS = (
    PeerView(ATTIC, "attic", PeerState.ALIVE),
    PeerView(SHED, "shed", PeerState.DEAD),
    PeerView(node_id(3), ATTIC[:6], PeerState.ALIVE),
)


def test_a_name_comes_before_the_beginning_of_an_id() -> None:
    assert resolve_node("attic", PEERS) == ATTIC
    assert resolve_node(ATTIC[:6], PEERS) == node_id(3)
    assert resolve_node(ATTIC[:7], PEERS) == ATTIC


def test_ids_in_any_case_and_of_nodes_long_gone() -> None:
    assert resolve_node(SHED.upper(), PEERS) == SHED
    assert resolve_node(node_id(9), PEERS) == node_id(9)
    assert resolve_node(SHED[:8].upper(), PEERS) == SHED


def test_what_is_not_one_node_is_said() -> None:
    with pytest.raises(NotFound, match=r"several ids: .*attic.*shed.*give more of it"):
        resolve_node("a", PEERS)
    with pytest.raises(NotFound, match=r"no node is called 'cellar'; nodes known here: .*attic"):
        resolve_node("cellar", PEERS)
    with pytest.raises(NotFound, match="nodes known here: none"):
        resolve_node("", ())
    with pytest.raises(NotFound):
        resolve_node("z" * 52, PEERS)
