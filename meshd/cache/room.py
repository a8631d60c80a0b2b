"""The cache of one process: weights made usable, fetched, offered to others, kept within a budget.

What node.py (or the CLI, where no daemon runs) holds of this room.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from meshd.cache.manifest import Manifest
from meshd.cache.places import Places
from meshd.cache.preparing import Preparer, Told, failure
from meshd.cache.references import BuiltinRef, FileRef, HubRef, format_ref, parse_hub_ref
from meshd.cache.store import Store
from meshd.cache.uses import UseBook
from meshd.cache.verifying import Moved, Verifier
from meshd.cache.weights import Weights
from meshd.config import Config, environment_of_children, hub_cache_dir
from meshd.errors import BadReference, CacheUnwritable, NoSpace
from meshd.ids import ModelId
from meshd.kernel import Pool
from meshd.sizes import format_size, parse_size_or_share
from meshd.view import CacheView, NeededWeights, WeightsView
from meshd.view.shape import ModelShape

if TYPE_CHECKING:
    # Late where they are needed: models are loaded before all of this is read.
    from meshd.cache.budget import Holding, PrunePlan
    from meshd.cache.catalog import Catalog
    from meshd.cache.inventory import Inventory, StoredSet
    from meshd.cache.offering import Offering
    from meshd.cache.removal import Removed, Remover
    from meshd.cache.tensors import HeldShards
    from meshd.cache.transfer.fetching import Fetch
    from meshd.cache.transfer.words import Credentials, FetchOrder, News, PeerSource

log = logging.getLogger(__name__)

Guarded = Callable[[Sequence[str]], list[str]]
"""The command line of a child that ends with this process."""


class Neighbours(Protocol):
    """The rest of the mesh, as far as weights go."""

    def sources(self, digest: str | None) -> Sequence[PeerSource]:
        """Nodes that may be asked for weights; those that say they hold that set come first."""

    def credentials(self) -> Credentials | None:
        """What to ask them with; None: there is no way."""

    def hold(self, digest: str) -> bool | None:
        """Whether one of them holds that set verified; None if there is nobody to ask."""


class Alone:
    """No other node."""

    def sources(self, digest: str | None) -> Sequence[PeerSource]:
        return ()

    def credentials(self) -> Credentials | None:
        return None

    def hold(self, digest: str) -> bool | None:
        return None


@dataclass(frozen=True, slots=True)
class Removals:
    """A plan, and which sets its holdings are."""

    plan: PrunePlan
    sets: Mapping[Holding, StoredSet]


class CacheRoom:
    def __init__(
        self,
        config: Config,
        pool: Pool,
        *,
        guarded: Guarded,
        neighbours: Neighbours | None = None,
        in_use: Callable[[], frozenset[str]] = frozenset,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`in_use`: digests of weights and paths of first shards that engines run on; `changed` is
        called when weights came or went."""
        hub = hub_cache_dir().absolute()
        self.settings = config.cache
        self.store = Store.at(Places(hub, config.weights_dir, config.models_dir))
        self.uses = UseBook(self.store.places.state / "uses")
        self.pool = pool
        self.verifier = Verifier(self.store)
        self.preparer = Preparer(self.store, lambda: self.catalog, pool, self.verifier, self._fetch)
        self._own_catalog = config.data_dir / "catalog.json"
        self.changed = changed
        self._guarded = guarded
        self._neighbours = neighbours or Alone()
        self._in_use = in_use

    def recover(self) -> None:
        """Finish removals that were interrupted, before anybody uses what they were to remove.
        Blocking; next to nothing if there are none."""
        if not any(self.store.places.removals.glob("*.json")):
            return
        try:
            for order in self.remover.recover():
                log.info("the removal of %s, which was interrupted, is finished", order.repo)
        except OSError as error:
            log.warning("an interrupted removal cannot be finished: %s", error)

    def close(self) -> None:
        self.verifier.close()

    @cached_property
    def catalog(self) -> Catalog:
        """Names of well-known models, the user's own first. Raises BadConfig."""
        from meshd.cache.catalog import load_catalog

        return load_catalog(self._own_catalog)

    @cached_property
    def offering(self) -> Offering:
        from meshd.cache.offering import Offering

        return Offering(self.store)

    @cached_property
    def remover(self) -> Remover:
        from meshd.cache.removal import Remover

        return Remover(self.store, self.uses)

    # -- for engines ------------------------------------------------------------------------------

    def identify(self, ref: str) -> tuple[ModelId, str]:
        """The name clients use, and the one way to write `ref`. Raises BadReference."""
        return self.preparer.identify(ref)

    async def prepare(self, ref: str, moved: Moved) -> Weights:
        """Weights an engine can be given; see `preparing`."""
        weights = await self.preparer.prepare(self.identify(ref)[0], ref, moved)
        if weights.digest is not None:
            with contextlib.suppress(OSError):  # it then counts as used when it came
                await self.pool.run(self.uses.used, weights.digest, time.time())
        self.changed()
        return weights

    async def shape(self, ref: str) -> ModelShape:
        """What the memory of the model depends on, wherever its weights are; see `shaping`. Raises
        what `prepare` raises."""
        from meshd.cache import shaping

        store, parsed = self.store, self.preparer.parse(ref)
        if isinstance(parsed, BuiltinRef):
            return await self.pool.run(shaping.shape_of_builtin, store)
        if isinstance(parsed, FileRef):
            return await self.pool.run(shaping.shape_of_local, parsed.path, store)
        manifest = await self.pool.run(self.preparer.known, parsed)
        if manifest is not None:
            here = await self.pool.run(shaping.shape_of_known, manifest, store)
            if here is not None:
                return here
        digest = None if manifest is None else manifest.digest
        order = self._order(parsed, digest, manifest=manifest, headers_only=True)
        async with await self._start(order) as fetch:
            return await shaping.shape_told(fetch)

    # -- for splits -------------------------------------------------------------------------------

    async def held_shards(self, digest: str) -> HeldShards | None:
        """See `tensors.held_shards`. Raises PoolFull."""
        from meshd.cache.tensors import held_shards

        return await self.pool.run(held_shards, digest, self.store)

    async def missing_bytes(self, weights: NeededWeights) -> int:
        """See `tensors.missing_bytes`. Raises PoolFull, BadReference."""
        from meshd.cache.tensors import missing_bytes

        repo = parse_hub_ref(weights.ref).repo
        return await self.pool.run(missing_bytes, repo, weights.files, self.store)

    async def fetch_shards(
        self, digest: str, weights: NeededWeights, missing_bytes: int, told: Told
    ) -> int:
        """Fetch the files that `weights` names, and nothing else of the set of that digest, from
        other nodes: the hub is not asked, and nothing makes room for them. On the disk there stays
        room for its tensors besides. `told` hears all news. Returns the bytes that came; leaving it
        ends it, in a state to go on from. Raises MeshdError."""
        from meshd.cache.transfer.words import Done, FetchFailed

        wanted = parse_hub_ref(weights.ref)
        usage = await self.usage()
        if usage.budget_bytes is not None:
            over = usage.used_bytes + missing_bytes - usage.budget_bytes
            if over > 0:
                raise NoSpace(f"the cache's budget leaves {format_size(over)} too little")
        only = tuple(sha256 for sha256, _ in weights.files)
        order = self._order(wanted, digest, expected_digest=digest, only=only, offline=True)
        order = order.model_copy(update={"reserve_bytes": order.reserve_bytes + weights.bytes})
        end: News | None = None
        try:
            with self.preparer.busy(wanted):
                async with await self._start(order) as fetch:
                    async for end in self._offered(fetch):
                        told(end)
        finally:
            self.changed()
        if isinstance(end, FetchFailed):
            raise failure(end, None, "")
        assert isinstance(end, Done), "a fetch ends with one of the two"
        self.verifier.verified_bytes += end.fetched_bytes
        return end.fetched_bytes

    def here(self, ref: str) -> str | None:
        """None if this node could use what `ref` names, else why not; see `Preparer.here`."""
        return self.preparer.here(ref)

    # -- what is there ----------------------------------------------------------------------------

    async def usage(self) -> CacheView:
        from meshd.cache.usage import read_usage

        return await self.pool.run(read_usage, self.store.places.hub, budget=self.settings.budget)

    async def inventory(self) -> Inventory:
        from meshd.cache.inventory import take_inventory

        return await self.pool.run(take_inventory, self.store, self.uses)

    def holding(self, one: StoredSet) -> Holding:
        """What `budget` has to know of a set, who needs it included."""
        used, busy = self._in_use(), self.preparer.busy_with
        paths = {expected.path for expected in one.verdict.expected}
        return one.holding(
            pinned=any(self._is(one, pin) for pin in self.settings.pins),
            in_use=one.digest in used
            or not paths.isdisjoint(used)
            or any(ref in busy for ref in one.refs),
            elsewhere=self._neighbours.hold(one.digest),
        )

    async def shelf(self) -> tuple[WeightsView, ...]:
        """What lies verified here, for other nodes to know; and from now on it is offered."""
        inventory = await self.inventory()
        self.offering.tell_of(await self.pool.run(self.store.manifests.all))
        return tuple(
            WeightsView(ModelId(one.model), one.ref, one.digest, one.size_bytes)
            for one in inventory.sets
            if one.verdict.ok and one.digest.startswith("sha256:")
        )

    def _is(self, one: StoredSet, ref: str) -> bool:
        try:
            parsed = self.preparer.parse(ref)
        except BadReference:
            return False
        return parsed in one.refs or one.model == self.identify(ref)[0]

    # -- fetching ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _fetch(
        self, wanted: HubRef, manifest: Manifest | None, damaged: tuple[str, ...]
    ) -> AsyncIterator[AsyncIterable[News]]:
        if self.settings.budget is not None:
            if manifest is None:
                manifest = await self._resolve(wanted)
            if manifest is not None:
                await self._make_room(manifest)
        if manifest is not None:
            self.offering.add(manifest)
        digest = None if manifest is None else manifest.digest
        order = self._order(wanted, digest, manifest=manifest, damaged=damaged)
        async with await self._start(order) as fetch:
            yield self._offered(fetch)
        self.changed()

    async def _offered(self, news: AsyncIterable[News]) -> AsyncIterator[News]:
        """What is on its way is offered to others as soon as it is known what it is."""
        from meshd.cache.transfer.words import Resolved

        async for one in news:
            if isinstance(one, Resolved):
                self.offering.add(one.manifest)
            yield one

    async def _start(self, order: FetchOrder) -> Fetch:
        from meshd.cache.transfer.fetching import Fetch

        command = self._guarded([sys.executable, "-P", "-m", "meshd.fetcher"])
        try:
            return await Fetch.start(order, command, environment_of_children())
        except OSError as error:
            raise CacheUnwritable(f"no process to fetch with: {error.strerror}") from None

    def _order(self, wanted: HubRef, digest: str | None = None, **more: Any) -> FetchOrder:
        from meshd.cache.transfer.words import FetchOrder
        from meshd.cache.usage import disk_of

        places, settings = self.store.places, self.settings
        credentials = self._neighbours.credentials() if settings.from_peers else None
        return FetchOrder(
            ref=format_ref(wanted),
            hub_dir=str(places.hub),
            state_dir=str(places.state),
            builtin_dir=str(places.builtin),
            peers=() if credentials is None else tuple(self._neighbours.sources(digest)),
            credentials=credentials,
            workers=settings.workers,
            reserve_bytes=parse_size_or_share(settings.reserve, disk_of(places.hub).total),
            stall_s=settings.stall_s,
            **more,
        )

    async def _resolve(self, wanted: HubRef) -> Manifest | None:
        """What is to be fetched; None if that fails, which the fetch itself will explain."""
        from meshd.cache.transfer.words import Resolved

        found = None
        async with await self._start(self._order(wanted, resolve_only=True)) as fetch:
            async for news in fetch:
                if isinstance(news, Resolved):
                    found = news.manifest
        return found

    async def _make_room(self, manifest: Manifest) -> None:
        """Remove what was used longest ago, if the budget asks for it. Raises NoSpace."""
        inventory = await self.inventory()
        there = {blob for one in inventory.sets for blob in one.blobs}
        missing = sum(
            file.size
            for file in manifest.files
            if str(self.store.places.blob(manifest.repo, file.sha256)) not in there
        )
        others = [one for one in inventory.sets if not _is_of(one, manifest)]
        wanted = await self.plan_removals(replace(inventory, sets=tuple(others)), missing)
        if wanted.plan.still_over_bytes and missing:
            raise NoSpace(
                f"{format_size(missing)} are to be fetched, and the cache's budget "
                f"(`cache.budget`, {self.settings.budget}) leaves "
                f"{format_size(wanted.plan.still_over_bytes)} too little: what is there is in use, "
                "pinned, or the last copy in the mesh; `meshd cache prune --dry-run` says which"
            )
        for _, reason in wanted.plan.remove:
            log.info("making room: %s", reason)
        await self.carry_out(wanted)

    async def plan_removals(
        self, inventory: Inventory, need_bytes: int = 0, *, force: bool = False
    ) -> Removals:
        """What the budget asks to remove, for `need_bytes` more to fit in."""
        from meshd.cache.budget import plan

        usage = await self.usage()
        sets = {self.holding(one): one for one in inventory.sets}
        wanted = plan(
            tuple(sets),
            inventory.leftovers,
            used_bytes=usage.used_bytes,
            budget_bytes=usage.budget_bytes,
            need_bytes=need_bytes,
            force=force,
        )
        return Removals(wanted, sets)

    async def carry_out(self, wanted: Removals) -> Removed:
        from meshd.cache.budget import Holding
        from meshd.cache.removal import Removed

        removed = Removed()
        for item, _ in wanted.plan.remove:
            if isinstance(item, Holding):
                order = wanted.sets[item].removal()
                removed += await self.pool.run(self.remover.remove, order)
            else:
                removed += await self.pool.run(self.remover.clear, item)
        return removed


def _is_of(one: StoredSet, manifest: Manifest) -> bool:
    return (one.repo, one.digest) == (manifest.repo, manifest.digest)
