"""Taking weights out of the Hugging Face cache, so that other tools find it whole. Blocking.

A set goes file by file: under the blob's lock first the link in the snapshot, then the blob if no
other snapshot of the repository links to it. Then what is empty goes: the snapshot's directories,
branches that named it, the repository itself. What is being downloaded is not touched.

The order is written down before anything happens, and crossed out at the end: `recover` finishes
what a kill interrupted. What was made after the order was written is not part of it: somebody may
have fetched the model again meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshd.cache.budget import Leftover, LeftoverKind
from meshd.cache.ledger import Ledger, facts_of
from meshd.cache.locks import try_lock
from meshd.cache.manifest import RepoName, RepoPath, Revision
from meshd.cache.observe import is_locked
from meshd.cache.repository import leads_to, linked_blobs, tidy
from meshd.cache.shared_store import payload_of, sweep
from meshd.cache.store import Store
from meshd.cache.usage import disk_bytes
from meshd.cache.uses import UseBook
from meshd.kernel.files import write_atomic

log = logging.getLogger(__name__)

MAX_ORDER_BYTES: Final = 4 * 1024 * 1024


class Link(BaseModel):
    """One file of a snapshot."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    revision: Revision
    path: RepoPath
    blob: str | None = Field(None, pattern=r"^[0-9a-f]{40,64}$")
    """Name of the blob it leads to; None for a file that lies in the snapshot itself."""


class RemovalOrder(BaseModel):
    """A set to be removed."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    repo: RepoName
    digest: str
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    freed_bytes: int = 0
    busy: tuple[str, ...] = ()
    """Files that stay because another program holds their locks: it is downloading them."""

    def __add__(self, other: Removed) -> Removed:
        return Removed(self.freed_bytes + other.freed_bytes, self.busy + other.busy)


class Remover:
    """Removes what it is told to, without asking whether it may (`budget` says that).

    Safe beside other processes that do the same. Raises OSError where the cache is not ours to
    write; what was begun is then finished by the next `recover`.
    """

    def __init__(self, store: Store, uses: UseBook) -> None:
        self._places = store.places
        self._store = store
        self._uses = uses

    def remove(self, order: RemovalOrder) -> Removed:
        """Remove the set; all of it stays if another program is downloading a part of it."""
        busy = tuple(
            str(self._at(order, link))
            for link in order.links
            if link.blob is not None and is_locked(self._places.lock(order.repo, link.blob))
        )
        if busy:
            return Removed(busy=busy)
        self._places.removals.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{order.repo}\n{order.digest}".encode()).hexdigest()[:40]
        written = self._places.removals / f"{name}.json"
        write_atomic(written, order.model_dump_json().encode())
        removed = self._carry_out(order, until_ns=None)
        written.unlink(missing_ok=True)
        return removed

    def recover(self) -> tuple[RemovalOrder, ...]:
        """Finish the removals that were interrupted; those orders."""
        finished = []
        for written in self._written_orders():
            try:
                status = written.stat()
                if status.st_size > MAX_ORDER_BYTES:
                    raise ValueError(f"has {status.st_size} bytes")
                order = RemovalOrder.model_validate_json(written.read_bytes())
            except FileNotFoundError:
                continue  # another process has finished it
            except (ValidationError, ValueError) as error:
                log.warning("removal order %s is unreadable and ignored: %s", written, error)
                written.unlink(missing_ok=True)
                continue
            self._carry_out(order, until_ns=status.st_mtime_ns)
            written.unlink(missing_ok=True)
            finished.append(order)
        return tuple(finished)

    def clear(self, leftover: Leftover) -> Removed:
        """Remove a leftover, if it still is one."""
        path = Path(leftover.path)
        blob, repo = leftover.blob, path.parent.parent
        with try_lock(self._lock(repo, blob)) as held:
            if not held:
                return Removed(busy=(leftover.path,))
            match leftover.kind:
                case LeftoverKind.PARTIAL:
                    self._places.journal(blob).unlink(missing_ok=True)
                case LeftoverKind.DAMAGED:
                    if not is_verified(path.with_name(blob), self._store.ledger):
                        return Removed()
                case LeftoverKind.ORPHAN:
                    if blob in linked_blobs(repo):
                        return Removed()
                    return Removed(self._unlink_blob(path))
            return Removed(_unlink(path))

    def _carry_out(self, order: RemovalOrder, *, until_ns: int | None) -> Removed:
        needed = self._needed_by_others(order)
        links = [link for link in order.links if (link.revision, link.path) not in needed]
        removed = Removed()
        for link in links:
            removed += self._remove_file(order.repo, link, until_ns)
        tidy(self._places.repo(order.repo), {(link.revision, link.path) for link in links})
        if not any(os.path.lexists(self._at(order, link)) for link in links):
            self._forget_set(order)
        return removed

    def _forget_set(self, order: RemovalOrder) -> None:
        """Nothing of the set is here any more: drop what is known of it."""
        revisions = {link.revision for link in order.links}
        for _, manifest in self._store.manifests.all():
            same_set = (manifest.repo, manifest.digest) == (order.repo, order.digest)
            if same_set and manifest.revision in revisions:
                self._store.manifests.remove(manifest)
        for link in order.links:
            if link.blob is not None and self._store.manifests.by_sha256(link.blob) is None:
                self._store.chunks.forget(link.blob)
        self._uses.forget(order.digest)

    def _remove_file(self, repo: str, link: Link, until_ns: int | None) -> Removed:
        """`until_ns`: leave what was made after that Unix time."""
        at = self._places.snapshot(repo, link.revision, link.path)
        if link.blob is None:
            if not _is_older(at, until_ns):
                return Removed()
            self._store.ledger.forget(at)
            return Removed(_unlink(at))
        blob = self._places.blob(repo, link.blob)
        with try_lock(self._places.lock(repo, link.blob)) as held:
            if not held:
                return Removed(busy=(str(at),))
            if _is_older(at, until_ns) and leads_to(at, link.blob):
                at.unlink()
            for stray in _strays(at):
                if leads_to(stray, link.blob):
                    stray.unlink(missing_ok=True)
            if link.blob in linked_blobs(self._places.repo(repo)):
                return Removed()
            freed = self._unlink_blob(blob) if _is_older(blob, until_ns) else 0
            for beside in _beside(blob):
                if _is_older(beside, until_ns):
                    # First what says which of its chunks are there.
                    self._places.journal(link.blob).unlink(missing_ok=True)
                    freed += _unlink(beside)
        return Removed(freed)

    def _unlink_blob(self, blob: Path) -> int:
        """Bytes freed. The blob's lock is held, and nothing links to it."""
        payload = payload_of(blob, self._places.hub)
        if payload is None:
            self._store.ledger.forget(blob)
            return _unlink(blob)
        _unlink(blob)
        return sweep(payload, self._places.hub)

    def _needed_by_others(self, order: RemovalOrder) -> frozenset[tuple[str, str]]:
        """(revision, path) of files that belong to other sets too, such as a projector."""
        return frozenset(
            (manifest.revision, file.path)
            for _, manifest in self._store.manifests.all()
            if manifest.repo == order.repo and manifest.digest != order.digest
            if any(
                self._places.snapshot(manifest.repo, manifest.revision, shard.path).is_symlink()
                for shard in manifest.shards
            )
            for file in manifest.files
        )

    def _written_orders(self) -> list[Path]:
        try:
            return sorted(p for p in self._places.removals.iterdir() if p.suffix == ".json")
        except FileNotFoundError:
            return []

    def _at(self, order: RemovalOrder, link: Link) -> Path:
        return self._places.snapshot(order.repo, link.revision, link.path)

    def _lock(self, repo: Path, blob: str) -> Path:
        return self._places.hub / ".locks" / repo.name / f"{blob}.lock"


