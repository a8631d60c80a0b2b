"""Members on the LAN, by multicast DNS. Only ever proposes addresses: who is there is proved later.

Multicast may be impossible (no interface, a firewall, no rights). That is one warning, and another
try when the interfaces are looked at again.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from meshd.ids import MeshId, NodeId
from meshd.kernel import Pool, Service
from meshd.peers.lan.addresses import read_interfaces
from meshd.peers.lan.announcement import Announcement, Found, only_here
from meshd.peers.lan.lan import CLOSE_S, Lan, trouble

log = logging.getLogger(__name__)

POLL_S: Final = 15.0
"""How often the interfaces are looked at: cables, Wi-Fi, VPNs, a failed start of multicast."""
MAX_SEEN: Final = 256
"""Services remembered. Full-policy: the one heard of longest ago makes way."""

Proposed = Callable[[NodeId, MeshId, str, tuple[str, ...]], None]
"""(node, mesh, name of the mesh, addresses HOST:PORT)."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is looked for and, for a member, what is announced."""

    mesh_id: MeshId | None
    mesh_name: str
    announcement: Announcement | None = None

    def wants(self, found: Found) -> bool:
        if self.announcement is not None and found.node_id == self.announcement.node_id:
            return False
        if self.mesh_id is not None:
            return found.mesh_id == self.mesh_id
        return found.mesh_name == self.mesh_name


class Discovery(Service):
    """Announces this node and looks for others, as `set_identity` or `look_for` last said.

    `proposed` is called on the loop for every node found, and again whenever what it says changes.
    With `enabled` false nothing is opened, sent or imported.
    """

    name = "discovery"
    stop_limit_s = CLOSE_S + 0.5

    def __init__(self, enabled: bool, proposed: Proposed = lambda *_: None) -> None:
        super().__init__()
        self.proposed = proposed
        self._enabled = enabled
        self._wish: _Wish | None = None
        self._wished = asyncio.Event()
        self._seen: OrderedDict[str, Found] = OrderedDict()
        self._lan: Lan | None = None
        self._warned = False

    # -- for its owner ----------------------------------------------------------------------------

    def set_identity(
        self,
        mesh_id: MeshId,
        mesh_name: str,
        node_id: NodeId,
        name: str,
        port: int,
        addresses: tuple[str, ...],
    ) -> None:
        """This node is a member: announce it, and look for the others of the mesh.

        `port`: the peer port; `addresses`: HOST:PORT, as other nodes are told. To be called again
        when any of it changes.
        """
        announcement = Announcement(mesh_id, mesh_name, node_id, name, port, addresses)
        self._want(_Wish(mesh_id, mesh_name, announcement))

    def look_for(self, mesh_id: MeshId | None, mesh_name: str) -> None:
        """This node is not in the mesh yet: announce nothing, look for that mesh. Without an id any
        mesh of that name is proposed."""
        self._want(_Wish(mesh_id, mesh_name))

    def rest(self) -> None:
        """Neither announce nor look."""
        self._want(None)

    # -- life -------------------------------------------------------------------------------------

    async def main(self) -> None:
        self.ready.set()
        if not self._enabled:
            await self.stopping.wait()
            return
        await _import_library()
        interfaces = read_interfaces()
        try:
            while not self.stopping.is_set():
                self._wished.clear()
                await self._follow()
                await self._pause()
                before, interfaces = interfaces, read_interfaces()
                if interfaces != before and self._lan is not None:
                    await self._guarded(self._lan.follow_interfaces())
        finally:
            await self._close()

    async def _pause(self) -> None:
        """Until another wish, the end, or `POLL_S` later."""
        waits = [
            asyncio.create_task(self._wished.wait(), name="discovery:wished"),
            asyncio.create_task(self.stopping.wait(), name="discovery:stopping"),
        ]
        try:
            await asyncio.wait(waits, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _want(self, wish: _Wish | None) -> None:
        if wish == self._wish:
            return
        self._wish = wish
        self._wished.set()
        if wish is not None:
            for found in tuple(self._seen.values()):
                self._tell(found)

    async def _follow(self) -> None:
        """Make the LAN side what the wish says."""
        wish = self._wish
        if wish is None:
            await self._close()
            return
        announcement = wish.announcement
        quiet = announcement is not None and only_here(announcement.addresses)
        if self._lan is not None and self._lan.only_here != quiet:
            await self._close()
        if self._lan is None:
            self._open(quiet)
        if self._lan is not None:
            await self._guarded(self._lan.announce(announcement))

    def _open(self, only_here: bool) -> None:
        try:
            self._lan = Lan(self._heard, self._forgotten, only_here=only_here)
        except trouble() as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "members on the LAN cannot be looked for: %s; known addresses are used "
                    "(--no-mdns turns this off)",
                    error,
                )
            return
        if self._warned:
            self._warned = False
            log.info("members on the LAN are looked for again")

    async def _close(self) -> None:
        lan, self._lan = self._lan, None
        self._seen.clear()
        if lan is not None:
            await lan.close()

    async def _guarded(self, work: Awaitable[None]) -> None:
        """Multicast is a convenience: what goes wrong in it is a line in the log."""
        try:
            async with asyncio.timeout(POLL_S):
                await work
        except trouble() as error:
            log.warning("multicast DNS: %s", error)

    # -- what is heard ----------------------------------------------------------------------------

    def _heard(self, instance: str, found: Found) -> None:
        if self._seen.get(instance) == found:
            return
        self._seen[instance] = found
        self._seen.move_to_end(instance)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        self._tell(found)

    def _forgotten(self, instance: str) -> None:
        self._seen.pop(instance, None)

    def _tell(self, found: Found) -> None:
        if self._wish is not None and self._wish.wants(found):
            self.proposed(found.node_id, found.mesh_id, found.mesh_name, found.addresses)


async def _import_library() -> None:
    """In a thread: it takes 50 ms or more, in which the API should answer."""
    pool = Pool("import", workers=1)
    try:
        await pool.run(importlib.import_module, "zeroconf.asyncio")
    finally:
        pool.close()
