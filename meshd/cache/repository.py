"""A repository's directory in the Hugging Face cache: what is in it, and leaving it tidy. Blocking.

Laid out as `places` says. What other programs do there meanwhile is no error: a file that has gone
is one that is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Repository:
    """What was found in one directory."""

    name: str
    """`owner/repo`."""
    path: Path
    blobs: Mapping[str, os.stat_result]
    """Everything in `blobs`, partials too; links not followed."""
    links: Mapping[tuple[str, str], str | None]
    """By (revision, path): the name of the blob, None for a file that lies there itself."""
    branches: Mapping[str, str]
    """By name: the commit."""


def repositories(hub: Path) -> Iterator[Repository]:
    """All repositories of models below `hub`, by name."""
    try:
        names = sorted(path.name for path in hub.iterdir())
    except OSError:
        return
    for name in names:
        kind, *parts = name.split("--")
        if kind == "models" and len(parts) == 2:
            yield _read(hub / name, "/".join(parts))


def linked_blobs(repo: Path) -> frozenset[str]:
    """Names of the blobs that some snapshot links to."""
    return frozenset(
        target.name for link in _files_below(repo / "snapshots") if (target := _target(link))
    )


def leads_to(link: Path, blob: str) -> bool:
    """Whether it is a link to the blob of that name."""
    target = _target(link)
    return target is not None and target.name == blob


def tidy(repo: Path, gone: set[tuple[str, str]]) -> None:
    """Remove what is empty since the files `gone`, (revision, path), are, as huggingface_hub does:
    directories, branches that name a snapshot that is no more, at last the repository."""
    snapshots = repo / "snapshots"
    for revision, path in gone:
        place = snapshots / revision / path
        for directory in place.parents:
            if directory == snapshots or not _rmdir(directory):
                break
    for revision in {revision for revision, _ in gone}:
        if not (snapshots / revision).exists():
            _forget_revision(repo, revision)
    if not _is_empty(snapshots) or not _is_empty(repo / "blobs"):
        return
    for name in ("refs", "trees", ".no_exist"):
        shutil.rmtree(repo / name, ignore_errors=True)
    for directory in (repo / "blobs", snapshots, repo):
        if not _rmdir(directory):
            return


def _forget_revision(repo: Path, revision: str) -> None:
    refs = repo / "refs"
    for ref in list(_files_below(refs)):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if ref.read_text().strip() == revision:
                ref.unlink()
                for directory in ref.relative_to(refs).parents:
                    _rmdir(refs / directory)
    with contextlib.suppress(OSError):
        (repo / "trees" / f"{revision}.json").unlink()
    shutil.rmtree(repo / ".no_exist" / revision, ignore_errors=True)


def _files_below(directory: Path) -> Iterator[Path]:
    """Everything that is no directory; links are not followed."""
    for place, directories, names in os.walk(directory):
        for name in names:
            yield Path(place, name)
        for name in directories:
            if Path(place, name).is_symlink():
                yield Path(place, name)


def _read(path: Path, name: str) -> Repository:
    blobs: dict[str, os.stat_result] = {}
    with contextlib.suppress(OSError), os.scandir(path / "blobs") as found:
        for entry in found:
            with contextlib.suppress(OSError):
                blobs[entry.name] = entry.stat(follow_symlinks=False)
    snapshots = path / "snapshots"
    links: dict[tuple[str, str], str | None] = {}
    for file in _files_below(snapshots):
        revision, _, inside = file.relative_to(snapshots).as_posix().partition("/")
        if inside:
            target = _target(file)
            links[revision, inside] = None if target is None else target.name
    branches: dict[str, str] = {}
    for ref in _files_below(path / "refs"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            branches[ref.relative_to(path / "refs").as_posix()] = ref.read_text().strip()
    return Repository(name, path, blobs, links, branches)


def _target(link: Path) -> Path | None:
    try:
        return link.readlink()
    except OSError:
        return None


def _rmdir(directory: Path) -> bool:
    """Whether it is gone now: only what is empty goes."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _is_empty(directory: Path) -> bool:
    try:
        with os.scandir(directory) as found:
            return next(found, None) is None
    except FileNotFoundError:
        return True
