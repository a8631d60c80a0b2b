"""The API as a service: sockets first, then everything behind them."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from meshd.api import refusals
from meshd.api.listener import BACKLOG, open_listeners
from meshd.api.pool import ConnectRemote
from meshd.api.relay import Relay
from meshd.config import Config
from meshd.errors import NodeDraining
from meshd.ids import InstanceId, ModelId
from meshd.kernel import Board, Clock, FlightRecorder, Service
from meshd.view import View

if TYPE_CHECKING:
    from meshd.api.events import EventHub
    from meshd.api.front import Front
    from meshd.api.metrics import MetricSource
    from meshd.api.usage import Usage

SWEEP_INTERVAL_S = 1.0
CLOSE_LIMIT_S = 1.0


class ApiServer(Service):
    """:9337. `bind` opens the port; `main` serves until `stopping`, then drains.

    `metrics`: further samples for `/metrics`. `connect_remote`: how to reach the relay of another
    node (see `pool.ConnectRemote`); without it only engines here are asked. `usage`: is told of
    requests. `plan`: what `/mesh/plan` says of a REF, raising MeshdError. The requests in flight
    when a stop begins have `config.drain_s`; `hurry` ends the wait.
    """

    name = "api"

    def __init__(
        self,
        config: Config,
        board: Board[View],
        *,
        clock: Clock,
        rng: random.Random,
        recorder: FlightRecorder | None = None,
        metrics: MetricSource | None = None,
        connect_remote: ConnectRemote | None = None,
        usage: Usage | None = None,
        plan: Callable[[str], dict[str, Any]] | None = None,
        sweep_interval_s: float = SWEEP_INTERVAL_S,
    ) -> None:
        super().__init__()
        self.stop_limit_s = config.drain_s + 3 * CLOSE_LIMIT_S
        self._config = config
        self._board = board
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._plan = plan
        self._sweep_interval_s = sweep_interval_s
        self._sockets: list[socket.socket] = []
        self._hurry = asyncio.Event()
        self._front: Front | None = None
        self._relay = Relay(
            config.api,
            clock=clock,
            rng=rng,
            recorder=recorder,
            spawn=lambda work: self.spawn(work, name="connect"),
            connect_remote=connect_remote,
            usage=usage,
        )

    # -- for the node -----------------------------------------------------------------------------

    def bind(self) -> tuple[str, int]:
        """Open the port and say which it is. Raises AddressInUse, BadConfig."""
        self._sockets = open_listeners(*self._config.listen_address)
        name = self._sockets[0].getsockname()
        return str(name[0]), int(name[1])

    def unbind(self) -> None:
        """Close the port of a server whose `main` never ran."""
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()

    def peer_protocol(self, peer: str) -> asyncio.Protocol:
        """For a stream of another node that is known to be `peer`: its requests are served like a
        client's, by engines of this node only. The caller calls `connection_made`, or hands it to
        the loop. Raises NodeDraining while the API does not run."""
        if self._front is None:
            raise NodeDraining("this node's API is not running")
        return self._front.for_peer(peer)

    def refuse_new(self) -> None:
        """The node shuts down: from now on no request begins here, of clients or of nodes. What is
        in flight goes on. (Draining by hand is the view's `node.state`, and can be undone.)"""
        self._relay.draining = True

    def use_key(self, key: str | None) -> None:
        """Ask for this API key from the next request on; None asks for none."""
        self._config = self._config.model_copy(update={"api_key": key})
        if self._front is not None:
            self._front.access.use_key(key)

    def hurry(self) -> None:
        """Do not wait for requests in flight any longer."""
        self._hurry.set()

    def cut_off(self) -> None:
        """End every request in flight, each with the answer or event its state still allows."""
        for exchange in tuple(self._relay.active):
            exchange.keep_alive = False
            exchange.fail(refusals.shutting_down())

    def status(self) -> dict[str, Any]:
        """What `/mesh/status` says."""
        from meshd.api import status

        view, now = self._board.current, self._clock.now()
        return status.status(view, self._config.mesh, now, self._relay.own_slots_in_use())

    def own_slots_in_use(self) -> Mapping[ModelId, int]:
        """Slots of this node's engines that requests hold now; a model without any is missing."""
        return self._relay.own_slots_in_use()

    async def wait_idle(self, instance: InstanceId) -> None:
        """Until no request is in flight on that engine."""
        await self._relay.flights.wait_idle(instance)

    def inflight(self, instance: InstanceId) -> int:
        return self._relay.flights.counts.get(instance, 0)

    def last_request_at(self, instance: InstanceId) -> float | None:
        """Monotonic time of the last begin or end of a request there; None if there was none."""
        return self._relay.flights.last_request_at(instance)

    async def wait_all_idle(self) -> None:
        """Until no request is in flight or waiting at all."""
        await self._relay.wait_all_idle()

    def inflight_total(self) -> int:
        return len(self._relay.active)

    # -- the service ------------------------------------------------------------------------------

    async def main(self) -> None:
        # The port is open by now, and connections queue in the kernel; aiohttp takes longer to
        # import than the rest of the node, so it comes after.
        from meshd.api.access import Access
        from meshd.api.dispatch import Dispatch
        from meshd.api.events import EventHub
        from meshd.api.front import Front
        from meshd.api.read_side import ReadSide

        if not self._sockets:
            self.bind()
        events = EventHub(self._board.current, self._clock.wall)
        read_side = ReadSide(
            self._board,
            self._relay,
            events,
            self._clock,
            self._config.mesh,
            self._metrics,
            self._plan,
        )
        dispatch = Dispatch(read_side)
        front = Front(self._config.api, self._relay, Access(self._config), self._rng, dispatch)
        dispatch.front = self._front = front
        self._relay.apply(self._board.current)
        unsubscribe = [
            self._board.subscribe(self._relay.apply),
            self._board.subscribe(events.apply),
        ]
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_server(front, sock=listener, backlog=BACKLOG)
            for listener in self._sockets
        ]
        self._sockets.clear()
        sweeper = self.spawn(self._sweep(front), name="sweep")
        try:
            self.ready.set()
            await self.stopping.wait()
            self.refuse_new()
            for server in servers:
                server.close()
            await self._drain(front, events)
        finally:
            for end in unsubscribe:
                end()
            for server in servers:
                server.close()
            sweeper.cancel()
            self._front = None
            self._relay.close()
            front.abort_all()
            await front.close(CLOSE_LIMIT_S)

    async def _drain(self, front: Front, events: EventHub) -> None:
        """Finish what is in flight, within `drain_s`; then tell what is left that it ends here."""
        events.close()
        front.close_idle()
        hurry = self.spawn(self._until_hurry(), name="hurry")
        idle = self.spawn(self._relay.wait_all_idle(), name="idle")
        try:
            await asyncio.wait(
                {hurry, idle},
                timeout=self._config.drain_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            hurry.cancel()
            idle.cancel()
        self.cut_off()

    async def _until_hurry(self) -> None:
        await self._hurry.wait()

    async def _sweep(self, front: Front) -> None:
        interval_s = self._sweep_interval_s
        while True:
            planned = self._clock.now() + interval_s
            await asyncio.sleep(interval_s)
            now = self._clock.now()
            self._relay.traffic.lags.append(max(0.0, now - planned))
            self._relay.sweep(now)
            front.sweep(now)
