"""What is in the cache: sets of weights, with a manifest or without one, and leftovers. Blocking, a
few milliseconds a set.

1. A manifest of which some shard is here is a set; all revisions with the same shards are one.
2. GGUF files no manifest tells of are sets by their names, each with its shards. Hashes they should
   have are known all the same: huggingface_hub names blobs by them.
3. What belongs to no set is a leftover: files set aside, blobs no snapshot links to, partials
   nobody will go on with. Other partials are a part of their sets.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from meshd.cache.budget import Holding, Leftover, LeftoverKind, own_bytes
from meshd.cache.commands import LeftoverRow, Listing, SetRow
from meshd.cache.leftovers import leftovers_of
from meshd.cache.manifest import Manifest, set_digest
from meshd.cache.places import OWN_PARTIAL, Places
from meshd.cache.references import COMMIT, DEFAULT_BRANCH, HubRef, format_ref, model_id
from meshd.cache.removal import Link, RemovalOrder
from meshd.cache.repository import Repository, repositories
from meshd.cache.selection import RepoFile, select
from meshd.cache.shared_store import bytes_of
from meshd.cache.store import Store
from meshd.cache.usage import PARTIAL_SUFFIX, disk_bytes
from meshd.cache.uses import UseBook
from meshd.cache.verdict import Expected, Fault, SetVerdict
from meshd.cache.weights import look, shard_paths
from meshd.errors import BadReference, HubRefused
from meshd.view import CacheView

_PARTIALS = (OWN_PARTIAL, PARTIAL_SUFFIX)
"""Endings of blobs on their way, by us and by older huggingface_hubs."""


@dataclass(frozen=True, slots=True)
class StoredSet:
    """A set of weights of which something is on the disk."""

    repo: str
    digest: str
    """`sha256:…`; of a set whose hashes are not all known something else, that names it too."""
    refs: tuple[HubRef, ...]
    """The best for people first."""
    manifest: Manifest | None
    """Of the revision that was judged."""
    verdict: SetVerdict
    links: tuple[Link, ...]
    """All files of all its revisions, there or not."""
    blobs: Mapping[str, int]
    """What is on the disk: bytes, by path."""
    last_used_at: float
    """Unix time; when it came, if it was not used since."""

    @property
    def ref(self) -> str:
        return format_ref(self.refs[0])

    @property
    def model(self) -> str:
        """The name clients use."""
        return model_id(self.ref)

    @property
    def size_bytes(self) -> int:
        """When it is whole, as far as is known."""
        return max(sum(e.size or 0 for e in self.verdict.expected), sum(self.blobs.values()))

    def holding(
        self, *, pinned: bool = False, in_use: bool = False, elsewhere: bool | None = None
    ) -> Holding:
        """What `budget` has to know of it."""
        return Holding(
            digest=self.digest,
            model=self.model,
            refs=tuple(format_ref(ref) for ref in self.refs),
            blobs=self.blobs,
            last_used_at=self.last_used_at,
            pinned=pinned,
            in_use=in_use,
            intact=self.verdict.worst.fault in (Fault.OK, Fault.UNVERIFIED),
            elsewhere=elsewhere,
        )

    def removal(self) -> RemovalOrder:
        return RemovalOrder(repo=self.repo, digest=self.digest, links=self.links)


@dataclass(frozen=True, slots=True)
class Inventory:
    sets: tuple[StoredSet, ...]
    """By model."""
    leftovers: tuple[Leftover, ...]

    def find(self, ref: HubRef) -> StoredSet | None:
        """The set that `ref` is known as, or the only one it can mean."""
        for one in self.sets:
            if ref in one.refs:
                return one
        candidates = [one for one in self.sets if _means(ref, one)]
        return candidates[0] if len(candidates) == 1 else None


def take_inventory(store: Store, uses: UseBook, *, now: float | None = None) -> Inventory:
    """Look at everything in the cache. `now`: Unix time."""
    at = time.time() if now is None else now
    known: dict[str, list[tuple[HubRef, Manifest]]] = defaultdict(list)
    for ref, manifest in store.manifests.all():
        known[manifest.repo].append((ref, manifest))
    sets: list[StoredSet] = []
    leftovers: list[Leftover] = []
    for repo in repositories(store.places.hub):
        found = list(_sets_of(repo, known[repo.name], store, uses))
        needed = {link.blob for one in found for link in one.links if link.blob is not None}
        loose = tuple(leftovers_of(repo, needed, store, at))
        growing = {
            item for item in loose
            if item.kind is LeftoverKind.PARTIAL and not item.useless and item.blob in needed
        }  # fmt: skip
        sets += [_with_partials(one, growing) for one in found]
        leftovers += [item for item in loose if item not in growing]
    return Inventory(tuple(sorted(sets, key=lambda one: (one.model, one.ref))), tuple(leftovers))


def _with_partials(one: StoredSet, growing: Iterable[Leftover]) -> StoredSet:
    """What somebody will go on with is a part of the set already."""
    parts = {link.blob for link in one.links}
    more = {item.path: item.size_bytes for item in growing if item.blob in parts}
    return replace(one, blobs={**one.blobs, **more}) if more else one


def listing(inventory: Inventory, holdings: Sequence[Holding], usage: CacheView) -> Listing:
    """The answer to `ls`; `holdings`: those of the sets, in the same order."""
    return Listing(
        path=usage.path,
        used_bytes=usage.used_bytes,
        budget_bytes=usage.budget_bytes,
        free_bytes=usage.free_bytes,
        sets=tuple(
            _row(one, holding, holdings)
            for one, holding in zip(inventory.sets, holdings, strict=True)
        ),
        leftovers=tuple(
            LeftoverRow(
                path=item.path,
                kind=item.kind.value,
                size_bytes=item.size_bytes,
                useless=item.useless,
                reason=item.reason,
            )
            for item in inventory.leftovers
        ),
    )


def _row(one: StoredSet, holding: Holding, holdings: Sequence[Holding]) -> SetRow:
    worst = one.verdict.worst
    return SetRow(
        model=one.model,
        refs=holding.refs,
        digest=one.digest if one.digest.startswith("sha256:") else None,
        state=worst.fault,
        problem=None if worst.fault is Fault.OK else worst.words,
        files=len(one.verdict.files),
        size_bytes=one.size_bytes,
        disk_bytes=holding.size_bytes,
        own_bytes=own_bytes(holding, holdings),
        last_used_at=one.last_used_at,
        pinned=holding.pinned,
        in_use=holding.in_use,
        elsewhere=holding.elsewhere,
    )


# -- sets -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """A set while its revisions are gathered."""

    verdict: SetVerdict
    manifest: Manifest | None = None
    refs: list[HubRef] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)


def _sets_of(
    repo: Repository, known: Sequence[tuple[HubRef, Manifest]], store: Store, uses: UseBook
) -> Iterator[StoredSet]:
    drafts = _told_sets(repo, known, store)
    told = {(link.revision, link.path) for draft in drafts.values() for link in draft.links}
    for links in _untold_sets(repo, told, store.places):
        digest = _digest(repo, links)
        draft = drafts.get(digest)
        if draft is None:
            verdict = look(_expected(repo, links, store.places), store.ledger, store.headers)
            draft = drafts[digest] = _Draft(verdict)
        revision, path = links[0].revision, links[0].path
        named = repo.branches.get(DEFAULT_BRANCH) == revision
        draft.refs.append(HubRef(repo.name, None if named else revision, None, path))
        draft.links += links
    for digest, draft in drafts.items():
        yield StoredSet(
            repo=repo.name,
            digest=digest,
            refs=tuple(sorted(dict.fromkeys(draft.refs), key=_plainness)),
            manifest=draft.manifest,
            verdict=draft.verdict,
            links=tuple(dict.fromkeys(draft.links)),
            blobs=dict(_on_disk(repo, draft.links, store.places)),
            last_used_at=uses.last_used_at(digest) or _came_at(repo, draft.links, store.places),
        )


def _told_sets(
    repo: Repository, known: Sequence[tuple[HubRef, Manifest]], store: Store
) -> dict[str, _Draft]:
    """Those of manifests, by digest; judged is the revision of which most is here."""
    groups: dict[str, list[tuple[HubRef, Manifest]]] = defaultdict(list)
    for ref, manifest in known:
        if _is_here(manifest, repo):
            groups[manifest.digest].append((ref, manifest))
    drafts: dict[str, _Draft] = {}
    for digest, group in groups.items():
        manifests = list(dict.fromkeys(manifest for _, manifest in group))
        best = max(
            manifests, key=lambda m: sum((m.revision, f.path) in repo.links for f in m.files)
        )
        links = [
            Link(revision=manifest.revision, path=file.path, blob=file.sha256)
            for manifest in manifests
            for file in manifest.files
        ]
        drafts[digest] = _Draft(store.look(best), best, [ref for ref, _ in group], links)
    return drafts


def _is_here(manifest: Manifest, repo: Repository) -> bool:
    """Something of it is; a projector alone may be another set's."""
    return any(
        (manifest.revision, shard.path) in repo.links
        or shard.sha256 in repo.blobs
        or any(f"{shard.sha256}{ending}" in repo.blobs for ending in _PARTIALS)
        for shard in manifest.shards
    )


