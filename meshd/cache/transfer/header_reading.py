"""The headers of a set whose files are elsewhere, by ranges from other nodes and the hub. Blocking.

0. Of a file that lies whole on this disk the header is read there.
1. A few nodes are asked before the hub (those that say they hold the set come first), the others
   after it. One that fails, in whatever way, is asked no more.
2. The hub is asked again for a while when it is ill.
3. Nothing that comes is hashed: what a header says decides where a model may go, and not what an
   engine is given.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final, Protocol

from meshd.cache.gguf_cursor import GgufError, NeedMore, Walks
from meshd.cache.gguf_header import GgufHeader, parse_header
from meshd.cache.hashes import Stopped
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.observe import MAX_HEADER_BYTES, observe
from meshd.cache.pairing import pairs
from meshd.cache.shape import shape_of
from meshd.cache.transfer.pace import Backoff
from meshd.cache.transfer.peer_source import PeerFile
from meshd.cache.transfer.plan import HUB
from meshd.cache.transfer.words import FetchOrder, OpenStream, PeerSource
from meshd.errors import HubRefused, HubUnavailable, MeshdError, PeerRefused
from meshd.view.shape import ModelShape

FIRST_BYTES: Final = 1024 * 1024
"""Read at first of a file that has metadata; as much again each time that it was not enough."""
LATER_FIRST_BYTES: Final = 64 * 1024
"""The same of later shards, which have little but the extents of their tensors."""
PEERS_BEFORE_HUB: Final = 2
"""Asking one that is gone costs seconds, and has to end."""


class Readable(Protocol):
    """A file that is elsewhere."""

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop`. Raises MeshdError."""


class HeaderReading:
    def __init__(
        self,
        order: FetchOrder,
        manifest: Manifest,
        *,
        hub: Callable[[Shard], Readable] | None,
        open_stream: OpenStream | None,
        blob: Callable[[Shard], Path],
    ) -> None:
        """`hub`: a file as the hub has it; None if it cannot be asked. `blob`: where a file would
        lie here."""
        self._blob = blob
        self._workers = order.workers
        self._manifest = manifest
        self._hub = hub
        self._open_stream = open_stream
        self._peers = order.peers if open_stream is not None else ()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._left: set[str] = set()
        """Ids of nodes that are asked no more."""
        self._counts: dict[str, int] = {}

    def run(self) -> tuple[ModelShape, dict[str, int]]:
        """The shape, and bytes got by source. Raises HubRefused, HubUnavailable, Stopped."""
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="header")
        try:
            pending = [pool.submit(self._header, shard) for shard in self._manifest.files]
            over, _ = wait(pending, return_when=FIRST_EXCEPTION)
            for one in over:
                one.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        headers = [one.result() for one in pending]
        count = len(self._manifest.shards)
        return _shape(headers[:count], headers[count:]), self._counts

    def stop(self) -> None:
        """From a signal's handler."""
        self._stop.set()

    def _header(self, shard: Shard) -> GgufHeader:
        here = observe(str(self._blob(shard)))
        if here.header is not None and here.facts is not None and here.facts.size == shard.size:
            return here.header  # 0
        peers = self._left_peers()
        for peer in peers[:PEERS_BEFORE_HUB]:  # 1
            if (header := self._from_peer(peer, shard)) is not None:
                return header
        why = HubUnavailable(f"no other node has {shard.name}, and the hub cannot be asked")
        if self._hub is not None:
            try:
                return self._from_hub(self._hub(shard), shard)
            except HubUnavailable as error:
                why = error
        for peer in peers[PEERS_BEFORE_HUB:]:
            if (header := self._from_peer(peer, shard)) is not None:
                return header
        raise why

    def _left_peers(self) -> Sequence[PeerSource]:
        with self._lock:
            return [peer for peer in self._peers if peer.node_id not in self._left]

    def _from_peer(self, peer: PeerSource, shard: Shard) -> GgufHeader | None:
        assert self._open_stream is not None, "without a way there are no peers"
        try:
            file = PeerFile.open(self._open_stream, peer, shard)
            try:
                if not file.whole:
                    raise PeerRefused(f"node {peer.name} has only parts", reason="not_there")
                return self._read(file, shard, peer.name)
            finally:
                file.close()
        except (MeshdError, GgufError):
            with self._lock:
                self._left.add(peer.node_id)
            return None

    def _from_hub(self, file: Readable, shard: Shard) -> GgufHeader:
        backoff = Backoff(random.random)
        while True:
            try:
                return self._read(file, shard, HUB)
            except GgufError as error:
                raise HubRefused(
                    f"{shard.name} of {self._manifest.repo} is no model that can be used: {error}"
                ) from None
            except HubUnavailable as error:  # 2
                now = time.monotonic()
                if not backoff.failed(now, error.retry_after_s):
                    raise
                self._stop.wait(backoff.retry_at - now)

    def _read(self, file: Readable, shard: Shard, source: str) -> GgufHeader:
        """Raises GgufError, Stopped, and what `file` raises."""
        data, walks = b"", Walks()
        for stop in _stops(shard, has_metadata=shard not in self._manifest.shards[1:]):
            if self._stop.is_set():
                raise Stopped
            piece = file.read_range(len(data), stop)
            data += piece
            with self._lock:
                self._counts[source] = self._counts.get(source, 0) + len(piece)
            try:
                return parse_header(data, shard.size, walks)
            except NeedMore:
                continue
        raise GgufError(f"its header has more than {MAX_HEADER_BYTES} bytes")


def _stops(shard: Shard, *, has_metadata: bool) -> Iterator[int]:
    """Up to where to read, each time further than before."""
    stop = FIRST_BYTES if has_metadata else LATER_FIRST_BYTES
    while stop < min(MAX_HEADER_BYTES, shard.size):
        yield stop
        stop *= 2
    yield min(MAX_HEADER_BYTES, shard.size)


def _shape(shards: Sequence[GgufHeader], projectors: Sequence[GgufHeader]) -> ModelShape:
    """With the projector only if it fits the model: an engine is given no other."""
    fitting = [one for one in projectors if pairs(shards[0], one) is None]
    return shape_of(shards, fitting[0] if fitting else None)
