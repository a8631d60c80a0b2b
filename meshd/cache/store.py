"""Everything a process keeps of weights, opened once: what is known, and how to look. Blocking."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.cache.hashes import ChunkHashes
from meshd.cache.headers import Headers
from meshd.cache.ledger import Ledger
from meshd.cache.manifest import Manifest
from meshd.cache.manifests import ManifestStore
from meshd.cache.places import Places
from meshd.cache.verdict import SetVerdict
from meshd.cache.weights import look_at


@dataclass(frozen=True, slots=True)
class Store:
    places: Places
    manifests: ManifestStore
    ledger: Ledger
    chunks: ChunkHashes
    headers: Headers

    @classmethod
    def at(cls, places: Places) -> Store:
        return cls(
            places,
            ManifestStore(places.manifests),
            Ledger(places.ledger),
            ChunkHashes(places),
            Headers(places.headers),
        )

    def look(self, manifest: Manifest) -> SetVerdict:
        """The verdict on a set of the hub, by what can be seen at once."""
        return look_at(manifest, self.places, self.ledger, self.headers)
