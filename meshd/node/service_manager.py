"""A node and the service manager that started it: what the one tells, and what it looks at first.

Started by hand, there is no manager, and all of this does nothing.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from meshd.config import notify_socket, split_address, watchdog_limit_s
from meshd.kernel import Board, Clock, Service
from meshd.kernel.notify import Notifier
from meshd.kernel.watchdog import Check, Watchdog
from meshd.view import ModelState, NodeState, PeerState, View

STANDSTILL_LIMIT_S = 10.0
"""Supervision of engines that is this much behind its own plan stands still."""
OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})
"""Why the question could not be asked: the machine has run out of something. A restart, which ends
every request, would not give it back."""
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ServiceManager:
    def __init__(self, board: Board[View], notifier: Notifier | None = None) -> None:
        self._board = board
        self._notifier = Notifier(notify_socket()) if notifier is None else notifier
        self._said = ""

    def follow(self) -> None:
        """Tell it what the node is doing, whenever that changes."""
        if self._notifier.heard:
            self._board.subscribe(self._tell_state)
            self._tell_state(self._board.current)

    def watchdog(self, overdue_s: Callable[[], float], *, clock: Clock) -> Service | None:
        """The service that feeds its watchdog; None if it has none. `overdue_s`: how far the
        supervision of engines is behind its plan."""
        limit_s = watchdog_limit_s()
        if limit_s is None or not self._notifier.heard:
            return None
        checks: dict[str, Check] = {
            "API": lambda: answers(self._board.current.node.listen),
            "engines": lambda: moves(overdue_s()),
        }
        return Watchdog(self._notifier, limit_s, checks, clock=clock)

    def ready(self) -> None:
        self._notifier.ready()

    def reloading(self) -> None:
        self._notifier.reloading()

    def stopping(self, limit_s: float) -> None:
        self._notifier.stopping(limit_s)

    def _tell_state(self, view: View) -> None:
        words = status_line(view)
        if words != self._said:
            self._said = words
            self._notifier.status(words)


def status_line(view: View) -> str:
    """One line for `systemctl status`: the node, its own models, its mesh."""
    node = view.node
    if node.state is NodeState.STARTING:
        return f"starting; the API listens on {node.listen}"
    states = [model.state for model in view.local.values()]
    loaded = len(states) - states.count(ModelState.ABSENT)
    alive = sum(peer.state is PeerState.ALIVE for peer in view.peers)
    ready = f"{states.count(ModelState.READY)} of {loaded} models ready"
    models = ready if loaded else "no model loaded"
    mesh = f"{alive} other node{'s' * (alive != 1)} alive" if view.peers else "alone in its mesh"
    return f"{node.state}; {models}; {mesh}"


async def answers(listen: str) -> str | None:
    """A check: the API, asked through its own port. Any answer will do; a full house says so, and
    is alive."""
    host, port = split_address(listen)
    try:
        reader, writer = await asyncio.open_connection(ANYWHERE.get(host, host), port)
        try:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            first = await reader.readline()
        finally:
            writer.close()
    except OSError as error:
        return None if error.errno in OUT_OF else f"{listen} does not answer: {error}"
    return None if first.startswith(b"HTTP/1.1 ") else f"{listen} answers {first[:40]!r}"


async def moves(overdue_s: float) -> str | None:
    """A check: supervision goes on."""
    return f"{overdue_s:.0f} s behind" if overdue_s > STANDSTILL_LIMIT_S else None
