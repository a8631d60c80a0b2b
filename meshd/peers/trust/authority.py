"""The mesh's own key (the CA): whoever holds it admits nodes and revokes them.

It signs certificates of nodes and entries of the deny list, and is made once, when a mesh is
founded. Pure but for randomness of the library: readings of the wall clock are arguments.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshd.errors import ProtocolError
from meshd.ids import MeshId
from meshd.peers.trust.certificates import DAY_S, LIFETIME_S, mesh_of, raw_public_key, read_csr
from meshd.view import Role

CA_LIFETIME_S: Final = 10 * 365 * DAY_S
BACKDATED_S: Final = DAY_S
"""Certificates begin this long before they are signed: clocks of a mesh differ."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The mesh's key with its certificate (DER). Its representation never shows the key."""

    mesh_id: MeshId
    mesh_name: str
    ca_certificate: bytes = field(repr=False)
    key: Ed25519PrivateKey = field(repr=False)

    def sign(self, csr_pem: bytes, role: Role, now: float) -> bytes:
        """A node's certificate (PEM) for the key of the request, valid for 90 days.

        Nothing but that key is taken from the request. Raises ProtocolError if the request is not
        signed by its key or names another node than its key.
        """
        node, public_key = read_csr(csr_pem)
        ca = x509.load_der_x509_certificate(self.ca_certificate)
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.mesh_id),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
                x509.NameAttribute(NameOID.COMMON_NAME, node),
            ]
        )
        usage = x509.ExtendedKeyUsage(
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        )
        end = min(_moment(now + LIFETIME_S), ca.not_valid_after_utc)
        builder = (
            _builder(subject, ca.subject, public_key, _moment(now - BACKDATED_S), end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(_issued_by(self.key.public_key()), critical=False)
        )
        return builder.sign(self.key, None).public_bytes(serialization.Encoding.PEM)

    def statement(self, message: bytes) -> bytes:
        """The mesh's signature of `message`, which must begin with its domain."""
        return self.key.sign(message)

    def key_pem(self) -> bytes:
        """The secret itself, for the file 0600 and for another issuer over its join channel."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def found(mesh_id: MeshId, mesh_name: str, now: float) -> Authority:
    """A new mesh: its key and a CA certificate for ten years that can sign nodes only."""
    key = Ed25519PrivateKey.generate()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, mesh_id),
            x509.NameAttribute(NameOID.COMMON_NAME, mesh_name),
        ]
    )
    begin, end = _moment(now - BACKDATED_S), _moment(now + CA_LIFETIME_S)
    builder = (
        _builder(subject, subject, key.public_key(), begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    certificate = builder.sign(key, None).public_bytes(serialization.Encoding.DER)
    return Authority(mesh_id, mesh_name, certificate, key)


def restore(ca_certificate: bytes, key_pem: bytes) -> Authority:
    """The authority of a CA certificate (DER) and the key that belongs to it (PEM).

    Raises ProtocolError if the key is none or another one's.
    """
    mesh_id, mesh_name = mesh_of(ca_certificate)
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError):
        key = None
    public = raw_public_key(x509.load_der_x509_certificate(ca_certificate))
    if not isinstance(key, Ed25519PrivateKey) or key.public_key().public_bytes_raw() != public:
        raise ProtocolError("the key is not that of the mesh's certificate")
    return Authority(mesh_id, mesh_name, ca_certificate, key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: Ed25519PublicKey,
    begin: dt.datetime,
    end: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issued_by(key: Ed25519PublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _moment(unix: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(unix), dt.UTC)
