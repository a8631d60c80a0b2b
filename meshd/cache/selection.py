"""Which files of a repository a reference means. Pure.

A repository is a list of paths; what they are is told by their names alone. How it is decided:

1. Only `.gguf` files count. Projectors (`mmproj`), importance matrices (`imatrix` without a
   quantisation) and drafts for speculative decoding are never taken for the model. A draft is what
   says so in a whole word of its path, unless the repository's name says so too.
2. Shards of one name and count in one directory are one set. A set that lacks a shard is still
   there, and refused if it is what was asked for: another would not be what was meant.
3. A path means the set it belongs to.
4. A quantisation means the sets of that very name (`quants`): `Q4_K_M` is neither `IQ4_K_M` nor
   `Q4_K_M_L` nor `UD-Q4_K_M`. What has no known quantisation is matched by whole words.
5. Nothing said: the first of `quants.PREFERENCE` that is there, else the only set.
6. Several sets of one quantisation and the same name are the same weights, stored twice: the one of
   fewer files is taken, then the one nearer to the root. Of several names none is: that is refused,
   naming them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from meshd.cache.manifest import Manifest, Shard
from meshd.cache.pairing import projectors_for
from meshd.cache.quants import PREFERENCE, canonical, in_order, quant_of, words_of
from meshd.cache.references import SHARD, HubRef, format_ref, stem_of
from meshd.errors import BadReference, HubRefused

MAX_NAMED: Final = 24
"""Files or quantisations a refusal lists at most."""


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a repository's listing."""

    path: str
    size: int
    """Bytes."""
    sha256: str | None
    """None if it is not stored with Git LFS."""


@dataclass(frozen=True, slots=True)
class Selection:
    shards: tuple[RepoFile, ...]
    """In order, none missing."""
    mmproj_candidates: tuple[RepoFile, ...]
    """Projectors that may belong to it, the best first."""


@dataclass(frozen=True, slots=True)
class _Set:
    directory: str
    stem: str
    count: int
    """Shards it should have; 1 if it is not split."""
    files: tuple[RepoFile, ...]

    @property
    def path(self) -> str:
        """Of the file that stands for the set."""
        return self.files[0].path

    @property
    def quant(self) -> str | None:
        return quant_of(self.path)


def select(files: Sequence[RepoFile], wanted: HubRef) -> Selection:
    """The files that `wanted` means among those of its repository.

    Raises BadReference: nothing or more than one fits (the message lists what there is), or a set
    lacks shards (it names them).
    """
    weights = [file for file in files if file.path.lower().endswith(".gguf")]
    if not weights:
        raise _refusal(wanted, "has no .gguf file", "; its weights may be in a repository -GGUF")
    if wanted.path is not None:
        chosen = _by_path(weights, wanted)
    else:
        sets = _sets([file for file in weights if _is_model(file.path, wanted.repo)])
        if not sets:
            listed = _list(file.path for file in weights)
            raise _refusal(wanted, "has no .gguf file that is a model", f", only {listed}")
        chosen = _the_one(_candidates(sets, wanted), wanted)
    _check_whole(chosen, wanted)
    projectors = [file for file in weights if _is_projector(file.path) and file.sha256]
    best_first = projectors_for(chosen.path, [file.path for file in projectors])
    by_path = {file.path: file for file in projectors}
    return Selection(chosen.files, tuple(by_path[path] for path in best_first))


def to_manifest(selection: Selection, wanted: HubRef, revision: str) -> Manifest:
    """What `selection` is at the commit `revision`. The first projector is taken as its own.

    Raises HubRefused for a file without a sha256, pydantic's ValidationError for a listing that
    cannot be (an empty file, a path that leads elsewhere).
    """
    projector = selection.mmproj_candidates[0] if selection.mmproj_candidates else None
    return Manifest(
        repo=wanted.repo,
        revision=revision,
        branch=wanted.branch,
        shards=tuple(_shard(file, wanted) for file in selection.shards),
        mmproj=None if projector is None else _shard(projector, wanted),
    )


# -- what a file is -------------------------------------------------------------------------------


def _is_projector(path: str) -> bool:
    return "mmproj" in path.rpartition("/")[2].lower()


def _is_importance_matrix(path: str) -> bool:
    return "imatrix" in path.rpartition("/")[2].lower() and quant_of(path) is None


def _is_model(path: str, repo: str) -> bool:
    if _is_projector(path) or _is_importance_matrix(path):
        return False
    return "DRAFT" not in words_of(path) or "DRAFT" in words_of(repo)


