"""Links made and lost: dials, arrivals, and that one identity is one process.

A copied data directory shows as one node id with two boots. Before a newcomer with another boot
takes an id's place, the process that holds it is asked, over its link or at its address; if that
one answers, the newcomer is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, assert_never

from meshd.errors import MeshdError, PeerRefused, ProtocolError
from meshd.ids import BootId, NodeId
from meshd.kernel import Clock, Driver, FlightRecorder
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.connector import ConnectionRefused, Connector
from meshd.peers.links.dialing import (
    Called,
    Dial,
    DialFailed,
    Dialing,
    DialSucceeded,
    LinkCame,
    LinkWent,
    NobodyListens,
    Proposed,
)
from meshd.peers.links.dialing import Effect as DialEffect
from meshd.peers.links.dialing import Event as DialEvent
from meshd.peers.links.frames import JOIN_LIMIT
from meshd.peers.links.handshake import attend_doctor, greet, statement_of, welcome
from meshd.peers.links.hello import Hello, Purpose, refusal
from meshd.peers.links.links import ControlLink, LinkTable, Remote
from meshd.peers.protocol import ALPN_CTL
from meshd.peers.swim.gossip import Alive
from meshd.peers.trust.certificates import PeerCertificate

log = logging.getLogger(__name__)

ECHO_S: Final = 0.7
"""How long the process that holds an id has to answer before a newcomer takes its place."""
LAST_WORDS_S: Final = 0.5
"""From a goodbye to the end of a connection whose other side does not close it."""
MAX_BOOTS: Final = 4096
MAX_PENDING: Final = 8
"""Frames kept for a node while it is dialled. Full-policy: the oldest goes; gossip is repeated."""

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Listener(Protocol):
    """Who is told of links: the session. Synchronous."""

    def own_hello(self, purpose: Purpose) -> Hello: ...

    def genuine(self, alive: Alive) -> bool:
        """Whether the statement's signature is its node's."""

    def link_came(self, link: ControlLink, statement: Alive) -> None: ...

    def link_went(self, link: ControlLink, broke: bool) -> None: ...

    def frame_came(self, link: ControlLink, frame: dict[str, Any]) -> None: ...

    def dial_refused(self, node: NodeId) -> None:
        """Nobody listens where that node was."""

    def refused(self, error: PeerRefused, theirs: str) -> None:
        """The node at `theirs`, or this one, would not have a link; it may matter to people."""

    def believed_alive(self, node: NodeId) -> tuple[str, ...]:
        """Where a node can be asked that membership holds for alive; empty if it does not."""


class Linking:
    """Owns the links of one membership. `close` ends them with a goodbye."""

    def __init__(
        self,
        own: NodeId,
        connector: Connector,
        listener: Listener,
        *,
        dial_timeout_s: float,
        max_links: int,
        clock: Clock,
        recorder: FlightRecorder,
        spawn: Spawn,
    ) -> None:
        self.links = LinkTable(own)
        self._own = own
        self._connector = connector
        self._listener = listener
        self._dial_timeout_s = dial_timeout_s
        self._max_links = max_links
        self._clock = clock
        self._spawn = spawn
        self._driver: Driver[DialEvent, DialEffect] = Driver(
            "dialing", Dialing(), self._obey, clock=clock, recorder=recorder
        )
        self._boots: OrderedDict[NodeId, BootId] = OrderedDict()
        self._pending: dict[NodeId, list[dict[str, Any]]] = {}
        self._echoes: dict[int, asyncio.Future[None]] = {}
        self._echo_numbers = itertools.count(1)
        self._closed = False

    # -- for the session --------------------------------------------------------------------------

    def propose(self, address: str, *, asked: bool = False) -> None:
        """Somebody of the mesh may listen at HOST:PORT."""
        self._driver.post(Proposed(address, asked))

    def send(self, node: NodeId, frame: dict[str, Any], addresses: tuple[str, ...]) -> None:
        """Over the node's link, or, if it has none, over one that is dialled now."""
        link = self.links.get(node)
        if link is not None:
            link.used_at = self._clock.now()
            link.send(frame, droppable=True)
        elif addresses and not self._closed:
            waiting = self._pending.setdefault(node, [])
            waiting.append(frame)
            del waiting[:-MAX_PENDING]
            self._driver.post(Called(node, addresses))

    def close(self, why: str) -> None:
        self._closed = True
        self._driver.close()
        for link in self.links:
            link.part(why)

    def drop(self, node: NodeId) -> None:
        """End the link to a node that is not welcome any more, at once."""
        self._boots.pop(node, None)
        link = self.links.get(node)
        if link is not None:
            link.send({"t": "refused", "reason": "denied", "message": _DENIED})
            self._part(link, "denied")

    def doubt(self, node: NodeId) -> None:
        """The node is held dead: end its link unless it answers, so that the next frame to it dials
        a fresh one.

        TCP would go on with a silent link, at ever longer intervals, for a quarter of an hour; and
        while it stands at either end no other can take its place. One that answers stays: the
        death was an error, and many new handshakes would feed what caused it.
        """
        link = self.links.get(node)
        if link is not None:
            self._spawn(self.end_if_silent(link))

    async def end_if_silent(self, link: ControlLink) -> None:
        if not await self._answers(link) and self.links.get(link.remote.node) is link:
            self._part(link, "silent")

    # -- arrivals ---------------------------------------------------------------------------------

    async def serve(self, channel: FrameChannel, certificate: PeerCertificate) -> None:
        """The listener's part of a control connection. Raises MeshdError; it is bounded in time by
        the caller."""
        ours = self._listener.own_hello("link")
        try:
            theirs = await welcome(channel, ours, lambda h: self._objection(h, certificate))
        except PeerRefused as error:
            if error.reason != "self":
                self._listener.refused(error, channel.origin)
            raise
        if theirs.purpose == "doctor":
            await attend_doctor(channel)
        else:
            self._link(channel, theirs, certificate, dialled=False)

    # -- dials ------------------------------------------------------------------------------------

    def _obey(self, order: DialEffect) -> None:
        match order:
            case Dial():
                self._spawn(self._dial(order))
            case NobodyListens():
                self._listener.dial_refused(order.node)
            case _:
                assert_never(order)

    async def _dial(self, order: Dial) -> None:
        address, node = order.address, order.expected
        try:
            async with asyncio.timeout(self._dial_timeout_s):
                reached = await self._open(address, node)
        except TimeoutError:
            log.debug("%s: no answer within %.0f s", address, self._dial_timeout_s)
            self._failed(order)
        except ConnectionRefused:
            self._failed(order, refused=True)
        except PeerRefused as error:
            self._dial_was_refused(order, error)
        except MeshdError as error:
            log.debug("%s: %s", address, error.message)
            self._failed(order)
        else:
            self._driver.post(DialSucceeded(address, reached))

    async def _open(self, address: str, expected: NodeId | None) -> NodeId:
        channel, certificate = await self._connector.connect(
            address, ALPN_CTL, JOIN_LIMIT, expected
        )
        try:
            theirs = await greet(channel, self._listener.own_hello("link"))
            objection = await self._objection(theirs, certificate)
            if objection is not None:
                channel.send(refusal(objection))
                channel.close()
                raise objection
            self._link(channel, theirs, certificate, dialled=True, address=address)
        except BaseException:
            channel.close()
            raise
        return certificate.node_id

    def _dial_was_refused(self, order: Dial, error: PeerRefused) -> None:
        if error.reason == "duplicate":
            self._failed(order)
        elif error.reason == "self":
            self._failed(order, for_good=True)
        else:
            self._failed(order)
            self._listener.refused(error, order.address)

    def _failed(self, order: Dial, *, for_good: bool = False, refused: bool = False) -> None:
        if order.expected is not None:
            self._pending.pop(order.expected, None)
        self._driver.post(DialFailed(order.address, for_good, refused))

    # -- both -------------------------------------------------------------------------------------

    async def _objection(self, theirs: Hello, certificate: PeerCertificate) -> PeerRefused | None:
        """What else speaks against the node that said this hello."""
        if theirs.node != certificate.node_id:
            return PeerRefused("the hello names another node than the certificate", reason="id")
        if theirs.purpose == "doctor":
            return None
        if not self._listener.genuine(statement_of(theirs)):
            return PeerRefused("the hello's statement is not signed by its node", reason="id")
        if await self._is_copy(theirs):
            return PeerRefused(
                f"another running node has the id of {theirs.name} ({theirs.node[:8]}): one data "
                "directory is a copy of the other; stop one, remove node.key and mesh/ from its "
                "data directory, and join it with an invite of its own",
                reason="copied_identity",
            )
        return None

    async def _is_copy(self, theirs: Hello) -> bool:
        """Whether the process that held this id before still answers under its own boot."""
        if self._boots.get(theirs.node) == theirs.boot:
            return False
        link = self.links.get(theirs.node)
        if link is not None:
            return link.remote.boot != theirs.boot and await self._answers(link)
        for address in self._listener.believed_alive(theirs.node)[:1]:
            boot = await self._boot_at(address, theirs.node)
            return boot is not None and boot != theirs.boot
        return False

    async def _answers(self, link: ControlLink) -> bool:
        number = next(self._echo_numbers)
        answered = asyncio.get_running_loop().create_future()
        self._echoes[number] = answered
        try:
            async with asyncio.timeout(ECHO_S):
                if not link.send({"t": "echo", "n": number}):
                    return False
                await answered
        except TimeoutError:
            return False
        finally:
            del self._echoes[number]
        return True

    async def _boot_at(self, address: str, node: NodeId) -> BootId | None:
        try:
            async with asyncio.timeout(ECHO_S):
                channel, _ = await self._connector.connect(address, ALPN_CTL, JOIN_LIMIT, node)
                try:
                    return (await greet(channel, self._listener.own_hello("doctor"))).boot
                finally:
                    channel.close()
        except (TimeoutError, MeshdError):
            return None

    def _link(
        self,
        channel: FrameChannel,
        theirs: Hello,
        certificate: PeerCertificate,
        *,
        dialled: bool,
        address: str = "",
    ) -> None:
        remote = Remote(
            node=theirs.node,
            role=certificate.role,
            boot=theirs.boot,
            name=theirs.name,
            version=theirs.version,
            dialled=dialled,
            address=address or channel.origin,
        )
        link = ControlLink(remote, self._frame_came, self._link_ended)
        link.used_at = self._clock.now()
        statement = statement_of(theirs)
        if self._closed:
            channel.close()
            return
        self._boots[theirs.node] = theirs.boot
        self._boots.move_to_end(theirs.node)
        while len(self._boots) > MAX_BOOTS:
            self._boots.popitem(last=False)
        # The table first: frames that came with the hello are handled inside `detach`.
        link.connection_made(_transport_of(channel))
        if not self.links.add(link):
            channel.detach(link)
            return
        self._make_room(link)
        self._driver.post(LinkCame(theirs.node))
        self._listener.link_came(link, statement)
        channel.detach(link)
        for frame in self._pending.pop(theirs.node, ()):
            link.send(frame, droppable=True)

    def _make_room(self, newest: ControlLink) -> None:
        if len(self.links) > self._max_links:
            oldest = min((k for k in self.links if k is not newest), key=lambda k: k.used_at)
            self._part(oldest, "idle")

    def _part(self, link: ControlLink, why: str) -> None:
        """It stands no more from now on, whether the other side reads the goodbye or not."""
        link.part(why)
        self._link_ended(link, False)
        asyncio.get_running_loop().call_later(LAST_WORDS_S, link.drop)

    def _frame_came(self, link: ControlLink, frame: dict[str, Any]) -> None:
        link.used_at = self._clock.now()
        match frame.get("t"):
            case "echo":
                link.send({"t": "echoed", "n": frame.get("n")})
            case "echoed":
                waiting = self._echoes.get(frame["n"]) if type(frame.get("n")) is int else None
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)
            case _:
                try:
                    self._listener.frame_came(link, frame)
                except MeshdError as error:
                    raise ProtocolError(error.message) from None

    def _link_ended(self, link: ControlLink, broke: bool) -> None:
        if self.links.remove(link):
            self._driver.post(LinkWent(link.remote.node))
            self._listener.link_went(link, broke)


_DENIED = (
    "this node is on the mesh's deny list; a new data directory and a new invite admit it again"
)


def _transport_of(channel: FrameChannel) -> asyncio.Transport:
    if channel.transport is None:
        raise ProtocolError("the connection closed during the hello")
    return channel.transport
