"""TLS between nodes: 1.3 only, the mesh's CA and nothing else trusted, services told apart by ALPN.

Host names are not checked: a node is its key, whatever address it has (`credentials.authenticate`).
The functions that make contexts read files; they take under a millisecond.
"""

from __future__ import annotations

import ssl

from meshd.peers.protocol import ALPN_BULK, ALPN_CTL, ALPN_JOIN, ALPN_RAW, ALPNS
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.identity import Identity
from meshd.peers.trust.membership import Membership


def may_speak(alpn: str | None, certificate: PeerCertificate | None) -> bool:
    """Whether a client that showed this (authenticated) certificate, or None, may have the service.

    This is the gate: without a certificate there is joining and nothing else. Pure.
    """
    if alpn == ALPN_JOIN:
        return True
    return alpn in (ALPN_CTL, ALPN_RAW) and certificate is not None


def server_context(membership: Membership, identity: Identity) -> ssl.SSLContext:
    """For the peer port. A client may come without a certificate, since joiners have none; one that
    the mesh did not sign, or that ran out, fails the handshake.

    No session tickets: a resumed session would skip the look at the certificate.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols(list(ALPNS))
    _trust(context, membership)
    reload_certificate(context, membership, identity)
    return context


def client_context(membership: Membership, identity: Identity, alpn: str) -> ssl.SSLContext:
    """For dialling a member: both certificates are checked. `alpn`: the service asked for."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([alpn])
    _trust(context, membership)
    reload_certificate(context, membership, identity)
    return context


def carrier_context(
    ca_certificate: bytes, certificate_path: str, key_path: str, *, server: bool
) -> ssl.SSLContext:
    """For bulk streams, in processes that have no membership in memory: both certificates are
    checked at either end. `ca_certificate`: DER. Raises OSError, ssl.SSLError if what the paths
    name cannot be used."""
    context = _context(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN_BULK])
    if server:
        context.num_tickets = 0
    context.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(ca_certificate))
    context.load_cert_chain(certificate_path, key_path)
    return context


def joining_context() -> ssl.SSLContext:
    """For dialling a mesh this node is not in: it has nothing to show and knows no CA yet.

    The handshake still proves that the other side holds the key of the certificate it shows;
    whether that certificate is the mesh's is for `joining` to check before it says a word.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ALPN_JOIN])
    return context


def reload_certificate(context: ssl.SSLContext, membership: Membership, identity: Identity) -> None:
    """Show the membership's present certificate in new connections; running ones keep theirs."""
    context.load_cert_chain(membership.certificate_path, identity.key_path)


def _context(protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _trust(context: ssl.SSLContext, membership: Membership) -> None:
    context.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(membership.ca_certificate))
