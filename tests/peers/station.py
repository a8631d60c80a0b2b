"""Nodes of one mesh in one process: real sessions, TLS and sockets, no daemon around them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from meshd.config import Config, PeerSettings
from meshd.election.deployments import DeploymentBook, Rejected, Written
from meshd.election.sharing import SharedDeployments
from meshd.ids import InstanceId, ModelId, NodeId
from meshd.kernel import Board, FlightRecorder, MonotonicClock, Pool
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.listener import PeerListener, Speakers
from meshd.peers.links.streams import Open
from meshd.peers.needs import Needs, nothing_in_bulk, nothing_to_lend
from meshd.peers.session import Session
from meshd.peers.trust.authority import Authority
from meshd.peers.trust.certificates import certificate_der, make_csr
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import load_or_create
from meshd.peers.trust.membership import Grant, Membership
from meshd.peers.trust.trust import Trust
from meshd.view import (
    Deployment,
    HostView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerView,
    ProofView,
    Role,
    RuntimeView,
    Target,
    View,
    with_local,
)


class EchoBack(asyncio.Protocol):
    """What a stream to the api reaches here: says the peer's name, then everything again."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # no subclass of it under TLS
        self.transport.write(f"{self.peer}:".encode())

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


class Station:
    """One node. `join(other)` makes it a member of `other`'s mesh without the joining protocol.
    `host`: where it listens."""

    def __init__(
        self, name: str, directory: Path, pool: Pool, *, host: str = "127.0.0.1", **peers: Any
    ) -> None:
        self.name = name
        self.host = host
        self.directory = directory / name
        self.directory.mkdir(exist_ok=True)
        self.identity = load_or_create(self.directory)
        self.config = Config(
            name=name,
            data_dir=self.directory,
            cache_dir=self.directory,
            peer_listen=f"{host}:0",
            peers=PeerSettings(**peers),
        )
        self.store = MeshStore(self.config.mesh_dir, self.identity)
        self.pool = pool
        node = NodeView(self.identity.node_id, name, "0", "member", NodeState.READY, 0.0, "", None)
        self.board = Board(View(node=node))
        self.tasks: set[asyncio.Task[None]] = set()
        self.listener = PeerListener(self.host, 0)
        self.recorder = FlightRecorder()
        self.served: list[EchoBack] = []
        self.joined: list[FrameChannel] = []
        self.port = 0
        self.carrier: tuple[str, ...] = ()
        self.serve_bulk: Callable[[NodeId, Open], dict[str, Any]] = nothing_in_bulk
        self.serve_loan: Callable[[NodeId, str], asyncio.Protocol] = nothing_to_lend
        self.bulk_losses = 0
        """How often its carrier took streams with it."""
        self.deployments = DeploymentBook()

    @property
    def id(self) -> NodeId:
        return self.identity.node_id

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def found(self, mesh: str = "home") -> Membership:
        return self.store.found(mesh)

    def join(self, issuer: Station, role: Role = Role.MEMBER) -> Membership:
        authority = issuer.session.trust.membership.authority
        assert authority is not None
        return self.admitted_by(authority, role)

    def admitted_by(self, authority: Authority, role: Role = Role.MEMBER) -> Membership:
        pem = authority.sign(make_csr(self.identity), role, time.time())
        grant = Grant(authority.ca_certificate, certificate_der(pem), role)
        return self.store.install(grant)

    async def start(self, *seeds: str, port: int = 0) -> Station:
        membership = self.store.load()
        assert membership is not None
        trust = Trust(membership, self.identity, self.store, self.pool)
        self.listener = PeerListener(self.host, port)
        self.port = self.listener.bind()
        needs = Needs(
            config=self.config,
            board=self.board,
            clock=MonotonicClock(),
            rng=random.Random(str(self.directory)),
            recorder=self.recorder,
            spawn=self.spawn,
            inflight=lambda _: 0,
            serve_api=self._serve,
            carrier=self.carrier,
            serve_bulk=self._serve_bulk,
            bulk_lost=self._bulk_lost,
            serve_loan=lambda node, name: self.serve_loan(node, name),  # noqa: PLW0108 (as it is then)
            deployments=SharedDeployments(self.deployments, self._show_deployments),
        )
        role = membership.role
        self.session = Session(trust, role, self.store.next_start(), needs, lambda: (self.address,))
        speakers = Speakers(
            trust.authenticate,
            self._join,
            self.session.linking.serve,
            self.session.serving.raw,
            self.session.serving.take_bulk,
        )
        await self.listener.start(trust.server_context(), speakers, self.spawn)
        self.session.start()
        for seed in seeds:
            self.session.linking.propose(seed, asked=True)
        return self

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=f"{self.name}:work")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def stop(self, *, goodbye: bool = True) -> None:
        """End it; without `goodbye` the way a killed process ends: every connection is reset."""
        if goodbye:
            self.session.leave()
            await asyncio.sleep(0.05)
        else:
            for link in self.session.linking.links:
                link.drop()
        self.session.close()
        self.listener.close()
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # -- what it shows ----------------------------------------------------------------------------

    def serve_model(self, name: str = "m", slots: int = 2) -> None:
        model = ModelId(name)
        instance = InstanceId(f"~{self.name}")
        ready = ModelView(
            id=model,
            ref=name,
            state=ModelState.READY,
            hosts=(HostView(self.name, self.id, 1, ModelState.READY, 512, slots, slots),),
            targets=(Target(model, self.name, instance, "/run/x", slots),),
        )
        self.board.publish(with_local(self.board.current, {model: ready}))

    def prove(self, backend: str, problem: str | None = None) -> None:
        """As the prover publishes it."""
        proof = ProofView("runtime", problem is None, time.time(), ("seen",), problem=problem)
        runtime = RuntimeView("e", backend, "0.5", None, "/e", (), proof, built_for="cuda")
        self.board.publish(replace(self.board.current, runtime=runtime))

    def deploy(self, name: str, *, tell: bool = True, **options: Any) -> Deployment:
        """Write a deployment here; without `tell` as if all that was sent of it was lost."""
        written = self.deployments.load(ModelId(name), f"owner/{name}", self.id, **options)
        return self._deployed(written, tell)

    def undeploy(self, name: str, *, tell: bool = True) -> Deployment:
        return self._deployed(self.deployments.unload(ModelId(name), self.id), tell)

    def _deployed(self, written: Written | Rejected, tell: bool) -> Deployment:
        assert isinstance(written, Written), written
        self._show_deployments((written.record,))
        if tell:
            self.session.deploying.spread((written.record.model,))
        return written.record

    def _show_deployments(self, _: tuple[Deployment, ...]) -> None:
        self.board.publish(replace(self.board.current, deployments=self.deployments.records))

    def set_state(self, state: NodeState) -> None:
        view = self.board.current
        self.board.publish(replace(view, node=replace(view.node, state=state)))

    def peer(self, other: Station) -> PeerView | None:
        return next((p for p in self.board.current.peers if p.id == other.id), None)

    def targets(self, name: str = "m") -> tuple[Target, ...]:
        model = self.board.current.models.get(ModelId(name))
        return () if model is None else model.targets

    async def heard_by(self, other: Station, deadline_s: float = 20.0) -> None:
        """Until `other` has dealt with all that was sent on the link to it: frames keep order."""
        async with asyncio.timeout(deadline_s):
            while True:
                link = self.session.linking.links.get(other.id)
                if link is not None and await self.session.linking._answers(link):
                    return
                await asyncio.sleep(0.02)

    async def until(
        self, condition: Callable[[], object], what: str, deadline_s: float = 10.0
    ) -> None:
        """Until `condition` holds, looked at whenever this node's view changes."""
        changed = asyncio.Event()
        unsubscribe = self.board.subscribe(lambda _: changed.set())
        try:
            async with asyncio.timeout(deadline_s):
                while not condition():
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"{self.name}: not within {deadline_s} s: {what}\n{self.board.current.mesh}\n"
                f"{self.board.current.peers}\n{self.recorder.render()[-4000:]}"
            ) from None
        finally:
            unsubscribe()

    def _serve(self, peer: str) -> asyncio.Protocol:
        protocol = EchoBack(peer)
        self.served.append(protocol)
        return protocol

    def _bulk_lost(self) -> None:
        self.bulk_losses += 1

    def _serve_bulk(self, node: NodeId, wanted: Open) -> dict[str, Any]:
        return self.serve_bulk(node, wanted)

    async def _join(self, channel: FrameChannel) -> None:
        self.joined.append(channel)
        channel.close()
