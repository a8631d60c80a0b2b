"""Certificates: what is asked for, and what one that is shown proves.

X.509 v3, Ed25519 throughout. The subject of a node's certificate is CN = node id, OU = role,
O = mesh id; the subject of the mesh's own (the CA's) is CN = mesh name, O = mesh id. Nothing else
in a certificate is read. Pure: readings of the wall clock are arguments (Unix time, seconds).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from meshd.errors import PeerRefused, ProtocolError
from meshd.ids import MeshId, NodeId
from meshd.peers.trust.identity import node_id_of
from meshd.peers.trust.wire import date
from meshd.view import Role

if TYPE_CHECKING:
    from meshd.peers.trust.identity import Identity

DAY_S: Final = 86_400.0
LIFETIME_S: Final = 90 * DAY_S
RENEW_BELOW_S: Final = LIFETIME_S / 3
"""A certificate is renewed when less than this is left: a node may be away for a month."""
MAX_BYTES: Final = 4096
"""Longest certificate or request that is looked at; ours have some 500 bytes."""
_MESH_ID: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What a certificate that was checked says of the node that showed it."""

    node_id: NodeId
    role: Role
    not_after: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A node's certificate, signed by the mesh it names; neither dates nor deny list checked."""

    node_id: NodeId
    role: Role
    public_key: bytes
    not_before: float
    not_after: float


