"""The election's room, wired: engines, weights, drivers and the mesh are other rooms'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from meshd.errors import MeshdError
from meshd.ids import ModelId
from meshd.kernel import Board, Clock, FlightRecorder, Pool
from meshd.view import View
from meshd.view.shape import MemoryParts

if TYPE_CHECKING:
    from meshd.api.admin import LoadBody, UnloadBody
    from meshd.cache.room import CacheRoom
    from meshd.config import Config
    from meshd.election.memory import Memory
    from meshd.election.room import ElectionRoom
    from meshd.election.words import StartHost
    from meshd.node.borrowing import Borrowing
    from meshd.node.lending import Lending
    from meshd.peers.mesh import MeshService
    from meshd.runtime.host import ModelHost


class Placing:
    """Makes the room, and is what commands ask. `models`, `mesh`: once they are there."""

    def __init__(
        self,
        config: Config,
        board: Board[View],
        cache: CacheRoom,
        *,
        models: Callable[[], ModelHost],
        mesh: Callable[[], MeshService],
        lending: Lending,
        borrowing: Borrowing,
        look_at_devices: Callable[[], None],
    ) -> None:
        self._config = config
        self._board = board
        self._cache = cache
        self._models = models
        self._mesh = mesh
        self._lending = lending
        self._borrowing = borrowing
        self._look_at_devices = look_at_devices
        self._drains: dict[ModelId, float] = {}
        """What an operator said of an unload that is on its way."""
        self._room: ElectionRoom | None = None

    @property
    def room(self) -> ElectionRoom:
        assert self._room is not None, "made before it is asked for"
        return self._room

    def make(self, *, clock: Clock, recorder: FlightRecorder, pool: Pool) -> ElectionRoom:
        """Blocking: reads what earlier runs left. Raises NoSpace, OSError."""
        from meshd.election import room
        from meshd.election.store import ElectionStore
        from meshd.peers.naming import resolve_node

        store = ElectionStore(self._config.data_dir)
        needs = room.Needs(
            start=self._start,
            stop=self._stop,
            taken=self._taken,
            engine=lambda: (self._models().engine_id, self._models().engine_problem),
            shape=self._cache.shape,
            prepare=self._cache.prepare,
            here=self._cache.here,
            identify=self._cache.identify,
            find_node=lambda name: resolve_node(name, self._board.current.peers),
            spread=lambda models: self._mesh().deployed(models),
            expects_others=lambda: self._mesh().expects_others,
            look_at_devices=self._look_at_devices,
            auto=self._choose,
            lends=self._lending.problem,
            end_loan=self._lending.end_loan,
            worker_lost=lambda model: self._models().worker_lost(model),
            avoided=self._borrowing.avoided,
            bytes_per_s=self._borrowing.bytes_per_s,
        )
        self._room = room.ElectionRoom(
            self._config,
            self._board,
            needs,
            store,
            store.load(),
            clock=clock,
            recorder=recorder,
            pool=pool,
        )
        return self._room

    # -- commands ---------------------------------------------------------------------------------

    async def load(self, body: LoadBody) -> ModelId:
        from meshd.election.desk import Wish

        return await self.room.desk.load(
            Wish(body.ref, body.context, body.parallel, body.replicas, body.host, body.split)
        )

    async def unload(self, body: UnloadBody) -> ModelId:
        model = self.room.desk.deployed(body.model)
        if body.drain_s is not None:
            self._drains[model] = body.drain_s
        try:
            return self.room.desk.unload(body.model)
        except MeshdError:
            self._drains.pop(model, None)
            raise

    # -- orders -----------------------------------------------------------------------------------

    def _start(self, order: StartHost, prompt_cache_bytes: int | None) -> None:
        from meshd.runtime.hosting_events import LoadOptions

        deployment = order.deployment
        self._drains.pop(deployment.model, None)
        options = LoadOptions(
            deployment.context,
            deployment.parallel,
            prompt_cache_bytes,
            split=order.plan,
            epoch=order.epoch,
        )
        self._models().load(deployment.ref, options, name=deployment.model)

    def _stop(self, model: ModelId, drain: bool) -> None:
        drain_s = self._drains.pop(model, None)
        self._models().unload(model, drain_s if drain else 0.0)

    def _taken(self, model: ModelId) -> Mapping[str, MemoryParts] | None:
        report = self._models().taken(model)
        return None if report is None else report.devices

    def _choose(self, memory: Memory) -> str | None:
        from meshd.cache.references import format_ref
        from meshd.election.choice import Candidate, choose

        weights = self._board.current.weights
        here = {w.ref for w in weights} | {str(w.model) for w in weights}
        candidates = []
        for entry in self._cache.catalog.entries:
            if entry.size_bytes is not None:
                ref = format_ref(entry.ref)
                on_disk = not here.isdisjoint((ref, entry.name))
                candidates.append(Candidate(entry.name, ref, entry.size_bytes, on_disk))
        found = choose(candidates, memory.budgets)
        return None if found is None else found.name