def _untold_sets(
    repo: Repository, told: set[tuple[str, str]], places: Places
) -> Iterator[list[Link]]:
    """Sets by the names of files that no manifest tells of; shards that are not here too."""
    seen = set(told)
    for revision, path in sorted(repo.links):
        hidden = path.rpartition("/")[2].startswith(".")
        if hidden or not path.lower().endswith(".gguf") or not COMMIT.fullmatch(revision):
            continue
        if (revision, path) in seen:
            continue
        root = places.snapshot(repo.name, revision)
        try:
            files = [one.relative_to(root).as_posix() for one in shard_paths(root / path)]
            links = [
                Link(revision=revision, path=one, blob=repo.links.get((revision, one)))
                for one in files
            ]
        except (BadReference, ValidationError):
            continue  # a name that no set of weights has
        seen.update((revision, one) for one in files)
        yield links


def _digest(repo: Repository, links: Sequence[Link]) -> str:
    """Of a set without a manifest, whose blobs are named by their sha256 if they are whole."""
    hashes = [link.blob for link in links if link.blob is not None and len(link.blob) == 64]
    if len(hashes) == len(links):
        return set_digest(hashes)
    return f"{repo.name}@{links[0].revision}/{links[0].path}"


def _expected(repo: Repository, links: Sequence[Link], places: Places) -> tuple[Expected, ...]:
    return tuple(
        Expected(
            str(places.snapshot(repo.name, link.revision, link.path)),
            sha256=link.blob if link.blob is not None and len(link.blob) == 64 else None,
        )
        for link in links
    )


