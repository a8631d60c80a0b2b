"""A member that admits others: a real listener and join desk, no daemon around them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from meshd.ids import NodeId
from meshd.kernel import Pool
from meshd.peers.joining.invite_book import InviteBook
from meshd.peers.joining.invites import Invite
from meshd.peers.joining.join_desk import JoinDesk
from meshd.peers.joining.joining import join
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.listener import PeerListener, Speakers
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.denylist import DenyList
from meshd.peers.trust.identity import Identity, load_or_create
from meshd.peers.trust.membership import Grant, Membership, authenticate
from meshd.peers.trust.tls import server_context
from meshd.peers.trust.wire import KnownPeer
from meshd.view import Role


def new_node(directory: Path, name: str) -> tuple[Identity, MeshStore]:
    """A node with a data directory of its own, in no mesh yet."""
    data_dir = directory / name
    data_dir.mkdir(exist_ok=True)
    identity = load_or_create(data_dir)
    return identity, MeshStore(data_dir / "mesh", identity)


class Newcomer:
    """A node in no mesh that holds an invite."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.identity, self.store = new_node(directory, name)

    @property
    def id(self) -> NodeId:
        return self.identity.node_id

    async def ask(self, invite: Invite, timeout_s: float = 5.0) -> Grant:
        return await join(invite, self.identity, self.name, timeout_s=timeout_s)

    async def join(self, invite: Invite) -> Membership:
        return self.store.install(await self.ask(invite))


class Reception:
    """The peer port of one member. Serves what is not joining with a greeting of its own."""

    def __init__(self, name: str, identity: Identity, store: MeshStore, pool: Pool) -> None:
        membership = store.load()
        assert membership is not None
        self.name = name
        self.identity = identity
        self.store = store
        self.membership = membership
        self.denied: DenyList = store.deny_list(membership)
        self.book = InviteBook(store.invites_path)
        self.book.load()
        self.admitted: list[tuple[NodeId, str, Role]] = []
        self.members: tuple[KnownPeer, ...] = ()
        self.heard: list[tuple[str | None, PeerCertificate]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.bugs: list[BaseException] = []
        """What came out of serving somebody; the daemon would end by it."""
        self.desk = JoinDesk(
            lambda: self.membership,
            name,
            self.book if membership.issuer else None,
            self.denied,
            members=lambda: (self.known(), *self.members),
            admitted=lambda *who: self.admitted.append(who),
            run=pool.run,
        )
        self.listener = PeerListener("127.0.0.1", 0)
        self.port = self.listener.bind()

    @property
    def id(self) -> NodeId:
        return self.identity.node_id

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def known(self) -> KnownPeer:
        return KnownPeer(node_id=self.id, name=self.name, addresses=(self.address,))

    async def start(self) -> Reception:
        self.context = server_context(self.membership, self.identity)
        speakers = Speakers(self._authenticate, self.desk.serve, self._greet, self._greet)
        await self.listener.start(self.context, speakers, self._spawn)
        return self

    async def stop(self) -> None:
        self.listener.close()
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert self.bugs == []

    async def idle(self) -> None:
        """Until nobody is being served any more."""
        async with asyncio.timeout(10):
            while self.tasks:
                await asyncio.wait(self.tasks)

    def invite(self, **wanted: Any) -> Invite:
        asked: dict[str, Any] = {"ttl_s": 600.0, "uses": 1, "role": Role.MEMBER, "issuer": False}
        asked |= {"addresses": (self.address,)} | wanted
        return self.book.issue(self.membership, **asked)

    def _authenticate(self, certificate: bytes) -> PeerCertificate:
        return authenticate(certificate, self.membership, self.denied)

    async def _greet(self, channel: FrameChannel, certificate: PeerCertificate) -> None:
        self.heard.append((channel.alpn, certificate))
        channel.send({"t": "welcome", "alpn": channel.alpn})
        channel.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=f"{self.name}:peer")
        self.tasks.add(task)
        task.add_done_callback(self._served)
        return task

    def _served(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.bugs.append(error)
