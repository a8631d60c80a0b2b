"""What the cache knows of the rest of the mesh, and what it gives to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshd.errors import PeerRefused
from meshd.ids import NodeId
from meshd.kernel import Board
from meshd.view import PeerState, Role, View

if TYPE_CHECKING:
    from meshd.cache.room import CacheRoom
    from meshd.cache.transfer.words import Credentials, PeerSource
    from meshd.peers.links.streams import Open
    from meshd.peers.mesh import MeshService

CARRIER = (sys.executable, "-P", "-m", "meshd.carrier")
"""The command line of the process that serves bulk streams; whatever lies in the directory the
daemon was started in is not imported."""


class MeshNeighbours:
    """`cache.room.Neighbours`, out of the mesh as far as there is one."""

    def __init__(self, board: Board[View], mesh: Callable[[], MeshService | None]) -> None:
        self._board = board
        self._mesh = mesh

    def sources(self, digest: str | None) -> tuple[PeerSource, ...]:
        from meshd.cache.transfer.words import PeerSource

        mesh = self._mesh()
        known = () if mesh is None else mesh.bulk_peers()
        holders = {p.id for p in self._board.current.peers if digest in p.weights}
        return tuple(
            PeerSource(node_id=peer.node_id, name=peer.name, addresses=tuple(peer.addresses))
            for peer in sorted(known, key=lambda peer: peer.node_id not in holders)
        )

    def credentials(self) -> Credentials | None:
        from meshd.cache.transfer.words import Credentials

        mesh = self._mesh()
        ours = None if mesh is None else mesh.bulk_credentials()
        return None if ours is None else Credentials(**ours.to_wire())

    def hold(self, digest: str) -> bool | None:
        others = [
            peer
            for peer in self._board.current.peers
            if peer.state is PeerState.ALIVE and peer.role is Role.MEMBER
        ]
        return any(digest in peer.weights for peer in others) if others else None


def bulk_service(
    cache: CacheRoom, tunnel: Callable[[NodeId, Open], dict[str, Any]]
) -> Callable[[NodeId, Open], dict[str, Any]]:
    """For `peers.needs`: what other nodes get of the weights here, every member the same; and
    `tunnel`, for hosts of which this node is a worker. It raises PeerRefused, NotInCache."""

    def serve(node: NodeId, wanted: Open) -> dict[str, Any]:
        if wanted.service == "rpc":
            return tunnel(node, wanted)
        if not cache.settings.from_peers:
            raise PeerRefused(
                "this node serves no weights (`cache.from_peers`)", reason="no_service"
            )
        if wanted.service == "shard" and wanted.sha256 is not None:
            return cache.offering.grant(wanted.sha256).to_json()
        if wanted.service == "manifest" and wanted.ref is not None:
            return cache.offering.manifests(wanted.ref)
        raise PeerRefused(f"there is no service `{wanted.service}` here", reason="no_service")

    return serve
