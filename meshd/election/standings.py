"""What nodes say of themselves, out of the view. Pure."""

from __future__ import annotations

from types import MappingProxyType

from meshd.election.words import Standing
from meshd.view import NodeState, PeerState, Role, View

REACHABLE = frozenset({PeerState.ALIVE, PeerState.SUSPECT})


def others(view: View) -> tuple[Standing, ...]:
    """All other nodes that are alive or suspected, by id. Of one whose advert has not come yet
    nothing is known, so it says nothing."""
    return tuple(
        Standing(
            peer.id,
            peer.name,
            MappingProxyType({bid.model: bid for bid in peer.bids}),
            MappingProxyType({claim.model: claim for claim in peer.claims}),
            peer.draining,
            peer.role is Role.MEMBER,
        )
        for peer in sorted(view.peers, key=lambda p: p.id)
        if peer.state in REACHABLE
    )


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
