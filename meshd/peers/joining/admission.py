"""What is said when a node joins, and what each side proves. Pure.

Over `meshd-join/1`, where the client shows no certificate:

    member -> Greeting     mesh, CA certificate, nonce, protocol range
    joiner                 checks the CA against the invite's fingerprint, and the TLS certificate
                           of the member against the CA, before it says a word
    joiner -> Request      invite id, who it is, certificate request, nonce, proof
    member -> Admitted     certificate, deny list, members; the mesh's key if the invite says so
           or Refusal      reason and words

The proof is HMAC-SHA256 under a key derived from the invite's secret, over both nonces, the sha256
of the member's TLS certificate (the `tls-server-end-point` binding of RFC 5929), the joiner's id
and its request. A member in the middle cannot pass it on: the issuer's certificate is another.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from meshd.peers.trust.denylist import MAX_MESSAGE_ENTRIES, DenyEntry
from meshd.peers.trust.wire import Blob, KnownPeer, Mesh, Name, Node, WireModel
from meshd.view import Role

NONCE_BYTES: Final = 16
MAX_MEMBERS: Final = 32
_DOMAIN: Final = b"meshd join v1\0"
_Protocol = Annotated[int, Field(ge=0, le=65_535)]
_Pem = Annotated[str, StringConstraints(max_length=8192)]
_Nonce = Annotated[Blob, Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Words = Annotated[str, StringConstraints(max_length=128)]


class Greeting(WireModel):
    t: Literal["greeting"] = "greeting"
    mesh: Mesh
    mesh_name: Name
    name: Name
    """Of the member."""
    ca: Annotated[Blob, Field(max_length=8192)]
    """The mesh's CA certificate, DER."""
    nonce: _Nonce
    protocol: Annotated[tuple[_Protocol, _Protocol], Field(strict=False)]
    version: _Words


class Request(WireModel):
    t: Literal["request"] = "request"
    invite: Annotated[Blob, Field(min_length=8, max_length=8)]
    node: Node
    name: Name
    csr: _Pem
    nonce: _Nonce
    proof: Annotated[Blob, Field(min_length=32, max_length=32)]


class Admitted(WireModel):
    t: Literal["admitted"] = "admitted"
    certificate: _Pem
    role: Annotated[Role, Field(strict=False)]
    ca_key: _Pem | None = Field(default=None, repr=False)
    denied: Annotated[
        tuple[DenyEntry, ...], Field(max_length=MAX_MESSAGE_ENTRIES, strict=False)
    ] = ()
    members: Annotated[tuple[KnownPeer, ...], Field(max_length=MAX_MEMBERS, strict=False)] = ()


def proof(
    key: bytes,
    *,
    member_nonce: bytes,
    joiner_nonce: bytes,
    member_certificate: bytes,
    node: str,
    csr: str,
) -> bytes:
    """What shows that the joiner has the invite's secret, for this connection and request only.

    `key`: derived from the secret (`Invite.key`); `member_certificate`: DER, as shown in TLS.
    """
    message = (
        _DOMAIN
        + member_nonce
        + joiner_nonce
        + hashlib.sha256(member_certificate).digest()
        + hashlib.sha256(node.encode()).digest()
        + hashlib.sha256(csr.encode()).digest()
    )
    return hmac.digest(key, message, "sha256")
