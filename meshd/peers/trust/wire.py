"""What the trust part's messages and files are made of, checked and bounded. Pure.

Unknown fields of other nodes are ignored: newer ones may say more.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
)

from meshd.config import split_address
from meshd.errors import ProtocolError
from meshd.peers.trust.identity import public_key_of

MAX_ADDRESSES = 8
"""Addresses one node, or one invite, may name."""
_LAST_SECOND = 253_402_300_799
"""The last second of the year 9999: later ones cannot be written as a date."""


class WireModel(BaseModel):
    """Base of what another node sent: strict about what is read, silent about the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


def _from_base64(value: object) -> object:
    if not isinstance(value, str):
        return value  # bytes are taken as they are, anything else is refused by the type
    return base64.b64decode(value, validate=True)


def _is_node_id(value: str) -> str:
    public_key_of(value)
    return value


def _is_address(value: str) -> str:
    host, port = split_address(value)
    if not host or not 0 < port <= 65_535:
        raise ValueError("not HOST:PORT")
    return value


Blob = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    PlainSerializer(lambda value: base64.b64encode(value).decode(), return_type=str),
]
"""Bytes, base64 in JSON."""
Node = Annotated[str, AfterValidator(_is_node_id)]
"""A node id: base32 of an Ed25519 public key."""
Mesh = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
"""Name of a node or of a mesh; the pattern is that of the configuration."""
Address = Annotated[
    str,
    StringConstraints(max_length=262, pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+):[0-9]{1,5}$"),
    AfterValidator(_is_address),
]
Addresses = Annotated[tuple[Address, ...], Field(max_length=MAX_ADDRESSES, strict=False)]
Counter = Annotated[int, Field(ge=0, lt=1 << 63)]
UnixSeconds = Annotated[int, Field(ge=0, le=_LAST_SECOND)]
ShortText = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{0,120}$")]
"""A few words for people: one line, fit for any terminal."""

M = TypeVar("M", bound=BaseModel)


def date(unix: float) -> str:
    """A moment as people write it, UTC."""
    try:
        moment = dt.datetime.fromtimestamp(unix, dt.UTC)
    except (OverflowError, ValueError, OSError):
        return "a date out of range"
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def read(model: type[M], value: Mapping[str, Any], what: str) -> M:
    """`value` as `model`. Raises ProtocolError naming the field that is wrong, never its value:
    it may be a secret."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"]) or "it"
        raise ProtocolError(f"{what}: {where}: {first['msg']}") from None


class KnownPeer(WireModel):
    """A member and where it was last reached: what a joiner is told and a node remembers."""

    node_id: Node
    name: Name
    addresses: Addresses = ()
