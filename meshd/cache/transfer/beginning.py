"""What lies on disk of a file when its fetch begins, and making the best of it. Blocking.

For the holder of the blob's lock. Methods raise OSError and Stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from meshd.cache import landing
from meshd.cache.hashes import ChunkHashes
from meshd.cache.hashing import FileChanged, hash_file
from meshd.cache.ledger import Ledger, facts_of
from meshd.cache.manifest import Shard
from meshd.cache.places import Places
from meshd.cache.transfer.partial import Partial


class Beginning:
    def __init__(
        self,
        places: Places,
        repo: str,
        shard: Shard,
        *,
        damaged: bool,
        stop: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """`damaged`: somebody found the blob to be wrong; what the ledger says does not count."""
        self._places = places
        self._repo = repo
        self._shard = shard
        self._damaged = damaged
        self._stop = stop
        self._say = say
        self._chunk_hashes = ChunkHashes(places)
        self.own = self._chunk_hashes.load(shard.sha256, shard.size)
        """Hashes of its chunks, if this machine had it verified once."""

    def is_there(self) -> bool:
        """Whether the blob is there and right; why not is said. Hashes it if need be."""
        blob, shard = self._places.blob(self._repo, self._shard.sha256), self._shard
        ledger = Ledger(self._places.ledger)
        try:
            facts = facts_of(blob)
        except OSError:
            return False
        if facts.size != shard.size:
            self._say(f"{shard.name} has {facts.size} bytes, not {shard.size}")
            return False
        if not self._damaged and ledger.known(facts) == shard.sha256:
            return True
        if self._damaged and self.own is not None:
            return False  # which of its chunks are right is found faster than its hash
        try:
            hashed = hash_file(blob, stop=self._stop)
        except FileChanged:
            return False
        if hashed.sha256 != shard.sha256:
            self._say(f"{shard.name} has the sha256 {hashed.sha256}, not {shard.sha256}")
            return False
        ledger.record(hashed.facts, hashed.sha256, read_from_ns=hashed.read_from_ns)
        if hashed.chunk_hashes is not None:
            self._chunk_hashes.save(hashed.sha256, hashed.chunk_hashes)
        return True

    def open_partial(self) -> Partial:
        """A blob that is there and wrong becomes the partial when own hashes tell which of its
        chunks are right; else it is set aside, and what there is of a partial is gone on with."""
        places, repo, shard = self._places, self._repo, self._shard
        blob = places.blob(repo, shard.sha256)
        mendable = blob.is_file() and not blob.is_symlink()
        if self.own is not None and mendable and not places.partial(repo, shard.sha256).exists():
            partial = Partial.from_damaged(places, repo, shard, self.own, stop=self._stop)
            self._say(f"mending {shard.name}: {len(partial.there)} of its chunks are right")
            return partial
        if os.path.lexists(blob):
            aside = landing.set_aside(places, repo, shard.sha256)
            self._say(f"set {shard.name} aside as {aside}")
        return Partial.open(places, repo, shard, own=self.own, stop=self._stop)

    def start_anew(self, partial: Partial) -> Partial:
        """Put what was got out of the way, unless something lies there already."""
        aside = landing.set_aside_path(self._places, self._repo, self._shard.sha256)
        if aside.exists():
            return partial
        partial.close()
        partial.path.replace(aside)
        self._say(f"set what was got of {self._shard.name} aside as {aside}")
        return Partial.open(self._places, self._repo, self._shard, own=None, stop=self._stop)
