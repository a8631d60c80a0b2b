"""What one membership proves and checks with: certificates, contexts, signatures, the deny list.

The one place where the trust modules meet the running node. What blocks (files, fsync) runs in the
pool; signatures (0.1 ms) do not.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from meshd.ids import NodeId
from meshd.kernel import Pool
from meshd.peers.protocol import ALPN_CTL, ALPN_RAW
from meshd.peers.swim.gossip import Alive
from meshd.peers.trust import signing, tls
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.credentials import MeshStore, needs_renewal
from meshd.peers.trust.denylist import MAX_MESSAGE_ENTRIES, DenyEntry, DenyList
from meshd.peers.trust.identity import Identity
from meshd.peers.trust.membership import Membership, authenticate

log = logging.getLogger(__name__)


class Trust:
    """`membership` is replaced when the certificate is renewed. Making one blocks."""

    def __init__(
        self, membership: Membership, identity: Identity, store: MeshStore, pool: Pool
    ) -> None:
        self.membership = membership
        self.identity = identity
        self.store = store
        self.denied: DenyList = store.deny_list(membership)
        self.on_renewal: Callable[[], None] = lambda: None
        """Called with a new certificate in place: what carries the old one is to be said again."""
        self._pool = pool
        self._server = tls.server_context(membership, identity)
        self._clients = {
            alpn: tls.client_context(membership, identity, alpn) for alpn in (ALPN_CTL, ALPN_RAW)
        }

    # -- connections ------------------------------------------------------------------------------

    def server_context(self) -> ssl.SSLContext:
        return self._server

    def client_context(self, alpn: str) -> ssl.SSLContext:
        return self._clients[alpn]

    def authenticate(self, certificate: bytes | None) -> PeerCertificate:
        """Whose certificate (DER) it is. Raises PeerRefused."""
        return authenticate(certificate, self.membership, self.denied)

    # -- signatures -------------------------------------------------------------------------------

    def sign_alive(
        self, incarnation: int, version: int, addresses: tuple[str, ...], *, left: bool
    ) -> Alive:
        return signing.sign_alive(
            self.identity, self.membership.mesh_id, incarnation, version, addresses, left
        )

    def is_genuine(self, alive: Alive) -> bool:
        """Whether its node said this, and is not on the deny list."""
        return alive.node not in self.denied and signing.alive_is_genuine(
            alive, self.membership.mesh_id
        )

    def seal(self, version: int, body: dict[str, Any]) -> dict[str, Any]:
        mine = self.membership
        return signing.seal_advert(self.identity, mine.certificate, mine.mesh_id, version, body)

    def open(self, envelope: Mapping[str, Any]) -> signing.SignedAdvert:
        """Raises ProtocolError, PeerRefused."""
        return signing.open_advert(envelope, self.membership, self.denied)

    # -- the deny list ----------------------------------------------------------------------------

    def denials_digest(self) -> dict[str, Any]:
        """The frame that tells whether two nodes have the same list."""
        return {"t": "denied", "digest": self.denied.digest()}

    def denials(self, nodes: Container[str] | None = None) -> Iterator[dict[str, Any]]:
        """Frames with the entries of those nodes, or all; each of a bounded size."""
        entries = [e for e in self.denied.entries if nodes is None or e.node in nodes]
        for start in range(0, len(entries), MAX_MESSAGE_ENTRIES):
            chunk = entries[start : start + MAX_MESSAGE_ENTRIES]
            yield {"t": "deny", "entries": [entry.to_wire() for entry in chunk]}

    async def merge(self, entries: tuple[DenyEntry, ...]) -> tuple[NodeId, ...]:
        """The nodes that are denied by them and were not before. Raises ProtocolError."""
        return await self._pool.run(self.denied.merge, entries)

    async def deny(self, node: NodeId) -> None:
        """Revoke a node. Raises NotIssuer, NoSpace."""
        await self._pool.run(self.denied.deny, self.membership.authority, node)

    # -- memory -----------------------------------------------------------------------------------

    async def remember(self, peers: list[tuple[NodeId, str, tuple[str, ...]]]) -> None:
        """Keep where others were, for the next start."""
        try:
            await self._pool.run(self.store.remember, peers)
        except OSError as error:
            log.warning("addresses of other nodes cannot be kept: %s", error)

    # -- renewal ----------------------------------------------------------------------------------

    def due_for_renewal(self) -> bool:
        return needs_renewal(self.membership, time.time())

    async def renew_by_own_key(self) -> None:
        """For issuers."""
        self._renewed(await self._pool.run(self.store.renew_own, self.membership))

    async def use(self, certificate_pem: bytes) -> None:
        """Take a renewed certificate over. Raises ProtocolError, PeerRefused."""
        self._renewed(await self._pool.run(self.store.replace_certificate, certificate_pem))

    def _renewed(self, membership: Membership) -> None:
        self.membership = membership
        for context in (self._server, *self._clients.values()):
            tls.reload_certificate(context, membership, self.identity)
        log.info("the certificate of this node was renewed")
        self.on_renewal()
