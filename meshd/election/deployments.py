"""What the mesh should serve: a table of records that any member may write. Pure.

Rules, numbered as in the code:

1. Of two records of one model the one with the higher stamp stands, whichever came first, however
   often it comes. So tables that have seen the same records are equal.
2. A new version is higher than every version in the table, not only of its own model: versions
   then tell which of two records was written later, by somebody who knew the other. Versions from
   `PLAUSIBLE_VERSION` on were made up by somebody; they drive up their own model's only.
3. What was unloaded stays as a tombstone, or a node that was away would bring it back.
4. At most `MAX_RECORDS` are kept. Tombstones go first, the lowest versions among them, then records
   of models that are served, the highest versions: a table that is full takes no more, and keeps
   what is running. All nodes choose alike. A model whose tombstone went can come back only by a
   node that was away while some thousand others were unloaded; it is seen, and unloaded again.
5. A write that changes nothing makes no version: every start of a node with `--model` would be
   news to all others.
6. One name is one reference. Who wants other weights by it unloads the first.
7. Only an operator changes how a model is deployed. A flag, `--auto` or a request that names what
   is deployed already wakes it up, and leaves what the operator said about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, TypedDict, Unpack

from meshd.election.records import MAX_VERSION, fingerprint, problem_of, supersedes
from meshd.ids import ModelId, NodeId
from meshd.view import Cause, Deployment
from meshd.view.shape import ModelShape

MAX_RECORDS: Final = 1024
PLAUSIBLE_VERSION: Final = 1 << 40
"""More than are ever written: a thousand a second for 34 years."""


class Changes(TypedDict, total=False):
    """What may be changed of a deployment; what is left out stays."""

    replicas: int | None
    context: int | None
    parallel: int | None
    host: NodeId | None
    shape: ModelShape | None


@dataclass(frozen=True, slots=True)
class Written:
    """The record that stands after a write."""

    record: Deployment
    changed: bool
    """False: it said this before, and there is nothing to save or spread."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A write that was not done, and why, in words that say what to do."""

    reason: str


