"""The mesh's key and what it signs: who is recognised, and everybody who is not."""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import PeerRefused, ProtocolError
from meshd.ids import MeshId
from meshd.peers.trust.authority import CA_LIFETIME_S, Authority, found, restore
from meshd.peers.trust.certificates import (
    DAY_S,
    LIFETIME_S,
    MAX_BYTES,
    RENEW_BELOW_S,
    authenticate_leaf,
    ca_fingerprint,
    ca_public_key,
    certificate_der,
    certificate_pem,
    make_csr,
    mesh_of,
    read_csr,
    read_leaf,
)
from meshd.peers.trust.identity import Identity, node_id
from meshd.view import Role

NOW = 1_800_000_000.0
MESH = MeshId("0123456789abcdef" * 2)
HOME = found(MESH, "home", NOW)


def a_node() -> Identity:
    key = Ed25519PrivateKey.generate()
    return Identity(node_id(key), key, Path("/nowhere/node.key"))


NODE = a_node()
CURVE = ec.generate_private_key(ec.SECP256R1())


def signed(authority: Authority = HOME, node: Identity = NODE, role: Role = Role.MEMBER) -> bytes:
    """A certificate of the mesh, DER."""
    return certificate_der(authority.sign(make_csr(node), role, NOW))


def subject(mesh: str | None, unit: str | None, common: str | None) -> x509.Name:
    values = (
        (NameOID.ORGANIZATION_NAME, mesh),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
        (NameOID.COMMON_NAME, common),
    )
    return x509.Name([x509.NameAttribute(o, v) for o, v in values if v is not None])


def forged(
    name: x509.Name,
    *,
    signer: Ed25519PrivateKey = HOME.key,
    issuer: x509.Name | None = None,
    key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey = NODE.key,
) -> bytes:
    """A certificate that meshd would not write, signed all the same; DER."""
    ca = x509.load_der_x509_certificate(HOME.ca_certificate)
    begin = dt.datetime.fromtimestamp(NOW, dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer or ca.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(begin)
        .not_valid_after(begin + dt.timedelta(days=1))
    )
    return builder.sign(signer, None).public_bytes(serialization.Encoding.DER)


def refusal(certificate: bytes | None, *, denied: Sequence[str] = (), now: float = NOW) -> str:
    with pytest.raises(PeerRefused) as caught:
        authenticate_leaf(certificate, HOME.ca_certificate, denied, now)
    return caught.value.reason


# -- the mesh -------------------------------------------------------------------------------------


def test_a_mesh_is_its_certificate() -> None:
    assert mesh_of(HOME.ca_certificate) == (MESH, "home")
    assert mesh_of(certificate_pem(HOME.ca_certificate)) == (MESH, "home")
    assert ca_public_key(HOME.ca_certificate) == HOME.key.public_key().public_bytes_raw()
    assert len(ca_fingerprint(HOME.ca_certificate)) == 32
    assert certificate_der(certificate_pem(HOME.ca_certificate)) == HOME.ca_certificate


def test_two_meshes_of_one_name_differ() -> None:
    other = found(MESH, "home", NOW)
    assert ca_fingerprint(other.ca_certificate) != ca_fingerprint(HOME.ca_certificate)


@pytest.mark.parametrize("certificate", [b"", b"\x30\x82", b"-----BEGIN CERTIFICATE-----\nAA\n"])
def test_what_is_no_certificate_is_no_mesh(certificate: bytes) -> None:
    for ask in (mesh_of, ca_public_key, certificate_der, certificate_pem):
        with pytest.raises(ProtocolError, match="cannot be read"):
            ask(certificate)


def test_a_node_s_certificate_is_no_mesh() -> None:
    with pytest.raises(ProtocolError, match="not the certificate of a mesh"):
        mesh_of(signed())


@pytest.mark.parametrize("mesh", ["", "0" * 31, "A" * 32, "z" * 32])
def test_a_mesh_has_an_id_of_32_digits(mesh: str) -> None:
    name = subject(mesh or None, None, "home")
    with pytest.raises(ProtocolError):
        mesh_of(forged(name, issuer=name, key=HOME.key))


def test_the_mesh_s_key_comes_back_from_its_file_and_no_other_does() -> None:
    again = restore(HOME.ca_certificate, HOME.key_pem())
    assert (again.mesh_id, again.mesh_name) == (MESH, "home")
    assert read_leaf(signed(again), HOME.ca_certificate).node_id == NODE.node_id
    curve = CURVE.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for pem in (found(MESH, "home", NOW).key_pem(), curve, b"", HOME.key_pem()[:-40]):
        with pytest.raises(ProtocolError, match="not that of the mesh"):
            restore(HOME.ca_certificate, pem)


def test_the_mesh_s_key_shows_in_no_representation() -> None:
    secret = HOME.key_pem().splitlines()[1].decode()
    for text in (repr(HOME), str(HOME), f"{HOME}"):
        assert secret not in text
        assert "Key" not in text
        assert "BEGIN" not in text


# -- requests -------------------------------------------------------------------------------------


def test_a_request_names_the_key_that_signed_it() -> None:
    node, key = read_csr(make_csr(NODE))
    assert node == NODE.node_id
    assert key.public_bytes_raw() == NODE.key.public_key().public_bytes_raw()


def csr(name: x509.Name, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm)
    return request.public_bytes(serialization.Encoding.PEM)


