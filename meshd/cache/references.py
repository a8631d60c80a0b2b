"""REF: how people name a model.

    builtin                                the small model made here
    /path/to/file.gguf  ./f.gguf  ~/f.gguf a local file; any shard names the set
    owner/repo[@revision][:QUANT]          a repository of the Hugging Face hub
    owner/repo[@revision]/path/file.gguf   a file in one; any shard names the set
    some-name                              a name of the catalog, in upper or lower case

What is not said is decided when the repository is known (`selection`). Nothing here asks the
network.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from meshd.errors import BadReference
from meshd.ids import ModelId

if TYPE_CHECKING:
    from meshd.cache.catalog import Catalog, Entry

BUILTIN = "builtin"
DEFAULT_BRANCH: Final = "main"

SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""File name of a shard; numbers count from 1."""

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
"""A revision that can never mean anything else."""

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_PART = r"[\w.-]{1,100}"
_IN_REPOSITORY = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    rf"(?:@(?P<revision>refs/{_PART}/{_PART}|{_PART}))?"
    r"/(?P<path>[^\\\x00-\x1f]{1,1000}\.gguf)",
    re.ASCII | re.IGNORECASE,
)
"""Of a revision with slashes only `refs/pr/1` can stand before a path: where would it end?"""
_REPOSITORY = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>[\w./-]{1,200}))?"
    r"(?::(?P<quant>[\w.-]{1,64}))?",
    re.ASCII,
)
_FORMS = (
    f"`{BUILTIN}`, a name of the catalog, owner/repo[@revision][:QUANT] or "
    "owner/repo/path/file.gguf of the Hugging Face hub, or a local path, which begins with / or ./ "
    "or ~"
)


