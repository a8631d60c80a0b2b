"""Those who bring: threads that ask the files of a fetch for work and get it from one source each.

The hub has several, every peer one. All stop by themselves when the fetch is over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol

from meshd.cache.chunks import CHUNK_BYTES, chunk_span
from meshd.cache.manifest import Shard
from meshd.cache.transfer.flights import Span
from meshd.cache.transfer.job import Job
from meshd.cache.transfer.pace import FIRST_DELAY_S
from meshd.cache.transfer.peer_source import PeerFile
from meshd.cache.transfer.plan import HUB
from meshd.cache.transfer.words import OpenStream, PeerSource
from meshd.errors import (
    HubRefused,
    HubUnavailable,
    MeshdError,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
)

AHEAD: Final = 2
"""Requests under way on one stream: while one is answered the next is there already."""
BUFFERS: Final = 3
"""Of a chunk each: one is filled while others are hashed and written."""
PIECE_BYTES: Final = 256 * 1024
"""Of a chunk, after which silence begins anew."""
BUSY: Final = "busy"
"""A refusal for now."""
MAX_DIALS: Final = 3
"""In a row that brought nothing, before a peer is left."""
REFRESH_S: Final = 1.0
"""Between two questions to a peer that has only parts yet."""


class Fetch(Protocol):
    """What a worker sees of the whole."""

    @property
    def over(self) -> bool:
        """Everything is done, or nothing more is wanted."""

    @property
    def jobs(self) -> Sequence[Job]:
        """The files, in order; ask only those that are `open`."""

    def find(self, source: str, first: Job | None, *, idle: bool) -> tuple[Job, Span] | None:
        """Work for `source`, of `first` if there is any; `idle`: taken off others."""

    def rest(self, until: float | None = None) -> None:
        """Wait until something happens, but not for long; or until `until`, or the end."""

    def count(self, source: str, length: int) -> None:
        """So many bytes came over the network."""

    def fail(self, error: MeshdError) -> None:
        """All is over, because of this."""

    def hub_failed(self, error: MeshdError) -> bool:
        """Whether to go on with the hub, from `hub_retry_at` on."""

    def hub_worked(self) -> None: ...

    @property
    def hub_retry_at(self) -> float: ...


class HubFile(Protocol):
    """A file at the hub; see `hub_source`."""

    def fetch(
        self, span: Span, buffer: memoryview, deliver: Callable[[int, memoryview], bool]
    ) -> None: ...


class HubWorker:
    """One connection to the hub at a time."""

    def __init__(self, fetch: Fetch, file_of: Callable[[Shard], HubFile]) -> None:
        self._fetch = fetch
        self._file_of = file_of
        self._job: Job | None = None

    def run(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while not self._fetch.over:
            if self._fetch.hub_retry_at > time.monotonic():
                self._fetch.rest(self._fetch.hub_retry_at)
            elif found := self._find():
                self._bring(*found, buffer)
            else:
                self._fetch.rest()

    def _find(self) -> tuple[Job, Span] | None:
        find = self._fetch.find
        return find(HUB, None, idle=False) or find(HUB, None, idle=True)

    def _bring(self, job: Job, span: Span, buffer: memoryview) -> None:
        def deliver(index: int, data: memoryview) -> bool:
            self._fetch.hub_worked()
            self._fetch.count(HUB, len(data))
            return job.deliver(span, index, data) and not self._fetch.over

        try:
            self._file_of(job.shard).fetch(span, buffer, deliver)
        except HubUnavailable as error:
            if not self._fetch.hub_failed(error):
                for each in self._fetch.jobs:
                    each.leave(HUB, error)
        except HubRefused as error:
            job.leave(HUB, error)
        except MeshdError as error:
            self._fetch.fail(error)
        finally:
            job.finished(span)


@dataclass(slots=True)
class _Seen:
    """What a peer last said of a file it has only parts of."""

    bits: bytes
    asked_at: float
    gained_at: float


class PeerWorker:
    """One stream to one peer at a time, for one file after the other."""

    def __init__(
        self, fetch: Fetch, source: str, peer: PeerSource, open_stream: OpenStream, stall_s: float
    ) -> None:
        """`source`: what plans and news call the peer."""
        self._fetch = fetch
        self._source = source
        self._peer = peer
        self._open_stream = open_stream
        self._stall_s = stall_s
        self._file: PeerFile | None = None
        self._job: Job | None = None
        self._seen: dict[Job, _Seen] = {}
        self._failures = 0
        self._heard_at: float | None = None
        """When bytes last came of those that are waited for; None while none are."""

    def run(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="meshd-keep") as pool:
            while not self._fetch.over:
                try:
                    self._work(pool)
                except PeerRefused as error:
                    self._refused(error)
                except PeerUnreachable as error:
                    self._failed(error)
                except ProtocolError as error:
                    self._leave_all(error)
                except MeshdError as error:
                    self._fetch.fail(error)
            self._hang_up()

    def mind_silence(self, now: float) -> None:
        """From another thread: end a stream that is silent for too long."""
        if self._heard_at is not None and now - self._heard_at > self._stall_s:
            self.abort()

    def abort(self) -> None:
        """From another thread: let it wait for nothing any more."""
        if file := self._file:
            file.abort()

    # -- work -------------------------------------------------------------------------------------

    def _work(self, pool: ThreadPoolExecutor) -> None:
        find = self._fetch.find
        if found := find(self._source, self._job, idle=False):
            self._bring(*found, pool)
        elif job := next((j for j in self._fetch.jobs if j.is_new_to(self._source)), None):
            self._turn_to(job)
        elif found := find(self._source, self._job, idle=True):
            self._bring(*found, pool)
        elif not self._look_again():
            self._fetch.rest()

    def _bring(self, job: Job, span: Span, pool: ThreadPoolExecutor) -> None:
        """`span`, and what more there is of its file."""
        keeping = _Keeping(job, pool)
        waiting = deque((span,))
        try:
            file = self._turn_to(job)
            file.ask(span)
            while waiting and job.usable(self._source):
                if len(waiting) < AHEAD and (more := job.take(self._source, idle=False)):
                    waiting.append(more)
                    file.ask(more)
                    continue
                self._receive(file, job, waiting[0], keeping)
                keeping.finish(waiting.popleft())
        finally:
            self._heard_at = None
            for span in waiting:
                keeping.finish(span)
            if waiting:
                self._hang_up()  # there is more on the way than anybody will read
            keeping.wait()

    def _receive(self, file: PeerFile, job: Job, span: Span, keeping: _Keeping) -> None:
        self._heard_at = time.monotonic()
        if not file.begin(span):
            job.lacks(self._source, span)
            return
        for index in range(span.first, span.first + span.count):
            length = chunk_span(index, job.shard.size)[1]
            buffer = keeping.buffer()[:length]
            for start in range(0, length, PIECE_BYTES):
                file.read(buffer[start : start + PIECE_BYTES])
                self._heard_at = time.monotonic()
            self._failures = 0
            self._fetch.count(self._source, length)
            keeping.deliver(span, index, buffer)

    # -- the stream -------------------------------------------------------------------------------

    def _turn_to(self, job: Job) -> PeerFile:
        """A stream for the file of `job`. A new one says first what the peer has."""
        if self._file is not None and self._job is job:
            return self._file
        self._hang_up()
        self._job = job
        file = self._file = PeerFile.open(self._open_stream, self._peer, job.shard)
        bits = file.have()
        if bits is None:
            self._seen.pop(job, None)
        else:
            self._note(job, bits)
        job.offered(self._source, bits, file.hashes())
        return file

    def _look_again(self) -> bool:
        """Ask what a peer on its way to a file has by now; whether one was asked."""
        now = time.monotonic()
        for job, seen in self._seen.items():
            if now - seen.asked_at < REFRESH_S or not job.usable(self._source):
                continue
            if now - seen.gained_at > self._stall_s:
                job.leave(self._source, PeerUnreachable("has not got any further itself"))
                continue
            if not any(seen.bits):
                self._hang_up()  # it may have all of it by now, and that is another stream
            bits = self._turn_to(job).have()
            if bits is not None:
                self._note(job, bits)
                job.offered(self._source, bits, None)
            return True
        return False

    def _note(self, job: Job, bits: bytes) -> None:
        now = time.monotonic()
        before = self._seen.get(job)
        same = before is not None and before.bits == bits
        self._seen[job] = _Seen(bits, now, before.gained_at if before and same else now)

    def _hang_up(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    # -- trouble ----------------------------------------------------------------------------------

    def _refused(self, error: PeerRefused) -> None:
        if error.reason == BUSY:
            self._failed(error)
        elif self._job is not None:
            self._job.leave(self._source, error)
            self._hang_up()

    def _failed(self, error: MeshdError) -> None:
        self._hang_up()
        self._failures += 1
        if self._failures >= MAX_DIALS:
            self._leave_all(error)
        else:
            self._fetch.rest(time.monotonic() + FIRST_DELAY_S * self._failures)

    def _leave_all(self, error: MeshdError) -> None:
        self._hang_up()
        for job in self._fetch.jobs:
            job.leave(self._source, error)


class _Keeping:
    """Hashes and writes chunks in a thread of its own while the next ones come."""

    def __init__(self, job: Job, pool: ThreadPoolExecutor) -> None:
        self._job = job
        self._pool = pool
        self._free: list[memoryview] = []
        self._made = 0
        self._pending: deque[tuple[Future[object], memoryview | None]] = deque()

    def buffer(self) -> memoryview:
        """One that nobody reads any more. Raises what went wrong with earlier chunks."""
        while not self._free:
            if self._made < BUFFERS:
                self._made += 1
                return memoryview(bytearray(CHUNK_BYTES))
            self._settle_one()
        return self._free.pop()

    def deliver(self, span: Span, index: int, data: memoryview) -> None:
        future: Future[object] = self._pool.submit(self._job.deliver, span, index, data)
        self._pending.append((future, memoryview(data.obj)))

    def finish(self, span: Span) -> None:
        """After everything delivered of it."""
        self._pending.append((self._pool.submit(self._job.finished, span), None))

    def wait(self) -> None:
        """Until all is kept. Raises what went wrong."""
        while self._pending:
            self._settle_one()

    def _settle_one(self) -> None:
        future, buffer = self._pending.popleft()
        if buffer is not None:
            wait((future,))
            self._free.append(buffer)
        future.result()
