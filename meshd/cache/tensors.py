"""Where the tensors of verified weights lie on this disk."""

from __future__ import annotations

from typing import NamedTuple

from meshd.cache.store import Store


class TensorPlace(NamedTuple):
    """The bytes of one tensor."""

    name: str
    path: str
    """Of a file that was verified."""
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


def tensors_of(digest: str, store: Store) -> tuple[TensorPlace, ...]:
    """Of all shards of the set of that digest; empty unless it lies here whole and verified.
    Blocking, milliseconds."""
    for _, manifest in store.manifests.all():
        if manifest.digest != digest:
            continue
        verdict = store.look(manifest)
        if not verdict.ok:
            continue
        return tuple(
            TensorPlace(tensor.name, expected.path, tensor.offset, tensor.size)
            for expected, seen in zip(verdict.expected, verdict.observations, strict=True)
            if seen.header is not None and not expected.projector
            for tensor in seen.header.tensors
        )
    return ()
