"""The shell around one machine: post -> handle -> record -> run effects -> re-arm the timer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from meshd.kernel.clock import Clock
from meshd.kernel.flight import FlightRecorder
from meshd.kernel.machine import Machine, Tick

E = TypeVar("E")
O = TypeVar("O")  # noqa: E741  (O for order)


class Driver(Generic[E, O]):
    """Owns `machine`: nobody else may call `handle`.

    Synchronous and run to completion: `post` returns when the event and everything its effects
    posted have been handled; a post from inside an effect queues behind the current one.
    `run_effect` must not block; slow work is started there and ends in a later `post`.
    """

    def __init__(
        self,
        name: str,
        machine: Machine[E | Tick, O],
        run_effect: Callable[[O], None],
        *,
        clock: Clock,
        recorder: FlightRecorder | None = None,
    ) -> None:
        self.name = name
        self.machine = machine
        self._run_effect = run_effect
        self._clock = clock
        self._recorder = recorder
        self._queue: deque[E | Tick] = deque()
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._closed = False

    def post(self, event: E | Tick) -> None:
        """Handle `event` now, or after the event being handled. A no-op once closed."""
        if self._closed:
            return
        self._queue.append(event)
        if self._running:
            return
        self._running = True
        try:
            while self._queue and not self._closed:
                self._step(self._queue.popleft())
        finally:
            self._running = False
        self._arm()

    @property
    def overdue_s(self) -> float:
        """How long ago the machine wanted waking. More than a moment means that nobody will: an
        order failed inside a timer, and the machine stands still for ever."""
        due = None if self._closed else self.machine.due()
        return 0.0 if due is None else max(0.0, self._clock.now() - due)

    def close(self) -> None:
        """Stop for good: no timer, no event after this."""
        self._closed = True
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _step(self, event: E | Tick) -> None:
        now = self._clock.now()
        effects = self.machine.handle(event, now)
        if self._recorder is not None:
            self._recorder.record(now, self.name, event, effects)
        for effect in effects:
            self._run_effect(effect)

    def _arm(self) -> None:
        due = None if self._closed else self.machine.due()
        if due == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = due
        if due is not None:
            # The loop's clock may tick coarser than ours; a Tick that comes early is handled by
            # re-arming, so round up by its resolution instead of spinning.
            delay = max(0.0, due - self._clock.now()) + 0.001
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = None
        due = self.machine.due()
        if due is None or due > self._clock.now():
            self._arm()
        else:
            self.post(Tick())
