"""One file of a fetch, from its lock to its link. Blocking; its sources run in other threads.

1. Hold the blob's lock; wait while another program has it.
2. If the blob is there with the right sha256, only link it. If it is there and wrong, make it the
   partial when own hashes tell which of its chunks are right, else set it aside.
3. Let sources bring what the plan wants, and hash what is there, in order, behind them.
4. When the sha256 of the whole is right, land. When it is wrong, the plan says what to get again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from meshd.cache import landing
from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.hashes import ChunkHashes, Stopped, damaged_chunks
from meshd.cache.hashing import FileChanged, hash_file
from meshd.cache.ledger import Ledger, facts_of
from meshd.cache.locks import try_lock
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.cache.transfer.flights import Span
from meshd.cache.transfer.partial import Partial
from meshd.cache.transfer.plan import Decision, Plan
from meshd.errors import (
    BrokenWeights,
    CacheUnwritable,
    HubUnavailable,
    MeshdError,
    NoSpace,
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
        changed: threading.Condition,
        stopped: Callable[[], bool],
        say: Say,
    ) -> None:
        """`changed` (of a lock that may be taken again): held while plans are looked at, told when
        something happened."""
        self.shard = shard
        self.waits_for: str | None = None
        """What it waits for other than bytes, for people."""
        self.done = False
        self._places = places
        self._manifest = manifest
        self._sources = sources
        self._damaged = damaged
        self._streams = streams
        self._changed = changed
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
        with self._changed:
            return self.open and self._the_plan().is_new(source)

    def usable(self, source: str) -> bool:
        """Whether it wants anything of `source`, now or later."""
        with self._changed:
            return self.open and self._the_plan().usable(source)

    def take(self, source: str, *, idle: bool) -> Span | None:
        """What `source` should bring; `idle`: of what others have not brought yet."""
        with self._changed:
            if self._plan is None or self._closed:
                return None
            now = time.monotonic()
            if idle:
                return self._plan.share(source, now)
            return self._plan.next(source, now)

    def offered(self, source: str, has: bytes | None, hashes: bytes | None) -> None:
        """Of what length is for the caller to check."""
        with self._changed:
            if not self._closed:
                self._the_plan().offered(source, has, hashes)
                self._follow()

    def lacks(self, source: str, span: Span) -> None:
        with self._changed:
            self._the_plan().lacks(source, span)

    def deliver(self, span: Span, index: int, data: memoryview) -> bool:
        """Chunk `index` of the span. Whether to go on with the next. Raises MeshdError when it
        cannot be kept."""
        digest = hashlib.sha256(data).digest()
        plan = self._the_plan()
        with self._changed:
            if self._closed:
                return False
            decision = plan.arrived(span.token, index, digest, time.monotonic())
            self._follow()
        if decision is Decision.STORE:
            self._store(index, data, digest)
        with self._changed:
            return decision is not Decision.BANNED and plan.covers(span.token, index + 1)

    def finished(self, span: Span) -> None:
        """No more of this span comes."""
        with self._changed:
            self._the_plan().finished(span.token)
            self._changed.notify_all()

    def leave(self, source: str, why: MeshdError) -> None:
        """`source` brings no more of this file."""
        with self._changed:
            self._why_left[source] = why
            if self._plan is not None:
                self._plan.gone(source, why.message)
            self._changed.notify_all()

    # -- the file ---------------------------------------------------------------------------------

    def _bring_and_land(self) -> None:
        if self._is_there():
            landing.link(self._places, self._manifest, self.shard)
        else:
            self._partial = self._begin()
            try:
                self._bring()
                self._land()
            finally:
                self._close()
        with self._changed:
            self.done = True
            self._changed.notify_all()

    def _is_there(self) -> bool:
        """Whether the blob lies there and is right; if it is wrong, that is said."""
        blob = self._places.blob(self._manifest.repo, self.shard.sha256)
        ledger = Ledger(self._places.ledger)
        try:
            facts = facts_of(blob)
        except OSError:
            return False
        if facts.size != self.shard.size:
            self._say(f"{self.shard.name} has {facts.size} bytes, not {self.shard.size}")
            return False
        if not self._damaged and ledger.known(facts) == self.shard.sha256:
            return True
        if self._damaged and self._own_hashes() is not None:
            return False  # its good chunks are found faster than its hash
        self.waits_for = f"hashing {self.shard.name}"
        try:
            hashed = hash_file(blob, stop=self._stopped)
        except FileChanged:
            return False
        self.waits_for = None
        if hashed.sha256 != self.shard.sha256:
            self._say(f"{self.shard.name} has the sha256 {hashed.sha256}, not its own")
            return False
        ledger.record(hashed.facts, hashed.sha256, read_from_ns=hashed.read_from_ns)
        if hashed.chunk_hashes is not None:
            ChunkHashes(self._places).save(hashed.sha256, hashed.chunk_hashes)
        return True

    def _begin(self) -> Partial:
        """Open the partial and the plan."""
        places, repo, sha256 = self._places, self._manifest.repo, self.shard.sha256
        blob, own = places.blob(repo, sha256), self._own_hashes()
        usable = blob.is_file() and not blob.is_symlink() and own is not None
        if usable and own is not None and not places.partial(repo, sha256).exists():
            partial = Partial.from_damaged(places, repo, self.shard, own)
            self._say(f"mending {self.shard.name}: {len(partial.there)} of its chunks are right")
        else:
            if os.path.lexists(blob):
                aside = landing.set_aside(places, repo, sha256)
                self._say(f"set {self.shard.name} aside as {aside}")
            partial = Partial.open(places, repo, self.shard, own=own)
        plan = Plan(
            self.shard.size,
            self._sources,
            streams=self._streams,
            own=own,
            there=partial.there,
            lot=random.randrange(1 << 30),
        )
        partial.forget(plan.take_dropped())
        with self._changed:
            for source, why in self._why_left.items():
                plan.gone(source, why.message)
            self._plan = plan
            self._changed.notify_all()
        return partial

    def _bring(self) -> None:
        """Until all of it is there and right."""
        plan = self._the_plan()
        while not self._hash_in_order():
            with self._changed:
                if not plan.complete:
                    continue
                came = self._digests()
            torn = damaged_chunks(self._partial.path, came, self._stopped)
            with self._changed:
                if self._rewound:
                    continue
                self._say(
                    f"the sha256 of {self.shard.name} is not what it should be; "
                    + (f"{len(torn)} chunks are not as they came" if torn else "fetching again")
                )
                if plan.whole_failed(torn):
                    self._start_anew()
                self._follow()
                self._mind_failure()

    def _hash_in_order(self) -> bool:
        """Whether the sha256 of the whole is right, once everything is there; then it is closed."""
        plan, partial = self._the_plan(), self._partial
        buffer = memoryview(bytearray(CHUNK_BYTES))
        whole = hashlib.sha256()
        self._hashed = 0
        while True:
            with self._changed:
                if self._rewound:
                    self._rewound, self._hashed, whole = False, 0, hashlib.sha256()
                if self._hashed == plan.chunks:
                    self._closed = whole.hexdigest() == self.shard.sha256
                    return self._closed
                index = self._hashed
                if not plan.has(index):
                    self._mind_failure()
                    self._changed.wait(POLL_S)
                    continue
                came_before, digest = plan.came_before(index), plan.digest(index)
            self._mind_stop()
            data = partial.read(index, buffer)
            if came_before and hashlib.sha256(data).digest() != digest:
                with self._changed:
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
            with self._changed:
                plan.not_stored(index)
                self._changed.notify_all()
            raise self._disk_trouble(error) from error
        with self._changed:
            plan.stored(index)
            self._follow()
            self._changed.notify_all()

    def _follow(self) -> None:
        """After anything that may have changed the plan's mind."""
        if self._closed:
            return
        dropped = self._the_plan().take_dropped()
        self._partial.forget(dropped)
        self._rewound = self._rewound or any(index <= self._hashed for index in dropped)
        self._changed.notify_all()

    def _start_anew(self) -> None:
        """Keep what was got so far out of the way, unless something is kept there already."""
        places, repo, sha256 = self._places, self._manifest.repo, self.shard.sha256
        aside = landing.set_aside_path(places, repo, sha256)
        if not aside.exists():
            self._partial.close()
            self._partial.path.replace(aside)
            self._partial = Partial.open(places, repo, self.shard, own=None)

    def _close(self) -> None:
        """Let no source write any more, then close the files: their descriptors may become those
        of others."""
        plan = self._the_plan()
        with self._changed:
            self._closed = True
            plan.abandon()
            self._changed.notify_all()
            while plan.storing:
                self._changed.wait(POLL_S)
        self._partial.close()

    def _digests(self) -> bytes:
        plan = self._the_plan()
        return b"".join(plan.digest(index) for index in range(plan.chunks))

    # -- trouble ----------------------------------------------------------------------------------

    def _the_plan(self) -> Plan:
        assert self._plan is not None, "sources and hashing begin when there is a plan"
        return self._plan

    def _own_hashes(self) -> bytes | None:
        return ChunkHashes(self._places).load(self.shard.sha256, self.shard.size)

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
        left = [why for why in self._why_left.values() if not why.retryable]
        sources = "; ".join(f"{name}: {why}" for name, why in plan.why_out().items())
        name = self.shard.name
        if plan.missing_bytes == 0 or not sources:
            path = self._partial.path
            raise BrokenWeights(f"{name} ({path}): {reason}", path=str(path))
        if left and len(sources) and set(plan.why_out()) == {"hub"}:
            raise left[0]
        retry = max((why.retry_after_s or 0.0 for why in self._why_left.values()), default=0.0)
        raise HubUnavailable(f"{name}: {reason} ({sources})", retry_after_s=retry or None)

    def _disk_trouble(self, error: OSError) -> MeshdError:
        name = error.filename or self._places.repo(self._manifest.repo)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return NoSpace(
                f"the disk is full: {self.shard.name} could not be written to {name}; `meshd cache "
                "prune --dry-run` shows what can go"
            )
        return CacheUnwritable(f"{name}: {error.strerror or error}")
