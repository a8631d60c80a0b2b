"""Invite tokens: all a new node needs to find a mesh, to know it, and to be let in.

`meshd1-` and, in lower-case base32 without padding:

    version 1 byte · mesh id 16 · name 1 + n · sha256 of the CA certificate 32 · invite id 8 ·
    secret 16 · expiry 8 (Unix seconds) · flags 1 (1 client, 2 issuer) · count of addresses 1 and
    each 1 + n · checksum 4 (the first bytes of the sha256 of all before)

The checksum tells a token that was cut off or mistyped from one of another kind. A token is a
secret: neither its representation nor an error about it shows the part that is.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from pydantic import TypeAdapter, ValidationError

from meshd.errors import BadInvite
from meshd.ids import MeshId
from meshd.peers.trust.wire import MAX_ADDRESSES, Address, Name, date
from meshd.view import Role

PREFIX: Final = "meshd1-"
INVITE_ID_BYTES: Final = 8
SECRET_BYTES: Final = 16
MAX_TOKEN_CHARACTERS: Final = 4096
_VERSION: Final = 1
_CLIENT, _ISSUER = 1, 2
_CHECKSUM_BYTES: Final = 4
_ANY_PREFIX: Final = re.compile(r"meshd([0-9]{1,6})-")
_KEY_DOMAIN: Final = b"meshd invite key v1\0"
_name: TypeAdapter[str] = TypeAdapter(Name)
_address: TypeAdapter[str] = TypeAdapter(Address)


@dataclass(frozen=True, slots=True)
class Invite:
    mesh_id: MeshId
    mesh_name: str
    ca_fingerprint: bytes = field(repr=False)
    """sha256 of the CA certificate (DER)."""
    invite_id: bytes
    """Names the invite to the node that issued it; no secret."""
    secret: bytes = field(repr=False)
    expires_at: int
    """Unix time, by the clock of the node that issued it."""
    role: Role
    issuer: bool
    """Whether whoever joins gets the mesh's key and can admit others."""
    addresses: tuple[str, ...]
    """HOST:PORT of members, at most 8."""

    @property
    def key(self) -> bytes:
        """What the secret is proved with; all that the issuing node keeps of it."""
        return derive_key(self.secret)


def derive_key(secret: bytes) -> bytes:
    return hashlib.sha256(_KEY_DOMAIN + secret).digest()


def is_token(text: str) -> bool:
    """Whether somebody meant this as a token, of whatever version and however damaged."""
    return _ANY_PREFIX.match(text.strip().lower()) is not None


def encode_invite(invite: Invite) -> str:
    """The token. Raises ValueError for fields that are too long."""
    flags = (_CLIENT if invite.role is Role.CLIENT else 0) | (_ISSUER if invite.issuer else 0)
    if len(invite.addresses) > MAX_ADDRESSES:
        raise ValueError(f"an invite names at most {MAX_ADDRESSES} addresses")
    body = b"".join(
        (
            bytes([_VERSION]),
            bytes.fromhex(invite.mesh_id),
            _counted(invite.mesh_name),
            invite.ca_fingerprint,
            invite.invite_id,
            invite.secret,
            invite.expires_at.to_bytes(8),
            bytes([flags, len(invite.addresses)]),
            *map(_counted, invite.addresses),
        )
    )
    return PREFIX + _to_base32(body + _checksum(body))


def decode_invite(token: str, now: float | None = None) -> Invite:
    """The invite a token stands for. `now`: Unix time; by default the clock's.

    Case and surrounding white space do not matter. Raises BadInvite that says which it is: no
    invite, one of a newer version, cut off or mistyped, expired.
    """
    now = time.time() if now is None else now
    body = _checked(token.strip().lower())
    try:
        invite = _parse(body)
    except (IndexError, ValueError, ValidationError):
        # The checksum is right, so this is how it was written.
        raise BadInvite(
            "this invite holds what this version of meshd does not understand; upgrade meshd here, "
            "or make the invite with the version that runs here"
        ) from None
    if invite.expires_at <= now:
        raise BadInvite(
            f"this invite to mesh {invite.mesh_name} expired on {date(invite.expires_at)} (the "
            f"clock of this machine says {date(now)}); make a new one with `meshd invite`"
        )
    return invite


def _checked(token: str) -> bytes:
    """The bytes of a token of this version, less the checksum, which was right."""
    match = _ANY_PREFIX.match(token)
    if match is None or len(token) > MAX_TOKEN_CHARACTERS:
        raise BadInvite(
            f"this is not an invite; one begins with {PREFIX} and is printed by `meshd invite`"
        )
    if match.group() != PREFIX:
        raise _newer()
    data = _from_base32(token.removeprefix(PREFIX))
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if not body or checksum != _checksum(body):
        raise BadInvite(
            "this invite is cut off or mistyped; copy the whole token, on one line, from the "
            "output of `meshd invite`"
        )
    if body[0] != _VERSION:
        raise _newer()
    return body


def _newer() -> BadInvite:
    return BadInvite(
        "this invite is of another version of meshd; upgrade meshd on this machine to that of the "
        "machine that made the invite"
    )


def _parse(body: bytes) -> Invite:
    """Raises IndexError, ValueError or ValidationError for a body that does not come out even."""
    reader = _Reader(body)
    reader.take(1)
    mesh_id = MeshId(reader.take(16).hex())
    name = _name.validate_python(reader.take_counted())
    fingerprint = reader.take(32)
    invite_id, secret = reader.take(INVITE_ID_BYTES), reader.take(SECRET_BYTES)
    expires_at = int.from_bytes(reader.take(8))
    flags, count = reader.take(2)
    if flags & ~(_CLIENT | _ISSUER) or count > MAX_ADDRESSES:
        raise ValueError("unknown flags, or too many addresses")
    addresses = _valid(reader.take_counted() for _ in range(count))
    reader.end()
    return Invite(
        mesh_id=mesh_id,
        mesh_name=name,
        ca_fingerprint=fingerprint,
        invite_id=invite_id,
        secret=secret,
        expires_at=expires_at,
        role=Role.CLIENT if flags & _CLIENT else Role.MEMBER,
        issuer=bool(flags & _ISSUER),
        addresses=addresses,
    )


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise IndexError("the data ends early")
        self._at += count
        return taken

    def take_counted(self) -> str:
        return self.take(self.take(1)[0]).decode("ascii")

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError("there is more than an invite")


def _valid(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(_address.validate_python(address) for address in addresses)


def _counted(text: str) -> bytes:
    encoded = text.encode("ascii")
    if len(encoded) > 255:
        raise ValueError(f"{text[:32]}… is too long for an invite")
    return bytes([len(encoded)]) + encoded


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]


def _to_base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _from_base32(text: str) -> bytes:
    """Empty for what is not base32 as `_to_base32` writes it."""
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except ValueError:
        return b""
    return data if _to_base32(data) == text else b""