def _sets(files: Sequence[RepoFile]) -> list[_Set]:
    """By path. Files whose number is none of their set's are left out."""
    found: dict[tuple[str, str, int], list[RepoFile]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.path):
        directory, _, name = file.path.rpartition("/")
        shard = SHARD.match(name)
        if shard is None:
            found[directory, name, 1].append(file)
        elif 1 <= int(shard["number"]) <= int(shard["count"]):
            found[directory, shard["stem"], int(shard["count"])].append(file)
    return [
        _Set(directory, stem_of(name), count, tuple(members))
        for (directory, name, count), members in found.items()
    ]


# -- which one is meant ---------------------------------------------------------------------------


def _by_path(weights: Sequence[RepoFile], wanted: HubRef) -> _Set:
    path = wanted.path or ""
    if _is_projector(path) or _is_importance_matrix(path):
        kind = "a projector" if _is_projector(path) else "an importance matrix"
        raise BadReference(f"`{format_ref(wanted)}` is {kind}, not a model", param="ref")
    directory, _, name = path.rpartition("/")
    shard = SHARD.match(name)
    stem, count = (shard["stem"], int(shard["count"])) if shard else (stem_of(name), 1)
    for one in _sets(weights):
        if (one.directory, one.stem, one.count) == (directory, stem, count):
            return one
    models = [one.path for one in _sets(weights) if _is_model(one.path, wanted.repo)]
    raise _refusal(wanted, f"has no {path}", f"; it has {_list(models)}")


def _candidates(sets: Sequence[_Set], wanted: HubRef) -> list[_Set]:
    """All of the quantisation that was asked for, or is preferred."""
    if wanted.quant is None:
        for quant in PREFERENCE:
            if found := [one for one in sets if one.quant == quant]:
                return found
        if len({one.stem for one in sets}) > 1:
            raise _refusal(wanted, "has several models", f"; say which: {_what_there_is(sets)}")
        return list(sets)
    quant = canonical(wanted.quant)
    found = [one for one in sets if one.quant == quant]
    if not found:
        found = [one for one in sets if one.quant is None and quant in words_of(one.path)]
    if not found:
        raise _refusal(wanted, f"has no {wanted.quant}", f"; it has {_what_there_is(sets)}")
    return found


def _the_one(candidates: Sequence[_Set], wanted: HubRef) -> _Set:
    if len({one.stem.lower() for one in candidates}) > 1:
        what = f"several {candidates[0].quant}" if candidates[0].quant else "several files"
        listed = _list(one.path for one in candidates)
        raise _refusal(wanted, f"has {what}", f"; give one as {wanted.repo}/PATH: {listed}")
    return min(candidates, key=lambda one: (one.count, one.path.count("/"), one.path))


def _check_whole(chosen: _Set, wanted: HubRef) -> None:
    if len(chosen.files) == chosen.count:
        return
    there = {file.path for file in chosen.files}
    prefix = f"{chosen.directory}/{chosen.stem}" if chosen.directory else chosen.stem
    names = (f"{prefix}-{n:05d}-of-{chosen.count:05d}.gguf" for n in range(1, chosen.count + 1))
    missing = [name for name in names if name not in there]
    raise _refusal(wanted, f"lacks {_list(missing)}", "; the set cannot be used")


# -- words ----------------------------------------------------------------------------------------


def _shard(file: RepoFile, wanted: HubRef) -> Shard:
    if file.sha256 is None:
        raise HubRefused(
            f"{wanted.repo}: the hub names no sha256 of {file.path} (it is not stored with Git "
            "LFS), so what arrives could not be checked; take another repository"
        )
    return Shard(path=file.path, size=file.size, sha256=file.sha256)


def _refusal(wanted: HubRef, what: str, more: str) -> BadReference:
    where = f"{wanted.repo}@{wanted.revision}" if wanted.revision else wanted.repo
    return BadReference(f"{where} {what}{more}", param="ref")


def _what_there_is(sets: Sequence[_Set]) -> str:
    """Quantisations, and the names of files that have none."""
    quants = in_order(one.quant for one in sets if one.quant is not None)
    return _list((*quants, *(one.path for one in sets if one.quant is None)))


def _list(names: Iterable[str]) -> str:
    all_names = tuple(names)
    more = len(all_names) - MAX_NAMED
    return ", ".join(all_names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
