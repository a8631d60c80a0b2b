"""The rooms of a node: made, wired to each other, started in order.

This is where rooms meet; none knows another. What is slow to import is imported when it is needed,
in a thread: the API listens before any of it.
"""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from meshd.config import Config
from meshd.errors import GpuRequired
from meshd.ids import ModelId
from meshd.kernel import Board, Clock, FlightRecorder, Pool, ServiceStack
from meshd.node.survey import Survey
from meshd.node.usage import LateUsage
from meshd.view import Preparing, Role, Target, View

if TYPE_CHECKING:
    from meshd.api import ApiServer
    from meshd.api.admin import AdminServer, MeshControls
    from meshd.cache.room import CacheRoom
    from meshd.election.room import ElectionRoom
    from meshd.node.borrowing import Borrowing
    from meshd.node.lending import Lending
    from meshd.node.placing import Placing
    from meshd.peers.lan.discovery import Discovery
    from meshd.peers.mesh import MeshService
    from meshd.peers.trust.identity import Identity
    from meshd.runtime.host import ModelHost
    from meshd.runtime.proof.prover import Prover
    from meshd.runtime.registry import Registry

_MODEL_ROOMS = (
    "meshd.cache.room",
    "meshd.election.room",
    "meshd.peers.trust.identity",
    "meshd.runtime.host",
    "meshd.runtime.proof.prover",
    "meshd.runtime.registry",
)
_MESH_ROOMS = (
    "meshd.node.borrowing",
    "meshd.node.lending",
    "meshd.cache.offering",
    "meshd.cache.service",
    "meshd.peers.lan.discovery",
    "meshd.peers.mesh",
)
_COMMAND_ROOMS = ("meshd.api.admin", "meshd.cache.commanding")
"""Not before the first engines are on their way: none of them waits for a command."""


def set_node(board: Board[View], **changes: object) -> None:
    """Publish what changed of this node itself."""
    view = board.current
    board.publish(replace(view, node=replace(view.node, **changes)))  # type: ignore[arg-type]