@dataclass(frozen=True, slots=True)
class BuiltinRef:
    """The model made on this machine."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """A local file; absolute, links not resolved (a Hugging Face cache is made of them)."""

    path: Path


@dataclass(frozen=True, slots=True)
class HubRef:
    """Something in a repository of the hub. At most one of `quant` and `path` is set; if neither
    is, the repository's listing decides."""

    repo: str
    """`owner/repo`, spelled as it was written."""
    revision: str | None = None
    """Branch, tag or commit; None: the branch `main`."""
    quant: str | None = None
    """In upper case."""
    path: str | None = None
    """Of the only or first file."""

    @property
    def branch(self) -> str:
        """What stands below `refs/` in the Hugging Face cache, or the commit that was asked for."""
        return self.revision or DEFAULT_BRANCH

    @property
    def is_pinned(self) -> bool:
        """It names a commit, so that what it means never moves."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


Reference: TypeAlias = BuiltinRef | FileRef | HubRef


def parse_ref(ref: str, catalog: Catalog | None = None) -> Reference:
    """What `ref` names. `catalog`: the one to look names up in; the packaged one if it is None.

    Looks whether a relative path exists, and asks nobody. Raises BadReference, saying what would be
    right.
    """
    if ref == BUILTIN:
        return BuiltinRef()
    if (path := _local_path(ref)) is not None:
        return FileRef(path)
    if "/" in ref:
        return parse_hub_ref(ref)
    return _find(ref, catalog).ref


def parse_hub_ref(ref: str) -> HubRef:
    """`owner/repo…` alone. Raises BadReference."""
    match = _IN_REPOSITORY.fullmatch(ref) or _REPOSITORY.fullmatch(ref)
    if match is None or (ref == match["repo"] and ref.lower().endswith(".gguf")):
        raise BadReference(_why_not_hub(ref), param="ref")
    repo, found = match["repo"], match.groupdict()
    revision, quant, path = found["revision"], found.get("quant"), found.get("path")
    if ".." in repo or "--" in repo or repo.lower().endswith(".git"):
        raise BadReference(f"`{repo}` cannot be the name of a repository", param="ref")
    for parts in (revision, path):
        if parts is not None and not {"", ".", ".."}.isdisjoint(parts.split("/")):
            raise BadReference(f"`{ref}`: `{parts}` leads out of the repository", param="ref")
    return HubRef(
        repo,
        None if revision == DEFAULT_BRANCH else revision,
        quant.upper() if quant else None,
        _first_shard(path) if path else None,
    )


def format_ref(ref: HubRef) -> str:
    """The one canonical spelling: what `parse_hub_ref` reads back as `ref`."""
    text = f"{ref.repo}@{ref.revision}" if ref.revision else ref.repo
    if ref.path is not None:
        return f"{text}/{ref.path}"
    return f"{text}:{ref.quant}" if ref.quant else text


def model_id(ref: str, catalog: Catalog | None = None) -> ModelId:
    """The name clients use for `ref`; known offline, and the same on every node:

    1. `builtin`; a name of the catalog, spelled as there;
    2. a file, local or in a repository: its name without `.gguf` and the number of its shard;
    3. `owner/repo:QUANT`: the repository's name without `-GGUF`, a dash, the quantisation;
    4. `owner/repo`: the repository's name without `-GGUF`.

    Raises BadReference.
    """
    parsed = parse_ref(ref, catalog)
    if isinstance(parsed, BuiltinRef):
        return ModelId(BUILTIN)
    if isinstance(parsed, FileRef):
        stem = stem_of(str(parsed.path))
    elif "/" not in ref:
        return ModelId(_find(ref, catalog).name)
    elif parsed.path is not None:
        stem = stem_of(parsed.path)
    else:
        name = re.sub(r"-GGUF$", "", parsed.repo.partition("/")[2], flags=re.IGNORECASE)
        return ModelId(f"{name}-{parsed.quant}" if parsed.quant else name)
    if not stem:
        raise BadReference(f"`{ref}` has no file name", param="ref")
    return ModelId(stem)


def stem_of(path: str) -> str:
    """The name of a file without its directories, `.gguf` and the number of its shard."""
    name = path.rpartition("/")[2]
    shard = SHARD.match(name)
    return shard["stem"] if shard else re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)


def hub_ref_of(path: Path, hub: Path) -> HubRef | None:
    """What `path` is in the Hugging Face cache `hub`: a file of a commit, None if not there.

    Links on the way to the cache are followed, the last one is not: it leads to a blob.
    """
    for place, root in ((path, hub), (path.parent.resolve() / path.name, hub.resolve())):
        if not place.is_relative_to(root):
            continue
        match place.relative_to(root).parts:
            case (folder, "snapshots", commit, *inside) if COMMIT.fullmatch(commit):
                kind, *names = folder.split("--")
                in_repo = "/".join(inside)
                if (kind, len(names)) == ("models", 2) and in_repo.lower().endswith(".gguf"):
                    with contextlib.suppress(BadReference):
                        return parse_hub_ref(f"{names[0]}/{names[1]}@{commit}/{in_repo}")
    return None


def _local_path(ref: str) -> Path | None:
    if ref.startswith(("/", "./", "../", "~")) or ref in (".", ".."):
        try:
            return Path(ref).expanduser().absolute()
        except RuntimeError:
            raise BadReference(f"`{ref}`: there is no such user", param="ref") from None
    if ref.lower().endswith(".gguf") and Path(ref).exists():
        return Path(ref).absolute()
    return None


def _first_shard(path: str) -> str:
    """`path`, or the first shard's if it names another of the set. Raises BadReference."""
    shard = SHARD.match(path)
    if shard is None:
        return path
    if not 1 <= int(shard["number"]) <= int(shard["count"]):
        raise BadReference(
            f"{path}: there is no shard {shard['number']} of {int(shard['count'])}", param="ref"
        )
    return f"{shard['stem']}-00001-of-{shard['count']}.gguf"


def _find(name: str, catalog: Catalog | None) -> Entry:
    if catalog is None:
        # Late: most starts name no catalog model.
        from meshd.cache.catalog import load_catalog

        catalog = load_catalog()
    entry = catalog.find(name)
    if entry is None:
        if name.lower().endswith(".gguf"):
            raise BadReference(f"there is no file {Path(name).absolute()}", param="ref")
        close = catalog.close_names(name)
        hint = f", close to it are {', '.join(close)}" if close else ""
        raise BadReference(f"`{name}` is not in the catalog{hint}; a REF is {_FORMS}", param="ref")
    return entry


def _why_not_hub(ref: str) -> str:
    if "://" in ref or ref.startswith(("hf.co/", "huggingface.co/")):
        return f"`{ref}` is an address; write owner/repo[@revision][:QUANT] for a model of the hub"
    if ref.lower().endswith(".gguf") and ref.count("/") == 1:
        return f"there is no file {ref}, and a file of the hub is owner/repo/path/file.gguf"
    if ref.endswith(":"):
        return f"`{ref}` names no quantisation behind its colon"
    if "@" in ref and ref.lower().endswith(".gguf"):
        return f"`{ref}`: before a path only a revision without slashes, or refs/pr/N, can stand"
    return f"`{ref}` is no REF; that is {_FORMS}"
