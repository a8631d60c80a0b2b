"""What the view says of the mesh and its nodes, published as seldom as it may be and as soon as it
must: at once when requests have to go elsewhere, a little later for numbers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from meshd.errors import PeerRefused
from meshd.ids import NodeId
from meshd.kernel import Board
from meshd.peers.adverts import AdvertBook
from meshd.peers.picture import Standing, picture
from meshd.peers.swim.members import Member
from meshd.peers.trust.membership import Membership
from meshd.view import MeshState, MeshView, PeerState, PeerView, View, with_peers

log = logging.getLogger(__name__)

AT_ONCE_S: Final = 0.0
SLOTS_S: Final = 0.2
"""Free slots of others: the choice among them wants them fresh."""
ROUND_TRIPS_S: Final = 1.0
RTT_WEIGHT: Final = 0.2
"""Of a new round trip in the smoothed one."""


class Showing:
    """Of one session. `name`: this node's, as configured; `members`, `book`, `membership` are read
    when it publishes."""

    def __init__(
        self,
        board: Board[View],
        own: NodeId,
        name: str,
        members: Callable[[], Mapping[NodeId, Member]],
        book: AdvertBook,
        membership: Callable[[], Membership],
    ) -> None:
        self._board = board
        self._own = own
        self._name = name
        self._members = members
        self._book = book
        self._membership = membership
        self._names: dict[NodeId, str] = {}
        self._rtts_s: dict[NodeId, float] = {}
        self._problem: PeerRefused | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        """Loop time of the timer."""
        self._closed = False

    def name_of(self, node: NodeId) -> str:
        """The name other nodes and people know it by; the beginning of its id before that."""
        return self._names.get(node, node[:8])

    def round_trip(self, node: NodeId, seconds: float) -> None:
        before = self._rtts_s.get(node, seconds)
        self._rtts_s[node] = before + RTT_WEIGHT * (seconds - before)
        self.within(ROUND_TRIPS_S)

    def forget(self, node: NodeId) -> None:
        self._rtts_s.pop(node, None)

    def refused(self, error: PeerRefused, theirs: str) -> None:
        """A node would not have a link; it matters to people while there is no other."""
        if self._problem is None or self._problem.message != error.message:
            log.warning("%s: %s", theirs, error.message)
        self._problem = error
        self.within(AT_ONCE_S)

    def welcomed(self) -> None:
        """A link stands."""
        self._problem = None

    def within(self, seconds: float) -> None:
        """Publish in at most so long; a wish for sooner wins."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        due_at = loop.time() + seconds
        if self._timer is not None:
            if self._due_at <= due_at:
                return
            self._timer.cancel()
        self._due_at = due_at
        self._timer = loop.call_later(seconds, self.publish)

    def publish(self) -> None:
        self._timer = None
        standings = {n: Standing(m.state, m.addresses) for n, m in self._members().items()}
        own_name, peers = picture(standings, self._book, self._rtts_s, self._own, self._name)
        self._names = {p.id: p.name for p in peers}
        self._names[self._own] = own_name
        publish(self._board, own_name, self._mesh(peers), peers)

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _mesh(self, peers: tuple[PeerView, ...]) -> MeshView:
        membership, problem = self._membership(), self._problem
        alone = not any(p.state is PeerState.ALIVE for p in peers)
        return MeshView(
            id=membership.mesh_id,
            name=membership.mesh_name,
            state=MeshState.REFUSED if problem is not None and alone else MeshState.MEMBER,
            reason=problem.message if problem is not None and alone else None,
            issuer=membership.issuer,
        )


def publish(board: Board[View], own_name: str, mesh: MeshView, peers: tuple[PeerView, ...]) -> None:
    """Replace what the view says of mesh, peers and this node's name."""
    view = replace(board.current, mesh=mesh)
    if view.node.name != own_name:
        view = replace(view, node=replace(view.node, name=own_name))
    if view.peers != peers:
        view = with_peers(view, peers)
    board.publish(view)
