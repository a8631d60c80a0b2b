"""What a node says of itself, signed with its key: statements of life, and adverts.

Pure. Every signature begins with a domain of its own and covers the mesh id, so that words said in
one place, or in one mesh, mean nothing in another.

An id *is* a public key, so the signature of a statement says who spoke without a certificate: it
only repeats the address book, and only admitted nodes are ever linked to. An advert carries the
certificate: what it says is acted on, so it must come from a node that was admitted.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field

from meshd.errors import ProtocolError
from meshd.ids import MeshId, NodeId
from meshd.peers.swim.gossip import Alive
from meshd.peers.trust.certificates import MAX_BYTES
from meshd.peers.trust.identity import Identity, public_key_of
from meshd.peers.trust.membership import Membership, authenticate
from meshd.peers.trust.wire import Blob, Counter, Mesh, Node, WireModel, read
from meshd.view import Role

MAX_ADVERT_BYTES: Final = 64 * 1024
"""Longest payload of an advert, before base64."""
MAX_STATEMENT_ADDRESSES: Final = 4
MAX_ADDRESS_BYTES: Final = 262
_ALIVE: Final = b"meshd alive v1\0"
_ADVERT: Final = b"meshd advert v1\0"
_U64: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class SignedAdvert:
    """An advert whose signature and certificate were checked; the body's fields were not."""

    node_id: NodeId
    role: Role
    version: int
    body: dict[str, Any]


class _Envelope(WireModel):
    certificate: Annotated[Blob, Field(max_length=MAX_BYTES)]
    payload: Annotated[Blob, Field(max_length=MAX_ADVERT_BYTES)]
    signature: Annotated[Blob, Field(min_length=64, max_length=64)]


class _Payload(WireModel):
    mesh: Mesh
    node: Node
    version: Counter
    body: dict[str, Any]


# -- statements -----------------------------------------------------------------------------------


def sign_alive(
    identity: Identity,
    mesh_id: MeshId,
    incarnation: int,
    version: int,
    addresses: tuple[str, ...],
    left: bool,
) -> Alive:
    """This node's word that it lives, or goes. Raises ValueError for what cannot be said: numbers
    outside 64 bits, more than 4 addresses or longer ones than 262 bytes."""
    message = _alive_message(mesh_id, identity.node_id, incarnation, version, addresses, left)
    return Alive(
        node=identity.node_id,
        incarnation=incarnation,
        version=version,
        addresses=addresses,
        left=left,
        signature=identity.key.sign(message),
    )


def alive_is_genuine(alive: Alive, mesh_id: MeshId) -> bool:
    """Whether the node itself said this, in this mesh. False, never an error, for anything else."""
    try:
        message = _alive_message(
            mesh_id, alive.node, alive.incarnation, alive.version, alive.addresses, alive.left
        )
        _verify_statement(public_key_of(alive.node), alive.signature, message)
    except (ValueError, TypeError, AttributeError, InvalidSignature):
        return False
    return True


# -- adverts --------------------------------------------------------------------------------------


def seal_advert(
    identity: Identity,
    certificate: bytes,
    mesh_id: MeshId,
    version: int,
    body: Mapping[str, Any],
) -> dict[str, Any]:
    """An advert as JSON for other nodes. `certificate`: this node's, DER. Raises ValueError if the
    body is longer than others would take."""
    payload = orjson.dumps(
        {"mesh": mesh_id, "node": identity.node_id, "version": version, "body": dict(body)}
    )
    if len(payload) > MAX_ADVERT_BYTES:
        raise ValueError(f"an advert of {len(payload)} bytes is over {MAX_ADVERT_BYTES}")
    envelope = _Envelope(
        certificate=certificate, payload=payload, signature=identity.key.sign(_ADVERT + payload)
    )
    return envelope.model_dump(mode="json")


def open_advert(
    envelope: Mapping[str, Any],
    membership: Membership,
    denied: Container[str],
    now: float | None = None,
) -> SignedAdvert:
    """What a node says of itself. `now`: Unix time; by default the clock's.

    Raises ProtocolError if it is not an advert or not signed by the node it names, PeerRefused if
    that node is not, or no longer, of this mesh.
    """
    sealed = read(_Envelope, envelope, "advert")
    certificate = authenticate(sealed.certificate, membership, denied, now)
    try:
        _verify(public_key_of(certificate.node_id), sealed.signature, _ADVERT + sealed.payload)
        payload: Any = orjson.loads(sealed.payload)
    except InvalidSignature:
        raise ProtocolError("an advert is not signed by its node") from None
    except orjson.JSONDecodeError:
        raise ProtocolError("an advert is not JSON") from None
    said = read(_Payload, payload, "advert")
    if said.mesh != membership.mesh_id or said.node != certificate.node_id:
        raise ProtocolError("an advert names another mesh or node than its certificate")
    return SignedAdvert(certificate.node_id, certificate.role, said.version, said.body)


# -- signatures -----------------------------------------------------------------------------------


def _alive_message(
    mesh_id: MeshId,
    node: str,
    incarnation: int,
    version: int,
    addresses: tuple[str, ...],
    left: bool,
) -> bytes:
    """Fixed-length fields, then each address behind its length."""
    if not 0 <= incarnation < _U64 or not 0 <= version < _U64 or type(left) is not bool:
        raise ValueError("a number is out of range")
    encoded = [address.encode() for address in addresses]
    if len(encoded) > MAX_STATEMENT_ADDRESSES or any(len(a) > MAX_ADDRESS_BYTES for a in encoded):
        raise ValueError("too many addresses, or too long ones")
    parts = [
        _ALIVE,
        bytes.fromhex(mesh_id),
        public_key_of(node),
        incarnation.to_bytes(8),
        version.to_bytes(8),
        bytes([left, len(encoded)]),
        *(len(a).to_bytes(2) + a for a in encoded),
    ]
    return b"".join(parts)


def _verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Raises InvalidSignature."""
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)


@functools.lru_cache(maxsize=8192)  # one statement comes from many sides and a check takes 0.1 ms
def _verify_statement(public_key: bytes, signature: bytes, message: bytes) -> None:
    """As `_verify`. Only what was good fills the cache, and it has at most 1.2 KB."""
    _verify(public_key, signature, message)