def is_verified(blob: Path, ledger: Ledger) -> bool:
    """Whether the blob is there and was found to be what its name says."""
    try:
        return ledger.known(facts_of(blob)) == blob.name
    except OSError:
        return False


# -- files ----------------------------------------------------------------------------------------


def _beside(blob: Path) -> list[Path]:
    """Partials of the blob and damaged ones that were set aside."""
    return [
        *blob.parent.glob(f"{blob.name}.incomplete"),
        *blob.parent.glob(f"{blob.name}.*.incomplete"),
        *blob.parent.glob(f"{blob.name}.damaged*"),
    ]


def _strays(link: Path) -> list[Path]:
    """What is left of making the link where it was interrupted: hidden names with a random end."""
    prefix = f".{link.name[:200]}."
    try:
        return [Path(e.path) for e in os.scandir(link.parent) if e.name.startswith(prefix)]
    except OSError:
        return []


def _is_older(path: Path, until_ns: int | None) -> bool:
    """Whether it is there, and was already at that Unix time; any time if that is None."""
    try:
        return until_ns is None or path.lstat().st_ctime_ns <= until_ns
    except FileNotFoundError:
        return False


def _unlink(path: Path) -> int:
    """Remove a file or link; the bytes that takes from the disk, 0 if it is not there."""
    try:
        status = path.lstat()
        path.unlink()
    except FileNotFoundError:
        return 0
    return disk_bytes(path.name, status) if status.st_nlink == 1 else 0
