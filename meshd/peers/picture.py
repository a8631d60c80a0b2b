"""The other nodes as the view shows them: membership, adverts and measurements in one. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshd.ids import NodeId
from meshd.peers.adverts import AdvertBook
from meshd.view import PeerState, PeerView, Role


@dataclass(frozen=True, slots=True)
class Standing:
    """What membership says of one other node."""

    state: PeerState
    addresses: tuple[str, ...]


def picture(
    members: Mapping[NodeId, Standing],
    adverts: AdvertBook,
    rtts_s: Mapping[NodeId, float],
    own: NodeId,
    own_name: str,
) -> tuple[str, tuple[PeerView, ...]]:
    """(the name this node goes by, all other nodes by name)."""
    said = {own: own_name}
    for node in members:
        advert = adverts.get(node)
        said[node] = advert.name if advert is not None else node[:8]
    names = unique_names(said)
    peers = []
    for node, standing in members.items():
        advert = adverts.get(node)
        backend, proof = adverts.runs_on(node)
        placement = adverts.placement(node)
        peers.append(
            PeerView(
                id=node,
                name=names[node],
                state=standing.state,
                role=advert.role if advert is not None else Role.MEMBER,
                address=standing.addresses[0] if standing.addresses else None,
                rtt_s=rtts_s.get(node),
                version=advert.version if advert is not None else "",
                draining=advert.draining if advert is not None else False,
                devices=tuple(d.to_view() for d in advert.devices) if advert is not None else (),
                models=adverts.models(node),
                weights=adverts.weights(node),
                backend=backend,
                proof=proof,
                bids=placement.bids,
                claims=placement.claims,
                demand=placement.demand,
                lends=placement.lends,
                rpc_protocol=adverts.rpc_protocol(node),
            )
        )
    return names[own], tuple(sorted(peers, key=lambda p: (p.name, p.id)))


def unique_names(said: Mapping[NodeId, str]) -> dict[NodeId, str]:
    """A name that is taken gets the beginning of its node's id as a suffix.

    Of several nodes that say one name the one with the smallest id keeps it bare, so that all nodes
    with one picture give the same names.
    """
    first: dict[str, NodeId] = {}
    for node in sorted(said):
        first.setdefault(said[node], node)
    return {
        node: name if first[name] == node else f"{name}-{node[:4]}" for node, name in said.items()
    }