def test_other_requests_are_refused() -> None:
    other = a_node()
    twice = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NODE.node_id)] * 2)
    requests = {
        "names another node": csr(subject(None, None, other.node_id), NODE.key),
        "names another": csr(subject("x", None, None), NODE.key),
        "another node": csr(twice, NODE.key),
        "Ed25519": csr(subject(None, None, NODE.node_id), CURVE),
        "too long": make_csr(NODE) + b" " * MAX_BYTES,
        "cannot be read": b"-----BEGIN CERTIFICATE REQUEST-----",
    }
    for words, request in requests.items():
        with pytest.raises(ProtocolError, match=words):
            read_csr(request)
        with pytest.raises(ProtocolError, match=words):
            HOME.sign(request, Role.MEMBER, NOW)


def as_pem(request: bytes) -> bytes:
    kind = b"CERTIFICATE REQUEST-----"
    return b"-----BEGIN %s\n%s-----END %s\n" % (kind, base64.encodebytes(request), kind)


REQUEST = x509.load_pem_x509_csr(make_csr(NODE)).public_bytes(serialization.Encoding.DER)


@given(st.data())
def test_a_changed_request_is_refused(data: st.DataObject) -> None:
    assert read_csr(as_pem(REQUEST))[0] == NODE.node_id
    with pytest.raises(ProtocolError):
        read_csr(as_pem(change(REQUEST, data)))


# -- certificates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_a_member_is_recognised(role: Role) -> None:
    seen = authenticate_leaf(signed(role=role), HOME.ca_certificate, (), NOW)
    assert (seen.node_id, seen.role) == (NODE.node_id, role)
    assert seen.not_after == NOW + LIFETIME_S
    leaf = read_leaf(signed(role=role), HOME.ca_certificate)
    assert leaf.not_before == NOW - DAY_S
    assert leaf.public_key == NODE.key.public_key().public_bytes_raw()


def test_a_third_of_its_life_is_left_for_the_renewal() -> None:
    assert RENEW_BELOW_S == 30 * DAY_S


def test_no_certificate_outlives_the_mesh_s() -> None:
    late = NOW + CA_LIFETIME_S - DAY_S
    leaf = read_leaf(
        certificate_der(HOME.sign(make_csr(NODE), Role.MEMBER, late)), HOME.ca_certificate
    )
    assert leaf.not_after == NOW + CA_LIFETIME_S


def test_a_certificate_can_sign_no_other() -> None:
    certificate = x509.load_der_x509_certificate(signed())
    limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert limits.critical
    assert not limits.value.ca
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert not usage.value.key_cert_sign
    victim = a_node()
    name = subject(MESH, "member", victim.node_id)
    chained = forged(name, signer=NODE.key, issuer=certificate.subject, key=victim.key)
    assert refusal(chained) == "wrong_mesh"
    posing = forged(name, signer=NODE.key, key=victim.key)  # names the mesh as its issuer
    assert refusal(posing) == "wrong_mesh"


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (None, "no_certificate"),
        (b"", "wrong_mesh"),
        (b"\x30\x03\x02\x01\x01", "wrong_mesh"),
        (b"\x30" * (MAX_BYTES + 1), "wrong_mesh"),
        (HOME.ca_certificate, "wrong_mesh"),
        (signed(found(MeshId("f" * 32), "home", NOW)), "wrong_mesh"),
        (signed(found(MESH, "home", NOW)), "wrong_mesh"),
        (forged(subject("f" * 32, "member", NODE.node_id)), "wrong_mesh"),
        (forged(subject(MESH, "king", NODE.node_id)), "wrong_mesh"),
        (forged(subject(MESH, None, NODE.node_id)), "wrong_mesh"),
        (forged(subject(MESH, "member", None)), "wrong_mesh"),
        (forged(subject(MESH, "member", a_node().node_id)), "id_mismatch"),
        (forged(subject(MESH, "member", NODE.node_id.upper())), "id_mismatch"),
        (
            forged(subject(MESH, "member", NODE.node_id), key=CURVE),
            "id_mismatch",
        ),
    ],
)  # fmt: skip
def test_nobody_else_is(certificate: bytes | None, reason: str) -> None:
    assert refusal(certificate) == reason


def test_the_deny_list_comes_before_the_dates() -> None:
    certificate = signed()
    long_after = NOW + LIFETIME_S + 1
    assert refusal(certificate, denied=[NODE.node_id]) == "denied"
    assert refusal(certificate, denied=[NODE.node_id], now=long_after) == "denied"
    assert refusal(certificate, denied=[a_node().node_id], now=long_after) == "expired"
    assert refusal(certificate, now=NOW - DAY_S - 1) == "expired"
    authenticate_leaf(certificate, HOME.ca_certificate, (), NOW + LIFETIME_S)
    authenticate_leaf(certificate, HOME.ca_certificate, (), NOW - DAY_S)


def test_an_expired_one_is_told_both_clocks() -> None:
    with pytest.raises(PeerRefused, match=r"to 2027-04-15 .* clock here says 2027-04-16.*invite"):
        authenticate_leaf(signed(), HOME.ca_certificate, (), NOW + LIFETIME_S + DAY_S)


def change(data: bytes, choose: st.DataObject) -> bytes:
    """`data` with some bytes replaced by others, or cut."""
    body = bytearray(data)
    if choose.draw(st.booleans()):
        return bytes(body[: choose.draw(st.integers(0, len(body) - 1))])
    for _ in range(choose.draw(st.integers(1, 4))):
        place = choose.draw(st.integers(0, len(body) - 1))
        body[place] ^= choose.draw(st.integers(1, 255))
    return bytes(body) if bytes(body) != data else data[:-1]


SIGNED = signed()


@given(st.data())
def test_a_changed_certificate_is_refused_and_never_more(data: st.DataObject) -> None:
    assert refusal(change(SIGNED, data)) in ("wrong_mesh", "id_mismatch")


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert refusal(data) == "wrong_mesh"
    with pytest.raises(ProtocolError):
        read_csr(data)
    with pytest.raises(ProtocolError):
        mesh_of(data)
