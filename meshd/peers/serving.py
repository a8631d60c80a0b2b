"""What other nodes get of this one over raw and bulk streams: its engines, memory, weights."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final

from meshd.errors import MeshdError, PeerRefused
from meshd.ids import NodeId
from meshd.peers.bulk.handover import Handover, credentials_of
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.streams import Open, Streams
from meshd.peers.needs import Needs
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.trust import Trust
from meshd.view import Role

MAX_BULK_STREAMS: Final = 32
"""That other nodes have open here; each is a thread of the carrier."""


class Serving:
    """Of one session. `name_of`: what a node is called."""

    def __init__(
        self, trust: Trust, role: Role, needs: Needs, name_of: Callable[[NodeId], str]
    ) -> None:
        self._role = role
        self._needs = needs
        self._name_of = name_of
        self.streams = Streams(needs.config.peers.max_streams)
        self.streams.offer({"api": self._serve_api, "loan": self._serve_loan})
        self.bulk = Handover(
            needs.carrier,
            authenticate=trust.authenticate,
            serve=self._serve_bulk,
            credentials=lambda: credentials_of(trust),
            lost=needs.bulk_lost,
            limit=MAX_BULK_STREAMS,
            clock=needs.clock,
            spawn=needs.spawn,
        )

    def cut(self, node: NodeId) -> None:
        """End all that `node` has open here."""
        self.streams.cut(node)
        self.bulk.cut(node)

    def close(self) -> None:
        self.streams.cut()
        self.bulk.close()

    # -- listener's speakers ----------------------------------------------------------------------

    async def raw(self, channel: FrameChannel, certificate: PeerCertificate) -> None:
        """A raw stream that another node opened, until it has a protocol of its own."""
        await self.streams.serve(channel, certificate)

    @property
    def take_bulk(self) -> Callable[[socket.socket], None] | None:
        """Who takes bulk connections over; None if nobody here does."""
        return self.bulk.take if self._needs.carrier else None

    def expect_bulk(self) -> None:
        """A bulk stream of another node is about to come."""
        if self._needs.carrier:
            self.bulk.expect()

    # -- services ---------------------------------------------------------------------------------

    def _serve_api(self, peer: PeerCertificate, wanted: Open) -> asyncio.Protocol:
        if self._role is Role.CLIENT:
            raise PeerRefused("a client node serves no models", reason="no_service")
        try:
            return self._needs.serve_api(self._name_of(peer.node_id))
        except MeshdError as error:
            raise PeerRefused(error.message, reason=error.code) from None

    def _serve_loan(self, peer: PeerCertificate, wanted: Open) -> asyncio.Protocol:
        if self._role is Role.CLIENT:
            raise PeerRefused("a client node lends no memory", reason="no_service")
        if peer.role is Role.CLIENT:
            raise PeerRefused("memory is lent to members and not to clients", reason="client")
        return self._needs.serve_loan(peer.node_id, self._name_of(peer.node_id))

    def _serve_bulk(self, node: NodeId, wanted: Open) -> dict[str, Any]:
        if self._role is Role.CLIENT:
            raise PeerRefused("a client node serves no weights", reason="no_service")
        return self._needs.serve_bulk(node, wanted)
