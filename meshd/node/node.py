"""A node: the only place where configuration becomes machines and services.

Start, in this order: the data directory is locked, the API listens (the port answers from here on),
the admin socket, then everything slow behind them. Stop, on SIGTERM or SIGINT: new requests are
refused, those in flight finish within `drain_s`, engines end, sockets go. A second signal hurries.
SIGHUP reads the configuration again (`reload.py`); in a terminal, which sends it when it is
closed, it stops the node.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import random
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from meshd import __version__
from meshd.api import ApiServer
from meshd.config import Loaded
from meshd.errors import GpuRequired, MeshdError
from meshd.ids import ModelId, NodeId
from meshd.kernel import (
    Board,
    FlightRecorder,
    MonotonicClock,
    Pool,
    ServiceStack,
)
from meshd.node.reload import reload
from meshd.node.service_manager import ServiceManager
from meshd.node.survey import Survey
from meshd.view import NodeState, NodeView, Preparing, Role, Target, View

if TYPE_CHECKING:
    from meshd.api.admin import AdminServer, InviteBody
    from meshd.cache.room import CacheRoom
    from meshd.peers.lan.discovery import Discovery
    from meshd.peers.mesh import MeshService
    from meshd.peers.trust.identity import Identity
    from meshd.runtime.host import ModelHost
    from meshd.runtime.proof.prover import Prover
    from meshd.runtime.registry import Registry

log = logging.getLogger(__name__)

_MODEL_ROOMS = (
    "meshd.cache.room",
    "meshd.peers.trust.identity",
    "meshd.runtime.host",
    "meshd.runtime.proof.prover",
    "meshd.runtime.registry",
)
_OTHER_ROOMS = (
    "meshd.api.admin",
    "meshd.cache.commanding",
    "meshd.cache.offering",
    "meshd.cache.service",
    "meshd.peers.lan.discovery",
    "meshd.peers.mesh",
)

END_LIMIT_S = 60.0
"""What a stop may take beyond `drain_s`: services end one after the other, engines the longest."""


class Node:
    """One run of a node; `run` is called once, inside the loop it belongs to."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        config = self.config = loaded.config
        self._clock = MonotonicClock()
        self._recorder = FlightRecorder()
        self._rng = random.Random()  # the one source of chance, handed to the shells
        self._pool = Pool("work", workers=2)
        self._drivers = Pool("drivers", workers=2)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._exit_code = 0
        self._cache: CacheRoom | None = None
        self._models: ModelHost | None = None
        self._mesh: MeshService | None = None
        node = NodeView(
            id=NodeId(""),
            name=config.name,
            version=__version__,
            role=Role.MEMBER.value,
            state=NodeState.STARTING,
            started_at=self._clock.now(),
            listen=config.listen,
            peer_listen=None,
        )
        self._board = Board(View(node=node))
        self._manager = ServiceManager(self._board)

    async def run(self) -> int:
        api = ApiServer(
            self.config,
            self._board,
            clock=self._clock,
            rng=self._rng,
            recorder=self._recorder,
            metrics=self._counts,
            connect_remote=self._connect_remote,
        )
        host, port = api.bind()
        self._set_node(listen=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        stack = ServiceStack()
        self._install_signals(api)
        self._manager.follow()
        try:
            await stack.start(api)
            log.info("API listens on http://%s/v1", self._board.current.node.listen)
            await self._start_rooms(stack, api)
            self._set_node(state=NodeState.READY)
            self._manager.ready()
            # What is alive now stays: full collections need not walk it again.
            gc.collect()
            gc.freeze()
            gc.enable()
            await self._wait_for_end(stack)
        finally:
            await self._shut_down(stack, api)
        return self._exit_code

    # -- start ------------------------------------------------------------------------------------

    async def _start_rooms(self, stack: ServiceStack, api: ApiServer) -> None:
        """Models that were asked for begin to load before the mesh is even imported. (A client is
        asked for none: `MeshService.prepare` refuses that.)"""
        config = self.config
        await self._import(_MODEL_ROOMS)
        from meshd.peers.trust.identity import load_or_create
        from meshd.runtime.orphans import end_orphans

        await self._pool.run(end_orphans, config.run_dir)
        identity = await self._pool.run(load_or_create, config.data_dir)
        self._set_node(id=identity.node_id)
        self._cache = await self._pool.run(self._make_cache)
        if config.model:
            await self._start_models(stack, api, hosts=True)
        await self._import(_OTHER_ROOMS)
        mesh, discovery = self._make_mesh(api, identity)
        await self._pool.run(mesh.prepare)
        role = Role.CLIENT if mesh.client else Role.MEMBER
        self._set_node(peer_listen=mesh.peer_listen, role=role.value)
        if not config.model:
            await self._start_models(stack, api, hosts=not mesh.client)
        from meshd.cache.service import CacheService

        await stack.start(CacheService(self._cache, self._board))
        await stack.start(self._make_admin(api))
        await stack.start(mesh)
        await stack.start(discovery)
        await stack.start(Survey(self.config, self._board, self._pool))
        assert self._models is not None, "started above, for clients too"
        if watchdog := self._manager.watchdog(self._models.overdue_s, clock=self._clock):
            await stack.start(watchdog)

    async def _import(self, modules: tuple[str, ...]) -> None:
        # In a thread, so that the API answers while all this is read from disk and compiled.
        await self._pool.run(lambda: [importlib.import_module(module) for module in modules])

    async def _start_models(self, stack: ServiceStack, api: ApiServer, *, hosts: bool) -> None:
        from meshd.runtime.host import ModelHost, Rooms
        from meshd.runtime.hosting_events import WeightFacts
        from meshd.runtime.registry import Registry

        config, cache = self.config, self._cache
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

        prover = self._make_prover(registry)
        models = self._models = ModelHost(
            config,
            self._board,
            Rooms(
                find_engine=lambda: registry.find(config.runtime_dir),
                prepare=prepare,
                identify=cache.identify,
                wait_idle=api.wait_idle,
                last_request_at=api.last_request_at,
                always_listed={ModelId("builtin"): "builtin"} if hosts else {},
                shown=prover.engine_found,
                hosts=hosts,
            ),
            clock=self._clock,
            rng=self._rng,
            recorder=self._recorder,
            pool=self._pool,
        )
        await stack.start(models)
        for ref in config.model:
            models.load(ref)
        if config.require_gpu:
            if not hosts:
                raise GpuRequired("--require-gpu: a client node hosts nothing; leave it out")
            await prover.require_gpu()
        await stack.start(prover)

    def _make_prover(self, registry: Registry) -> Prover:
        from meshd.cache.builtin import ensure
        from meshd.runtime.proof.looks import real_looks
        from meshd.runtime.proof.prover import Prover

        config = self.config
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
            self.config,
            self._pool,
            guarded=guarded,
            neighbours=MeshNeighbours(self._board, lambda: self._mesh),
            in_use=lambda: self._models.weights_in_use() if self._models else frozenset(),
        )
        cache.recover()
        return cache

    def _make_mesh(self, api: ApiServer, identity: Identity) -> tuple[MeshService, Discovery]:
        from meshd.node.neighbours import CARRIER, bulk_service
        from meshd.peers.lan.discovery import Discovery
        from meshd.peers.mesh import MeshService
        from meshd.peers.session import Needs
        from meshd.runtime.process import guarded

        cache = self._cache
        assert cache is not None, "the mesh is made after the cache"

        discovery = Discovery(self.config.mdns)
        mesh = self._mesh = MeshService(
            identity,
            lambda service: Needs(
                config=self.config,
                board=self._board,
                clock=self._clock,
                rng=self._rng,
                recorder=self._recorder,
                spawn=lambda work: service.spawn(work, name="work"),
                inflight=api.inflight,
                serve_api=api.peer_protocol,
                carrier=tuple(guarded(CARRIER)),
                serve_bulk=bulk_service(cache),
            ),
            self._pool,
            discovery,
        )
        discovery.proposed = mesh.found_on_lan
        return mesh, discovery

    def _make_admin(self, api: ApiServer) -> AdminServer:
        from meshd.api.admin import AdminServer, LoadBody, UnloadBody
        from meshd.cache.commanding import CacheCommander
        from meshd.runtime.hosting_events import LoadOptions

        models, cache = self._models, self._cache
        assert models is not None, "the admin side comes after the models"
        assert cache is not None, "and those after the cache"

        def load(body: LoadBody) -> ModelId:
            return models.load(body.ref, LoadOptions(body.context, body.parallel))

        def unload(body: UnloadBody) -> ModelId:
            return models.unload(body.model, body.drain_s)

        return AdminServer(
            self.config.admin_socket,
            load=load,
            unload=unload,
            status=api.status,
            recorder=self._recorder,
            mesh=self,
            cache=CacheCommander(cache),
        )

    def _counts(self) -> Iterable[tuple[str, Mapping[str, str], float]]:
        """For `/metrics`, what is not the API's."""
        restarts = self._models.restarts if self._models is not None else 0
        yield "meshd_child_restarts_total", {"kind": "llama-server"}, restarts
        verified = self._cache.verifier.verified_bytes if self._cache is not None else 0
        yield "meshd_cache_verified_bytes_total", {}, verified
        received, sent = self._mesh.gossip_bytes() if self._mesh is not None else (0, 0)
        yield "meshd_gossip_bytes_total", {"direction": "in"}, received
        yield "meshd_gossip_bytes_total", {"direction": "out"}, sent

    async def _connect_remote(
        self, target: Target, make_protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Protocol:
        assert self._mesh is not None, "a remote target comes from the mesh"
        return await self._mesh.connect_remote(target, make_protocol)

    # -- admin.MeshControls -----------------------------------------------------------------------

    async def invite(self, body: InviteBody) -> dict[str, Any]:
        return await self._joined().invite(
            ttl_s=body.ttl_s, uses=body.uses, role=body.role, issuer=body.issuer
        )

    async def revoke(self, node: str) -> dict[str, Any]:
        return await self._joined().revoke(node)

    async def leave(self) -> dict[str, Any]:
        return await self._joined().leave()

    async def drain(self) -> dict[str, Any]:
        """Until `undrain`: no request is served by this node's engines, those in flight finish."""
        return self._drain_by_hand(NodeState.DRAINING)

    async def undrain(self) -> dict[str, Any]:
        return self._drain_by_hand(NodeState.READY)

    def _drain_by_hand(self, state: NodeState) -> dict[str, Any]:
        if not self._stop.is_set():
            self._set_node(state=state)
        return {"state": self._board.current.node.state.value}

    def _joined(self) -> MeshService:
        assert self._mesh is not None, "the admin socket opens after the mesh is made"
        return self._mesh

    # -- signals ----------------------------------------------------------------------------------

    def _install_signals(self, api: ApiServer) -> None:
        loop = asyncio.get_running_loop()
        ends = [signal.SIGTERM, signal.SIGINT]
        if sys.stdin is not None and sys.stdin.isatty():
            ends.append(signal.SIGHUP)  # the terminal was closed, and the node goes with it
        else:
            loop.add_signal_handler(signal.SIGHUP, self._reload, api)
        for number in ends:
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.info("%s again: ending without waiting for requests", number.name)
            self._hurry.set()
        else:
            log.info("%s: draining for at most %.0f s", number.name, self.config.drain_s)
            self._stop.set()

    def _reload(self, api: ApiServer) -> None:
        # Some kilobytes of files, now and then: no reason to go through a pool.
        self._manager.reloading()
        try:
            new = reload(self.config, self._loaded.again().config)
        except MeshdError as error:
            log.error("SIGHUP: everything stays as it is: %s", error.message)
        else:
            self.config = new.config
            logging.getLogger().setLevel(new.config.log_level.upper())
            api.use_key(new.config.api_key)
            log.warning("SIGHUP: %s", new.words())
        self._manager.ready()

    # -- end --------------------------------------------------------------------------------------

    async def _wait_for_end(self, stack: ServiceStack) -> None:
        told = asyncio.create_task(self._wait_told(), name="node:told to stop")
        try:
            await asyncio.wait({told, stack.failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
        if stack.failed.done():
            self._exit_code = self._explain(stack.failed.exception())

    def _explain(self, error: BaseException | None) -> int:
        """Say why the node ends on its own; the exit code of it."""
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, MeshdError):  # said on purpose, for example by a mesh that refuses us
            log.error("%s", error.message)
            return error.exit_code
        log.critical("a service failed; stopping", exc_info=error)
        self._write_flight()
        return 1

    async def _wait_told(self) -> None:
        await self._stop.wait()

    async def _shut_down(self, stack: ServiceStack, api: ApiServer) -> None:
        api.refuse_new()
        self._manager.stopping(self.config.drain_s + END_LIMIT_S)
        self._set_node(state=NodeState.DRAINING)
        if self._exit_code == 0:
            await self._drain(api)
        # An engine finishes its streams before it follows a TERM: leave it none.
        api.cut_off()
        api.hurry()
        await stack.stop()
        self._pool.close()
        self._drivers.close()
        log.info("stopped")

    async def _drain(self, api: ApiServer) -> None:
        """Until no request is in flight, `drain_s` passed, or a second signal came."""
        idle = asyncio.create_task(api.wait_all_idle(), name="node:idle")
        hurry = asyncio.create_task(self._hurry.wait(), name="node:hurry")
        done, pending = await asyncio.wait(
            {idle, hurry}, timeout=self.config.drain_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if idle not in done:
            log.warning("ending with %d requests in flight", api.inflight_total())

    def _write_flight(self) -> None:
        path = self.config.log_dir / "flight.txt"
        try:
            path.write_text(self._recorder.render())
        except OSError as error:
            log.warning("the flight record could not be written to %s: %s", path, error)
        else:
            log.critical("events and effects up to the failure: %s", path)

    def _set_node(self, **changes: object) -> None:
        view = self._board.current
        self._board.publish(replace(view, node=replace(view.node, **changes)))  # type: ignore[arg-type]
