"""One end of a loan's stream: frames both ways, a beat every second, and one end.

Silence is counted in looks of our own and not by a clock: a process that stood still for a while
finds what the other side said meanwhile before it calls it silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from meshd.errors import ProtocolError
from meshd.peers.links.frames import FrameReader, frame, parse
from meshd.peers.loans.words import FRAME_LIMIT, Beat, Moved
from meshd.peers.trust.wire import WireModel

SILENT_S: Final = 4.0
LINGER_S: Final = 1.0
"""How long the last words may take to leave."""
LOOKS_A_BEAT: Final = 4
BACKLOG_BYTES: Final = 64 * 1024
"""Full-policy: words about progress are left out when so much waits for the other side."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a line lives. Both ends of a mesh use the same."""

    beat_s: float = 1.0
    silent_s: float = SILENT_S
    """Who said nothing for so long is taken for gone at the next look, a quarter of a beat later
    at most."""


class Line(asyncio.Protocol):
    """`heard(frame)` for each frame, which may raise ProtocolError: the line ends then.
    `over(reason)` once, unless `hang_up` came before; it may hang up itself, with a last word."""

    def __init__(
        self,
        heard: Callable[[Mapping[str, Any]], None],
        over: Callable[[str], None],
        pace: Pace,
    ) -> None:
        self._heard = heard
        self._over = over
        self._pace = pace
        self._reader = FrameReader(FRAME_LIMIT)
        self._transport: asyncio.Transport | None = None
        self._ended = False
        self._closed = asyncio.Event()
        self._looks = 0
        self._unheard = 0
        """Looks since the other side's last word."""
        self._timer: asyncio.TimerHandle | None = None

    # -- for its owner ----------------------------------------------------------------------------

    def say(self, word: WireModel | dict[str, Any]) -> None:
        """A no-op once the line has ended."""
        if self._ended or self._transport is None or self._transport.is_closing():
            return
        if isinstance(word, Moved) and self._transport.get_write_buffer_size() > BACKLOG_BYTES:
            return
        self._transport.write(
            frame(word if isinstance(word, dict) else word.model_dump(mode="json"))
        )

    def hang_up(self, last: WireModel | None = None) -> None:
        """End it from this side; `over` is not called from now on. May be called again."""
        if self._ended:
            return
        if last is not None:
            self.say(last)
        self._ended = True
        self._rest()
        if self._transport is not None:
            # A close waits for an answer of the other side, which may be gone without a word.
            self._transport.close()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LINGER_S, self._transport.abort)

    async def wait_closed(self) -> None:
        """Until the connection is gone; after `hang_up`, `LINGER_S` at most."""
        if self._transport is not None:
            await self._closed.wait()

    # -- asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        self._unheard = 0
        try:
            for body in self._reader.feed(data):
                if self._ended:
                    return
                self._heard(parse(body))
        except ProtocolError as error:
            self._end(error.message)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._closed.set()
        self._end(f"the connection broke: {exc}" if exc is not None else "the connection closed")
        self._rest()

    # -- life -------------------------------------------------------------------------------------

    def _look(self) -> None:
        pause_s = self._pace.beat_s / LOOKS_A_BEAT
        if self._unheard * pause_s >= self._pace.silent_s:
            self._end(f"nothing was heard of it for {self._pace.silent_s:g} s")
            return
        if self._looks % LOOKS_A_BEAT == 0:
            self.say(Beat())
        self._looks += 1
        self._unheard += 1
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._look)

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._over(reason)
            self.hang_up()

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
