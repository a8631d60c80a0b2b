"""Control links: one long-lived connection a pair of nodes, and which one of two stays.

A link is made after both sides have said hello (handshake.py) and carries frames of gossip,
adverts, deny lists and renewals both ways. Full-policy: a peer that does not read loses gossip once
`GOSSIP_BACKLOG_BYTES` wait for it (a later round tells it again), and its link at `BACKLOG_BYTES`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

from meshd.errors import ProtocolError
from meshd.ids import BootId, NodeId
from meshd.peers.links.frames import CONTROL_LIMIT, FrameReader, frame, parse
from meshd.view import Role

log = logging.getLogger(__name__)

GOSSIP_BACKLOG_BYTES: Final = 128 * 1024
BACKLOG_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Remote:
    """Who is at the other end: proved by its certificate, or said in its hello."""

    node: NodeId
    role: Role
    boot: BootId
    name: str
    version: str
    dialled: bool
    """Whether this side dialled."""
    address: str
    """HOST:PORT of the connection's far end."""


class ControlLink(asyncio.Protocol):
    """An established link. `on_frame(link, frame)` for every frame but a goodbye;
    `on_end(link, broke)` once: `broke` is True unless one side said goodbye before."""

    def __init__(
        self,
        remote: Remote,
        on_frame: Callable[[ControlLink, dict[str, Any]], None],
        on_end: Callable[[ControlLink, bool], None],
    ) -> None:
        self.remote = remote
        self.transport: asyncio.Transport | None = None
        self.used_at = 0.0
        """Monotonic time of the last frame, either way; kept by the owner."""
        self.bytes_in = 0
        self.bytes_out = 0
        self._on_frame = on_frame
        self._on_end = on_end
        self._reader = FrameReader(CONTROL_LIMIT)
        self._parted = False
        self._ended = False

    # -- for its owner ----------------------------------------------------------------------------

    def send(self, value: dict[str, Any], *, droppable: bool = False) -> bool:
        """Whether it was sent; `droppable` frames are left out when the peer is behind."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        backlog = transport.get_write_buffer_size()
        if droppable and backlog > GOSSIP_BACKLOG_BYTES:
            return False
        if backlog > BACKLOG_BYTES:
            log.warning("link to %s: it does not read; closing", self.remote.name)
            transport.abort()
            return False
        data = frame(value)
        self.bytes_out += len(data)
        transport.write(data)
        return True

    def part(self, why: str) -> None:
        """Close with a goodbye: the peer does not take the end for a death."""
        self.send({"t": "bye", "why": why})
        self._parted = True
        if self.transport is not None:
            self.transport.close()

    def drop(self) -> None:
        """Close at once, without a word and without `on_end` calling it broken."""
        self._parted = True
        if self.transport is not None:
            self.transport.abort()

    # -- asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.bytes_in += len(data)
        try:
            for body in self._reader.feed(data):
                self._frame(parse(body))
        except ProtocolError as error:
            log.warning("link to %s: %s; closing", self.remote.name, error.message)
            if self.transport is not None:
                self.transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if not self._ended:
            self._ended = True
            self._on_end(self, not self._parted)

    def _frame(self, value: dict[str, Any]) -> None:
        if value.get("t") == "bye":
            self._parted = True
            if self.transport is not None:
                self.transport.close()
        elif not self._parted:
            self._on_frame(self, value)


class LinkTable:
    """The links that stand, by node; at most one each."""

    def __init__(self, own: NodeId) -> None:
        self._own = own
        self._links: dict[NodeId, ControlLink] = {}

    def __iter__(self) -> Iterator[ControlLink]:
        return iter(tuple(self._links.values()))

    def __len__(self) -> int:
        return len(self._links)

    def get(self, node: NodeId) -> ControlLink | None:
        return self._links.get(node)

    def add(self, link: ControlLink) -> bool:
        """Whether `link` is the one that stays; the one that does not is said goodbye to."""
        existing = self._links.get(link.remote.node)
        if existing is None:
            self._links[link.remote.node] = link
            return True
        if keeps(existing.remote, link.remote, self._own):
            link.part("duplicate")
            return False
        self._links[link.remote.node] = link
        existing.part("replaced")
        return True

    def remove(self, link: ControlLink) -> bool:
        """Whether `link` was the one that stood."""
        if self._links.get(link.remote.node) is not link:
            return False
        del self._links[link.remote.node]
        return True


def keeps(existing: Remote, new: Remote, own: NodeId) -> bool:
    """Whether of two links to one node the existing one stays; both ends decide the same.

    1. Another boot: the old process is gone, its link with it.
    2. The same side dialled both: it gave up on the first.
    3. Both dialled: the link dialled by the node with the smaller id.
    """
    if existing.boot != new.boot or existing.dialled == new.dialled:  # 1, 2
        return False
    smaller_is_us = own < existing.node  # 3
    return existing.dialled == smaller_is_us
