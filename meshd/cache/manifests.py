"""Manifests on disk: what references turned out to be, so that it is known without the hub.

One small file a reference, beside the Hugging Face cache and not in it. `put` writes two: for the
reference as it was written, whose branch moves, and for the same one with its commit, so that what
a branch meant before stays known as long as its files do. Files are replaced whole, so several
processes may read and write at once; what cannot be read is ignored, and made again by the hub.

What other programs left in the Hugging Face cache tells too: `from_tree_cache`, `from_snapshot`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.cache.references import COMMIT, HubRef, format_ref, parse_hub_ref
from meshd.cache.selection import RepoFile, select, to_manifest
from meshd.errors import BadReference, HubRefused
from meshd.kernel.files import write_atomic

FORMAT: Final = 1
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
"""A set of a thousand shards takes a quarter of a megabyte."""
MAX_TREE_BYTES: Final = 32 * 1024 * 1024
MAX_SNAPSHOT_FILES: Final = 20_000
TREE_FORMAT: Final = 1
"""Of huggingface_hub's `trees/<commit>.json`."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


class _Record(BaseModel):
    """What a file says."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1] = FORMAT
    ref: str
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Entry:
    ref: HubRef
    manifest: Manifest
    put_ns: int
    """Unix time in nanoseconds: the file's own."""


_Signature = tuple[int, int, int]


