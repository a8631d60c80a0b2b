"""The shell that shows deployments no node works on: `View.wanted`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from meshd.election.shapes import Shapes
from meshd.election.unserved import Unserved
from meshd.election.words import Standing
from meshd.ids import ModelId
from meshd.kernel import Board, Clock
from meshd.view import Deployment, ModelState, ModelView, View, with_wanted


class Showing:
    def __init__(self, board: Board[View], shapes: Shapes, *, clock: Clock) -> None:
        self._board = board
        self._shapes = shapes
        self._clock = clock
        self._made_of: tuple[object, ...] = ()
        self._unserved = Unserved()
        self._found: Mapping[ModelId, ModelView] = {}

    def show(
        self,
        records: tuple[Deployment, ...],
        nodes: tuple[Standing, ...],
        demand: Mapping[ModelId, int],
        failed: Mapping[ModelId, ModelView],
    ) -> None:
        """See unserved.py for the arguments."""
        made_of = (records, nodes, demand, tuple(failed.values()))
        if made_of != self._made_of:
            self._made_of = made_of
            self._found = self._unserved.look(records, nodes, demand, failed)
        shown = MappingProxyType({**self._found, **self._unknown(records)})
        view = self._board.current
        if shown != view.wanted:
            self._board.publish(with_wanted(view, shown))

    def _unknown(self, records: Iterable[Deployment]) -> Mapping[ModelId, ModelView]:
        """Deployments that nobody can count yet, as far as this node works on that."""
        found = {}
        for record in records:
            if record.removed or record.asleep or record.shape is not None:
                continue
            now, problem = self._shapes.preparing(record.model), self._shapes.problem(record)
            look = ModelView(record.model, record.ref, ModelState.FAILED)
            if now is not None:
                found[record.model] = replace(
                    look, state=now.state, reason=now.reason, progress=now.progress, fetch=now.fetch
                )
            elif problem is not None:
                found[record.model] = replace(
                    look, reason=problem.words, retry_after_s=self._wait_s(problem.retry_at)
                )
        return found

    def _wait_s(self, at: float | None) -> float | None:
        """In whole seconds: what differed at every look would be news to all who look at the view,
        and the next look would follow."""
        return None if at is None else float(max(1, math.ceil(at - self._clock.now())))