def _on_disk(repo: Repository, links: Iterable[Link], places: Places) -> Iterator[tuple[str, int]]:
    """(path, bytes) of what is there of the files, wherever it lies."""
    for link in links:
        place = places.snapshot(repo.name, link.revision, link.path)
        if link.blob is not None:
            place = bytes_of(places.blob(repo.name, link.blob), places.hub)
        try:
            yield str(place), disk_bytes(place.name, place.lstat())
        except OSError:
            continue


def _came_at(repo: Repository, links: Iterable[Link], places: Places) -> float:
    """When the last of it came."""
    times = [0.0]
    for link in links:
        with contextlib.suppress(OSError):
            status = places.snapshot(repo.name, link.revision, link.path).lstat()
            times.append(status.st_mtime)
        names = (f"{link.blob}{ending}" for ending in ("", *_PARTIALS))
        times += [repo.blobs[name].st_mtime for name in names if name in repo.blobs]
    return max(times)


def _plainness(ref: HubRef) -> tuple[bool, bool, str]:
    """Order of references for people: a branch before a commit, a quantisation before a path."""
    return (ref.is_pinned, ref.quant is None, format_ref(ref))


def _means(ref: HubRef, one: StoredSet) -> bool:
    """Whether `ref` can mean the set, going by the names of its files."""
    revisions = {link.revision for link in one.links}
    if ref.repo != one.repo or ref.branch not in revisions | {known.branch for known in one.refs}:
        return False
    paths = dict.fromkeys(link.path for link in one.links)
    try:
        select([RepoFile(path, 1, None) for path in paths], ref)
    except (BadReference, HubRefused):
        return False
    return True