class ManifestStore:
    """The manifests in `directory`. Blocking: a file is read again only when it has changed.

    May be used from several threads.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[str, tuple[_Signature, _Entry | None]] = {}

    def find(self, ref: HubRef) -> Manifest | None:
        """What `ref` is, as far as that is known:

        1. what it turned out to be the last time;
        2. if it names a quantisation or a file: the newest set of that branch or commit that has
           it, whichever reference led to it.

        A bare `owner/repo` is not guessed: what its listing prefers may not be here.
        """
        exact = self._entry(self._directory / _file_name(ref))
        if exact is not None:
            return exact.manifest
        if ref.quant is None and ref.path is None:
            return None
        known = [e for e in self._entries(ref.repo) if e.ref.branch == ref.branch]
        known.sort(key=lambda e: (e.put_ns, e.manifest.revision), reverse=True)
        return next((e.manifest for e in known if _holds(e.manifest, ref)), None)

    def put(self, ref: HubRef, manifest: Manifest) -> None:
        """Remember that `ref` is `manifest`. Raises OSError, ValueError for another repository.

        Repositories are the same in upper and lower case, as on the hub.
        """
        if manifest.repo.lower() != ref.repo.lower():
            raise ValueError(f"{format_ref(ref)} cannot be a manifest of {manifest.repo}")
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The pinned one first: a branch must not lead to what is known nowhere else.
        for one in dict.fromkeys((replace(ref, revision=manifest.revision), ref)):
            record = _Record(ref=format_ref(one), manifest=manifest)
            write_atomic(self._directory / _file_name(one), record.model_dump_json().encode())

    def all(self) -> tuple[tuple[HubRef, Manifest], ...]:
        """Every reference with what it is; by reference. A set has two or more of them."""
        found = sorted(self._entries(), key=lambda entry: format_ref(entry.ref))
        return tuple((entry.ref, entry.manifest) for entry in found)

    def by_sha256(self, sha256: str) -> tuple[Manifest, Shard] | None:
        """A file with these contents, and a set it belongs to."""
        for entry in self._entries():
            for shard in entry.manifest.files:
                if shard.sha256 == sha256:
                    return entry.manifest, shard
        return None

    def remove(self, manifest: Manifest) -> None:
        """Forget this set of this revision, and every reference to it. Raises OSError."""
        for path in self._files(manifest.repo):
            entry = self._entry(path)
            if entry is not None and _is_same_set(entry.manifest, manifest):
                path.unlink(missing_ok=True)

    def _entries(self, repo: str | None = None) -> Iterator[_Entry]:
        for path in self._files(repo):
            entry = self._entry(path)
            if entry is not None and (repo is None or entry.ref.repo.lower() == repo.lower()):
                yield entry

    def _files(self, repo: str | None = None) -> list[Path]:
        prefix = "" if repo is None else _prefix(repo)
        try:
            paths = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return []
        # Names with a dot in front are being written.
        return [
            path
            for path in paths
            if path.suffix == ".json" and path.name[0] != "." and path.name.startswith(prefix)
        ]

    def _entry(self, path: Path) -> _Entry | None:
        try:
            seen = path.stat()
        except FileNotFoundError:
            self._read.pop(path.name, None)
            return None
        signature = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
        known = self._read.get(path.name)
        if known is not None and known[0] == signature:
            return known[1]
        try:
            entry = _parse(path, seen.st_mtime_ns)
        except FileNotFoundError:
            return None  # removed meanwhile
        except (OSError, ValueError, BadReference) as error:
            # ValueError: pydantic's too, and that of a file that is no text.
            _log.warning("the manifest %s is ignored: %s", path, _first_line(error))
            entry = None
        self._read[path.name] = (signature, entry)
        return entry


def from_tree_cache(places: Places, wanted: HubRef) -> Manifest | None:
    """What `wanted` is by the listing that huggingface_hub keeps of a repository it downloaded
    whole; None if there is no usable one or it has nothing that fits. Blocking."""
    commit = _commit(places, wanted)
    if commit is None:
        return None
    try:
        tree = json.loads(
            _read(places.repo(wanted.repo) / "trees" / f"{commit}.json", MAX_TREE_BYTES)
        )
        if tree["format_version"] != TREE_FORMAT:
            return None
        files = [_listed(path, facts) for path, facts in tree["files"].items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return _manifest(files, wanted, commit)


def from_snapshot(places: Places, wanted: HubRef) -> Manifest | None:
    """What `wanted` is by the files of its revision in the Hugging Face cache, whose blobs are
    named by their sha256; None if nothing whole fits. Blocking.

    Sizes are those of the files, so only a hash can tell a cut one. Of files that are not here
    nothing is known: a bare `owner/repo` may be another set than the hub would say.
    """
    commit = _commit(places, wanted)
    if commit is None:
        return None
    root = places.snapshot(wanted.repo, commit)
    files = []
    for link in islice(root.rglob("*.gguf"), MAX_SNAPSHOT_FILES):
        try:
            blob, size = link.readlink().name, link.stat().st_size
        except OSError:
            continue  # no link, or one to nothing
        if _SHA256.fullmatch(blob):
            files.append(RepoFile(link.relative_to(root).as_posix(), size, blob))
    return _manifest(files, wanted, commit)


# -- entries --------------------------------------------------------------------------------------


def _prefix(repo: str) -> str:
    return repo.lower().replace("/", "--") + "."


def _file_name(ref: HubRef) -> str:
    """`owner--name.<16 digits>.json`: for people to find, and distinct."""
    return f"{_prefix(ref.repo)}{hashlib.sha256(format_ref(ref).encode()).hexdigest()[:16]}.json"


def _parse(path: Path, put_ns: int) -> _Entry:
    """Raises OSError, ValueError or BadReference for a file that is no entry, or not this one."""
    record = _Record.model_validate_json(_read(path, MAX_FILE_BYTES))
    ref = parse_hub_ref(record.ref)
    if _file_name(ref) != path.name or record.manifest.repo.lower() != ref.repo.lower():
        raise ValueError(f"it is that of {record.ref}")
    return _Entry(ref, record.manifest, put_ns)


def _read(path: Path, limit: int) -> bytes:
    """Raises OSError, ValueError if it is longer than `limit` bytes."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is longer than {limit} bytes")
    return data


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'it'}: {first['msg']}"
    return str(error).partition("\n")[0]


def _holds(manifest: Manifest, ref: HubRef) -> bool:
    """Whether `ref` names this very set."""
    files = [RepoFile(shard.path, shard.size, shard.sha256) for shard in manifest.files]
    try:
        select(files, ref)
    except BadReference:
        return False
    return True


def _is_same_set(one: Manifest, other: Manifest) -> bool:
    return (one.repo, one.revision, one.shards) == (other.repo, other.revision, other.shards)


# -- what others left -----------------------------------------------------------------------------


def _commit(places: Places, wanted: HubRef) -> str | None:
    """The commit that is meant: itself, or what `refs/<branch>` says."""
    if wanted.is_pinned:
        return wanted.revision
    try:
        text = _read(places.branch(wanted.repo, wanted.branch), 64).decode().strip()
    except (OSError, ValueError):
        return None
    return text if COMMIT.fullmatch(text) else None


def _listed(path: str, facts: dict[str, Any]) -> RepoFile:
    return RepoFile(path, facts.get("lfs_size") or facts["size"], facts.get("lfs_sha256"))


def _manifest(files: list[RepoFile], wanted: HubRef, commit: str) -> Manifest | None:
    try:
        return to_manifest(select(files, wanted), wanted, commit)
    except (BadReference, HubRefused, ValidationError):
        return None
