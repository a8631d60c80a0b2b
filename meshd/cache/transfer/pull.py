"""A whole fetch: its files, those who bring them, and what is said of it meanwhile. Blocking."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

from meshd.cache import landing
from meshd.cache.hashes import ChunkHashes, Stopped
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.cache.transfer.crew import HubFile, HubWorker, PeerWorker
from meshd.cache.transfer.flights import Span
from meshd.cache.transfer.job import POLL_S, Job
from meshd.cache.transfer.pace import Backoff, Rate
from meshd.cache.transfer.plan import HUB
from meshd.cache.transfer.words import FetchOrder, News, OpenStream, PeerSource, Progress, Said
from meshd.cache.usage import disk_of
from meshd.errors import MeshdError, NoSpace
from meshd.sizes import format_size

TELL_S: Final = 0.25
MAX_PEERS: Final = 8
"""Asked at once; one or two fill a link."""
MAX_OPEN_FILES: Final = 4
"""Under way at once: the hash of one is still to be finished when the next is fetched."""
BLOCK_BYTES: Final = 512
"""Of `st_blocks`, whatever the file system's are."""
END_S: Final = 0.25
"""For threads to notice the end. One may be in the middle of a silent answer, which nobody waits
for: what they leave is consistent at any moment."""

FileOf = Callable[[Shard], HubFile]


