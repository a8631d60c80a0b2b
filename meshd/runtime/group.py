"""An engine and what other nodes lend it, as one unit: a pure machine.

The engine of a split model uses RPC servers of workers, through tunnels. Whoever lends them (the
rooms that open loans and tunnels, behind `Borrow`) and whoever runs the engine (`Child`) know
nothing of each other; what ends one of them ends all. Rules, numbered as in the code:

1. The workers are asked first. The engine is started when all of them serve.
2. Whatever ends the engine unasked is FAILED, and so is the loss of a worker: what can be done
   without it is planned anew, by the election.
3. The loss of a worker ends the engine by KILL. It may hang in a read that never ends, and nothing
   it could still say is of use.
4. An engine aborts when a worker's RPC server goes away, without saying whose, and is faster than
   the news. For `NEWS_S` after such an end the loss of a worker is waited for, to tell its name.
5. Loans end when the model has FAILED, at once, and after a stop when the engine is gone: requests
   in flight have the whole drain.
6. A stop while the workers are asked is waited for until all of that is undone.
7. STOPPED comes last: no engine, no loan, no task is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Protocol, assert_never

from meshd.ids import ModelId
from meshd.kernel.machine import Tick
from meshd.runtime.child_events import ChildState, StartAsked, StopAsked
from meshd.runtime.faults import RPC_LOST
from meshd.view import SplitPlan

NEWS_S: Final = 1.0
"""See rule 4. It only aborts when a connection was closed, and that is told in milliseconds."""


@dataclass(frozen=True, slots=True)
class LoanOrder:
    """What a host borrows for one engine."""

    model: ModelId
    epoch: int
    """Of its claim."""
    digest: str | None
    """Of the weights, so that workers find them on their disks."""
    plan: SplitPlan


class Borrowed(Protocol):
    """What all workers of an order lend, until it ends."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """HOST:PORT on this machine that lead to each part's RPC server, in the order's order."""

    @property
    def warmed_bytes(self) -> int:
        """Of tensors that workers took from their own disks."""

    async def end(self, reason: str) -> None:
        """Give all of it back; within seconds, and nothing if that was done."""


Borrow = Callable[[LoanOrder, Callable[[str], None], Callable[[str], None]], Awaitable[Borrowed]]
"""(order, lost, moved): ask all workers, and return when all of them serve. `lost(reason)` is
called at most once, after that, when one of them no longer does; `moved(words)` says how far it is.
Raises MeshdError, naming the worker. Then, and when it is cancelled, nothing stays borrowed."""


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskingMoved:
    words: str


@dataclass(frozen=True, slots=True)
class Granted:
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotGranted:
    """Some worker refused, or the asking was given up."""

    reason: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    reason: str


@dataclass(frozen=True, slots=True)
class EngineMoved:
    """What the engine's supervisor reports. After STOPPED it reports no more."""

    state: ChildState
    reason: str | None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class LoansEnded:
    pass


Event = (
    StartAsked
    | StopAsked
    | AskingMoved
    | Granted
    | NotGranted
    | WorkerLost
    | EngineMoved
    | LoansEnded
    | Tick
)


# -- effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskWorkers:
    """Ends in Granted or NotGranted."""


@dataclass(frozen=True, slots=True)
class StopAsking:
    """Hurries the end of AskWorkers."""


@dataclass(frozen=True, slots=True)
class LaunchEngine:
    """Ends in EngineMoved(STOPPED)."""

    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopLaunched:
    drain_s: float


@dataclass(frozen=True, slots=True)
class KillLaunched:
    pass


