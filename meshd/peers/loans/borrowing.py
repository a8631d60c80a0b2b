"""The host's side of loans: all workers of a plan lend their memory, or none does.

1. Streams to all workers are opened, and each is asked, at the same time.
2. All have granted: all are told to commit, and each says when its RPC server can be used.
   Meanwhile tunnels to them are opened.
3. Each is probed through its own tunnel.

What fails at any step, and on any worker, ends everything that was begun. Afterwards the loans are
one unit: the loss of any part is told once, and whoever hears of it ends the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, TypeVar, assert_never

from meshd.errors import MeshdError, ProtocolError, SplitFailed
from meshd.ids import LoanId, ModelId, NodeId
from meshd.peers.loans.line import Line, Pace
from meshd.peers.loans.words import (
    Beat,
    Commit,
    End,
    Ended,
    Granted,
    Loaded,
    Moved,
    Refused,
    Serving,
    ask_to_wire,
    parse_worker_word,
)
from meshd.view import LoanAsk, NeededWeights, Part, SplitPlan

log = logging.getLogger(__name__)

ASK_S: Final = 5.0
"""From the first stream to the last grant."""
STALL_S: Final = 30.0
"""A worker that commits and says nothing of it for so long is given up."""
TUNNELS_S: Final = 10.0
PROBE_S: Final = 5.0
END_S: Final = 2.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BorrowOrder:
    """What is to be borrowed, and for what."""

    model: ModelId
    epoch: int
    """Of this node's claim."""
    rpc_protocol: str
    """Of the engine that will use it."""
    digest: str | None
    """Of the weights."""
    plan: SplitPlan
    weights: Mapping[NodeId, NeededWeights] = field(default_factory=dict)
    """What each worker needs of them, as far as that is known."""

    def ask(self, part: Part) -> LoanAsk:
        weights = self.weights.get(part.node)
        return LoanAsk(self.model, self.epoch, self.rpc_protocol, part, self.digest, weights)


class Tunnels(Protocol):
    """Ways to the RPC servers of all workers."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """HOST:PORT on this machine, in the order of the workers."""

    async def close(self) -> None: ...


Connect: TypeAlias = Callable[
    [NodeId, str, Callable[[], asyncio.Protocol]], Awaitable[asyncio.Protocol]
]
"""Opens the raw stream of a loan to the node, which errors call by the name. Raises MeshdError."""
OpenTunnels: TypeAlias = Callable[
    [Sequence[tuple[Part, LoanId]], Callable[[str], None]], Awaitable[Tunnels]
]
"""Tunnels for the loans, and whom to tell the reason when they are lost later. Raises MeshdError;
leaves nothing behind when it does or is cancelled."""
Probe: TypeAlias = Callable[[str, str], Awaitable[None]]
"""Whether an RPC server of that protocol answers at HOST:PORT. Raises MeshdError if not."""


class Borrowed:
    """The loans of one plan, usable until `end` or `lost`."""

    def __init__(self, group: _Group, endpoints: tuple[str, ...]) -> None:
        self.endpoints = endpoints
        """HOST:PORT on this machine, in the order of the plan's parts."""
        self.loans: Mapping[NodeId, LoanId] = {w.part.node: w.loan for w in group.workers}
        self.warmed: Mapping[NodeId, int] = {w.part.node: w.warmed_bytes for w in group.workers}
        """Bytes of its weights that each had on its disk."""
        self._group = group

    @property
    def warmed_bytes(self) -> int:
        return sum(self.warmed.values())

    @property
    def culprits(self) -> tuple[str, ...]:
        """Ids of the workers that `lost` was called for; empty before, and if it was for the
        tunnels."""
        return self._group.culprits

    def loaded(self) -> None:
        """The engine has generated a token: tell the workers that no more tensors come, so that
        they know those they keep to be whole."""
        for worker in self._group.workers:
            worker.line.say(Loaded())

    async def end(self, reason: str) -> None:
        """Give it all back, within `END_S`; `lost` is not called from now on. May be called
        again, and by several at once."""
        await self._group.end(reason)


