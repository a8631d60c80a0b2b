"""The deny list on the wire: entries go to every link at once, lists that differ are sent whole.

A new link is told the digest of this node's list; whoever has another one answers with its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from meshd.errors import MeshdError
from meshd.ids import NodeId
from meshd.peers.links.linking import Spawn
from meshd.peers.links.links import ControlLink, LinkTable
from meshd.peers.trust import denylist
from meshd.peers.trust.denylist import DenyEntry
from meshd.peers.trust.trust import Trust

log = logging.getLogger(__name__)


class Denying:
    """Of one session. `denied(nodes, source)`: they are on the list now and were not before."""

    def __init__(
        self,
        trust: Trust,
        links: LinkTable,
        *,
        spawn: Spawn,
        denied: Callable[[tuple[NodeId, ...], ControlLink], None],
    ) -> None:
        self._trust = trust
        self._links = links
        self._spawn = spawn
        self._denied = denied

    def greet(self, link: ControlLink) -> None:
        link.send(self._trust.denials_digest())

    def spread(self, nodes: tuple[NodeId, ...], source: ControlLink | None) -> None:
        """Tell all links but `source`, and those to the nodes themselves."""
        frames = list(self._trust.denials(nodes))
        for link in self._links:
            if link is not source and link.remote.node not in nodes:
                for frame in frames:
                    link.send(frame)

    def frame_came(self, link: ControlLink, frame: dict[str, Any]) -> bool:
        """Whether the frame was one of ours. Raises ProtocolError."""
        match frame.get("t"):
            case "deny":
                entries = denylist.from_wire(frame.get("entries"))
                self._spawn(self._entries_came(link, entries))
            case "denied":
                if frame != self._trust.denials_digest():
                    for entries_frame in self._trust.denials():
                        link.send(entries_frame)
            case _:
                return False
        return True

    async def _entries_came(self, link: ControlLink, entries: tuple[DenyEntry, ...]) -> None:
        try:
            fresh = await self._trust.merge(entries)
        except MeshdError as error:
            log.warning("link to %s: %s; closing", link.remote.name, error.message)
            link.drop()
        else:
            if fresh:
                self._denied(fresh, link)
