"""The daemon's side of its tunnels: starts the process, hears its news, ends it.

One process for one split model, so that the end of the process and the end of the tunnels are the
same thing: whatever becomes of one of them, none is left half open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Final

from meshd.config import environment_of_children
from meshd.errors import MeshdError, ProtocolError
from meshd.ids import NodeId
from meshd.peers.bulk.tunnel_words import (
    NEWS_LIMIT,
    Carried,
    Ends,
    Listening,
    News,
    Refused,
    TunnelEnd,
    parse_news,
)
from meshd.peers.bulk.words import Credentials
from meshd.peers.links.frames import FrameReader, frame, parse

log = logging.getLogger(__name__)

OPEN_S: Final = 5.0
"""From the order to the ports. The process takes half a second to start, more on a busy machine."""
END_S: Final = 2.0
"""From SIGKILL to the end of the process."""


class TunnelsFailed(MeshdError):
    """The process of tunnels did not come up; the message says why."""

    code, status, retryable = "tunnels_failed", 503, True


class Tunnels:
    """Made by `open`. Whoever opened them closes them, also after `lost`."""

    def __init__(
        self,
        ends: Sequence[TunnelEnd],
        lost: Callable[[str], None],
        counted: Callable[[NodeId, int, int], None],
    ) -> None:
        self.endpoints: tuple[str, ...] = ()
        """`127.0.0.1:PORT` of each worker's RPC server, in the order of the ends."""
        self.strangers = 0
        """Connections of other users, which were closed."""
        self._ends = tuple(ends)
        self._lost = lost
        self._counted = counted
        self._refusals: dict[NodeId, str] = {}
        self._ports: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        """Empty if the process ended before."""
        self._exited = asyncio.Event()
        self._process: asyncio.SubprocessTransport | None = None
        self._control: asyncio.Transport | None = None
        self._opened = False
        self._over = False
        """It is being closed, or the process is gone."""

    @classmethod
    async def open(
        cls,
        command: tuple[str, ...],
        credentials: Credentials,
        ends: Sequence[TunnelEnd],
        *,
        lost: Callable[[str], None],
        counted: Callable[[NodeId, int, int], None],
    ) -> Tunnels:
        """Tunnels to `ends`, each of which can be connected to; that its worker answers is not
        known yet. Raises TunnelsFailed, within `OPEN_S`.

        `command` becomes the process, its standard input a socket (`tunnel_words.py`). `lost` is
        called once, with words for people, if the process ends unasked after this returned.
        `counted` gets bytes received from and sent to a node since its last call, about once a
        second while there are any.
        """
        self = cls(ends, lost, counted)
        try:
            async with asyncio.timeout(OPEN_S):
                await self._start(command, Ends(credentials=credentials, ends=self._ends))
                ports = await self._ports
            if self._over or not ports:
                raise TunnelsFailed("the process of tunnels ended as it began")
            self.endpoints = tuple(f"127.0.0.1:{port}" for port in ports)
            self._opened = True
        except TimeoutError:
            raise TunnelsFailed(f"no tunnels within {OPEN_S:.0f} s") from None
        except OSError as error:
            raise TunnelsFailed(f"the process of tunnels cannot be started: {error}") from None
        finally:
            if not self._opened:
                await self.close()
        names = ", ".join(end.name for end in self._ends)
        log.info("tunnels to %s run as process %d", names, self.pid)
        return self

    @property
    def pid(self) -> int:
        """Of the process; 0 if there is none."""
        return 0 if self._process is None else self._process.get_pid() or 0

    def refusal(self, node: NodeId) -> str | None:
        """Why a connection to that node's RPC server could last not be had; the other side's words
        where it had some."""
        return self._refusals.get(node)

    async def close(self) -> None:
        """End the process, and with it every tunnel."""
        self._over = True
        self._ports.cancel()
        if self._control is not None:
            self._control.abort()
        if self._process is None:
            return
        self._kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._exited.wait()
        self._process.close()

    # -- the process ------------------------------------------------------------------------------

    async def _start(self, command: tuple[str, ...], order: Ends) -> None:
        loop = asyncio.get_running_loop()
        control, its_control = socket.socketpair()
        try:
            with its_control:
                self._process, _ = await loop.subprocess_exec(
                    lambda: _Exit(self._exited, self._ended),
                    *command,
                    stdin=its_control.fileno(),
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=None,
                    env=environment_of_children(),
                    start_new_session=True,
                )
            self._control, _ = await loop.create_unix_connection(
                lambda: _Control(self._heard, self._ended), sock=control
            )
        except BaseException:
            control.close()
            raise
        self._control.write(frame(order.model_dump()))

    def _ended(self) -> None:
        """The process or its socket is gone."""
        if self._over:
            return
        self._over = True
        self._kill()
        if self._opened:
            log.warning("the process of tunnels is gone, and every tunnel with it")
            self._lost("the process of tunnels ended")
        elif not self._ports.done():
            self._ports.set_result(())

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    # -- its news ---------------------------------------------------------------------------------

    def _heard(self, news: News) -> None:
        """Raises ProtocolError."""
        match news:
            case Listening(ports=ports) if len(ports) == len(self._ends) and not self._ports.done():
                self._ports.set_result(ports)
            case Carried(bytes=carried) if len(carried) == len(self._ends):
                if news.strangers:  # at most one line for each report, however many try
                    self.strangers += news.strangers
                    log.warning("%d tunnels were refused to other users here", news.strangers)
                for end, (received, sent) in zip(self._ends, carried, strict=True):
                    if received or sent:
                        self._counted(end.node_id, received, sent)
            case Refused(end=index) if index < len(self._ends):
                end = self._ends[index]
                self._refusals[end.node_id] = news.message
                log.warning("no tunnel to node %s: %s", end.name, news.message)
            case _:
                raise ProtocolError(f"the process of tunnels says `{news.t}` out of place")


class _Control(asyncio.Protocol):
    """Frames from the process."""

    def __init__(self, heard: Callable[[News], None], ended: Callable[[], None]) -> None:
        self._heard = heard
        self._ended = ended
        self._reader = FrameReader(NEWS_LIMIT)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                self._heard(parse_news(parse(body)))
        except ProtocolError:
            log.exception("the process of tunnels talks nonsense and is ended")
            self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()


class _Exit(asyncio.SubprocessProtocol):
    def __init__(self, exited: asyncio.Event, ended: Callable[[], None]) -> None:
        self._exited = exited
        self._ended = ended

    def process_exited(self) -> None:
        self._exited.set()
        self._ended()