async def borrow(
    order: BorrowOrder,
    *,
    connect: Connect,
    open_tunnels: OpenTunnels,
    probe: Probe,
    lost: Callable[[str], None],
    moved: Callable[[str], None],
    pace: Pace | None = None,
) -> Borrowed:
    """The memory of all workers of `order.plan`.

    `lost(reason)` is called at most once and only after this has returned: a worker fell silent,
    ended its loan or is gone, or the tunnels are. `moved(words)`: what a worker is at meanwhile.
    Raises MeshdError, which names the worker and has its words, at most `END_S` after the failure;
    nothing is borrowed then, nor when this is cancelled.
    """
    group = _Group(order, moved, pace or Pace())
    try:
        endpoints = await _first_error(group.prepare(connect, open_tunnels, probe))
        return group.hand_over(endpoints, lost)
    except BaseException as error:
        await group.end(error.message if isinstance(error, MeshdError) else "the host gave it up")
        raise


async def _first_error(work: Coroutine[Any, Any, T]) -> T:
    """`work`, whose TaskGroup fails like its first task. A cancel from outside that comes with a
    failure is not lost, as Python 3.11 would (gh-116720)."""
    task = asyncio.current_task()
    assert task is not None
    cancels = task.cancelling()
    try:
        return await work
    except BaseExceptionGroup as errors:
        bugs = errors.split(MeshdError)[1]
        if bugs is not None:
            raise bugs from None
        if task.cancelling() > cancels:
            raise asyncio.CancelledError from None
        raise errors.exceptions[0] from None


class _Group:
    """All workers of one order: one unit from the first ask on."""

    def __init__(self, order: BorrowOrder, moved: Callable[[str], None], pace: Pace) -> None:
        self.workers = tuple(
            _Worker(order.ask(part), moved, self._broke, pace) for part in order.plan.parts
        )
        self._tunnels: Tunnels | None = None
        self._broken = asyncio.Event()
        self._reason = ""
        """What broke it first."""
        self.culprits: tuple[str, ...] = ()
        """Workers that broke it first; none if it was the tunnels."""
        self._lost: Callable[[str], None] | None = None
        self._ending = asyncio.Lock()

    async def prepare(
        self, connect: Connect, open_tunnels: OpenTunnels, probe: Probe
    ) -> tuple[str, ...]:
        """Raises an exception group, as TaskGroups do."""
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch(), name="loans: watch")
            await self._ask(tasks, connect)  # 1
            committed = [tasks.create_task(w.commit(), name="loans: commit") for w in self.workers]
            dug = tasks.create_task(self._dig(open_tunnels), name="loans: tunnels")
            for commit in committed:  # 2
                await commit
            endpoints = await dug  # 3
            probed = [
                tasks.create_task(worker.probe(probe, endpoint), name="loans: probe")
                for worker, endpoint in zip(self.workers, endpoints, strict=True)
            ]
            for answer in probed:
                await answer
            watch.cancel()
        return endpoints

    def hand_over(self, endpoints: tuple[str, ...], lost: Callable[[str], None]) -> Borrowed:
        """Raises SplitFailed if it broke in the last moment."""
        if self._broken.is_set():
            raise SplitFailed(self._reason, workers=self.culprits)
        self._lost = lost
        return Borrowed(self, endpoints)

    async def end(self, reason: str) -> None:
        self._lost = None
        for worker in self.workers:
            worker.line.hang_up(End(reason=reason))
        try:
            async with asyncio.timeout(END_S), self._ending:
                if self._tunnels is not None:
                    await self._tunnels.close()
                    self._tunnels = None
                for worker in self.workers:
                    await worker.line.wait_closed()
        except TimeoutError:
            log.warning("tunnels or loans did not end within %.0f s", END_S)

    async def _watch(self) -> None:
        await self._broken.wait()
        raise SplitFailed(self._reason, workers=self.culprits)

    async def _ask(self, tasks: asyncio.TaskGroup, connect: Connect) -> None:
        asked = [tasks.create_task(w.ask(connect), name="loans: ask") for w in self.workers]
        try:
            async with asyncio.timeout(ASK_S):
                for answer in asked:
                    await answer
        except TimeoutError:
            silent = [w for w in self.workers if not w.loan]
            names = ", ".join(w.name for w in silent)
            raise SplitFailed(
                f"no answer of {names} within {ASK_S:.0f} s",
                workers=tuple(w.part.node for w in silent),
            ) from None

    async def _dig(self, open_tunnels: OpenTunnels) -> tuple[str, ...]:
        ends = [(w.part, w.loan) for w in self.workers]
        try:
            async with asyncio.timeout(TUNNELS_S):
                self._tunnels = await open_tunnels(ends, self._tunnels_lost)
                return self._tunnels.endpoints
        except TimeoutError:
            raise SplitFailed(f"no tunnels to the workers within {TUNNELS_S:.0f} s") from None

    def _tunnels_lost(self, reason: str) -> None:
        self._broke(SplitFailed(reason))

    def _broke(self, error: SplitFailed) -> None:
        if self._broken.is_set():
            return
        self._reason, self.culprits = error.message, error.workers
        self._broken.set()
        if self._lost is not None:
            self._lost(self._reason)


