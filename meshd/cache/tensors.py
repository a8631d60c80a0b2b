"""Where the tensors of verified weights lie on this disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from meshd.cache.ledger import facts_of
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.references import HubRef, format_ref
from meshd.cache.store import Store
from meshd.cache.transfer.partial import journaled_bytes
from meshd.cache.verdict import Fault, SetVerdict


class TensorPlace(NamedTuple):
    """The bytes of one tensor."""

    name: str
    path: str
    """Of a file that was verified."""
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class HeldShards:
    """What lies verified here of one set, its projector aside."""

    ref: str
    """What it is on its hub, with the commit."""
    tensors: tuple[TensorPlace, ...]
    files: Mapping[str, Shard]
    """The shards they lie in, by path on this disk; in order."""
    whole: bool
    """Nothing of the set is missing or wrong."""

    def has(self, files: Iterable[tuple[str, int]]) -> bool:
        """Whether all of `files` (sha256 and bytes) are among them."""
        here = {shard.sha256 for shard in self.files.values()}
        return all(sha256 in here for sha256, _ in files)


def held_shards(digest: str, store: Store) -> HeldShards | None:
    """Of the set of that digest: of the revision of which most is here. None if nothing of it is
    verified. Blocking, milliseconds."""
    best: HeldShards | None = None
    for ref, manifest in store.manifests.all():
        if manifest.digest != digest:
            continue
        held = _held(ref, manifest, store.look(manifest))
        if held.whole:
            return held
        if held.files and (best is None or len(held.files) > len(best.files)):
            best = held
    return best


def missing_bytes(repo: str, files: Iterable[tuple[str, int]], store: Store) -> int:
    """How much of `files` (sha256 and bytes) is still to come. Blocking, milliseconds."""
    return sum(_missing(repo, sha256, size, store) for sha256, size in files)


def _missing(repo: str, sha256: str, size: int, store: Store) -> int:
    try:
        if store.ledger.known(facts_of(store.places.blob(repo, sha256))) == sha256:
            return 0
    except OSError:
        pass  # not there, perhaps a part of it
    if not store.places.partial(repo, sha256).exists():
        return size
    return size - journaled_bytes(store.places.journal(sha256), size)


def _held(ref: HubRef, manifest: Manifest, verdict: SetVerdict) -> HeldShards:
    tensors: list[TensorPlace] = []
    files: dict[str, Shard] = {}
    looks = zip(verdict.expected, verdict.observations, verdict.files, strict=True)
    for shard, (expected, seen, file) in zip(manifest.files, looks, strict=True):
        if expected.projector or seen.header is None or file.fault is not Fault.OK:
            continue
        files[expected.path] = shard
        tensors += [
            TensorPlace(tensor.name, expected.path, tensor.offset, tensor.size)
            for tensor in seen.header.tensors
        ]
    pinned = HubRef(manifest.repo, manifest.revision, ref.quant, ref.path)
    return HeldShards(format_ref(pinned), tuple(tensors), files, verdict.ok)