class DeploymentBook:
    """See the module's docstring. `records`: those saved by earlier runs of this node."""

    def __init__(self, records: Iterable[Deployment] = ()) -> None:
        self._records: dict[ModelId, Deployment] = {}
        self._fingerprints: dict[ModelId, int] = {}
        self._digest = 0
        self.merge(records)

    @property
    def records(self) -> tuple[Deployment, ...]:
        """The whole table, tombstones included, by model."""
        return tuple(self._records[model] for model in sorted(self._records))

    def get(self, model: ModelId) -> Deployment | None:
        """The record of `model`, a tombstone if it was unloaded."""
        return self._records.get(model)

    @property
    def digest(self) -> int:
        """64 bits over the table: equal if and, but for chance, only if the tables are."""
        return self._digest

    def fingerprint(self, model: ModelId) -> int:
        """Of the record of `model`, which is in the table."""
        return self._fingerprints[model]

    def merge(self, records: Iterable[Deployment]) -> tuple[Deployment, ...]:
        """Take what others wrote; the records of it that stand now and did not before (1)."""
        taken: dict[ModelId, Deployment] = {}
        for record in records:
            before = self._records.get(record.model)
            if before is None or supersedes(record, before):
                self._put(record)
                taken[record.model] = record
        self._shrink()
        return tuple(record for model, record in taken.items() if self.get(model) == record)

    # -- writing ----------------------------------------------------------------------------------

    def load(
        self,
        model: ModelId,
        ref: str,
        origin: NodeId,
        *,
        cause: Cause = Cause.OPERATOR,
        replicas: int | None = 1,
        context: int | None = None,
        parallel: int | None = None,
        host: NodeId | None = None,
        split: bool = False,
        shape: ModelShape | None = None,
    ) -> Written | Rejected:
        """Deploy `model`, or deploy it anew with these options; wakes it up. A shape that is known
        stays if none is given."""
        before = self._records.get(model)
        if before is not None and not before.removed and before.ref != ref:  # 6
            return Rejected(
                f"`{model}` is the name of {before.ref} in this mesh; unload that first, or give "
                "the file another name"
            )
        if before is not None and not before.removed and cause is not Cause.OPERATOR:  # 7
            return self.wake(model, origin)
        if shape is None and before is not None:
            shape = before.shape
        wish = Deployment(model, ref, 0, origin, replicas, context, parallel, host, cause)
        return self._write(replace(wish, split=split, shape=shape))

    def renew(self, model: ModelId, origin: NodeId) -> Written | Rejected:
        """The same record in a new version: who failed with the last one tries again."""
        before = self._records.get(model)
        if before is None or before.removed:
            return _not_deployed(model)
        return self._put_newer(replace(before, origin=origin), before)

    def unload(self, model: ModelId, origin: NodeId) -> Written | Rejected:
        """Leave a tombstone (3). Unloading twice changes nothing."""
        before = self._records.get(model)
        if before is None:
            return _not_deployed(model)
        tombstone = Deployment(model, before.ref, 0, origin, cause=before.cause, removed=True)
        return self._write(tombstone)

    def put_to_sleep(self, model: ModelId, origin: NodeId) -> Written | Rejected:
        return self._rewrite(model, origin, asleep=True)

    def wake(self, model: ModelId, origin: NodeId) -> Written | Rejected:
        return self._rewrite(model, origin, asleep=False)

    def change(
        self, model: ModelId, origin: NodeId, **changes: Unpack[Changes]
    ) -> Written | Rejected:
        """Another number of replicas, place or size for what is deployed, awake or not."""
        before = self._records.get(model)
        if before is None or before.removed:
            return _not_deployed(model)
        return self._write(replace(before, origin=origin, **changes))

    def _rewrite(self, model: ModelId, origin: NodeId, *, asleep: bool) -> Written | Rejected:
        before = self._records.get(model)
        if before is None or before.removed:
            return _not_deployed(model)
        return self._write(replace(before, origin=origin, asleep=asleep))

    def _write(self, wish: Deployment) -> Written | Rejected:
        before = self._records.get(wish.model)
        if before is not None and _says_the_same(wish, before):  # 5
            return Written(before, changed=False)
        return self._put_newer(wish, before)

    def _put_newer(self, wish: Deployment, before: Deployment | None) -> Written | Rejected:
        record = replace(wish, version=self._next_version(before))
        if record.version > MAX_VERSION:
            return Rejected(
                f"the record of `{wish.model}` is in its last version; use another name"
            )
        problem = problem_of(record)
        if problem is not None:
            return Rejected(f"`{wish.model}` cannot be deployed like this: {problem}")
        if not self.merge((record,)):  # 4
            return Rejected(
                f"the mesh has {MAX_RECORDS} models deployed already; unload one that is not used"
            )
        return Written(record, changed=True)

    def _next_version(self, before: Deployment | None) -> int:
        known = (r.version for r in self._records.values() if r.version < PLAUSIBLE_VERSION)
        own = 0 if before is None else before.version
        return max(own, max(known, default=0)) + 1  # 2

    # -- the table --------------------------------------------------------------------------------

    def _shrink(self) -> None:
        if len(self._records) <= MAX_RECORDS:
            return
        for record in sorted(self._records.values(), key=_keeping)[MAX_RECORDS:]:
            self._remove(record.model)

    def _put(self, record: Deployment) -> None:
        self._remove(record.model)
        mark = fingerprint(record)
        self._records[record.model] = record
        self._fingerprints[record.model] = mark
        self._digest ^= mark

    def _remove(self, model: ModelId) -> None:
        if self._records.pop(model, None) is not None:
            self._digest ^= self._fingerprints.pop(model)


def _keeping(record: Deployment) -> tuple[bool, int, ModelId]:
    """The order in which records are kept (4)."""
    return record.removed, -record.version if record.removed else record.version, record.model


def _says_the_same(one: Deployment, other: Deployment) -> bool:
    """But for who wrote it and when."""
    return replace(one, version=other.version, origin=other.origin) == other


def _not_deployed(model: ModelId) -> Rejected:
    return Rejected(f"`{model}` is not deployed; `meshd models` lists what is")
