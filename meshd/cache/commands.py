"""What `meshd cache …` can ask for, and the answers. Only words: `room.py` does it.

Answers are JSON objects, made of the models below. `pull`, `verify` and `repair` tell as they go:
events with a `t`, those of `transfer.words.News` (`resolved`, `progress`, `said`, `done`,
`failed`), `file` and `verified`. The last event is the result: `done` or `failed` of a pull or a
repair, `verified` or `failed` of a verification.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict

from meshd.errors import MeshdError

Event: TypeAlias = dict[str, Any]
Events: TypeAlias = AsyncGenerator[Event, None]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SetRow(_Answer):
    """A set of weights in the cache."""

    model: str
    """The name clients use."""
    refs: tuple[str, ...]
    """What it can be asked for with; the first is the best for people."""
    digest: str | None
    state: str
    """The worst verdict over its files, a word of `verdict.Fault`."""
    problem: str | None
    """What is wrong, in words, with the worst file."""
    files: int
    size_bytes: int
    """When it is whole."""
    disk_bytes: int
    """What of it is on the disk."""
    own_bytes: int
    """What its removal frees: not shared with other sets."""
    last_used_at: float
    """Unix time."""
    pinned: bool
    in_use: bool
    elsewhere: bool | None
    """Another node of the mesh holds it verified; None if there is no other node to ask."""


class LeftoverRow(_Answer):
    """A file of the cache that belongs to no set."""

    path: str
    kind: Literal["partial", "damaged", "orphan"]
    size_bytes: int
    useless: bool
    """`prune` removes it."""
    reason: str


class Listing(_Answer):
    """The answer to `ls`."""

    path: str
    used_bytes: int
    """Of everything in the Hugging Face cache."""
    budget_bytes: int | None
    free_bytes: int
    sets: tuple[SetRow, ...]
    leftovers: tuple[LeftoverRow, ...]


class PlanRow(_Answer):
    """A set or a leftover, and what becomes of it."""

    what: str
    """The model's name, or a path."""
    ref: str | None
    size_bytes: int
    last_used_at: float | None
    reason: str


class PruneReport(_Answer):
    """The answer to `prune`."""

    dry_run: bool
    remove: tuple[PlanRow, ...]
    keep: tuple[PlanRow, ...]
    freed_bytes: int
    """In a dry run what would be freed."""
    still_over_bytes: int
    busy: tuple[str, ...] = ()
    """Files that stay because another program is downloading them."""


class RemovalReport(_Answer):
    """The answer to `rm`."""

    model: str
    refs: tuple[str, ...]
    freed_bytes: int


class FileChecked(_Answer):
    """Event: what verifying one file came to."""

    t: Literal["file"] = "file"
    model: str
    ref: str
    path: str
    number: int
    total: int
    fault: str
    """A word of `verdict.Fault`; `ok` if it is what it should be."""
    problem: str
    expected: str | None
    found: str | None
    advice: str | None
    """What to do; None if nothing."""


class Verified(_Answer):
    """Event: the result of a verification."""

    t: Literal["verified"] = "verified"
    files: int
    wrong: int
    hashed_bytes: int


def failed(error: MeshdError) -> Event:
    """The last event of work that ended with `error`."""
    return {
        "t": "failed",
        "code": error.detail["code"] if error.detail and "code" in error.detail else error.code,
        "message": error.message,
        "permanent": not error.retryable,
        "retry_after_s": error.retry_after_s,
    }


class CacheCommands(Protocol):
    """Whoever carries the commands out: the daemon, or the CLI itself where none runs.

    Everything may raise MeshdError. Leaving an iteration early cancels its work, in a state from
    which the same command goes on.
    """

    async def ls(self) -> dict[str, Any]:
        """A Listing."""

    def pull(self, ref: str) -> Events:
        """Fetch what of `ref` is not there; ends with `done` or `failed`."""

    def verify(self, ref: str | None) -> Events:
        """Hash all files of a set, or of all sets, whatever the ledger says: `progress`, a `file`
        each, `verified`."""

    def repair(self, ref: str) -> Events:
        """Verify, then fetch what is wrong; ends with `done` or `failed`."""

    async def rm(self, ref: str, *, force: bool) -> dict[str, Any]:
        """A RemovalReport. Raises NotInCache; WeightsInUse if `budget.objection` has one."""

    async def prune(self, *, dry_run: bool, force: bool) -> dict[str, Any]:
        """A PruneReport."""
