"""What this node reads out to others: which file a sha256 is here, and what is known of a model.

Blocking, for well under a millisecond: a few looks at the disk for a sha256 that is known here, and
none for any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshd.cache.ledger import facts_of
from meshd.cache.manifest import Manifest
from meshd.cache.references import HubRef, parse_hub_ref
from meshd.cache.store import Store
from meshd.cache.transfer.words import Grant
from meshd.errors import MeshdError, NotInCache


class Offering:
    """Only files that a manifest names are ever read out."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: dict[str, tuple[str, int]] = {}
        """Repository and size, by sha256."""

    def tell_of(self, known: Iterable[tuple[HubRef, Manifest]]) -> None:
        """All manifests there are."""
        self._files = {}
        for _, manifest in known:
            self.add(manifest)

    def add(self, manifest: Manifest) -> None:
        """One more, before the next `tell_of`: what is being fetched is served as far as it is."""
        self._files.update({f.sha256: (manifest.repo, f.size) for f in manifest.files})

    def grant(self, sha256: str) -> Grant:
        """A blob that is verified, or a partial as far as it is. Raises NotInCache."""
        repo, size = self._files.get(sha256, ("", 0))
        if not repo:
            raise NotInCache("no file with that sha256 is here")
        places = self._store.places
        hashes, blob = places.chunk_hashes(sha256), places.blob(repo, sha256)
        try:
            if self._store.ledger.known(facts_of(blob)) == sha256:
                known = str(hashes) if self._store.chunks.has(sha256, size) else None
                return Grant(str(blob.resolve()), size, sha256, known, None)
        except OSError:
            pass  # not there, perhaps a part of it
        partial, journal = places.partial(repo, sha256), places.journal(sha256)
        if partial.is_file() and journal.is_file():
            return Grant(str(partial), size, sha256, str(hashes), str(journal))
        raise NotInCache("the file is not here, or not verified")

    def manifests(self, ref: str) -> dict[str, Any]:
        """The answer to who asks what `ref` is. Raises NotInCache."""
        try:
            wanted = parse_hub_ref(ref)
        except MeshdError as error:
            raise NotInCache(error.message) from None
        found = self._store.manifests.find(wanted)
        if found is None:
            raise NotInCache("nothing is known of it here")
        return {"t": "open", "manifests": [found.model_dump(mode="json")]}
