"""Making weights usable: look, hash, fetch or mend what is wrong, look again.

This is the way every model takes to an engine, and a set that is not whole does not leave it:

1. the built-in model is made; local files are looked at and hashed once; nothing can be fetched
   for them;
2. a set of the hub whose manifest is known is looked at; what is whole goes on at once, with no
   network and no hashing;
3. what was not hashed since it changed is hashed;
4. what is missing or wrong is fetched, from other nodes and the hub, once;
5. what is wrong still is an error that names the shard, where it is, what was expected and found,
   and the command to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from meshd.cache.manifest import Manifest
from meshd.cache.manifests import from_snapshot, from_tree_cache
from meshd.cache.references import (
    BUILTIN,
    BuiltinRef,
    FileRef,
    HubRef,
    Reference,
    format_ref,
    hub_ref_of,
    model_id,
    parse_ref,
)
from meshd.cache.store import Store
from meshd.cache.verdict import Fault, SetVerdict
from meshd.cache.verifying import Moved, Verifier
from meshd.cache.weights import Weights, inspect, local_set, look, misfit, to_weights
from meshd.errors import BrokenWeights, HubRefused, HubUnavailable, MeshdError, NoSpace
from meshd.ids import ModelId
from meshd.kernel import Pool
from meshd.sizes import format_size
from meshd.view import FetchView, ModelState, Preparing

if TYPE_CHECKING:
    # Late where they are needed: a node that fetches nothing starts without them.
    from meshd.cache.catalog import Catalog
    from meshd.cache.transfer.words import FetchFailed, News, Progress

log = logging.getLogger(__name__)

LOCAL_RETRY_S: Final = 30.0
"""Local files are looked at again this often: that takes milliseconds, and a file that was put
back should need no command."""
FETCH_RETRY_S: Final = 60.0
"""After a fetch that failed for a reason that may pass; the fetch itself has tried for a while."""

Told: TypeAlias = "Callable[[News], None]"


class StartFetch(Protocol):
    """Fetch in a process of its own; leaving the context ends it, in a state to go on from."""

    def __call__(
        self, wanted: HubRef, manifest: Manifest | None, damaged: tuple[str, ...]
    ) -> AbstractAsyncContextManager[AsyncIterable[News]]:
        """The last news is Done or FetchFailed. `manifest`: None for what the hub says now;
        `damaged`: sha256 of blobs that are there and wrong. Raises MeshdError."""


class Preparer:
    """`pool` runs looks, `verifier` what takes long; `catalog` is asked for only when a name has to
    be looked up."""

    def __init__(
        self,
        store: Store,
        catalog: Callable[[], Catalog],
        pool: Pool,
        verifier: Verifier,
        fetch: StartFetch,
    ) -> None:
        self.store = store
        self._catalog = catalog
        self._pool = pool
        self._verifier = verifier
        self._fetch = fetch
        self._turns: dict[HubRef, asyncio.Lock] = {}
        self.busy_with: dict[HubRef, int] = {}
        """References that somebody waits for, and how many do."""

    def parse(self, ref: str) -> Reference:
        """What `ref` names; a path into the Hugging Face cache is what it is on the hub. Raises
        BadReference."""
        parsed = parse_ref(ref, self._catalog_for(ref))
        if isinstance(parsed, FileRef):
            return hub_ref_of(parsed.path, self.store.places.hub) or parsed
        return parsed

    def identify(self, ref: str) -> tuple[ModelId, str]:
        """The name clients use, and the one way to write the reference. Raises BadReference."""
        parsed = self.parse(ref)
        name = model_id(ref, self._catalog_for(ref))
        return name, format_ref(parsed) if isinstance(parsed, HubRef) else ref

    def here(self, ref: str) -> str | None:
        """None if this node could use what `ref` names, else why not: what is the hub's can be
        fetched, a local file has to be there. Blocking: it is looked for, and not into it."""
        try:
            parsed = parse_ref(ref, self._catalog_for(ref))
            if not isinstance(parsed, FileRef) or parsed.path.is_file():
                return None
        except MeshdError as error:
            return error.message
        except OSError as error:
            return f"{ref} cannot be looked at on this machine: {error.strerror}"
        if hub_ref_of(parsed.path, self.store.places.hub) is not None:
            return None
        return f"{parsed.path} is not on this machine"

    def _catalog_for(self, ref: str) -> Catalog | None:
        return None if ref == BUILTIN or "/" in ref else self._catalog()

    async def prepare(self, name: ModelId, ref: str, moved: Moved) -> Weights:
        """Weights an engine can be given, by the rules above.

        Raises MeshdError: BadReference, BrokenWeights, HubRefused, HubUnavailable, NoSpace; its
        `retry_after_s` says when trying again may help, `retryable` that the trouble is expected
        to pass. Cancelling it ends a fetch; what was got stays for the next time.
        """
        parsed = self.parse(ref)
        if isinstance(parsed, HubRef):
            verdict, manifest = await self.make_whole(name, parsed, moved)
            if (problem := misfit(verdict)) is not None:
                log.warning("model %s runs without its projector: %s", name, problem)
            return to_weights(name, ref, verdict, manifest)
        try:
            return await self._local(ref, parsed, moved)  # 1
        except MeshdError as error:
            error.retry_after_s = LOCAL_RETRY_S
            raise

    async def make_whole(
        self,
        name: str,
        wanted: HubRef,
        moved: Moved,
        told: Told = lambda _: None,
        *,
        newest: bool = False,
    ) -> tuple[SetVerdict, Manifest]:
        """Rules 2 to 5 for a set of the hub; one at a time for each. `told` hears all news of a
        fetch. `newest`: ask the hub what a branch is now, if it can be asked."""
        with self.busy(wanted) as turn:
            if turn.locked():
                moved(Preparing(ModelState.WAITING, "it is being fetched already"))
            async with turn:
                return await self._make_whole(name, wanted, moved, told, newest)

    @contextlib.contextmanager
    def busy(self, wanted: HubRef) -> Iterator[asyncio.Lock]:
        """Somebody waits for `wanted`, so that nothing of it is removed meanwhile. The lock is for
        making it whole."""
        self.busy_with[wanted] = self.busy_with.get(wanted, 0) + 1
        try:
            yield self._turns.setdefault(wanted, asyncio.Lock())
        finally:
            self.busy_with[wanted] -= 1
            if not self.busy_with[wanted]:
                del self.busy_with[wanted], self._turns[wanted]

    async def _make_whole(
        self, name: str, wanted: HubRef, moved: Moved, told: Told, newest: bool
    ) -> tuple[SetVerdict, Manifest]:
        manifest = await self._pool.run(self.known, wanted)
        verdict = None
        if manifest is not None:
            verdict = await self.examine(manifest, moved)  # 2, 3
            if verdict.ok and (wanted.is_pinned or not newest):
                return verdict, manifest
            if not verdict.ok:
                log.warning("model %s: %s; fetching what is wrong", name, verdict.worst.words)
        asked = None if newest and not wanted.is_pinned else manifest
        manifest = await self._mend(name, wanted, asked, verdict, moved, told)  # 4
        verdict = await self.examine(manifest, moved)
        if not verdict.ok:  # 5
            raise verdict.to_error(_repair(wanted))
        return verdict, manifest

    def known(self, wanted: HubRef) -> Manifest | None:
        """What `wanted` is as far as this machine knows, by us or by huggingface_hub. Blocking."""
        manifests, places = self.store.manifests, self.store.places
        found = manifests.find(wanted)
        if found is None:
            names_a_set = wanted.quant is not None or wanted.path is not None
            found = from_tree_cache(places, wanted)
            if found is None and names_a_set:
                found = from_snapshot(places, wanted)
            if found is not None:
                manifests.put(wanted, found)
        return found

    async def examine(self, manifest: Manifest, moved: Moved) -> SetVerdict:
        """The verdict on a set, with nothing left unhashed that could be hashed."""
        verdict = await self._pool.run(self.store.look, manifest)
        if verdict.unverified:
            await self._hash(verdict, moved)
            verdict = await self._pool.run(self.store.look, manifest)
        return verdict

    async def _local(self, ref: str, parsed: BuiltinRef | FileRef, moved: Moved) -> Weights:
        store = self.store
        where = store.places.builtin
        weights = await self._pool.run(inspect, ref, where, store.ledger, store.headers)
        if weights.digest is None and isinstance(parsed, FileRef):
            await self._hash(await self._pool.run(self._look_local, parsed), moved)
            weights = await self._pool.run(inspect, ref, where, store.ledger, store.headers)
        return weights

    def _look_local(self, parsed: FileRef) -> SetVerdict:
        headers = self.store.headers
        return look(local_set(parsed.path, headers), self.store.ledger, headers)

    async def _hash(self, verdict: SetVerdict, moved: Moved) -> None:
        await self._verifier.verify(verdict.unverified, verdict.unverified_bytes, moved)

    # -- fetching ---------------------------------------------------------------------------------

    async def _mend(
        self,
        name: str,
        wanted: HubRef,
        manifest: Manifest | None,
        verdict: SetVerdict | None,
        moved: Moved,
        told: Told,
    ) -> Manifest:
        """Fetch what is wrong, or everything. Returns the manifest that holds now."""
        from meshd.cache.transfer.words import Done, FetchFailed, Progress, Resolved, Said

        moved(Preparing(ModelState.FETCHING, "asking for the weights"))
        end: News | None = None
        async with self._fetch(wanted, manifest, _damaged(verdict)) as stream:
            async for end in stream:
                told(end)
                if isinstance(end, Resolved):
                    manifest = end.manifest
                elif isinstance(end, Progress):
                    moved(preparing_of(end))
                elif isinstance(end, Said):
                    log.info("model %s: %s", name, end.message)
        if isinstance(end, FetchFailed):
            raise failure(end, verdict, _repair(wanted))
        assert isinstance(end, Done), "a fetch ends with one of the two"
        assert manifest is not None, "and is done only with what it resolved"
        self._verifier.verified_bytes += end.fetched_bytes
        got = ", ".join(f"{format_size(count)} from {who}" for who, count in end.sources.items())
        log.info("model %s: the weights are whole%s", name, f" ({got})" if got else "")
        return manifest


_STATES = {
    "fetching": ModelState.FETCHING,
    "verifying": ModelState.VERIFYING,
    "waiting": ModelState.WAITING,
}
_CODES: dict[str, type[MeshdError]] = {
    error.code: error for error in (HubRefused, HubUnavailable, NoSpace)
}


def preparing_of(news: Progress) -> Preparing:
    return Preparing(
        _STATES[news.stage],
        news.reason,
        min(1.0, news.done_bytes / news.total_bytes) if news.total_bytes else None,
        FetchView(
            news.done_bytes,
            news.total_bytes,
            news.bytes_per_s,
            news.eta_s,
            tuple(sorted(news.sources.items())),
        ),
    )


def failure(end: FetchFailed, verdict: SetVerdict | None, command: str) -> MeshdError:
    """The error of a fetch that failed; of a set that is partly there, with what is wrong, and the
    `command` that tries again."""
    wait_s = None if end.permanent else max(end.retry_after_s or 0.0, FETCH_RETRY_S)
    if verdict is not None:
        words = verdict.worst.words
        return BrokenWeights(
            f"{words}; fetching it failed: {end.message}; `{command}` tries again",
            path=verdict.worst.path,
            retry_after_s=wait_s,
        )
    kind = _CODES.get(end.code, HubRefused if end.permanent else HubUnavailable)
    return kind(end.message, retry_after_s=end.retry_after_s)


def _repair(wanted: HubRef) -> str:
    return f"meshd cache repair {format_ref(wanted)}"


def _damaged(verdict: SetVerdict | None) -> tuple[str, ...]:
    """Blobs that are there and wrong."""
    if verdict is None:
        return ()
    wrong = (Fault.FOREIGN, Fault.SHORT, Fault.LONG, Fault.CORRUPT)
    return tuple(
        expected.sha256
        for expected, file in zip(verdict.expected, verdict.files, strict=True)
        if file.fault in wrong and expected.sha256 is not None
    )
