"""What the daemon of a host and its process of tunnels tell each other. Pure.

One socket, frames (`frames.py`), each a message below. The daemon sends one `ends` and nothing
more; the process answers with `listening`, and then tells what happens. The end of the socket is
the end of the process, and with it of its tunnels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from meshd.errors import ProtocolError
from meshd.ids import LoanId, NodeId
from meshd.peers.bulk.words import Credentials

ORDER_LIMIT: Final = 1024 * 1024
"""Bytes of the frame `ends`."""
NEWS_LIMIT: Final = 64 * 1024
MAX_ENDS: Final = 64


@dataclass(frozen=True, slots=True)
class TunnelEnd:
    """The worker at the other end of a tunnel."""

    node_id: NodeId
    name: str
    addresses: tuple[str, ...]
    loan: LoanId
    """What it lends its RPC server for."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Ends(_Message):
    """Whom tunnels are to lead to."""

    t: Literal["ends"] = "ends"
    credentials: Credentials
    ends: Annotated[tuple[TunnelEnd, ...], Field(min_length=1, max_length=MAX_ENDS)]


class Listening(_Message):
    """Ports on 127.0.0.1, in the order of the ends."""

    t: Literal["listening"] = "listening"
    ports: tuple[Annotated[int, Field(ge=1, le=65_535)], ...]


class Carried(_Message):
    """What has been since the last time."""

    t: Literal["carried"] = "carried"
    bytes: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...]
    """Received from and sent to each end, in their order; on the wire."""
    strangers: Annotated[int, Field(ge=0)] = 0
    """Connections of other users, which were closed."""


class Refused(_Message):
    """No stream could be opened for a connection, which was closed."""

    t: Literal["refused"] = "refused"
    end: Annotated[int, Field(ge=0)]
    """Which of the ends."""
    reason: str
    message: str


News = Listening | Carried | Refused

_NEWS: Final[TypeAdapter[News]] = TypeAdapter(Annotated[News, Field(discriminator="t")])


def parse_ends(message: Mapping[str, Any]) -> Ends:
    """Raises ProtocolError."""
    try:
        return Ends.model_validate(message)
    except ValidationError as error:
        raise ProtocolError(f"an order for tunnels is malformed: {_problem(error)}") from None


def parse_news(message: Mapping[str, Any]) -> News:
    """Raises ProtocolError."""
    try:
        return _NEWS.validate_python(message)
    except ValidationError as error:
        raise ProtocolError(f"news of tunnels are malformed: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'message'}: {first['msg']}"
