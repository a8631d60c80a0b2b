"""Carries out `meshd cache …`: the commands of `commands.CacheCommands` on a `CacheRoom`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshd.cache.budget import Holding, Item, objection
from meshd.cache.commands import (
    Event,
    Events,
    FileChecked,
    PlanRow,
    PruneReport,
    RemovalReport,
    Verified,
    failed,
)
from meshd.cache.inventory import Inventory, StoredSet, listing
from meshd.cache.references import BUILTIN, BuiltinRef, HubRef, format_ref
from meshd.cache.removal import Removed
from meshd.cache.room import CacheRoom, Guarded
from meshd.cache.transfer.words import Progress
from meshd.cache.verdict import Expected, Fault, SetVerdict
from meshd.cache.verifying import Moved
from meshd.cache.weights import inspect, local_set, look
from meshd.config import Config
from meshd.errors import InvalidRequest, MeshdError, NotInCache, WeightsInUse
from meshd.kernel import Pool
from meshd.view import ModelState, Preparing

Tell = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class _Hashed:
    bytes: int
    problems: Mapping[str, str]
    """Words on what a look afterwards does not see, by path."""


class CacheCommander:
    """Implements `CacheCommands`."""

    def __init__(self, room: CacheRoom) -> None:
        self._room = room

    # -- lists ------------------------------------------------------------------------------------

    async def ls(self) -> dict[str, Any]:
        room = self._room
        inventory = await room.inventory()
        usage = await room.usage()
        holdings = [room.holding(one) for one in inventory.sets]
        return listing(inventory, holdings, usage).model_dump(mode="json")

    async def rm(self, ref: str, *, force: bool) -> dict[str, Any]:
        room = self._room
        one = await self._stored(ref)
        holding = room.holding(one)
        if (why := objection(holding, force=force)) is not None:
            raise WeightsInUse(f"{one.ref} stays: {why}")
        removed = await room.pool.run(room.remover.remove, one.removal())
        if removed.busy:
            raise WeightsInUse(
                f"{one.ref} stays: another program is downloading {removed.busy[0]}; try again "
                "when it has ended"
            )
        room.changed()
        report = RemovalReport(model=one.model, refs=holding.refs, freed_bytes=removed.freed_bytes)
        return report.model_dump(mode="json")

    async def prune(self, *, dry_run: bool, force: bool) -> dict[str, Any]:
        room = self._room
        inventory = await room.inventory()
        removals = await room.plan_removals(inventory, force=force)
        wanted, removed = removals.plan, Removed()
        freed = wanted.freed_bytes
        if not dry_run:
            removed = await room.carry_out(removals)
            freed = removed.freed_bytes
            room.changed()
        report = PruneReport(
            dry_run=dry_run,
            remove=tuple(_plan_row(item, reason) for item, reason in wanted.remove),
            keep=tuple(_plan_row(item, reason) for item, reason in wanted.keep),
            freed_bytes=freed,
            still_over_bytes=max(0, wanted.over_bytes - freed),
            busy=removed.busy,
        )
        return report.model_dump(mode="json")

    # -- long work --------------------------------------------------------------------------------

    def pull(self, ref: str) -> Events:
        room = self._room
        name, _ = room.identify(ref)
        parsed = room.preparer.parse(ref)
        if not isinstance(parsed, HubRef):
            raise InvalidRequest(f"`{ref}` is on this machine; there is nothing to pull")

        async def work(tell: Tell) -> None:
            await room.preparer.make_whole(
                name, parsed, _as_events(tell), lambda news: tell(news.model_dump()), newest=True
            )

        return _whole_or_not(work)

    def repair(self, ref: str) -> Events:
        room = self._room
        name, _ = room.identify(ref)
        parsed = room.preparer.parse(ref)
        if not isinstance(parsed, HubRef):
            raise InvalidRequest(
                f"`{ref}` has no hub to mend it from; put the right file there"
                if not isinstance(parsed, BuiltinRef)
                else "the built-in model is made again by itself"
            )

        async def work(tell: Tell) -> None:
            one = (await room.inventory()).find(parsed)
            if one is not None:
                await self._hash_all([one.verdict], tell)
            await room.preparer.make_whole(
                name, parsed, _as_events(tell), lambda news: tell(news.model_dump())
            )

        return _whole_or_not(work)

    def verify(self, ref: str | None) -> Events:
        async def work(tell: Tell) -> None:
            subjects = await self._subjects(ref)
            hashed = await self._hash_all([verdict for _, _, verdict in subjects], tell)
            files = wrong = 0
            for model, said, before in subjects:
                verdict = await self._room.pool.run(self._look_again, before)
                for event in _files(model, said, verdict, hashed.problems):
                    files += 1
                    wrong += event.fault != Fault.OK
                    tell(event.model_dump())
            tell(Verified(files=files, wrong=wrong, hashed_bytes=hashed.bytes).model_dump())
            self._room.changed()

        return _told_by(work)

    async def _subjects(self, ref: str | None) -> list[tuple[str, str, SetVerdict]]:
        """(model, REF, verdict so far) of what is to be verified. Raises NotInCache."""
        room = self._room
        if ref is None:
            return [(one.model, one.ref, one.verdict) for one in (await room.inventory()).sets]
        parsed = room.preparer.parse(ref)
        name, _ = room.identify(ref)
        if isinstance(parsed, HubRef):
            one = await self._stored(ref)
            return [(one.model, one.ref, one.verdict)]
        if isinstance(parsed, BuiltinRef):
            weights = await room.pool.run(inspect, ref, room.store.places.builtin)
            sha256 = None if weights.digest is None else weights.digest.removeprefix("sha256:")
            expected: tuple[Expected, ...] = (Expected(str(weights.first_shard), sha256=sha256),)
        else:
            expected = local_set(parsed.path)
        return [(name, ref, await room.pool.run(look, expected, room.store.ledger))]

    def _look_again(self, verdict: SetVerdict) -> SetVerdict:
        return look(verdict.expected, self._room.store.ledger, self._room.store.headers)

    async def _hash_all(self, verdicts: Sequence[SetVerdict], tell: Tell) -> _Hashed:
        """Hash every file that can be hashed, whatever the ledger says."""
        able = [
            (expected, seen.facts.size)
            for verdict in verdicts
            for expected, seen, file in zip(
                verdict.expected, verdict.observations, verdict.files, strict=True
            )
            if seen.facts is not None and file.fault in (Fault.OK, Fault.UNVERIFIED, Fault.CORRUPT)
        ]
        total = sum(size for _, size in able)
        checked = await self._room.verifier.verify(
            [expected for expected, _ in able], total, _as_events(tell)
        )
        return _Hashed(total, {one.path: one.problem for one in checked if one.problem})

    # -- what is meant ----------------------------------------------------------------------------

    async def _stored(self, ref: str) -> StoredSet:
        """The set in the cache that `ref` is. Raises NotInCache."""
        parsed = self._room.preparer.parse(ref)
        if not isinstance(parsed, HubRef):
            raise NotInCache(f"`{ref}` is no model of the Hugging Face cache")
        inventory = await self._room.inventory()
        one = inventory.find(parsed)
        if one is None:
            raise NotInCache(_not_here(parsed, inventory))
        return one


@contextlib.asynccontextmanager
async def commands_here(config: Config, guarded: Guarded) -> AsyncIterator[CacheCommander]:
    """The commands in this process, for when no daemon runs: no peers, nothing in use."""
    pool = Pool("cache", workers=2)
    room = CacheRoom(config, pool, guarded=guarded)
    try:
        await pool.run(room.recover)
        yield CacheCommander(room)
    finally:
        room.close()
        pool.close()


# -- events ---------------------------------------------------------------------------------------


async def _told_by(work: Callable[[Tell], Awaitable[None]]) -> Events:
    """The events that `work` tells, as they come; leaving early cancels it."""
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    # Unbounded, because who tells must not wait; a few a second, and a line for each file.

    async def run() -> None:
        try:
            await work(events.put_nowait)
        finally:
            events.put_nowait(None)

    task = asyncio.create_task(run(), name="cache command")
    try:
        while (event := await events.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _whole_or_not(work: Callable[[Tell], Awaitable[None]]) -> Events:
    """As `_told_by`, with `done` or `failed` as the last event, whatever was told before."""
    last: Event = {}
    try:
        async with contextlib.aclosing(_told_by(work)) as events:
            async for event in events:
                if event["t"] in ("done", "failed"):
                    last = event
                else:
                    yield event
    except MeshdError as error:
        yield failed(error)
    else:
        yield last or {"t": "done", "fetched_bytes": 0, "sources": {}}


def _as_events(tell: Tell) -> Moved:
    """Hashing as `progress`; of a fetch the news themselves are told."""

    def moved(now: Preparing) -> None:
        if now.state is ModelState.VERIFYING and now.fetch is not None:
            fetch = now.fetch
            tell(
                Progress(
                    stage="verifying",
                    reason=now.reason,
                    done_bytes=fetch.done_bytes,
                    total_bytes=fetch.total_bytes,
                    bytes_per_s=fetch.bytes_per_s,
                    eta_s=fetch.eta_s,
                ).model_dump()
            )

    return moved


def _files(
    model: str, ref: str, verdict: SetVerdict, problems: Mapping[str, str]
) -> list[FileChecked]:
    """What verifying came to; `problems`: as hashing saw them."""
    mended_by = "put the right file there"
    if ref == BUILTIN:
        mended_by = "load it: it is made again"
    elif not ref.startswith("/"):
        mended_by = f"meshd cache repair {ref}"
    return [
        FileChecked(
            model=model,
            ref=ref,
            path=file.path,
            number=file.number,
            total=file.total,
            fault=file.fault,
            problem=problems.get(file.path, file.problem),
            expected=file.expected,
            found=file.found,
            advice=None if file.fault is Fault.OK else mended_by,
        )
        for file in verdict.files
    ]


def _plan_row(item: Item, reason: str) -> PlanRow:
    if isinstance(item, Holding):
        return PlanRow(
            what=item.model,
            ref=item.refs[0] if item.refs else None,
            size_bytes=item.size_bytes,
            last_used_at=item.last_used_at,
            reason=reason,
        )
    return PlanRow(
        what=item.path, ref=None, size_bytes=item.size_bytes, last_used_at=None, reason=reason
    )


def _not_here(ref: HubRef, inventory: Inventory) -> str:
    near = [one.ref for one in inventory.sets if one.repo.lower() == ref.repo.lower()]
    hint = f"; of {ref.repo} there is {', '.join(near)}" if near else "; `meshd cache ls` lists it"
    return f"nothing of {format_ref(ref)} is in the cache{hint}"