class _Worker:
    """The loan of one worker, as the host sees it."""

    def __init__(
        self,
        ask: LoanAsk,
        moved: Callable[[str], None],
        broke: Callable[[SplitFailed], None],
        pace: Pace,
    ) -> None:
        self.part = ask.part
        self.name = ask.part.name
        self.line = Line(self._heard, self._over, pace)
        self.loan = LoanId("")
        """Empty until it is granted."""
        self.warmed_bytes = 0
        self._wanted = ask
        self._moved = moved
        self._broke = broke
        loop = asyncio.get_running_loop()
        self._granted: asyncio.Future[LoanId] = loop.create_future()
        self._serving: asyncio.Future[int] = loop.create_future()
        self._stall: asyncio.Timeout | None = None
        """Runs while it commits."""

    # -- steps ------------------------------------------------------------------------------------

    async def ask(self, connect: Connect) -> None:
        try:
            await connect(self.part.node, self.name, lambda: self.line)
        except MeshdError as error:
            raise self._failed(error.message) from None
        self.line.say(ask_to_wire(self._wanted))
        self.loan = await self._granted

    async def commit(self) -> None:
        self.line.say(Commit())
        try:
            async with asyncio.timeout(STALL_S) as self._stall:
                self.warmed_bytes = await self._serving
        except TimeoutError:
            raise self._failed(f"nothing moved there for {STALL_S:.0f} s") from None
        finally:
            self._stall = None

    async def probe(self, probe: Probe, endpoint: str) -> None:
        try:
            async with asyncio.timeout(PROBE_S):
                await probe(endpoint, self._wanted.rpc_protocol)
        except TimeoutError:
            raise self._failed(f"its RPC server did not answer within {PROBE_S:.0f} s") from None
        except MeshdError as error:
            raise self._failed(error.message) from None

    # -- what the worker says ---------------------------------------------------------------------

    def _heard(self, frame: Mapping[str, Any]) -> None:
        word = parse_worker_word(frame)
        match word:
            case None | Beat():
                pass
            case Granted():
                if self._granted.done():
                    raise ProtocolError("it granted twice")
                self._granted.set_result(word.loan)
            case Refused():
                self._over(word.message)
            case Moved():
                if self._stall is not None and not self._stall.expired():
                    self._stall.reschedule(asyncio.get_running_loop().time() + STALL_S)
                    self._moved(f"{self.name}: {word.words}")
            case Serving():
                if self._stall is None or self._serving.done():
                    raise ProtocolError("it serves what was not committed")
                self._serving.set_result(word.warmed_bytes)
            case Ended():
                self._over(word.reason)
            case _:
                assert_never(word)

    def _over(self, reason: str) -> None:
        self.line.hang_up(End(reason=reason))
        self._broke(self._failed(reason))

    def _failed(self, words: str) -> SplitFailed:
        return SplitFailed(f"worker {self.name}: {words}", workers=(self.part.node,))
