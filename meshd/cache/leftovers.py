"""Files of a repository in the cache that belong to no set of weights, and which may go. Blocking.

A partial may be gone on with, a file that was set aside gives its good parts to its replacement, a
blob without a link may be just about to get one: each is useless only when that is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Final

from meshd.cache.budget import Leftover, LeftoverKind
from meshd.cache.landing import DAMAGED
from meshd.cache.observe import is_locked
from meshd.cache.removal import is_verified
from meshd.cache.repository import Repository
from meshd.cache.shared_store import bytes_of
from meshd.cache.store import Store
from meshd.cache.usage import PARTIAL_SUFFIX, disk_bytes

STALE_AFTER_S: Final = 7 * 86_400.0
"""A partial that was not written for so long is nobody's any more."""
SETTLED_AFTER_S: Final = 3600.0
"""Making a blob and its link takes no time at all, on any file system."""


def leftovers_of(
    repo: Repository, needed: Collection[str], store: Store, now: float
) -> Iterator[Leftover]:
    """By name. `needed`: names of blobs that belong to sets, linked or not; `now`: Unix time."""
    linked = frozenset(repo.links.values())
    for name, status in sorted(repo.blobs.items()):
        blob, _, ending = name.partition(".")
        if not blob or name in linked or name in needed:
            continue  # a temporary name, for a moment; or a part of something
        path = repo.path / "blobs" / name
        locked = is_locked(store.places.lock(repo.name, blob))
        if name.endswith(PARTIAL_SUFFIX):
            kind = LeftoverKind.PARTIAL
            useless, reason = _partial(now - status.st_mtime, locked)
        elif f".{ending}".startswith(DAMAGED):
            kind = LeftoverKind.DAMAGED
            useless = is_verified(path.with_name(blob), store.ledger)
            reason = "set aside as damaged, " + (
                "and replaced" if useless else "and not replaced yet; its good parts help to"
            )
        else:
            kind = LeftoverKind.ORPHAN
            useless = not locked and now - status.st_ctime > SETTLED_AFTER_S
            reason = "belongs to no snapshot" if useless else "has just come"
            with contextlib.suppress(OSError):
                status = bytes_of(path, store.places.hub).lstat()
        yield Leftover(str(path), kind, disk_bytes(name, status), useless, reason)


def _partial(age_s: float, locked: bool) -> tuple[bool, str]:
    if locked:
        return False, "is being downloaded"
    if age_s > STALE_AFTER_S:
        return True, f"a download nobody went on with for {age_s / 86_400:.0f} days"
    return False, "a download that can go on"
