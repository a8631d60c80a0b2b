"""Raw streams between nodes: one TLS connection each, one frame that says what for, then bytes.

The opener names an allow-listed service and never an address; the other side answers with a status
frame, and from then on the connection belongs to two protocols that know nothing of this module.
Streams of a node that is put on the deny list are cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from meshd.errors import PeerRefused, PeerUnreachable, ProtocolError
from meshd.ids import NodeId
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.hello import parse_refusal, refusal
from meshd.peers.trust.certificates import PeerCertificate

OPEN_TIMEOUT_S: Final = 5.0

Name = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,256}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Reference = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,1024}$")]


class Open(BaseModel):
    """The one frame of an opener. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    t: Literal["open"] = "open"
    service: Annotated[str, StringConstraints(pattern=r"^[a-z-]{1,32}$")]
    """`api`: HTTP/1.1 requests for the engine `instance` of the node that is asked. `loan`: memory
    of that node for a split model, by the frames of `peers/loans/words.py`. On bulk connections
    `shard` and `manifest`."""
    instance: Name | None = None
    sha256: Digest | None = None
    """Bulk service `shard`: of the file that is wanted."""
    ref: Reference | None = None
    """Bulk service `manifest`: of the model that is asked about, as people write it."""


def parse_open(message: Mapping[str, Any]) -> Open:
    """Raises ProtocolError."""
    try:
        return Open.model_validate(message)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise ProtocolError(f"a stream was opened with {problem['msg']}") from None


Service: TypeAlias = Callable[[PeerCertificate, Open], asyncio.Protocol]
"""What a stream is handed to, by who opened it. Raises PeerRefused."""


class Streams:
    """The streams other nodes opened here, and the opening of ours. `limit`: of theirs."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._services: Mapping[str, Service] = {}
        self._open: dict[asyncio.Transport, NodeId] = {}

    def offer(self, services: Mapping[str, Service]) -> None:
        self._services = services

    async def serve(self, channel: FrameChannel, opener: PeerCertificate) -> None:
        """The listener's part, for an authenticated node. Raises PeerRefused, ProtocolError."""
        wanted = parse_open(await channel.read())
        try:
            protocol = self._accept(opener, wanted)
        except PeerRefused as error:
            channel.send(refusal(error))
            raise
        channel.send({"t": "open"})
        transport = channel.transport
        if transport is None:
            raise PeerUnreachable("the stream closed as it opened")
        self._open[transport] = opener.node_id
        channel.detach(protocol)

    def cut(self, node: NodeId | None = None) -> None:
        """End the streams that `node` opened here; None: all."""
        self.prune()
        for transport, opener in tuple(self._open.items()):
            if node is None or opener == node:
                del self._open[transport]
                transport.abort()

    def prune(self) -> None:
        """Forget those that have ended; called now and then, and before the count matters."""
        for transport in [t for t in self._open if t.is_closing()]:
            del self._open[transport]

    def _accept(self, opener: PeerCertificate, wanted: Open) -> asyncio.Protocol:
        service = self._services.get(wanted.service)
        if service is None:
            raise PeerRefused(f"there is no service `{wanted.service}` here", reason="no_service")
        if len(self._open) >= self._limit:
            self.prune()
        if len(self._open) >= self._limit:
            raise PeerRefused(
                f"{self._limit} streams are open here already (`peers.max_streams`)", reason="busy"
            )
        return service(opener, wanted)


async def begin(
    channel: FrameChannel, wanted: Open, make_protocol: Callable[[], asyncio.Protocol]
) -> asyncio.Protocol:
    """The opener's part, on a connection whose far end was authenticated.

    Raises PeerRefused with the other side's words, ProtocolError, PeerUnreachable; the caller
    bounds the time and closes the channel then.
    """
    channel.send(wanted.model_dump(exclude_none=True))
    answer = await channel.read()
    if answer.get("t") != "open":
        if answer.get("t") == "refused":
            raise parse_refusal(answer)
        raise ProtocolError("a stream was answered with neither `open` nor `refused`")
    protocol = make_protocol()
    channel.detach(protocol)
    return protocol
