"""A node's place in a mesh: its certificate and, on issuers, the mesh's key. Who else is there, and
alive, is the business of `swim`."""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from meshd.ids import MeshId
from meshd.peers.trust.authority import Authority
from meshd.peers.trust.certificates import RENEW_BELOW_S, PeerCertificate, authenticate_leaf
from meshd.peers.trust.denylist import DenyEntry
from meshd.peers.trust.wire import KnownPeer
from meshd.view import Role


@dataclass(frozen=True, slots=True)
class Membership:
    """This node's place in a mesh. Certificates are DER."""

    mesh_id: MeshId
    mesh_name: str
    role: Role
    ca_certificate: bytes = field(repr=False)
    ca_fingerprint: bytes
    """sha256 of `ca_certificate`."""
    certificate: bytes = field(repr=False)
    certificate_path: Path
    """Where `certificate` is kept, PEM: the TLS library reads it from there itself."""
    not_after: float
    """Unix time at which `certificate` runs out."""
    authority: Authority | None = field(default=None, compare=False)

    @property
    def issuer(self) -> bool:
        """Whether this node holds the mesh's key."""
        return self.authority is not None


@dataclass(frozen=True, slots=True)
class Grant:
    """What a mesh gave a node that joined, checked by whoever received it. Certificates are DER."""

    ca_certificate: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    role: Role
    ca_key: bytes | None = field(default=None, repr=False)
    """PEM; only for an issuer."""
    denied: tuple[DenyEntry, ...] = ()
    peers: tuple[KnownPeer, ...] = ()


def authenticate(
    certificate: bytes | None,
    membership: Membership,
    denied: Container[str],
    now: float | None = None,
) -> PeerCertificate:
    """Who showed `certificate` (DER) in a handshake; the id is computed from its key.

    `now`: Unix time; by default the clock's. Raises PeerRefused with reason no_certificate,
    wrong_mesh, id_mismatch, denied or expired.
    """
    now = time.time() if now is None else now
    return authenticate_leaf(certificate, membership.ca_certificate, denied, now)


def needs_renewal(membership: Membership, now: float) -> bool:
    """Whether a third or less of the certificate's 90 days is left. `now`: Unix time."""
    return membership.not_after - now < RENEW_BELOW_S
