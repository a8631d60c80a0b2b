"""Repositories of the local hub: commits, trees, names of files as git and LFS give them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

LFS_SUFFIXES = (".gguf", ".safetensors", ".bin")
NO_TREE = "0" * 40


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of one commit. It lies at `location` and must stay as it is."""

    path: str
    location: Path
    size: int
    oid: str
    """Of git: sha1 of the blob, which for an LFS file is its pointer."""
    sha256: str | None
    """Of an LFS file."""

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def pointer(self) -> bytes:
        return _pointer(self.sha256 or "", self.size)


@dataclass(slots=True)
class Repository:
    name: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Mapping[str, StoredFile]] = field(default_factory=dict)
    guests: set[str] = field(default_factory=set)
    """Tokens that may read it if it is private or gated."""

    def commit(self, branch: str, files: Mapping[str, StoredFile]) -> str:
        """Make `files` the whole of `branch`; the commit's hash, which depends on nothing else."""
        text = "\n".join(f"{path} {file.etag}" for path, file in sorted(files.items()))
        commit = hashlib.sha1(f"{self.name}\n{text}".encode()).hexdigest()
        self.commits[commit] = dict(sorted(files.items()))
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or commit, None if there is none."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision)

    def info(self, commit: str, *, with_files: bool) -> dict[str, Any]:
        """What `/api/models/{repo}` says."""
        files = self.commits[commit].values()
        return {
            "_id": self.name.encode().hex()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.partition("/")[0],
            "sha": commit,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "tags": ["gguf"],
            "downloads": 0,
            "likes": 0,
            "createdAt": "2025-01-01T00:00:00.000Z",
            "lastModified": "2025-01-01T00:00:00.000Z",
            "siblings": [_sibling(file, with_files=with_files) for file in files],
        }

    def tree(self, commit: str, below: str, *, recursive: bool) -> list[dict[str, Any]] | None:
        """What `/api/models/{repo}/tree` lists, folders included; None: no such folder."""
        prefix = f"{below}/" if below else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in self.commits[commit].items():
            if not path.startswith(prefix):
                continue
            inside = PurePosixPath(path[len(prefix) :])
            for folder in list(inside.parents)[-2::-1]:
                entries[f"{prefix}{folder}"] = {
                    "type": "directory",
                    "oid": NO_TREE,
                    "size": 0,
                    "path": f"{prefix}{folder}",
                }
            entries[path] = _entry(file)
        if below and not entries:
            return None
        return [
            entry
            for path, entry in sorted(entries.items())
            if recursive or "/" not in path[len(prefix) :]
        ]


def store(path: str, location: Path) -> StoredFile:
    """Hash the file at `location`, which will be `path` of a repository."""
    size = location.stat().st_size
    if path.endswith(LFS_SUFFIXES):
        with location.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredFile(path, location, size, _blob_oid(_pointer(sha256, size)), sha256)
    return StoredFile(path, location, size, _blob_oid(location.read_bytes()), None)


def _pointer(sha256: str, size: int) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    ).encode()


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "oid": file.oid,
        "size": file.size,
        "path": file.path,
    }
    if file.sha256 is not None:
        entry["lfs"] = {
            "oid": file.sha256,
            "size": file.size,
            "pointerSize": len(file.pointer),
        }
    return entry


def _sibling(file: StoredFile, *, with_files: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": file.path}
    if with_files:
        sibling |= {"size": file.size, "blobId": file.oid}
        if file.sha256 is not None:
            sibling["lfs"] = {
                "sha256": file.sha256,
                "size": file.size,
                "pointerSize": len(file.pointer),
            }
    return sibling
