"""What nodes say of themselves, out of the view. Pure."""

from __future__ import annotations

from types import MappingProxyType

from meshd.election.words import Standing
from meshd.ids import NodeId
from meshd.view import NodeState, PeerState, PeerView, Role, View

REACHABLE = frozenset({PeerState.ALIVE, PeerState.SUSPECT})


def others(view: View) -> tuple[Standing, ...]:
    """All other nodes that are alive or suspected, by id. Of one whose advert has not come yet
    nothing is known, so it says nothing."""
    return tuple(_standing(peer) for peer in _reachable(view))


def myself(view: View) -> Standing:
    """This node, as the others see it."""
    node = view.node
    return Standing(
        node.id,
        node.name,
        MappingProxyType({bid.model: bid for bid in view.bids}),
        MappingProxyType({claim.model: claim for claim in view.claims}),
        node.state is NodeState.DRAINING,
        node.role != Role.CLIENT.value,
    )


class Standings:
    """`others` for one who looks at every view: what a node says of where models are changes
    seldom, and a view often. Equal answers are the same object."""

    def __init__(self) -> None:
        self._said: dict[NodeId, tuple[tuple[object, ...], Standing]] = {}
        self._others: tuple[Standing, ...] = ()

    def others(self, view: View) -> tuple[Standing, ...]:
        said = {}
        for peer in _reachable(view):
            words = (peer.name, peer.bids, peer.claims, peer.draining, peer.role)
            before = self._said.get(peer.id)
            same = before is not None and before[0] == words
            said[peer.id] = before if before is not None and same else (words, _standing(peer))
        self._said = said
        found = tuple(standing for _, standing in said.values())
        if len(found) != len(self._others) or any(
            new is not old for new, old in zip(found, self._others, strict=True)
        ):
            self._others = found
        return self._others


def _reachable(view: View) -> list[PeerView]:
    return sorted((p for p in view.peers if p.state in REACHABLE), key=lambda p: p.id)


def _standing(peer: PeerView) -> Standing:
    return Standing(
        peer.id,
        peer.name,
        MappingProxyType({bid.model: bid for bid in peer.bids}),
        MappingProxyType({claim.model: claim for claim in peer.claims}),
        peer.draining,
        peer.role is Role.MEMBER,
    )