class Pull:
    """One order's files. `run` once; `stop` from any thread, or a signal's handler."""

    def __init__(
        self,
        order: FetchOrder,
        manifest: Manifest,
        *,
        hub: FileOf | None,
        open_stream: OpenStream | None,
        tell: Callable[[News], None],
    ) -> None:
        """`hub`: None when it is not to be asked."""
        self._order = order
        self._manifest = manifest
        self._places = Places(Path(order.hub_dir), Path(order.state_dir), Path(order.builtin_dir))
        self._tell = tell
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """Told when there may be work, and at the end."""
        self._stop = threading.Event()
        self._trouble: BaseException | None = None
        self._backoff = Backoff(random.random)
        self._counts: dict[str, int] = {}
        self._hub = hub
        self._peers = _named(order.peers[:MAX_PEERS]) if open_stream is not None else {}
        sources = (*((HUB,) if hub is not None else ()), *self._peers)
        streams = (order.workers if hub is not None else 0) + len(self._peers)
        self._jobs = tuple(
            Job(
                self._places,
                manifest,
                shard,
                sources,
                damaged=shard.sha256 in order.damaged,
                streams=streams,
                lock=self._lock,
                changed=self._changed,
                stopped=lambda: self.over,
                say=lambda message: tell(Said(message=message)),
            )
            for shard in _distinct(manifest.files)
        )
        self._hub_workers = [HubWorker(self, hub) for _ in range(order.workers)] if hub else []
        self._peer_workers = [
            PeerWorker(self, name, peer, open_stream, order.stall_s)
            for name, peer in self._peers.items()
            if open_stream is not None
        ]

    # -- for the child ----------------------------------------------------------------------------

    def run(self) -> dict[str, int]:
        """Bytes got by source. Raises MeshdError, Stopped; anything else is a bug."""
        self._check_space()
        landing.tag_directory(self._places.hub)
        threads = [threading.Thread(target=target, daemon=True) for target in self._targets()]
        for thread in threads:
            thread.start()
        rate = Rate(time.monotonic())
        seen = 0
        while not self.over:
            with self._changed:
                self._changed.wait_for(lambda: self.over, TELL_S)
                total = sum(self._counts.values())
            now = time.monotonic()
            rate.observe(total - seen, now)
            seen = total
            for worker in self._peer_workers:
                worker.mind_silence(now)
            if not self.over:
                self._tell(self._progress(rate))
        for worker in self._peer_workers:
            worker.abort()
        deadline = time.monotonic() + END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._trouble is not None:
            raise self._trouble
        if not self._all_done:
            raise Stopped
        self._link_rest()
        return dict(self._counts)

    def stop(self) -> None:
        self._stop.set()

    # -- for the crew (`crew.Fetch`) --------------------------------------------------------------

    @property
    def over(self) -> bool:
        return self._stop.is_set() or self._trouble is not None or self._all_done

    @property
    def jobs(self) -> Sequence[Job]:
        return self._jobs

    def find(self, source: str, first: Job | None, *, idle: bool) -> tuple[Job, Span] | None:
        with self._changed:
            for job in sorted(self._jobs, key=lambda job: job is not first):
                if span := job.take(source, idle=idle):
                    return job, span
        return None

    def rest(self, until: float | None = None) -> None:
        with self._changed:
            if until is None:
                self._changed.wait(POLL_S)
            else:
                self._changed.wait_for(lambda: self.over, max(0.0, until - time.monotonic()))

    def count(self, source: str, length: int) -> None:
        with self._changed:
            self._counts[source] = self._counts.get(source, 0) + length

    def fail(self, error: BaseException) -> None:
        with self._changed:
            if self._trouble is None:
                self._trouble = error
            self._changed.notify_all()

    def hub_failed(self, error: MeshdError) -> bool:
        with self._changed:
            now = time.monotonic()
            waiting = now < self._backoff.retry_at
            go_on = self._backoff.failed(now, error.retry_after_s)
        if go_on and not waiting:
            delay_s = self._backoff.retry_at - now
            self._tell(Said(message=f"{error.message}; asking again in {delay_s:.1f} s"))
        return go_on

    def hub_worked(self) -> None:
        self._backoff.worked()

    @property
    def hub_retry_at(self) -> float:
        return self._backoff.retry_at

    # -- threads ----------------------------------------------------------------------------------

    def _targets(self) -> list[Callable[[], None]]:
        waiting = iter(self._jobs)
        lock = threading.Lock()

        def files() -> None:
            while not self.over:
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                job.run()

        runs = [files] * min(MAX_OPEN_FILES, len(self._jobs))
        runs += [worker.run for worker in self._hub_workers]
        runs += [worker.run for worker in self._peer_workers]
        return [partial(self._guarded, run) for run in runs]

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Stopped:
            pass
        except BaseException as error:
            self.fail(error)

    @property
    def _all_done(self) -> bool:
        return all(job.done for job in self._jobs)

    # -- before and after -------------------------------------------------------------------------

    def _check_space(self) -> None:
        """Raises NoSpace when what is missing does not fit beside the reserve."""
        hub = self._places.hub
        free = disk_of(hub).free
        need = sum(self._missing_on_disk(shard) for shard in _distinct(self._manifest.files))
        left = free - self._order.reserve_bytes
        if need > max(left, 0):
            raise NoSpace(
                f"{format_size(need)} are to be fetched, and {hub} has {format_size(free)} free, "
                f"of which {format_size(self._order.reserve_bytes)} stay free (`cache.reserve`): "
                f"{format_size(need - max(left, 0))} too little; `meshd cache prune --dry-run` "
                "shows what can go"
            )

    def _missing_on_disk(self, shard: Shard) -> int:
        """What the shard will still take of the disk."""
        repo, sha256 = self._manifest.repo, shard.sha256
        paths = [self._places.partial(repo, sha256)]
        damaged = sha256 in self._order.damaged
        if not damaged or ChunkHashes(self._places).has(sha256, shard.size):
            paths.append(self._places.blob(repo, sha256))  # right, or mended in place
        taken = 0
        for path in paths:
            try:
                taken = max(taken, path.stat().st_blocks * BLOCK_BYTES)
            except OSError:
                continue
        return max(0, shard.size - taken)

    def _link_rest(self) -> None:
        """Files of the set that are the same as others."""
        for shard in self._manifest.files:
            landing.link(self._places, self._manifest, shard)

    def _progress(self, rate: Rate) -> Progress:
        with self._changed:
            missing = sum(job.missing_bytes for job in self._jobs)
            total = sum(job.shard.size for job in self._jobs)
            waits = [job.waits_for for job in self._jobs if job.waits_for]
            checks = [job.checks for job in self._jobs if job.checks]
            sources = dict(self._counts)
        stage: Literal["fetching", "verifying", "waiting"]
        if missing == 0:
            stage, reason = "verifying", "hashing what was fetched"
        elif checks and not sources:
            stage, reason = "verifying", checks[0]
        elif waits and rate.bytes_per_s < 1:
            stage, reason = "waiting", waits[0]
        else:
            stage, reason = "fetching", f"from {' and '.join(sources) or 'its sources'}"
        return Progress(
            stage=stage,
            reason=reason,
            done_bytes=total - missing,
            total_bytes=total,
            bytes_per_s=round(rate.bytes_per_s, 1),
            eta_s=rate.eta_s(missing),
            sources=sources,
        )


def _distinct(files: Sequence[Shard]) -> tuple[Shard, ...]:
    """One of each content."""
    return tuple({shard.sha256: shard for shard in reversed(files)}.values())[::-1]


def _named(peers: Sequence[PeerSource]) -> dict[str, PeerSource]:
    """By the name people know, made distinct."""
    found: dict[str, PeerSource] = {}
    for peer in peers:
        taken = peer.name in found or peer.name in (HUB, "")
        found[f"{peer.name} ({peer.node_id[:8]})" if taken else peer.name] = peer
    return found
