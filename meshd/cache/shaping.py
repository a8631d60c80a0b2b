"""The shape of the model that a reference names, whether its weights are here or not.

1. What lies whole on this disk tells it by its headers; nothing is hashed for that. What lies
   there in part is refused, with the words that say what is wrong.
2. Else, of a set of the hub, a child reads the headers alone, where other nodes or the hub have
   them. Only the manifest is kept of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from pathlib import Path

from meshd.cache import builtin
from meshd.cache.manifest import Manifest
from meshd.cache.observe import observe
from meshd.cache.preparing import failure
from meshd.cache.shape import shape_of
from meshd.cache.store import Store
from meshd.cache.transfer.words import Done, FetchFailed, News, Shape
from meshd.cache.verdict import SetVerdict
from meshd.cache.weights import headers_of, local_set, look
from meshd.errors import BadReference
from meshd.view.shape import ModelShape


def shape_of_builtin(store: Store) -> ModelShape:
    """It is made if it is not there. Blocking. Raises BrokenWeights."""
    header = observe(store.places.builtin / builtin.FILE_NAME, store.headers).header
    if header is None:
        header = observe(builtin.ensure(store.places.builtin), store.headers).header
    assert header is not None, "its sha256 was just found to be right"
    return shape_of([header])


def shape_of_local(path: Path, store: Store) -> ModelShape:
    """Of the set that a local file belongs to, and the projector beside it. Blocking, milliseconds.
    Raises BadReference if nothing of it is there, BrokenWeights."""
    verdict = look(local_set(path, store.headers), None, store.headers)
    if all(seen.facts is None for seen in verdict.observations):
        first = verdict.observations[0]
        raise BadReference(f"{first.path}: {first.problem}", param="ref")
    shape = _shape(verdict)
    if shape is None:
        raise verdict.to_error(None)
    return shape


def shape_of_known(manifest: Manifest, store: Store) -> ModelShape | None:
    """None if nothing of the set is here. Blocking, milliseconds. Raises BrokenWeights of one that
    is here in part, as far as that can be seen: it is to be mended first."""
    verdict = store.look(manifest)
    shape = _shape(verdict)
    if shape is None and any(seen.facts is not None for seen in verdict.observations):
        raise verdict.to_error(f"meshd cache repair {manifest.repo}")
    return shape


async def shape_told(news: AsyncIterable[News]) -> ModelShape:
    """What a child says that was asked for headers only. Raises HubRefused, HubUnavailable."""
    shape = None
    async for one in news:
        if isinstance(one, Shape):
            shape = ModelShape.from_json(one.shape.encode())
        elif isinstance(one, FetchFailed):
            raise failure(one, None, "")
        elif isinstance(one, Done):
            break
    assert shape is not None, "it is done only when it has said it"
    return shape


def _shape(verdict: SetVerdict) -> ModelShape | None:
    return shape_of(*headers_of(verdict)) if verdict.ok or verdict.needs_hash else None
