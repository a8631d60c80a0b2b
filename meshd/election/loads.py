"""The shell around demand: what clients ask for, here and elsewhere, and what follows from it.

More hosts or fewer for deployments that leave it to demand, and sleep for what nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from meshd.election.demand import Demand
from meshd.election.election import Election
from meshd.election.hosted import Phase
from meshd.election.replicas import Replicas
from meshd.election.standings import REACHABLE
from meshd.election.words import Standing
from meshd.ids import ModelId
from meshd.kernel import Board, Clock
from meshd.view import Deployment, View


class Loads:
    """`idle_unload_s`: how long a model may be unused; None for ever."""

    def __init__(
        self,
        board: Board[View],
        machine: Election,
        demand: Demand,
        *,
        idle_unload_s: float | None,
        clock: Clock,
    ) -> None:
        self._board = board
        self._machine = machine
        self._demand = demand
        self._idle_unload_s = idle_unload_s
        self._clock = clock
        self._replicas = Replicas()

    @property
    def wanted(self) -> Mapping[ModelId, int]:
        """Hosts by model, of deployments that leave it to demand."""
        return self._replicas.wanted

    # -- requests: api.usage.Usage ----------------------------------------------------------------

    def asked(self, model: ModelId) -> None:
        self._demand.asked(model, self._clock.now())

    def answered(self, model: ModelId, service_s: float) -> None:
        self._demand.answered(model, service_s, self._clock.now())

    def began(self, model: ModelId) -> None:
        self._demand.began(model, self._clock.now())

    def ended(self, model: ModelId) -> None:
        self._demand.ended(model, self._clock.now())

    # -- what follows -----------------------------------------------------------------------------

    def exchange(self) -> None:
        """Tell the other nodes what clients of this one ask for, and hear what theirs do."""
        view = self._board.current
        reachable = [peer for peer in view.peers if peer.state in REACHABLE]
        self._demand.keep_only(peer.id for peer in reachable)
        for peer in reachable:
            self._demand.hear(peer.id, dict(peer.demand))
        told = tuple(sorted(self._demand.tell(self._clock.now()).items()))
        if told != view.demand:
            self._board.publish(replace(view, demand=told))

    def scale(self, records: tuple[Deployment, ...], nodes: tuple[Standing, ...]) -> bool:
        """Whether `wanted` changed. `nodes`: all that are reachable, this one too."""
        models = self._board.current.models
        return self._replicas.look(records, nodes, models, self._demand, self._clock.now())

    def unused(self) -> Iterator[tuple[ModelId, str]]:
        """What this node serves and nobody has used for too long, with the words for it."""
        limit_s = self._idle_unload_s
        if limit_s is None:
            return
        for model in self._demand.idle(self._clock.now(), limit_s):
            hosted = self._machine.hosted.get(model)
            if hosted is not None and hosted.phase is Phase.READY:
                yield model, f"nobody has asked for it for {limit_s:g} s"
