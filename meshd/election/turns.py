"""Whose turn it is to claim a model, and who lets it pass, as seen from this node. Pure.

A node that bids YES and never claims would otherwise hold a model up for as long as it is alive.
Rules, numbered as in the code:

1. It is the turn of those first in the ranking, as many as there are places to be filled, for as
   long as they say YES or SPLIT and claim nothing, and this node would claim, or give up, but for
   them.
2. Who had its turn for `TURN_S` is passed over for `PASSED_S`, as if it had said nothing. Then it
   is the turn of the next one, so that of many who wait one claims.
3. Who says SWAP is waited for: it may be waiting for requests of those it makes room.
4. A claim of it, its death and a new version of the record end that; so does its failing to be
   first for a moment.
5. Who is first is found out only in gaps that last: it costs a look at every node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from meshd.election.ranking import Ranked, comes_next, first_ranked, ranked
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Deployment, Suits

TURN_S: Final = 10.0
"""Tens of times what bids, a saved epoch and a claim take, also in a slow network."""
PASSED_S: Final = 300.0
"""As long as the longest back-off of a node that says why it fails."""
LAST_S: Final = 2.0
"""How long a gap must last before anybody is timed; most are filled before."""
_AT_ONCE: Final = (Suits.YES, Suits.SPLIT)
"""Who says so claims when it is its turn."""


@dataclass(slots=True)
class _Watch:
    """Of one model."""

    stamp: tuple[int, NodeId]
    """Of the record that it is about."""
    look_at: float | None = None
    """When to find out again who is first; None while nobody is waited for."""
    turns: dict[NodeId, float] = field(default_factory=dict)
    """When their turn will have passed."""
    passed: dict[NodeId, float] = field(default_factory=dict)
    """Until when they are passed over."""


class Turns:
    """See the module's docstring. Bounded by the models and nodes that there are."""

    def __init__(self) -> None:
        self._watches: dict[ModelId, _Watch] = {}

    def awaited(
        self,
        deployment: Deployment,
        own: Ranked | None,
        others: Mapping[NodeId, Standing],
        places: int,
        now: float,
    ) -> float | None:
        """When to ask again, if so many come before `own` that it is not its turn; None if it is.
        With `own` None everybody in the ranking comes before it."""
        watch = self._watch(deployment, others, now)
        while _comes_later(deployment, own, _believed(watch, others), places):
            if watch.look_at is None:
                watch.look_at = now + LAST_S  # 5
            if now < watch.look_at:
                watch.turns = {
                    node: until
                    for node, until in watch.turns.items()
                    if (other := others.get(node)) is not None and _says_yes(other, deployment)
                }
                return watch.look_at
            _look(watch, deployment, others, places, now)
        self.over(deployment.model)
        return None

    def over(self, model: ModelId) -> None:
        """Nobody is waited for: there is no gap, or it is this node's turn."""
        watch = self._watches.get(model)
        if watch is not None:
            watch.look_at = None
            watch.turns.clear()
            if not watch.passed:
                del self._watches[model]

    def forget(self, model: ModelId) -> None:
        """It was unloaded."""
        self._watches.pop(model, None)

    def passed(self, model: ModelId, others: Mapping[NodeId, Standing]) -> tuple[str, ...]:
        """The names of those that are passed over, as of the last look."""
        watch = self._watches.get(model)
        passed = () if watch is None else watch.passed
        return tuple(sorted(others[node].name for node in passed if node in others))

    def _watch(
        self, deployment: Deployment, others: Mapping[NodeId, Standing], now: float
    ) -> _Watch:
        """As far as it still holds (4)."""
        model = deployment.model
        watch = self._watches.get(model)
        if watch is None or watch.stamp != deployment.stamp:
            watch = self._watches[model] = _Watch(deployment.stamp)
        watch.passed = {
            node: until
            for node, until in watch.passed.items()
            if now < until and node in others and model not in others[node].claims
        }
        return watch


def _believed(watch: _Watch, others: Mapping[NodeId, Standing]) -> Iterable[Standing]:
    if not watch.passed:
        return others.values()
    return (other for node, other in others.items() if node not in watch.passed)


def _comes_later(
    deployment: Deployment, own: Ranked | None, others: Iterable[Standing], places: int
) -> bool:
    if own is None:
        return any(ranked(other, deployment) is not None for other in others)
    return not comes_next(deployment, own, others, places)


def _look(
    watch: _Watch,
    deployment: Deployment,
    others: Mapping[NodeId, Standing],
    places: int,
    now: float,
) -> None:
    """Find out whose turn it is (1), and whose has passed (2); and if one has, look once more."""
    first = [
        r.node.node
        for r in first_ranked(deployment, _believed(watch, others), places)
        if r.bid.suits in _AT_ONCE  # 3
    ]
    turns = {node: watch.turns.get(node, now + TURN_S) for node in first}
    late = [node for node, until in turns.items() if until <= now]
    watch.passed.update(dict.fromkeys(late, now + PASSED_S))
    watch.turns = {node: until for node, until in turns.items() if node not in late}
    watch.look_at = now if late else min(watch.turns.values(), default=now + TURN_S)


def _says_yes(other: Standing, deployment: Deployment) -> bool:
    found = ranked(other, deployment)
    return found is not None and found.bid.suits in _AT_ONCE
