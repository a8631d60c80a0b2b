"""One file of a fetch, from its lock to its link. Blocking; its sources run in other threads.

1. Hold the blob's lock; wait while another program has it.
2. If the blob is there with the right sha256, only link it; else make the best of what there is
   (`beginning`).
3. Let sources bring what the plan wants, and hash what is there, in order, behind them.
4. When the sha256 of the whole is right, land. When it is wrong, the plan says what to get again.
"""

from __future__ import annotations

import errno
import hashlib
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from meshd.cache import landing
from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.hashes import Stopped, damaged_chunks
from meshd.cache.locks import try_lock
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.cache.transfer.beginning import Beginning
from meshd.cache.transfer.flights import Span
from meshd.cache.transfer.partial import Partial
from meshd.cache.transfer.plan import HUB, Decision, Plan
from meshd.errors import (
    BrokenWeights,
    CacheUnwritable,
    HubRefused,
    HubUnavailable,
    MeshdError,
    NoSpace,
    PeerRefused,
)

POLL_S: Final = 0.5
"""How often a lock is tried, and how soon a missed wake-up is made up for."""
SYNC_EVERY: Final = 64
"""Chunks between two requests to write to the disk: all of it at the end would take long."""

Say = Callable[[str], None]


class Job:
    """`run` is for one thread; `take` to `leave` for those of sources, any number."""

    def __init__(
        self,
        places: Places,
        manifest: Manifest,
        shard: Shard,
        sources: tuple[str, ...],
        *,
        damaged: bool,
        streams: int,
        lock: threading.RLock,
        changed: threading.Condition,
        stopped: Callable[[], bool],
        say: Say,
    ) -> None:
        """`lock`: held while plans are looked at. `changed`, of the same lock: told when there may
        be work for sources, or when it is over."""
        self.shard = shard
        self.waits_for: str | None = None
        """What it waits for other than bytes, for people."""
        self.checks: str | None = None
        """What of it is being hashed before anything is fetched, for people."""
        self.done = False
        self._places = places
        self._manifest = manifest
        self._sources = sources
        self._damaged = damaged
        self._streams = streams
        self._lock = lock
        self._changed = changed
        self._came = threading.Condition(lock)
        """Told when bytes came, or a source went."""
        self._stopped = stopped
        self._say = say
        self._plan: Plan | None = None
        self._partial: Partial
        self._hashed = 0
        """Chunks that went into the hash of the whole."""
        self._rewound = False
        """One of those is not there any more."""
        self._closed = False
        """The bytes are what they are: nothing sources say or bring changes them now."""
        self._why_left: dict[str, MeshdError] = {}

    # -- for the fetch ----------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Sources may ask it for work."""
        return self._plan is not None and not self._closed

    @property
    def missing_bytes(self) -> int:
        if self.done:
            return 0
        return self.shard.size if self._plan is None else self._plan.missing_bytes

    def run(self) -> None:
        """Raises MeshdError, Stopped."""
        repo = self._manifest.repo
        told = False
        try:
            while True:
                with try_lock(self._places.lock(repo, self.shard.sha256)) as held:
                    if held:
                        self.waits_for = None
                        self._bring_and_land()
                        return
                self.waits_for = f"another program is downloading {self.shard.name}"
                if not told:
                    self._say(f"{self.waits_for}; waiting for it")
                    told = True
                with self._changed:
                    self._changed.wait(POLL_S)
                self._mind_stop()
        except OSError as error:
            raise self._disk_trouble(error) from error

    # -- for sources ------------------------------------------------------------------------------

    def is_new_to(self, source: str) -> bool:
        """Whether `source` has still to say what it has."""
        with self._lock:
            return self.open and self._the_plan().is_new(source)

    def usable(self, source: str) -> bool:
        """Whether it wants anything of `source`, now or later."""
        with self._lock:
            return self.open and self._the_plan().usable(source)

    def take(self, source: str, *, idle: bool) -> Span | None:
        """What `source` should bring; `idle`: of what others have not brought yet."""
        with self._lock:
            if self._plan is None or self._closed:
                return None
            now = time.monotonic()
            if idle:
                return self._plan.share(source, now)
            return self._plan.next(source, now)

    def offered(self, source: str, has: bytes | None, hashes: bytes | None) -> None:
        """Of what length is for the caller to check."""
        with self._lock:
            if not self._closed:
                self._the_plan().offered(source, has, hashes)
                self._follow()

    def lacks(self, source: str, span: Span) -> None:
        with self._lock:
            self._the_plan().lacks(source, span)

    def deliver(self, span: Span, index: int, data: memoryview) -> bool:
        """Chunk `index` of the span. Whether to go on with the next. Raises MeshdError when it
        cannot be kept."""
        digest = hashlib.sha256(data).digest()
        plan = self._the_plan()
        with self._lock:
            if self._closed:
                return False
            decision = plan.arrived(span.token, index, digest, time.monotonic())
            self._follow()
            if decision is not Decision.STORE:
                self._tell_all()  # somebody else may have to bring it
        if decision is Decision.STORE:
            self._store(index, data, digest)
        with self._lock:
            return decision is not Decision.BANNED and plan.covers(span.token, index + 1)

    def finished(self, span: Span) -> None:
        """No more of this span comes."""
        with self._lock:
            self._the_plan().finished(span.token)
            self._tell_all()

    def leave(self, source: str, why: MeshdError) -> None:
        """`source` brings no more of this file."""
        with self._lock:
            self._why_left[source] = why
            if self._plan is not None:
                self._plan.gone(source, why.message)
            self._tell_all()

    # -- the file ---------------------------------------------------------------------------------

    def _bring_and_land(self) -> None:
        beginning = self._beginning()
        self.checks = f"looking at what is there of {self.shard.name}"
        if beginning.is_there():
            landing.link(self._places, self._manifest, self.shard)
        else:
            self._partial = beginning.open_partial()
            try:
                self._open_plan(beginning.own)
                self.checks = None
                self._bring()
                self._land()
            finally:
                self._close()
        with self._lock:
            self.checks = None
            self.done = True
            self._changed.notify_all()

    def _beginning(self) -> Beginning:
        return Beginning(
            self._places,
            self._manifest.repo,
            self.shard,
            damaged=self._damaged,
            stop=self._stopped,
            say=self._say,
        )

    def _open_plan(self, own: bytes | None) -> None:
        plan = Plan(
            self.shard.size,
            self._sources,
            streams=self._streams,
            own=own,
            there=self._partial.there,
            lot=random.randrange(1 << 30),
        )
        self._partial.forget(plan.take_dropped())
        with self._lock:
            for source, why in self._why_left.items():
                plan.gone(source, why.message)
            self._plan = plan
            self._changed.notify_all()

    def _bring(self) -> None:
        """Until all of it is there and right."""
        plan = self._the_plan()
        while not self._hash_in_order():
            with self._lock:
                if not plan.complete:
                    continue
                came = self._digests()
            torn = damaged_chunks(self._partial.path, came, self._stopped)
            with self._lock:
                if self._rewound:
                    continue
                self._say(
                    f"the sha256 of {self.shard.name} is not what it should be; "
                    + (f"{len(torn)} chunks are not as they came" if torn else "fetching again")
                )
                if plan.whole_failed(torn):
                    self._partial = self._beginning().start_anew(self._partial)
                self._follow()
                self._mind_failure()

    def _hash_in_order(self) -> bool:
        """Whether the sha256 of the whole is right, once everything is there; then it is closed."""
        plan, partial = self._the_plan(), self._partial
        buffer = memoryview(bytearray(CHUNK_BYTES))
        whole = hashlib.sha256()
        self._hashed = 0
        while True:
            with self._lock:
                if self._rewound:
                    self._rewound, self._hashed, whole = False, 0, hashlib.sha256()
                if self._hashed == plan.chunks:
                    self._closed = whole.hexdigest() == self.shard.sha256
                    return self._closed
                index = self._hashed
                if not plan.has(index):
                    self._mind_failure()
                    self._came.wait(POLL_S)
                    continue
                came_before, digest = plan.came_before(index), plan.digest(index)
            self._mind_stop()
            data = partial.read(index, buffer)
            if came_before and hashlib.sha256(data).digest() != digest:
                with self._lock:
                    plan.torn((index,))
                    self._follow()
                continue
            whole.update(data)
            self._hashed += 1
            if self._hashed % SYNC_EVERY == 0:
                partial.sync()

    def _land(self) -> None:
        self._partial.sync()
        path = self._partial.path
        landing.land(self._places, self._manifest, self.shard, path, self._digests())
        self._partial.discard_journal()

    def _store(self, index: int, data: memoryview, digest: bytes) -> None:
        plan = self._the_plan()
        try:
            self._partial.write(index, data, digest)
        except OSError as error:
            with self._lock:
                plan.not_stored(index)
                self._tell_all()
            raise self._disk_trouble(error) from error
        with self._lock:
            plan.stored(index)
            self._follow()
            self._came.notify_all()

    def _follow(self) -> None:
        """After anything that may have changed the plan's mind."""
        if self._closed:
            return
        plan = self._the_plan()
        for source, reason in plan.why_out().items():
            if source not in self._why_left:
                why = PeerRefused(reason, reason="banned")
                self._why_left[source] = why
                self._say(f"{source} is not asked for {self.shard.name} any more: it {reason}")
                self._tell_all()
        dropped = plan.take_dropped()
        self._partial.forget(dropped)
        self._rewound = self._rewound or any(index <= self._hashed for index in dropped)
        if dropped:
            self._tell_all()

    def _tell_all(self) -> None:
        self._came.notify_all()
        self._changed.notify_all()

    def _close(self) -> None:
        """Let no source write any more, then close the files: their descriptors may become those
        of others."""
        with self._lock:
            self._closed = True
            if self._plan is not None:
                self._plan.abandon()
                self._changed.notify_all()
                self._came.wait_for(lambda: not self._the_plan().storing)
        self._partial.close()

    def _digests(self) -> bytes:
        plan = self._the_plan()
        return b"".join(plan.digest(index) for index in range(plan.chunks))

    # -- trouble ----------------------------------------------------------------------------------

    def _the_plan(self) -> Plan:
        assert self._plan is not None, "sources and hashing begin when there is a plan"
        return self._plan

    def _mind_stop(self) -> None:
        if self._stopped():
            raise Stopped

    def _mind_failure(self) -> None:
        """Raises what ended the fetch of this file, if anything did. With `changed` held."""
        self._mind_stop()
        plan = self._the_plan()
        reason = plan.settle()
        self._follow()
        if reason is None:
            return
        name, out = self.shard.name, plan.why_out()
        if plan.complete or not out:
            path = self._partial.path
            raise BrokenWeights(f"{name} ({path}): {reason}", path=str(path))
        refused = self._why_left.get(HUB)
        if isinstance(refused, HubRefused) and len(out) == 1:
            raise refused
        words = f"{name}: {reason} ({'; '.join(f'{who}: {why}' for who, why in out.items())})"
        if isinstance(refused, HubRefused):
            raise HubRefused(words)
        retry = max((why.retry_after_s or 0.0 for why in self._why_left.values()), default=0.0)
        raise HubUnavailable(words, retry_after_s=retry or None)

    def _disk_trouble(self, error: OSError) -> MeshdError:
        name = error.filename or self._places.repo(self._manifest.repo)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return NoSpace(
                f"the disk is full: {self.shard.name} could not be written to {name}; `meshd cache "
                "prune --dry-run` shows what can go"
            )
        return CacheUnwritable(f"{name}: {error.strerror or error}")
