"""The board: where rooms hang up their latest snapshot and see the others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Board(Generic[T]):
    """Holds one immutable value and tells subscribers when it is replaced.

    Synchronous, single-threaded. A subscriber that publishes is told last: changes made while
    subscribers run are delivered after the current round, in order, so nobody sees them reversed.
    """

    def __init__(self, value: T) -> None:
        self._value = value
        self._subscribers: list[Callable[[T], None]] = []
        self._pending: list[T] = []
        self._delivering = False

    @property
    def current(self) -> T:
        return self._value

    def publish(self, value: T) -> None:
        """Replace the value. Publishing an equal value tells nobody."""
        if value == self._value:
            return
        self._value = value
        self._pending.append(value)
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._pending:
                latest = self._pending.pop(0)
                for subscriber in tuple(self._subscribers):
                    subscriber(latest)
        finally:
            self._delivering = False

    def subscribe(self, subscriber: Callable[[T], None]) -> Callable[[], None]:
        """Call `subscriber` with every later value; returns what ends the subscription."""
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

        return unsubscribe
