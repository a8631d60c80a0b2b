"""A membership in action: gossip, links, adverts and the deny list of one mesh, put together.

Frames come in from links, statements in them are checked, and what is left goes to the membership
machine as events; its orders go out as frames.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Final, assert_never

from meshd import __version__
from meshd.errors import PeerRefused, PeerUnreachable
from meshd.ids import BootId, NodeId
from meshd.kernel import Driver
from meshd.peers.denying import Denying
from meshd.peers.deploying import Deploying
from meshd.peers.joining.renewing import Renewing
from meshd.peers.links.codec import message_from_wire, message_to_wire
from meshd.peers.links.connector import Connector
from meshd.peers.links.frames import RAW_OPEN_LIMIT
from meshd.peers.links.handshake import statement_to_hello
from meshd.peers.links.hello import Hello, Purpose, make_hello, parse_refusal
from meshd.peers.links.linking import Linking
from meshd.peers.links.links import ControlLink
from meshd.peers.links.streams import OPEN_TIMEOUT_S, Open, begin
from meshd.peers.needs import Needs
from meshd.peers.protocol import ALPN_RAW
from meshd.peers.serving import Serving
from meshd.peers.showing import AT_ONCE_S, SLOTS_S, Showing
from meshd.peers.swim import gossip
from meshd.peers.swim.gossip import Alive, Message
from meshd.peers.swim.swim import Swim
from meshd.peers.swim.timing import LAN, WAN
from meshd.peers.telling import Telling
from meshd.peers.trust.trust import Trust
from meshd.peers.trust.wire import KnownPeer
from meshd.view import (
    PeerState,
    Role,
    Target,
    View,
)

log = logging.getLogger(__name__)

TICK_S: Final = 0.25
SWEEP_S: Final = 1.0


class Session:
    """Lives from a membership's start to `close`. Implements `linking.Listener`."""

    def __init__(
        self,
        trust: Trust,
        role: Role,
        starts: int,
        needs: Needs,
        addresses: Callable[[], tuple[str, ...]],
    ) -> None:
        """`addresses`: where other nodes are told to reach this one."""
        self.trust = trust
        self._addresses = addresses
        self.own = trust.identity.node_id
        self.role = role
        self.peer_bytes = [0, 0]
        """Received and sent on links that are gone."""
        self._needs = needs
        self._leaving = False
        self._closed = False
        self._had_company = False
        self._boot = BootId(f"{needs.rng.getrandbits(64):016x}")
        self._statement = self._signed(starts << 20, starts << 20)
        self._look_timer: asyncio.TimerHandle | None = None
        self._connector = Connector(trust.client_context, trust.authenticate)
        self.linking = Linking(
            self.own,
            self._connector,
            self,
            dial_timeout_s=needs.config.peers.dial_timeout_s,
            max_links=needs.config.peers.max_links,
            clock=needs.clock,
            recorder=needs.recorder,
            spawn=needs.spawn,
        )
        timing = WAN if needs.config.peers.preset == "wan" else LAN
        self._swim = Swim(self.own, timing, needs.rng)
        self._driver: Driver[gossip.Event, gossip.Effect] = Driver(
            "membership", self._swim, self._run, clock=needs.clock, recorder=needs.recorder
        )
        self.telling = Telling(
            self.own,
            needs.config.name,
            role,
            starts << 20,
            trust,
            self.linking.links,
            clock=needs.clock,
            inflight=needs.inflight,
            newer=self._advert_is_newer,
            changed=self._others_changed,
        )
        self._showing = Showing(
            needs.board,
            self.own,
            needs.config.name,
            lambda: self._swim.members,
            self.telling.book,
            lambda: trust.membership,
        )
        self.serving = Serving(trust, role, needs, self._showing.name_of)
        self.deploying = Deploying(needs.deployments, self.linking.links, needs.clock, needs.rng)
        self._denying = Denying(
            trust, self.linking.links, spawn=needs.spawn, denied=self._denials_came
        )
        self._hearers = (self.telling, self._denying, self.deploying)
        trust.on_renewal = self._renewed
        self.renewing = Renewing(trust, needs.clock, needs.rng.choice)
        self._unsubscribe = needs.board.subscribe(self._view_changed)

    # -- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        self._driver.post(gossip.SelfStated(self._statement))
        self._view_changed(self._needs.board.current)
        self._showing.publish()
        self._needs.spawn(self._ticks())

    def leave(self) -> None:
        """Tell the others that this node goes; links stay until `close`."""
        self._leaving = True
        self._restate(self._statement.incarnation + 1)

    def close(self) -> None:
        self._closed = True
        self._unsubscribe()
        self._showing.close()
        if self._look_timer is not None:
            self._look_timer.cancel()
        self._driver.close()
        self.linking.close("leaving" if self._leaving else "closing")
        self.serving.close()

    async def _ticks(self) -> None:
        next_sweep_at = 0.0
        while not self._closed:
            await asyncio.sleep(TICK_S)
            now = self._needs.clock.now()
            self.telling.tell_slots(self._needs.board.current)
            if now >= next_sweep_at:
                next_sweep_at = now + SWEEP_S
                self.serving.streams.prune()
                self.telling.want_again(self._needs.rng.choice)
                self.deploying.look()

    # -- for the node -----------------------------------------------------------------------------

    async def connect(
        self, target: Target, make_protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Protocol:
        """A stream to the engine of a remote target. Raises PeerUnreachable, PeerRefused."""
        if target.node_id is None:
            raise PeerUnreachable(f"no address of node {target.node} is known")
        wanted = Open(service="api", instance=target.instance)
        return await self.open_stream(target.node_id, target.node, wanted, make_protocol)

    async def open_stream(
        self,
        node: NodeId,
        name: str,
        wanted: Open,
        make_protocol: Callable[[], asyncio.Protocol],
    ) -> asyncio.Protocol:
        """A raw stream to `node`, which errors call `name`. Raises PeerUnreachable, PeerRefused."""
        member = self._swim.members.get(node)
        if member is None or not member.addresses:
            raise PeerUnreachable(f"no address of node {name} is known")
        link = self.linking.links.get(node)
        address = link.remote.address if link is not None and link.remote.dialled else ""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                channel, _ = await self._connector.connect(
                    address or member.addresses[0], ALPN_RAW, RAW_OPEN_LIMIT, node
                )
                try:
                    return await begin(channel, wanted, make_protocol)
                except BaseException:
                    channel.abort()
                    raise
        except TimeoutError:
            raise PeerUnreachable(
                f"node {name} did not open a stream within {OPEN_TIMEOUT_S:.0f} s"
            ) from None

    def known_peers(self) -> tuple[KnownPeer, ...]:
        """The nodes that are alive, for a newcomer to begin with."""
        return tuple(islice(self._alive(), 16))

    def bulk_peers(self) -> tuple[KnownPeer, ...]:
        """The nodes that may be asked for weights: alive, no clients, not on the deny list."""
        return tuple(
            peer
            for peer in self._alive()
            if peer.node_id not in self.trust.denied and not self._is_client(NodeId(peer.node_id))
        )

    def _alive(self) -> Iterator[KnownPeer]:
        """Others that can be dialled now."""
        for node, member in self._swim.members.items():
            if member.state is PeerState.ALIVE and member.addresses:
                name = self._showing.name_of(node)
                yield KnownPeer(node_id=node, name=name, addresses=member.addresses)

    def _is_client(self, node: NodeId) -> bool:
        advert = self.telling.book.get(node)
        return advert is not None and advert.role is Role.CLIENT

    async def remember(self) -> None:
        """Keep where the others are for the next start."""
        await self.trust.remember(
            [
                (node, self._showing.name_of(node), member.addresses)
                for node, member in self._swim.members.items()
                if member.state is not PeerState.LEFT
            ]
        )

    def gossip_bytes(self) -> tuple[int, int]:
        """(received, sent) on control links since the session began."""
        links = list(self.linking.links)
        return (
            self.peer_bytes[0] + sum(k.bytes_in for k in links),
            self.peer_bytes[1] + sum(k.bytes_out for k in links),
        )

    def denied(self, nodes: tuple[NodeId, ...], source: ControlLink | None = None) -> None:
        """`nodes` are on the deny list from now on: spread it, and have no more to do with them."""
        self._denying.spread(nodes, source)
        for node in nodes:
            log.warning("node %s is on the deny list", self._showing.name_of(node))
            self.linking.drop(node)
            self.serving.cut(node)
            self.telling.forget(node)
            self._driver.post(gossip.NodeRevoked(node))
        self._showing.within(AT_ONCE_S)

    def _renewed(self) -> None:
        self.telling.say_again()  # adverts carry the certificate
        self.serving.bulk.renewed()

    # -- linking.Listener -------------------------------------------------------------------------

    def own_hello(self, purpose: Purpose) -> Hello:
        runtime = self._needs.board.current.runtime
        membership = self.trust.membership
        return make_hello(
            node=self.own,
            name=self._needs.config.name,
            mesh=membership.mesh_id,
            boot=self._boot,
            role=self.role,
            version=__version__,
            time=time.time(),
            purpose=purpose,
            engine=runtime.build if runtime is not None else None,
            rpc=runtime.rpc_protocol if runtime is not None else None,
            statement=statement_to_hello(self._statement) if purpose == "link" else None,
        )

    def genuine(self, alive: Alive) -> bool:
        return self.trust.is_genuine(alive)

    def link_came(self, link: ControlLink, statement: Alive) -> None:
        remote = link.remote
        log.info("link to %s (%s) at %s", remote.name, remote.node[:8], remote.address)
        self._showing.welcomed()
        self._driver.post(gossip.NodeMet(statement))
        self.telling.greet(link)
        self._denying.greet(link)
        self.deploying.greet(link)

    def link_went(self, link: ControlLink, broke: bool) -> None:
        remote = link.remote
        self.peer_bytes[0] += link.bytes_in
        self.peer_bytes[1] += link.bytes_out
        log.log(
            logging.INFO if broke else logging.DEBUG,
            "link to %s %s", remote.name, "broke" if broke else "was closed",
        )  # fmt: skip
        if broke and not self._closed:
            self._driver.post(gossip.LinkLost(remote.node))

    def frame_came(self, link: ControlLink, frame: dict[str, Any]) -> None:
        message = message_from_wire(frame)
        if message is not None:
            self._driver.post(gossip.MessageReceived(link.remote.node, self._checked(message)))
        elif not any(part.frame_came(link, frame) for part in self._hearers):
            match frame.get("t"):
                case "renew" | "renewed":
                    self._needs.spawn(self.renewing.frame_came(link, frame))
                case "refused":
                    self.refused(parse_refusal(frame), link.remote.address)
                case _:
                    pass  # of a later version; the range in the hello said we can live without

    def _denials_came(self, nodes: tuple[NodeId, ...], source: ControlLink) -> None:
        if not self._closed:
            self.denied(nodes, source)

    def dial_refused(self, node: NodeId) -> None:
        self._driver.post(gossip.DialRefused(node))

    def refused(self, error: PeerRefused, theirs: str) -> None:
        self._showing.refused(error, theirs)

    def believed_alive(self, node: NodeId) -> tuple[str, ...]:
        member = self._swim.members.get(node)
        alive = member is not None and member.state is PeerState.ALIVE
        return member.addresses if member is not None and alive else ()

    # -- orders of the membership machine ---------------------------------------------------------

    def _run(self, effect: gossip.Effect) -> None:
        match effect:
            case gossip.Send():
                member = self._swim.members.get(effect.to)
                addresses = member.addresses if member is not None else ()
                self.linking.send(effect.to, message_to_wire(effect.message), addresses)
            case gossip.StateSelf():
                self._restate(effect.incarnation)
            case gossip.MemberChanged():
                self._member_changed(effect)
            case gossip.AdvertNewer():
                self.telling.want(effect.node, effect.version, effect.source)
            case gossip.RoundTrip():
                self._showing.round_trip(effect.node, effect.seconds)
            case gossip.SelfImpersonated():
                log.warning(
                    "somebody else speaks with this node's key (a copied data directory?); stop "
                    "one of the two and give it a data directory of its own"
                )
            case _:
                assert_never(effect)

    def _member_changed(self, change: gossip.MemberChanged) -> None:
        name = self._showing.name_of(change.node)
        log.info(
            "node %s: %s -> %s (%s)",
            name, change.old or "unknown", change.new or "forgotten", change.why,
        )  # fmt: skip
        if change.new is None:
            self.telling.forget(change.node)
            self._showing.forget(change.node)
        elif change.new is PeerState.ALIVE and not self._had_company:
            # The first one is kept at once, the others now and then: a crowd that arrives together
            # would be a write to the disk for each pair of nodes.
            self._had_company = True
            self._needs.spawn(self.remember())
        elif change.new is PeerState.DEAD:
            self.linking.doubt(change.node)
        self._showing.within(AT_ONCE_S)

    # -- statements of our own --------------------------------------------------------------------

    def _advert_is_newer(self, version: int) -> None:
        self._state(self._statement.incarnation, version)

    def _restate(self, incarnation: int) -> None:
        self._state(max(incarnation, self._statement.incarnation), self.telling.version)

    def addresses_changed(self) -> None:
        """Where this node is reached has changed: say so as a new statement."""
        if self._addresses() != self._statement.addresses:
            self._restate(self._statement.incarnation + 1)

    def _state(self, incarnation: int, version: int) -> None:
        self._statement = self._signed(incarnation, version)
        self._driver.post(gossip.SelfStated(self._statement))

    def _signed(self, incarnation: int, version: int) -> Alive:
        addresses = self._addresses()
        return self.trust.sign_alive(incarnation, version, addresses, left=self._leaving)

    def _checked(self, message: Message) -> Message:
        """`message` without statements that their nodes did not sign, or that are denied."""
        if isinstance(message, gossip.Digest):
            return message
        kept = tuple(
            u for u in message.updates if not isinstance(u, Alive) or self.trust.is_genuine(u)
        )
        if len(kept) == len(message.updates):
            return message
        return replace(message, updates=kept)

    # -- views ------------------------------------------------------------------------------------

    def _view_changed(self, view: View) -> None:
        if self._closed:
            return
        if self._look_timer is not None:  # what is urgent does not wait for what is not
            self._look_timer.cancel()
            self._look_timer = None
        again_s = self.telling.look(view)
        if again_s is not None:
            self._look_timer = asyncio.get_running_loop().call_later(again_s, self._look_again)

    def _others_changed(self, urgent: bool) -> None:
        self._showing.within(AT_ONCE_S if urgent else SLOTS_S)

    def _look_again(self) -> None:
        self._look_timer = None
        self._view_changed(self._needs.board.current)
