"""Shards of a model that a worker of a split fetches from other nodes before its host connects.

`runtime.lending.supply` decides whether that is faster than being sent them by the host. Here it is
asked, and carried out within its limits: a fetch that fails, stalls or takes too long leaves the
rest to the host, and what it brought stays for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from meshd.errors import MeshdError
from meshd.ids import NodeId
from meshd.kernel import Board
from meshd.runtime.lending.supply import Choice, Ways, choose
from meshd.sizes import format_size
from meshd.view import Loan, NeededWeights, PeerState, View

if TYPE_CHECKING:
    from meshd.cache.room import CacheRoom
    from meshd.cache.transfer.words import News

log = logging.getLogger(__name__)

STALL_S: Final = 10.0
"""A fetch that got no further for so long is given up."""
REST_S: Final = 600.0
"""After a fetch that was given up or failed, the same weights are not fetched for so long: a host
plans anew at once, and would wait as long again for nothing."""
MEASURED_BYTES: Final = 64 << 20
"""A fetch of less says little about the lines it came over."""
MAX_REMEMBERED: Final = 64
"""Sets of weights, and groups of nodes, of which something is remembered; the oldest goes."""

Moved: TypeAlias = Callable[[str], None]
K = TypeVar("K")


class Supplying:
    """For `Lending`. One fetch of the same weights at a time."""

    def __init__(self, board: Board[View], cache: CacheRoom) -> None:
        self._board = board
        self._cache = cache
        self.fetched_bytes = 0
        """Of shards that came from other nodes since this node began."""
        self._rates: dict[frozenset[NodeId], float] = {}
        """Bytes per second that the last fetch from these holders brought."""
        self._rests: dict[str, float] = {}
        """Until when weights are not fetched, by digest."""

    async def supply(self, loan: Loan, kept_bytes: int, moved: Moved) -> None:
        """Fetch what `loan` needs of its weights, if that is the faster way. `kept_bytes`: of
        tensors that are kept of them. Raises nothing; cancelling it ends the fetch."""
        ask = loan.ask
        if ask.weights is None or ask.digest is None or not self._cache.settings.from_peers:
            return
        holders = self._holders(ask.digest, loan.host)
        try:
            held = await self._cache.held_shards(ask.digest)
            if held is not None and held.has(ask.weights.files):
                return
            missing = await self._cache.missing_bytes(ask.weights)
        except (MeshdError, OSError) as error:
            log.warning("shards of %s are not looked for: %s", ask.model, error)
            return
        choice = self._choose(ask.digest, ask.weights, missing, kept_bytes, holders)
        if not choice.fetch:
            log.info("shards of %s are not fetched from other nodes: %s", ask.model, choice.reason)
            return
        words = f"{format_size(missing)} of {ask.model} from other nodes"
        log.info("fetching %s: %s", words, choice.reason)
        moved(f"fetching shards: {format_size(missing)}")
        try:
            await self._fetch(ask.digest, ask.weights, missing, holders, choice.limit_s, moved)
        except (MeshdError, OSError) as error:  # TimeoutError is one
            why = "it is too slow" if isinstance(error, TimeoutError) else error
            log.warning("fetching %s is given up, its host sends the rest: %s", words, why)
            _remember(self._rests, ask.digest, time.monotonic() + REST_S)

    def _holders(self, digest: str, host: NodeId) -> frozenset[NodeId]:
        """Nodes besides the host that say they hold the weights verified."""
        return frozenset(
            peer.id
            for peer in self._board.current.peers
            if peer.state is PeerState.ALIVE and digest in peer.weights and peer.id != host
        )

    def _choose(
        self,
        digest: str,
        weights: NeededWeights,
        missing_bytes: int,
        kept_bytes: int,
        holders: frozenset[NodeId],
    ) -> Choice:
        if time.monotonic() < self._rests.get(digest, 0.0):
            return Choice(False, "the last time that was given up")
        return choose(
            Ways(
                missing_bytes=missing_bytes,
                own_bytes=weights.bytes,
                kept_bytes=kept_bytes,
                pushed_bytes=weights.pushed_bytes,
                pushed_to=weights.pushed_to,
                holders=len(holders),
                push_bytes_per_s=weights.bytes_per_s,
                fetch_bytes_per_s=self._rates.get(holders),
            )
        )

    async def _fetch(
        self,
        digest: str,
        weights: NeededWeights,
        missing_bytes: int,
        holders: frozenset[NodeId],
        limit_s: float,
        moved: Moved,
    ) -> None:
        """Raises MeshdError, OSError, TimeoutError."""
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(min(STALL_S, limit_s)) as limit:
            watch = _Watch(limit, began + limit_s, moved)
            try:
                got = await self._cache.fetch_shards(digest, weights, missing_bytes, watch.told)
            finally:
                self.fetched_bytes += watch.fetched_bytes
        seconds = asyncio.get_running_loop().time() - began
        log.info("fetched %s in %.1f s", watch.words(got), seconds)
        if got >= MEASURED_BYTES:
            _remember(self._rates, holders, got / seconds)


class _Watch:
    """Of one fetch: what it says is passed on, and when it gets no further its time is up."""

    def __init__(self, limit: asyncio.Timeout, latest_at: float, moved: Moved) -> None:
        self.fetched_bytes = 0
        self._limit = limit
        self._latest_at = latest_at
        self._moved = moved
        self._done_bytes = -1
        self._sources: tuple[str, ...] = ()

    def told(self, news: News) -> None:
        from meshd.cache.transfer.words import Done, Progress, Said

        if isinstance(news, Said):
            log.info("fetching shards: %s", news.message)
        if isinstance(news, Done | Progress):
            self.fetched_bytes = sum(news.sources.values())
            self._sources = tuple(sorted(news.sources))
        if not isinstance(news, Progress):
            return
        done, total = news.done_bytes, news.total_bytes
        if done > self._done_bytes or news.stage == "verifying":
            self._done_bytes = done
            self._wait_on()
        of = f" from {', '.join(self._sources)}" if self._sources else ""
        self._moved(f"fetching shards: {done >> 20} of {total >> 20} MiB{of}")

    def words(self, count: int) -> str:
        return f"{format_size(count)} of shards from {', '.join(self._sources) or 'nobody'}"

    def _wait_on(self) -> None:
        at = min(asyncio.get_running_loop().time() + STALL_S, self._latest_at)
        if not self._limit.expired():
            self._limit.reschedule(at)


def _remember(known: dict[K, float], key: K, value: float) -> None:
    known.pop(key, None)
    known[key] = value
    while len(known) > MAX_REMEMBERED:
        del known[next(iter(known))]