def make_csr(identity: Identity) -> bytes:
    """A request (PEM) for a certificate for this node's key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.node_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(identity.key, None).public_bytes(serialization.Encoding.PEM)


def certificate_der(encoded: bytes) -> bytes:
    """The DER form of a certificate in PEM or DER. Raises ProtocolError for anything else."""
    return _parse(encoded).public_bytes(serialization.Encoding.DER)


def certificate_pem(encoded: bytes) -> bytes:
    """The PEM form of a certificate in PEM or DER. Raises ProtocolError for anything else."""
    return _parse(encoded).public_bytes(serialization.Encoding.PEM)


def mesh_of(ca_certificate: bytes) -> tuple[MeshId, str]:
    """Id and name of the mesh whose CA certificate this is (DER or PEM).

    Raises ProtocolError if it is not the self-signed certificate of an Ed25519 CA of a mesh.
    """
    certificate = _parse(ca_certificate)
    mesh_id = subject_field(certificate, NameOID.ORGANIZATION_NAME)
    name = subject_field(certificate, NameOID.COMMON_NAME)
    if not _is_signed_by(certificate, certificate) or not _MESH_ID.fullmatch(mesh_id) or not name:
        raise ProtocolError("this is not the certificate of a mesh")
    return MeshId(mesh_id), name


def authenticate_leaf(
    certificate: bytes | None, ca_certificate: bytes, denied: Container[str], now: float
) -> PeerCertificate:
    """Who the node is that showed `certificate` (DER), by the mesh of `ca_certificate` (DER).

    Raises PeerRefused with one of the reasons, in this order: no_certificate, wrong_mesh (also for
    what is no certificate at all), id_mismatch, denied, expired (also: not valid yet).
    """
    if certificate is None:
        raise PeerRefused("the other side showed no certificate", reason="no_certificate")
    leaf = read_leaf(certificate, ca_certificate)
    if leaf.node_id in denied:
        raise PeerRefused(
            f"node {leaf.node_id[:8]} was revoked: it is on the mesh's deny list; a new --data-dir "
            "and a new invite admit its machine again",
            reason="denied",
        )
    if not leaf.not_before <= now <= leaf.not_after:
        raise PeerRefused(
            f"the certificate of node {leaf.node_id[:8]} is valid from {date(leaf.not_before)} to "
            f"{date(leaf.not_after)} and the clock here says {date(now)}; set the clocks, or admit "
            "the node again with a new invite",
            reason="expired",
        )
    return PeerCertificate(leaf.node_id, leaf.role, leaf.not_after)


@functools.lru_cache(maxsize=1024)  # a signature check costs 0.1 ms; adverts repeat certificates
def read_leaf(certificate: bytes, ca_certificate: bytes) -> Leaf:
    """What a node's certificate (DER) says, its signature by the CA and its id checked.

    Raises PeerRefused: wrong_mesh or id_mismatch.
    """
    if len(certificate) > MAX_BYTES:
        raise PeerRefused("the certificate is too long to be a node's", reason="wrong_mesh")
    try:
        parsed, ca = _parse(certificate), _parse(ca_certificate)
        ours = subject_field(ca, NameOID.ORGANIZATION_NAME)
        signed = _is_signed_by(parsed, ca)
        mesh_id = subject_field(parsed, NameOID.ORGANIZATION_NAME)
        claimed = subject_field(parsed, NameOID.COMMON_NAME)
        unit = subject_field(parsed, NameOID.ORGANIZATIONAL_UNIT_NAME)
    except ProtocolError as error:
        raise PeerRefused(error.message, reason="wrong_mesh") from None
    if not signed or mesh_id != ours:
        raise PeerRefused("the certificate is not of this mesh", reason="wrong_mesh")
    public_key = raw_public_key(parsed)
    node_id = node_id_of(public_key) if public_key is not None else None
    if public_key is None or node_id is None or claimed != node_id:
        raise PeerRefused("the certificate names another node than its key", reason="id_mismatch")
    try:
        role = Role(unit)
    except ValueError:
        raise PeerRefused(f"the certificate's role {unit!r} is unknown", reason="wrong_mesh") from (
            None
        )
    return Leaf(
        node_id=node_id,
        role=role,
        public_key=public_key,
        not_before=parsed.not_valid_before_utc.timestamp(),
        not_after=parsed.not_valid_after_utc.timestamp(),
    )


def read_csr(csr_pem: bytes) -> tuple[NodeId, Ed25519PublicKey]:
    """The node that asks, and its key: the request is signed by that key and names its id.

    Raises ProtocolError for any other request.
    """
    if len(csr_pem) > MAX_BYTES:
        raise ProtocolError("the certificate request is too long")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key, valid = request.public_key(), request.is_signature_valid
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except Exception:  # the parser has many errors of its own; a bad request is one thing
        raise ProtocolError("the certificate request cannot be read") from None
    if not isinstance(key, Ed25519PublicKey) or not valid:
        raise ProtocolError("the certificate request is not signed by an Ed25519 key")
    node = node_id_of(key.public_bytes_raw())
    if [name.value for name in names] != [node]:
        raise ProtocolError("the certificate request names another node than its key")
    return node, key


def ca_fingerprint(ca_certificate: bytes) -> bytes:
    """sha256 of a CA certificate (DER): what an invite says of the mesh."""
    return hashlib.sha256(ca_certificate).digest()


def ca_public_key(ca_certificate: bytes) -> bytes:
    """The raw Ed25519 key of a mesh. Raises ProtocolError for a certificate of another kind."""
    key = raw_public_key(_parse(ca_certificate))
    if key is None:
        raise ProtocolError("the certificate of the mesh has no Ed25519 key")
    return key


def raw_public_key(certificate: x509.Certificate) -> bytes | None:
    """The Ed25519 key of a certificate; None if it has another kind of key."""
    try:
        key = certificate.public_key()
    except Exception:  # as above
        return None
    return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else None


def subject_field(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    """The value of a field that stands in the subject exactly once; raises ProtocolError."""
    try:
        values = [a.value for a in certificate.subject.get_attributes_for_oid(oid)]
    except Exception:  # as above
        raise ProtocolError("the subject of the certificate cannot be read") from None
    if len(values) != 1 or not isinstance(values[0], str):
        raise ProtocolError("the subject of the certificate is not that of a node")
    return values[0]


def _parse(encoded: bytes) -> x509.Certificate:
    try:
        if encoded.lstrip()[:11] == b"-----BEGIN ":
            return x509.load_pem_x509_certificate(encoded)
        return x509.load_der_x509_certificate(encoded)
    except Exception:  # as above
        raise ProtocolError("the certificate cannot be read") from None


def _is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
        return isinstance(ca.public_key(), Ed25519PublicKey)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
