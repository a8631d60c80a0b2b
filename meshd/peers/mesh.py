"""This node's place in a mesh: founding, joining, being a member, leaving.

Nothing here delays serving. A node that joins serves what it has meanwhile; one that cannot reach
its mesh keeps trying, with the reason in `meshd status`; only a mesh that says no for good to a
node that was started to join it ends the daemon, with the mesh's own words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final, Protocol

from meshd.config import Config
from meshd.errors import (
    BadConfig,
    InvalidRequest,
    JoinRefused,
    MeshdError,
    NoMesh,
    NotIssuer,
    PeerUnreachable,
)
from meshd.ids import MeshId, ModelId, NodeId
from meshd.kernel import Pool, Service
from meshd.peers.bulk.handover import credentials_of
from meshd.peers.bulk.words import Credentials
from meshd.peers.joining.invite_book import InviteBook
from meshd.peers.joining.invites import Invite, encode_invite
from meshd.peers.joining.join_desk import JoinDesk
from meshd.peers.joining.joining import join
from meshd.peers.lan.addresses import advertised_addresses
from meshd.peers.lan.sightings import Sightings
from meshd.peers.links.listener import PeerListener, Speakers
from meshd.peers.links.streams import Open
from meshd.peers.naming import resolve_node
from meshd.peers.needs import Needs
from meshd.peers.session import Session
from meshd.peers.showing import publish
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import Identity
from meshd.peers.trust.membership import Grant, Membership
from meshd.peers.trust.trust import Trust
from meshd.peers.trust.wire import KnownPeer
from meshd.peers.wishes import Wishes, check_wishes, read_wishes
from meshd.view import MeshState, MeshView, Role, Target

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S: Final = 10.0
JOIN_RETRY_MIN_S: Final = 1.0
JOIN_RETRY_MAX_S: Final = 30.0
GOODBYE_S: Final = 0.25
"""From the last words of a leaving node to the end of its links."""
LOOK_S: Final = 15.0
"""How often the addresses of this machine and the age of the certificate are looked at."""
REMEMBER_S: Final = 60.0


class Announcer(Protocol):
    """Discovery, as far as it is told what to do from here."""

    def set_identity(
        self,
        mesh_id: MeshId,
        mesh_name: str,
        node_id: NodeId,
        name: str,
        port: int,
        addresses: tuple[str, ...],
    ) -> None: ...

    def look_for(self, mesh_id: MeshId | None, mesh_name: str) -> None: ...

    def rest(self) -> None: ...


class MeshService(Service):
    """`prepare` before `start`: it opens the peer port and refuses what cannot work."""

    name = "mesh"
    stop_limit_s = 5.0

    def __init__(
        self,
        identity: Identity,
        needs: Callable[[Service], Needs],
        pool: Pool,
        discovery: Announcer,
    ) -> None:
        super().__init__()
        self._identity = identity
        self._needs = needs(self)
        self._config: Config = self._needs.config
        self._pool = pool
        self._discovery = discovery
        self._store = MeshStore(self._config.mesh_dir, identity)
        self._listener = PeerListener(*self._config.peer_listen_address)
        self._port = 0
        self._wishes = Wishes((), (), ())
        self._membership: Membership | None = None
        self._session: Session | None = None
        self._sightings = Sightings()
        self._addresses: tuple[str, ...] = ()
        self._invites: InviteBook | None = None
        self._lifetime: set[asyncio.Task[None]] = set()
        self._expects_others = False

    # -- before the start -------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read what is on disk and asked for, and open the port. Blocking; writes nothing.

        Raises BadInvite, BadConfig, JoinRefused, AddressInUse.
        """
        self._wishes = read_wishes(self._config.join)
        self._membership = self._store.load()
        self._expects_others = self._store.had_others or bool(self._wishes.invites)
        check_wishes(self._wishes, self._membership, self._store.had_others, self._config.mesh)
        if self.client and self._config.model:
            raise BadConfig("a client node hosts no models; leave --model out", param="model")
        self._port = self._listener.bind()
        self._look_at_addresses()

    @property
    def client(self) -> bool:
        """Whether this node only uses the mesh: it was told so, or admitted as no more."""
        mine, invites = self._membership, self._wishes.invites
        if self._config.client or (mine is not None and mine.role is Role.CLIENT):
            return True
        return mine is None and bool(invites) and all(i.role is Role.CLIENT for i in invites)

    @property
    def peer_listen(self) -> str:
        host, _ = self._config.peer_listen_address
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"

    # -- service ----------------------------------------------------------------------------------

    async def main(self) -> None:
        try:
            await self._enter()  # a join goes on behind it
            self.ready.set()
            await self.stopping.wait()
        finally:
            await self._exit()

    async def _enter(self) -> None:
        mine = self._membership
        new = [i for i in self._wishes.invites if mine is None or i.mesh_id != mine.mesh_id]
        if new:
            self._show(MeshState.JOINING, f"joining `{new[0].mesh_name}`", new[0].mesh_name)
            self._discovery.look_for(new[0].mesh_id, new[0].mesh_name)
            self.spawn(self._join(tuple(new)), name="join")
            return
        if mine is None:
            role = Role.CLIENT if self._config.client else Role.MEMBER
            mine = await self._pool.run(self._store.found, self._config.mesh, role)
            log.info("founded mesh `%s` (%s)", mine.mesh_name, mine.mesh_id[:8])
        await self._begin(mine)

    async def _exit(self) -> None:
        session = self._session
        if session is not None:
            session.leave()
            await session.remember()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(GOODBYE_S)
        self._end_session()
        self._listener.close()

    # -- joining ----------------------------------------------------------------------------------

    async def _join(self, invites: tuple[Invite, ...]) -> None:
        pause_s = JOIN_RETRY_MIN_S
        refused: dict[int, MeshdError] = {}
        while True:
            for number, invite in enumerate(invites):
                if number in refused:
                    continue
                try:
                    grant = await self._ask(invite)
                    membership = await self._pool.run(self._store.install, grant)
                except JoinRefused as error:
                    refused[number] = error
                except MeshdError as error:
                    log.warning("cannot join `%s` yet: %s", invite.mesh_name, error.message)
                    self._show(MeshState.JOINING, error.message, invite.mesh_name)
                else:
                    log.info("joined mesh `%s` as %s", invite.mesh_name, grant.role.value)
                    await self._begin(membership)
                    return
            if len(refused) == len(invites):
                raise next(iter(refused.values()))
            # Discovery looks for one mesh at a time: that of the first invite.
            await self._sightings.pause(
                invites[0].mesh_id, pause_s * (0.5 + self._needs.rng.random())
            )
            pause_s = min(JOIN_RETRY_MAX_S, 2 * pause_s)

    async def _ask(self, invite: Invite) -> Grant:
        def attempt(also: tuple[str, ...]) -> Coroutine[None, None, Grant]:
            return join(
                invite, self._identity, self._config.name, timeout_s=JOIN_TIMEOUT_S, also=also
            )

        return await self._sightings.heeding(invite.mesh_id, attempt)

    # -- being a member ---------------------------------------------------------------------------

    async def _begin(self, membership: Membership) -> None:
        self._membership = membership
        starts = await self._pool.run(self._store.next_start)
        trust = await self._pool.run(Trust, membership, self._identity, self._store, self._pool)
        role = Role.CLIENT if self.client else Role.MEMBER
        session = Session(trust, role, starts, self._needs, lambda: self._addresses)
        self._session = session
        desk = await self._desk(trust, session)
        await self._listener.start(
            trust.server_context(),
            Speakers(
                trust.authenticate,
                desk.serve,
                session.linking.serve,
                session.serving.raw,
                session.serving.take_bulk,
            ),
            lambda work: self.spawn(work, name="peer"),
        )
        session.start()
        invited = (i for i in self._wishes.invites if i.mesh_id == membership.mesh_id)
        for address in (*self._wishes.addresses, *(a for i in invited for a in i.addresses)):
            session.linking.propose(address, asked=True)
        for peer in await self._pool.run(self._store.remembered):
            for address in peer.addresses:
                session.linking.propose(address)
        for sighting in self._sightings:
            self._propose(*sighting)
        self._tell_discovery()
        self._lifetime.add(self.spawn(self._look_after(session), name="look after"))

    async def _desk(self, trust: Trust, session: Session) -> JoinDesk:
        self._invites = None
        if trust.membership.authority is not None:
            self._invites = InviteBook(self._store.invites_path)
            await self._pool.run(self._invites.load)

        def admitted(node: NodeId, name: str, role: Role) -> None:
            log.info("admitted %s (%s) as %s", name, node[:8], role.value)

        def members() -> tuple[KnownPeer, ...]:
            own = KnownPeer(
                node_id=self._identity.node_id, name=self._config.name, addresses=self._addresses
            )
            return (own, *session.known_peers())

        return JoinDesk(
            lambda: trust.membership,
            self._config.name,
            self._invites,
            trust.denied,
            members=members,
            admitted=admitted,
            run=self._pool.run,
        )

    def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        for task in self._lifetime:
            task.cancel()
        self._lifetime.clear()
        self._listener.stop()

    async def _look_after(self, session: Session) -> None:
        """Now and then: own addresses, the certificate's age, where the others are."""
        remembered_at = self._needs.clock.now()
        while True:
            await asyncio.sleep(LOOK_S)
            if await self._pool.run(self._look_at_addresses):
                session.addresses_changed()
                self._tell_discovery()
            await session.renewing.look(list(session.linking.links))
            now = self._needs.clock.now()
            if now - remembered_at >= REMEMBER_S:
                remembered_at = now
                await session.remember()

    def _look_at_addresses(self) -> bool:
        """Whether other nodes should be told other addresses than before."""
        host, _ = self._config.peer_listen_address
        before = self._addresses
        self._addresses = advertised_addresses(host, self._port, self._config.advertise)
        return self._addresses != before

    def _tell_discovery(self) -> None:
        mine = self._membership
        if mine is not None and self._session is not None:
            self._discovery.set_identity(
                mine.mesh_id,
                mine.mesh_name,
                self._identity.node_id,
                self._config.name,
                self._port,
                self._addresses,
            )

    # -- asked by other rooms ---------------------------------------------------------------------

    def found_on_lan(
        self, node: NodeId, mesh: MeshId, mesh_name: str, addresses: tuple[str, ...]
    ) -> None:
        """Discovery saw a node. It only proposes."""
        self._sightings.add(mesh, node, addresses)
        self._propose(mesh, node, addresses)

    def _propose(self, mesh: MeshId, node: NodeId, addresses: tuple[str, ...]) -> None:
        session, mine = self._session, self._membership
        if session is None or mine is None or mesh != mine.mesh_id:
            return
        if node != self._identity.node_id and session.linking.links.get(node) is None:
            for address in addresses[:4]:
                session.linking.propose(address)

    async def connect_remote(
        self, target: Target, make_protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Protocol:
        """For the api: a stream to that engine on its node. Raises PeerUnreachable, PeerRefused."""
        if self._session is None:
            raise PeerUnreachable("this node belongs to no mesh any more")
        return await self._session.connect(target, make_protocol)

    async def open_stream(
        self,
        node: NodeId,
        name: str,
        wanted: Open,
        make_protocol: Callable[[], asyncio.Protocol],
    ) -> asyncio.Protocol:
        """A raw stream to `node`, which errors call `name`. Raises PeerUnreachable, PeerRefused."""
        if self._session is None:
            raise PeerUnreachable("this node belongs to no mesh any more")
        return await self._session.open_stream(node, name, wanted, make_protocol)

    def deployed(self, models: Collection[ModelId]) -> None:
        """Their deployments were written here: tell the others. Who links up later finds out by
        the digest of the table."""
        if self._session is not None:
            self._session.deploying.spread(models)

    @property
    def expects_others(self) -> bool:
        """Whether the mesh is known to have other members: it was joined, or had some before."""
        return self._expects_others

    def gossip_bytes(self) -> tuple[int, int]:
        return (0, 0) if self._session is None else self._session.gossip_bytes()

    def bulk_credentials(self) -> Credentials | None:
        """For a process that opens bulk streams; None while this node is in no mesh."""
        return None if self._session is None else credentials_of(self._session.trust)

    def bulk_peers(self) -> tuple[KnownPeer, ...]:
        """The nodes that may be asked for weights."""
        return () if self._session is None else self._session.bulk_peers()

    def expect_bulk(self) -> None:
        """Another node is about to open a bulk stream here."""
        if self._session is not None:
            self._session.serving.expect_bulk()

    def bulk_bytes(self) -> tuple[int, int]:
        """(received, sent) by bulk streams other nodes opened here, those that are over."""
        if self._session is None:
            return (0, 0)
        received, sent = self._session.serving.bulk.bytes_carried
        return received, sent

    # -- commands ---------------------------------------------------------------------------------

    async def invite(self, *, ttl_s: float, uses: int, role: Role, issuer: bool) -> dict[str, Any]:
        """A token for `meshd run --join`. Raises NoMesh, NotIssuer, InvalidRequest."""
        mine = self._issuing()
        if issuer and role is Role.CLIENT:
            raise InvalidRequest("a client cannot be an issuer; leave one of the two out")
        assert self._invites is not None
        invite = await self._pool.run(
            self._invites.issue,
            mine,
            ttl_s=ttl_s,
            uses=uses,
            role=role,
            issuer=issuer,
            addresses=self._addresses,
        )
        token = encode_invite(invite)
        return {
            "token": token,
            "expires_at": invite.expires_at,
            "command": f"meshd run --join {token}",
        }

    async def revoke(self, name: str) -> dict[str, Any]:
        """Put a node on the deny list, for good. Raises NoMesh, NotIssuer, NotFound."""
        self._issuing()
        session = self._session
        assert session is not None
        node = resolve_node(name, self._needs.board.current.peers)
        if node == self._identity.node_id:
            raise InvalidRequest("a node cannot revoke itself; `meshd leave` leaves the mesh")
        known = next((p.name for p in self._needs.board.current.peers if p.id == node), node[:8])
        await session.trust.deny(node)
        session.denied((node,))
        return {"node": known, "id": node}

    async def leave(self) -> dict[str, Any]:
        """Leave the mesh for good: its certificate and keys are gone from the data directory."""
        session, mine = self._session, self._membership
        if session is None or mine is None:
            raise NoMesh("this node belongs to no mesh")
        session.leave()
        await asyncio.sleep(GOODBYE_S)
        self._end_session()
        self._discovery.rest()
        await self._pool.run(self._store.remove)
        self._membership = None
        log.info("left mesh `%s`", mine.mesh_name)
        self._show(MeshState.NONE, "left; `meshd run --join TOKEN` joins a mesh again", "")
        return {"mesh": mine.mesh_name}

    def _issuing(self) -> Membership:
        mine, session = self._membership, self._session
        if mine is None or session is None:
            raise NoMesh("this node belongs to no mesh yet; see `meshd status`")
        if mine.authority is None:
            raise NotIssuer(
                "this node does not hold the mesh's key; run the command on the node that founded "
                "the mesh, or on one that joined with `meshd invite --issuer`"
            )
        return mine

    def _show(self, state: MeshState, reason: str, mesh_name: str) -> None:
        mesh = MeshView(id=None, name=mesh_name, state=state, reason=reason)
        publish(self._needs.board, self._config.name, mesh, ())