@dataclass(frozen=True, slots=True)
class EndLoans:
    """Ends in LoansEnded."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tell:
    """There may be something new to report."""


Effect = AskWorkers | StopAsking | LaunchEngine | StopLaunched | KillLaunched | EndLoans | Tell


# -- machine --------------------------------------------------------------------------------------


class _Loans(Enum):
    NONE = auto()
    ASKED = auto()
    HELD = auto()
    ENDING = auto()


class _Engine(Enum):
    NONE = auto()
    ALIVE = auto()
    DEAD = auto()
    """It FAILED; its supervisor has not been told to stop."""


class Group:
    """See the module's docstring. `workers`: their names, for people. Started once."""

    def __init__(self, workers: str) -> None:
        self.state = ChildState.STOPPED
        self.reason: str | None = None
        self.worker_lost = False
        """It FAILED because a worker refused or was lost: nothing is known to be wrong here."""
        self._workers = workers
        self._loans = _Loans.NONE
        self._engine = _Engine.NONE
        self._stopping = False
        self._lost: str | None = None
        """Why a worker was lost before anybody could make use of it."""
        self._news_at: float | None = None
        """Until when the loss of a worker is waited for."""

    def due(self) -> float | None:
        return self._news_at

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case StartAsked():
                self._loans = _Loans.ASKED  # 1
                return [*self._become(ChildState.STARTING, f"asking {self._workers} for memory"),
                        AskWorkers()]  # fmt: skip
            case StopAsked():
                return self._stop(event.drain_s)
            case AskingMoved():
                asking = self._loans is _Loans.ASKED and not self._stopping
                return self._become(ChildState.STARTING, event.words) if asking else []
            case Granted():
                return self._granted(event.endpoints)
            case NotGranted():
                self._loans = _Loans.NONE
                return self._wind_up() if self._stopping else self._fail_without(event.reason)
            case WorkerLost():
                return self._worker_lost(event.reason)
            case EngineMoved():
                return self._engine_moved(event, now)
            case LoansEnded():
                self._loans = _Loans.NONE
                return self._wind_up()
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _granted(self, endpoints: tuple[str, ...]) -> list[Effect]:
        self._loans = _Loans.HELD
        if self._stopping:
            return self._wind_up()
        if self._lost is not None:
            return self._fail_without(self._lost)
        self._engine = _Engine.ALIVE
        return [LaunchEngine(endpoints)]  # 1

    def _worker_lost(self, reason: str) -> list[Effect]:
        if self._loans is _Loans.ASKED:
            self._lost = reason  # it is faster than the word that they serve
            return []
        if self._loans is not _Loans.HELD:
            return []
        return self._end_all(reason) if self._stopping else self._fail_without(reason)  # 2

    def _engine_moved(self, event: EngineMoved, now: float) -> list[Effect]:
        if event.state is ChildState.STOPPED:
            self._engine = _Engine.NONE
            return self._wind_up()
        if event.state is ChildState.FAILED:
            self._engine = _Engine.DEAD
        if self.state is ChildState.FAILED:
            return []  # it is being ended, and why has been said
        if event.state is not ChildState.FAILED:
            return self._become(event.state, event.reason)
        reason = event.reason or "the engine ended"
        if event.fault == RPC_LOST:  # 4
            self._news_at = now + NEWS_S
            return self._become(ChildState.STOPPING, reason)
        return self._fail(reason)  # 2

    def _fail_without(self, reason: str) -> list[Effect]:
        self.worker_lost = True
        return self._fail(reason)

    def _fail(self, reason: str) -> list[Effect]:
        self._news_at = None
        ends = self._end_all(reason)  # 5
        return [*ends, *self._become(ChildState.FAILED, reason)]

    def _end_all(self, reason: str) -> list[Effect]:
        effects: list[Effect] = []
        if self._engine is _Engine.ALIVE:
            effects.append(KillLaunched())  # 3
        if self._loans is _Loans.HELD:
            self._loans = _Loans.ENDING
            effects.append(EndLoans(reason))
        return effects

    def _stop(self, drain_s: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._loans is _Loans.ASKED and not self._stopping:
            effects.append(StopAsking())  # 6
        self._stopping, self._news_at = True, None
        if self._engine is not _Engine.NONE:
            effects.append(StopLaunched(drain_s))
        return [*effects, *self._wind_up()]

    def _wind_up(self) -> list[Effect]:
        """The next step of the end, if it is its time."""
        if self._engine is not _Engine.NONE:
            return []
        if self._loans is _Loans.HELD:
            return self._end_all("the model is no longer wanted here")  # 5
        if self._loans is not _Loans.NONE or not self._stopping:
            return []
        return self._become(ChildState.STOPPED, None)  # 7

    def _tick(self, now: float) -> list[Effect]:
        if self._news_at is None or now < self._news_at:
            return []
        return self._fail_without(self.reason or "")  # 4

    def _become(self, state: ChildState, reason: str | None) -> list[Effect]:
        self.state, self.reason = state, reason
        return [Tell()]
