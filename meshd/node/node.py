"""A node's life: start, signals, end. What it is made of: `rooms.py`.

Start, in this order: the data directory is locked, the API listens (the port answers from here on),
the admin socket, then everything slow behind them. Stop, on SIGTERM or SIGINT: new requests are
refused, those in flight finish within `drain_s`, engines end, sockets go. A second signal hurries.
SIGHUP reads the configuration again (`reload.py`); in a terminal, which sends it when it is
closed, it stops the node.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import sys
from typing import TYPE_CHECKING, Any

from meshd import __version__
from meshd.api import ApiServer
from meshd.config import Loaded
from meshd.errors import MeshdError
from meshd.ids import NodeId
from meshd.kernel import Board, FlightRecorder, MonotonicClock, ServiceStack
from meshd.node.reload import reload
from meshd.node.rooms import Rooms, set_node
from meshd.node.service_manager import ServiceManager
from meshd.view import NodeState, NodeView, Role, View

if TYPE_CHECKING:
    from meshd.api.admin import InviteBody

log = logging.getLogger(__name__)

END_LIMIT_S = 60.0
"""What a stop may take beyond `drain_s`: services end one after the other, engines the longest."""


class Node:
    """One run of a node; `run` is called once, inside the loop it belongs to."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        config = self.config = loaded.config
        self._clock = MonotonicClock()
        self._recorder = FlightRecorder()
        self._rng = random.Random()  # the one source of chance, handed to the shells
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._exit_code = 0
        node = NodeView(
            id=NodeId(""),
            name=config.name,
            version=__version__,
            role=Role.MEMBER.value,
            state=NodeState.STARTING,
            started_at=self._clock.now(),
            listen=config.listen,
            peer_listen=None,
        )
        self._board = Board(View(node=node))
        self._manager = ServiceManager(self._board)
        self._rooms = Rooms(
            config, self._board, clock=self._clock, rng=self._rng, recorder=self._recorder
        )

    async def run(self) -> int:
        api = ApiServer(
            self.config,
            self._board,
            clock=self._clock,
            rng=self._rng,
            recorder=self._recorder,
            metrics=self._rooms.counts,
            connect_remote=self._rooms.connect_remote,
            usage=self._rooms.usage,
            plan=self._rooms.usage.plan,
        )
        host, port = api.bind()
        self._set_node(listen=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        stack = ServiceStack()
        self._install_signals(api)
        self._manager.follow()
        try:
            await stack.start(api)
            log.info("API listens on http://%s/v1", self._board.current.node.listen)
            await self._rooms.start(stack, api, self)
            if watchdog := self._manager.watchdog(self._rooms.overdue_s, clock=self._clock):
                await stack.start(watchdog)
            self._set_node(state=NodeState.READY)
            self._manager.ready()
            # What is alive now stays: full collections need not walk it again.
            gc.collect()
            gc.freeze()
            gc.enable()
            await self._wait_for_end(stack)
        finally:
            await self._shut_down(stack, api)
        return self._exit_code

    # -- admin.MeshControls -----------------------------------------------------------------------

    async def invite(self, body: InviteBody) -> dict[str, Any]:
        return await self._rooms.joined().invite(
            ttl_s=body.ttl_s, uses=body.uses, role=body.role, issuer=body.issuer
        )

    async def revoke(self, node: str) -> dict[str, Any]:
        return await self._rooms.joined().revoke(node)

    async def leave(self) -> dict[str, Any]:
        return await self._rooms.joined().leave()

    async def drain(self) -> dict[str, Any]:
        """Until `undrain`: its models are moved to other nodes, and it takes no others."""
        return self._drain_by_hand(NodeState.DRAINING)

    async def undrain(self) -> dict[str, Any]:
        return self._drain_by_hand(NodeState.READY)

    def _drain_by_hand(self, state: NodeState) -> dict[str, Any]:
        if not self._stop.is_set():
            self._set_node(state=state)
        return {"state": self._board.current.node.state.value}

    # -- signals ----------------------------------------------------------------------------------

    def _install_signals(self, api: ApiServer) -> None:
        loop = asyncio.get_running_loop()
        ends = [signal.SIGTERM, signal.SIGINT]
        if sys.stdin is not None and sys.stdin.isatty():
            ends.append(signal.SIGHUP)  # the terminal was closed, and the node goes with it
        else:
            loop.add_signal_handler(signal.SIGHUP, self._reload, api)
        for number in ends:
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.info("%s again: ending without waiting for requests", number.name)
            self._hurry.set()
        else:
            log.info("%s: draining for at most %.0f s", number.name, self.config.drain_s)
            self._stop.set()

    def _reload(self, api: ApiServer) -> None:
        # Some kilobytes of files, now and then: no reason to go through a pool.
        self._manager.reloading()
        try:
            new = reload(self.config, self._loaded.again().config)
        except MeshdError as error:
            log.error("SIGHUP: everything stays as it is: %s", error.message)
        else:
            self.config = new.config
            logging.getLogger().setLevel(new.config.log_level.upper())
            api.use_key(new.config.api_key)
            log.warning("SIGHUP: %s", new.words())
        self._manager.ready()

    # -- end --------------------------------------------------------------------------------------

    async def _wait_for_end(self, stack: ServiceStack) -> None:
        told = asyncio.create_task(self._wait_told(), name="node:told to stop")
        try:
            await asyncio.wait({told, stack.failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
        if stack.failed.done():
            self._exit_code = self._explain(stack.failed.exception())

    def _explain(self, error: BaseException | None) -> int:
        """Say why the node ends on its own; the exit code of it."""
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, MeshdError):  # said on purpose, for example by a mesh that refuses us
            log.error("%s", error.message)
            return error.exit_code
        log.critical("a service failed; stopping", exc_info=error)
        self._write_flight()
        return 1

    async def _wait_told(self) -> None:
        await self._stop.wait()

    async def _shut_down(self, stack: ServiceStack, api: ApiServer) -> None:
        api.refuse_new()
        self._manager.stopping(self.config.drain_s + END_LIMIT_S)
        self._rooms.withdraw()
        self._set_node(state=NodeState.DRAINING)
        if self._exit_code == 0:
            await self._drain(api)
        # An engine finishes its streams before it follows a TERM: leave it none.
        api.cut_off()
        api.hurry()
        await stack.stop()
        self._rooms.close()
        log.info("stopped")

    async def _drain(self, api: ApiServer) -> None:
        """Until no request is in flight, `drain_s` passed, or a second signal came."""
        idle = asyncio.create_task(api.wait_all_idle(), name="node:idle")
        hurry = asyncio.create_task(self._hurry.wait(), name="node:hurry")
        done, pending = await asyncio.wait(
            {idle, hurry}, timeout=self.config.drain_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if idle not in done:
            log.warning("ending with %d requests in flight", api.inflight_total())

    def _write_flight(self) -> None:
        path = self.config.log_dir / "flight.txt"
        try:
            path.write_text(self._recorder.render())
        except OSError as error:
            log.warning("the flight record could not be written to %s: %s", path, error)
        else:
            log.critical("events and effects up to the failure: %s", path)

    def _set_node(self, **changes: object) -> None:
        set_node(self._board, **changes)
