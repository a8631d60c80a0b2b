"""How verified bytes become a file of the Hugging Face cache. Blocking.

Everything is laid out as huggingface_hub does it, so that other tools find and verify it. Each step
is atomic and leaves a state the next fetch goes on from: hashes of chunks, the blob under its name,
the ledger, the link to it; the reference to the commit comes last, when the set is whole.

Nobody but the holder of the blob's lock (`Places.lock`) may call what takes a `sha256` or `shard`.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from meshd.cache.hashes import ChunkHashes
from meshd.cache.ledger import Ledger
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.kernel.files import write_atomic

DAMAGED: Final = ".damaged"
TAG: Final = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This directory holds what can be downloaded again (https://bford.info/cachedir/).\n"
)
"""Tells programs that make backups to leave the cache out."""


def land(
    places: Places, manifest: Manifest, shard: Shard, verified: Path, hashes: bytes | None
) -> Path:
    """Make the file at `verified` (in the directory of blobs, on disk, with the shard's sha256, and
    written by nobody any more) the blob, and link it. `hashes`: of its chunks. What was set aside
    of it goes. The blob's path. Raises OSError."""
    blob = places.blob(manifest.repo, shard.sha256)
    if hashes is not None:
        ChunkHashes(places).save(shard.sha256, hashes)
    verified.replace(blob)
    _sync_directory(blob.parent)
    Ledger(places.ledger).record_landed(blob, shard.sha256)
    link(places, manifest, shard)
    set_aside_path(places, manifest.repo, shard.sha256).unlink(missing_ok=True)
    return blob


def link(places: Places, manifest: Manifest, shard: Shard) -> None:
    """Let the snapshot's path of the shard lead to its blob. Raises OSError."""
    path = places.snapshot(manifest.repo, manifest.revision, shard.path)
    target = os.path.relpath(places.blob(manifest.repo, shard.sha256), path.parent)
    if path.is_symlink() and str(path.readlink()) == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target)
    except FileExistsError:
        temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
        temporary.symlink_to(target)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise
    _sync_directory(path.parent)


def set_aside(places: Places, repo: str, sha256: str) -> Path:
    """Put a blob that is not what it should be out of the way; where it is now. Raises OSError."""
    aside = set_aside_path(places, repo, sha256)
    places.blob(repo, sha256).replace(aside)
    return aside


def set_aside_path(places: Places, repo: str, sha256: str) -> Path:
    blob = places.blob(repo, sha256)
    return blob.with_name(blob.name + DAMAGED)


def name_branch(places: Places, manifest: Manifest, *, newest: bool) -> None:
    """Let the manifest's branch name its commit. `newest`: the hub just said so; otherwise only if
    the branch names nothing yet, as it may have moved since. Raises OSError."""
    if manifest.branch == manifest.revision:
        return
    if any(part in ("", ".", "..") for part in manifest.branch.split("/")):
        return  # it would lead elsewhere
    path = places.branch(manifest.repo, manifest.branch)
    if _names(path) == manifest.revision or (not newest and path.exists()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, manifest.revision.encode(), mode=0o644)


def tag_directory(hub: Path) -> None:
    """Make the hub's directory, marked as a cache. Raises OSError."""
    hub.mkdir(parents=True, exist_ok=True)
    tag = hub / "CACHEDIR.TAG"
    if not tag.exists():
        write_atomic(tag, TAG.encode(), mode=0o644)


def _names(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
