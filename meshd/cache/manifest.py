"""A manifest: what a model is, by its hub. Pure.

Repository, revision and every file of the set with size and sha256, so that what is on disk can be
judged without asking anybody. Manifests come from the hub's tree API or from peers, hence the
bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

MAX_SHARDS: Final = 1024
"""The largest known set has fewer than 200 files."""

# Not \w: it means all of Unicode, and costs 250 ms and 40 MB to compile with these counts.
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
RepoName = Annotated[str, StringConstraints(pattern=rf"^{_NAME}/{_NAME}$")]
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
"""A commit: manifests never name a branch, whose content moves."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _stays_inside(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"`{path}` leads elsewhere, or nowhere")
    return path


RepoPath = Annotated[
    str,
    StringConstraints(pattern=r"^[^\\\x00-\x1f]+$", max_length=1024),
    AfterValidator(_stays_inside),
]
"""Of a file, relative to the repository's root, with `/`; it can lead nowhere else."""


class Shard(BaseModel):
    """One file of a set."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    path: RepoPath
    size: Annotated[int, Field(gt=0, le=1 << 46)]
    """Bytes."""
    sha256: Sha256
    """The LFS oid; it is the name of the blob in the Hugging Face cache too."""

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.rpartition("/")[2]


class Manifest(BaseModel):
    """One set of weights of one revision of one repository."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    repo: RepoName
    revision: Revision
    branch: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9_./-]{1,200}$"),
        AfterValidator(_stays_inside),
    ] = "main"
    """What was asked for; `refs/<branch>` in the Hugging Face cache names `revision`."""
    shards: Annotated[tuple[Shard, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    """In order; one for a model that is not split."""
    mmproj: Shard | None = None
    """The projector for images or sound that belongs to it."""

    @model_validator(mode="after")
    def _paths_are_distinct(self) -> Manifest:
        if len({shard.path for shard in self.files}) != len(self.files):
            raise ValueError("a file stands twice")
        return self

    @property
    def files(self) -> tuple[Shard, ...]:
        """Everything that has to be on disk."""
        return self.shards if self.mmproj is None else (*self.shards, self.mmproj)

    def only(self, hashes: Collection[str]) -> Manifest:
        """The same with those of its shards alone that have one of the sha256 `hashes`. Its digest
        is another one: for what is on the way, not for what is known. Raises ValueError if it has
        none of them."""
        shards = tuple(shard for shard in self.shards if shard.sha256 in hashes)
        if not shards:
            raise ValueError("none of its shards")
        return self.model_copy(update={"shards": shards, "mmproj": None})

    @property
    def total_bytes(self) -> int:
        return sum(shard.size for shard in self.files)

    @property
    def digest(self) -> str:
        return set_digest(shard.sha256 for shard in self.shards)


def set_digest(hashes: Iterable[str]) -> str:
    """The digest of a set out of the sha256 of its shards, in order: `sha256:` and 64 hex digits.

    That of a single file is the file's own; several are hashed as lines of hex.
    """
    lines = tuple(hashes)
    if len(lines) == 1:
        return f"sha256:{lines[0]}"
    return "sha256:" + hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