class Rooms:
    """Those of one node; `start` is called once."""

    def __init__(
        self,
        config: Config,
        board: Board[View],
        *,
        clock: Clock,
        rng: random.Random,
        recorder: FlightRecorder,
    ) -> None:
        self._config = config
        self._board = board
        self._clock = clock
        self._rng = rng
        self._recorder = recorder
        self._pool = Pool("work", workers=2)
        self._drivers = Pool("drivers", workers=2)
        self._records = Pool("records", workers=2)
        """Of the election: a claim waits for the disk, and must not for a walk through a cache."""
        self._tensors = Pool("tensors", workers=4)
        """Of loans: each may read a model's weights."""
        self._cache: CacheRoom | None = None
        self._models: ModelHost | None = None
        self._prover: Prover | None = None
        self._mesh: MeshService | None = None
        self._survey: Survey | None = None
        self._placing: Placing
        self._lending: Lending
        self._borrowing: Borrowing
        self.usage = LateUsage()
        """Told of requests, from the first one on."""

    async def start(self, stack: ServiceStack, api: ApiServer, controls: MeshControls) -> None:
        """Who asks the others first must know of them: models are placed when the mesh is there."""
        config = self._config
        await self._import(_MODEL_ROOMS)
        from meshd.peers.trust.identity import load_or_create
        from meshd.runtime.orphans import end_orphans

        await self._pool.run(end_orphans, config.run_dir)
        identity = await self._pool.run(load_or_create, config.data_dir)
        set_node(self._board, id=identity.node_id)
        cache = self._cache = await self._pool.run(self._make_cache)
        await self._import(_MESH_ROOMS)
        self._make_loans(cache)
        self._placing = self._make_placing(cache)
        election = self.usage.room = await self._pool.run(
            lambda: self._placing.make(
                clock=self._clock, recorder=self._recorder, pool=self._records
            )
        )
        mesh, discovery = self._make_mesh(api, identity, election)
        await self._pool.run(mesh.prepare)
        role = Role.CLIENT if mesh.client else Role.MEMBER
        set_node(self._board, peer_listen=mesh.peer_listen, role=role.value)
        await self._start_models(stack, api, election, hosts=not mesh.client)
        from meshd.cache.service import CacheService

        await stack.start(CacheService(cache, self._board))
        assert self._prover is not None, "made with the models"
        survey = Survey(self._config, self._board, self._pool, self._prover.listing)
        self._survey = survey
        await stack.start(survey)
        await stack.start(self._lending)
        await stack.start(mesh)
        await stack.start(election)
        await self._import(_COMMAND_ROOMS)
        await stack.start(self._make_admin(api, controls))
        await stack.start(discovery)

    async def _import(self, modules: tuple[str, ...]) -> None:
        # In a thread, so that the API answers while all this is read from disk and compiled.
        await self._pool.run(lambda: [importlib.import_module(module) for module in modules])

    async def _start_models(
        self, stack: ServiceStack, api: ApiServer, election: ElectionRoom, *, hosts: bool
    ) -> None:
        from meshd.runtime import host
        from meshd.runtime.hosting_events import WeightFacts
        from meshd.runtime.registry import Registry

        config, cache = self._config, self._cache
        registry = Registry(config.cache_dir)
        assert cache is not None, "models are started after the cache"

        async def prepare(ref: str, moved: Callable[[Preparing], None]) -> WeightFacts:
            weights = await cache.prepare(ref, moved)
            return WeightFacts(
                first_shard=str(weights.first_shard),
                total_bytes=weights.total_bytes,
                trained_context=weights.trained_context,
                capabilities=weights.capabilities,
                digest=weights.digest,
                created_at=weights.created_at,
                mmproj=None if weights.mmproj is None else str(weights.mmproj),
            )

        prover = self._prover = self._make_prover(registry)
        models = self._models = host.ModelHost(
            config,
            self._board,
            host.Rooms(
                find_engine=lambda: registry.find(config.runtime_dir),
                prepare=prepare,
                identify=cache.identify,
                wait_idle=api.wait_idle,
                last_request_at=api.last_request_at,
                always_listed=self._loadable if hosts else dict,
                shown=prover.engine_found,
                hosts=hosts,
                changed=election.look_again,
                borrow=self._borrowing.borrow,
            ),
            clock=self._clock,
            rng=self._rng,
            recorder=self._recorder,
            pool=self._pool,
        )
        await stack.start(models)
        if config.require_gpu:
            if not hosts:
                raise GpuRequired("--require-gpu: a client node hosts nothing; leave it out")
            await prover.require_gpu()
        await stack.start(prover)

    def _loadable(self) -> Mapping[ModelId, str]:
        """What a request may ask for, if that is enough to load it; else what every node has."""
        builtin = {ModelId("builtin"): "builtin"}
        if not self._config.on_demand:
            return builtin
        return {**{w.model: w.ref for w in self._board.current.weights}, **builtin}

    def _make_loans(self, cache: CacheRoom) -> None:
        from meshd.node.borrowing import Borrowing
        from meshd.node.lending import Lending

        self._borrowing = Borrowing(self._board, cache, self.joined, clock=self._clock)
        self._lending = Lending(
            self._config,
            self._board,
            cache,
            lambda: self._placing.room,
            expect_tunnel=lambda: self.joined().expect_bulk(),
            rng=self._rng,
            pool=self._tensors,
        )

    def _make_placing(self, cache: CacheRoom) -> Placing:
        from meshd.node.placing import Placing

        def models() -> ModelHost:
            assert self._models is not None, "started before the election"
            return self._models

        return Placing(
            self._config,
            self._board,
            cache,
            models=models,
            mesh=self.joined,
            lending=self._lending,
            borrowing=self._borrowing,
            look_at_devices=lambda: self._survey.look_now() if self._survey else None,
        )

    def _make_prover(self, registry: Registry) -> Prover:
        from meshd.cache.builtin import ensure
        from meshd.runtime.proof.looks import real_looks
        from meshd.runtime.proof.prover import Prover

        config = self._config
        return Prover(
            config,
            self._board,
            real_looks(lambda: ensure(config.models_dir), self._drivers, self._rng),
            pool=self._drivers,
            clock=self._clock,
            find=lambda: registry.find(config.runtime_dir),
            serving=lambda: self._models.serving_pids() if self._models else frozenset(),
        )

    def _make_cache(self) -> CacheRoom:
        from meshd.cache.room import CacheRoom
        from meshd.node.neighbours import MeshNeighbours
        from meshd.runtime.process import guarded

        cache = CacheRoom(
            self._config,
            self._pool,
            guarded=guarded,
            neighbours=MeshNeighbours(self._board, lambda: self._mesh),
            in_use=lambda: self._models.weights_in_use() if self._models else frozenset(),
        )
        cache.recover()
        return cache

    def _make_mesh(
        self, api: ApiServer, identity: Identity, election: ElectionRoom
    ) -> tuple[MeshService, Discovery]:
        from meshd.node.neighbours import CARRIER, bulk_service
        from meshd.peers.lan.discovery import Discovery
        from meshd.peers.mesh import MeshService
        from meshd.peers.needs import Needs
        from meshd.runtime.process import guarded

        cache = self._cache
        assert cache is not None, "the mesh is made after the cache"

        discovery = Discovery(self._config.mdns)
        mesh = self._mesh = MeshService(
            identity,
            lambda service: Needs(
                config=self._config,
                board=self._board,
                clock=self._clock,
                rng=self._rng,
                recorder=self._recorder,
                spawn=lambda work: service.spawn(work, name="work"),
                inflight=api.inflight,
                serve_api=api.peer_protocol,
                carrier=tuple(guarded(CARRIER)),
                serve_bulk=bulk_service(cache, self._lending.tunnel),
                bulk_lost=self._lending.tunnels_lost,
                serve_loan=self._lending.desk.serve,
                deployments=election.shared,
            ),
            self._pool,
            discovery,
        )
        discovery.proposed = mesh.found_on_lan
        return mesh, discovery

    def _make_admin(self, api: ApiServer, controls: MeshControls) -> AdminServer:
        from meshd.api.admin import AdminServer
        from meshd.cache.commanding import CacheCommander

        cache, placing = self._cache, self._placing
        assert cache is not None, "the admin side comes after the cache"
        return AdminServer(
            self._config.admin_socket,
            load=placing.load,
            unload=placing.unload,
            plan=placing.room.desk.plan,
            status=api.status,
            recorder=self._recorder,
            mesh=controls,
            cache=CacheCommander(cache),
        )

    def counts(self) -> Iterable[tuple[str, Mapping[str, str], float]]:
        """For `/metrics`, what is not the API's."""
        restarts = self._models.restarts if self._models is not None else 0
        yield "meshd_child_restarts_total", {"kind": "llama-server"}, restarts
        verified = self._cache.verifier.verified_bytes if self._cache is not None else 0
        yield "meshd_cache_verified_bytes_total", {}, verified
        received, sent = self._mesh.gossip_bytes() if self._mesh is not None else (0, 0)
        yield "meshd_gossip_bytes_total", {"direction": "in"}, received
        yield "meshd_gossip_bytes_total", {"direction": "out"}, sent
        received, sent = self._mesh.bulk_bytes() if self._mesh is not None else (0, 0)
        yield "meshd_bulk_bytes_total", {"direction": "in"}, received
        yield "meshd_bulk_bytes_total", {"direction": "out"}, sent
        if self.usage.room is not None:
            yield from self.usage.room.metrics()
            yield from self._lending.metrics()
            yield from self._borrowing.metrics()

    async def connect_remote(
        self, target: Target, make_protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Protocol:
        assert self._mesh is not None, "a remote target comes from the mesh"
        return await self._mesh.connect_remote(target, make_protocol)

    def joined(self) -> MeshService:
        assert self._mesh is not None, "the admin socket opens after the mesh is made"
        return self._mesh

    def overdue_s(self) -> float:
        """How long supervision of engines should have moved and did not."""
        assert self._models is not None, "started with the rooms, for clients too"
        election = 0.0 if self.usage.room is None else self.usage.room.overdue_s
        return max(self._models.overdue_s(), election)

    def withdraw(self) -> None:
        """The node is about to end: other nodes take over what it hosts."""
        if self.usage.room is not None:
            self.usage.room.withdraw()
            self._lending.desk.close("this node ends")

    def close(self) -> None:
        """After every service has stopped."""
        self._pool.close()
        self._drivers.close()
        self._records.close()
        self._tensors.close()
