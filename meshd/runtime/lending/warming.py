"""Fills an RPC server's cache of tensors from weights that were verified on this machine.

A host offers each large tensor by its hash, and sends it if the server does not have it. Here the
server is given the same bytes first, from the file beside it: it hashes and keeps them itself, so
that what lies in its cache is what this very build looks for. That happens before the host
connects, since a server serves one connection at a time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meshd.errors import MeshdError
from meshd.kernel import Pool
from meshd.runtime.lending import rpc_words
from meshd.runtime.lending.extents import TensorExtent, offered_by_hash
from meshd.runtime.lending.rpc_client import Connection
from meshd.runtime.lending.tensor_cache import TensorCache

log = logging.getLogger(__name__)

TELL_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Warmed:
    """Bytes of a worker's tensors."""

    sent: int
    """Given to the server just now."""
    held: int
    """Known to lie in its cache; a host need not push them."""


async def warm(
    cache: TensorCache,
    port: int,
    tensors: Sequence[TensorExtent],
    *,
    rpc_protocol: str,
    pool: Pool,
    moved: Callable[[str], None],
) -> Warmed:
    """Have the RPC server on `port`, whose cache is `cache`, keep those of `tensors` (all this
    worker holds) that a host would offer by hash and that it has not kept before.

    `moved` is told how far it is, on the loop, more than once a second. Raises nothing: what was
    not warmed is pushed by the host. A cancelled warming ends within a second, in its thread.
    """
    if rpc_protocol != rpc_words.PROTOCOL:
        log.info("protocol %s of the engine is not known well enough to warm it", rpc_protocol)
        return Warmed(0, 0)
    loop = asyncio.get_running_loop()

    def tell(words: str) -> None:
        loop.call_soon_threadsafe(moved, words)

    work = _Warming(cache, port, tell)
    try:
        await pool.run(work.run, offered_by_hash(tensors))
    except (MeshdError, OSError) as error:
        log.warning("tensors could not be warmed, the host will push them: %s", error)
    except asyncio.CancelledError:
        work.given_up.set()
        raise
    return Warmed(work.sent, work.held)


class _GivenUp(OSError):
    """Nobody waits for it any more."""


@dataclass(slots=True)
class _Warming:
    """One warming, in a thread."""

    cache: TensorCache
    port: int
    tell: Callable[[str], None]
    sent: int = 0
    held: int = 0
    given_up: threading.Event = field(default_factory=threading.Event)
    _total: int = 0
    _told_at: float = float("-inf")
    _kept: dict[str, str] = field(default_factory=dict)

    def run(self, tensors: Sequence[TensorExtent]) -> None:
        """Raises OSError; what came before it counts."""
        lacking = self.cache.lacking(tensors, rpc_words.PROTOCOL)
        self._total = sum(t.size for t in lacking)
        self.held = sum(t.size for t in tensors) - self._total
        if not lacking:
            return
        began = time.monotonic()
        try:
            with Connection(self.port, self._waiting) as connection:
                self._give_all(connection, lacking)
        finally:
            if self._kept:
                self.cache.write_down(self._kept, rpc_words.PROTOCOL)
        seconds = time.monotonic() - began
        log.info("warmed %d tensors, %d bytes, in %.2f s", len(lacking), self.sent, seconds)

    def _give_all(self, connection: Connection, tensors: Sequence[TensorExtent]) -> None:
        if (found := connection.hello()) != rpc_words.PROTOCOL:
            raise OSError(f"the RPC server speaks protocol {found}")
        room = rpc_words.ROW_BYTES * rpc_words.rows(max(t.size for t in tensors))
        allocated = connection.allocate(room)
        if allocated is None:
            raise OSError(f"the RPC server has no {room} bytes to spare")
        buffer, base = allocated
        for tensor in tensors:
            before = self.cache.files()
            head = rpc_words.set_tensor_head(tensor.name, tensor.size, buffer=buffer, base=base)
            with Path(tensor.path).open("rb", buffering=0) as file:
                connection.set_tensor(head, file, tensor.offset, tensor.size, self._moved)
            name = self.cache.keep_tensor(tensor, before)
            if name is not None:
                self._kept[tensor.name] = name
                self.held += tensor.size
        connection.free(buffer)

    def _moved(self, count: int) -> None:
        self.sent += count
        self._waiting()

    def _waiting(self) -> None:
        if self.given_up.is_set():
            raise _GivenUp("the warming was given up")
        now = time.monotonic()
        if now >= self._told_at + TELL_EVERY_S:
            self._told_at = now
            self.tell(f"warming tensors: {self.sent >> 20} of {self._total >> 20} MiB")
