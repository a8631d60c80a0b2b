"""What is looked at before every load: what is found wrong reaches no engine.

`look` observes and judges (blocking, a few milliseconds for a hundred shards); `inspect` does it
for what is no hub's: the built-in model and local files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshd.cache import builtin
from meshd.cache.gguf_header import GgufHeader
from meshd.cache.headers import Headers
from meshd.cache.ledger import Ledger
from meshd.cache.manifest import MAX_SHARDS, Manifest, set_digest
from meshd.cache.observe import explain_missing, observe
from meshd.cache.pairing import best_pair, pairs
from meshd.cache.places import Places
from meshd.cache.references import SHARD, BuiltinRef, FileRef, model_id, parse_ref
from meshd.cache.verdict import Expected, Observation, SetVerdict, judge
from meshd.errors import BadReference
from meshd.ids import ModelId

MAX_PROJECTORS: Final = 16
"""Looked at in a directory."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A set of files that passed the checks."""

    model: ModelId
    ref: str
    paths: tuple[Path, ...]
    """Of the shards, in order."""
    total_bytes: int
    """Of everything, the projector included."""
    architecture: str
    trained_context: int | None
    capabilities: tuple[str, ...]
    digest: str | None
    """sha256 over the shards (`manifest.set_digest`); None if one was not hashed."""
    created_at: int
    mmproj: Path | None = None
    """The projector for images or sound."""

    @property
    def first_shard(self) -> Path:
        return self.paths[0]


def inspect(
    ref: str, models_dir: Path, ledger: Ledger | None = None, headers: Headers | None = None
) -> Weights:
    """The weights `ref` names, if it is the built-in model or a local file, checked. Blocking.

    `models_dir`: where the built-in model lives. Local files need not have been hashed; their
    digest is known if they were. Raises BadReference if the reference or its file does not exist,
    BrokenWeights naming the shard, its path, what was expected and found, and what to do.
    """
    parsed = parse_ref(ref)
    if isinstance(parsed, BuiltinRef):
        expected = (Expected(str(builtin.ensure(models_dir)), sha256=builtin.SHA256),)
        verdict = judge(expected, [observe(expected[0].path, headers)], [builtin.SHA256])
    elif isinstance(parsed, FileRef):
        verdict = look(local_set(parsed.path, headers), ledger, headers)
    else:
        raise BadReference(f"`{ref}` names a model of the hub, not a local file", param="ref")
    first = verdict.observations[0]
    if len(verdict.files) == 1 and first.facts is None:
        raise BadReference(f"{first.path}: {first.problem}", param="ref")
    if not verdict.ok and not verdict.needs_hash:
        raise verdict.to_error(None)
    return to_weights(model_id(ref), ref, verdict)


def look(
    expected: Sequence[Expected], ledger: Ledger | None, headers: Headers | None = None
) -> SetVerdict:
    """Look at the files of a set and judge them. Blocking; without a ledger no hash is known."""
    observations = [observe(one.path, headers) for one in expected]
    return judge(expected, observations, _known(observations, ledger))


def look_at(
    manifest: Manifest, places: Places, ledger: Ledger, headers: Headers | None = None
) -> SetVerdict:
    """The same for a set of the hub, as it should lie in the Hugging Face cache."""
    expected = expected_of(manifest, places)
    observations = [
        explain_missing(observe(one.path, headers), one, places, manifest.repo) for one in expected
    ]
    return judge(expected, observations, _known(observations, ledger))


def to_weights(
    model: ModelId, ref: str, verdict: SetVerdict, manifest: Manifest | None = None
) -> Weights:
    """What an engine can be given. `manifest`: for a set of the hub, whose verdict must be OK; of
    local files it may be that they were not hashed. Anything else is a ValueError. A projector that
    does not fit the model (`misfit`) is left out."""
    if not verdict.ok and (manifest is not None or not verdict.needs_hash):
        raise ValueError(f"not to be given to an engine: {verdict.worst.words}")
    shards, projectors = _parts(verdict)
    first = _header(shards[0])
    projectors = [seen for seen in projectors if pairs(first, _header(seen)) is None]
    hashes = [file.sha256 for file in verdict.files if file.number > 0]
    known = [sha256 for sha256 in hashes if sha256 is not None]
    digest = set_digest(known) if len(known) == len(hashes) else None
    facts = [seen.facts for seen in verdict.observations if seen.facts is not None]
    return Weights(
        model=model,
        ref=ref,
        paths=tuple(Path(seen.path) for seen in shards),
        total_bytes=sum(one.size for one in facts),
        architecture=first.architecture or "",
        trained_context=first.context_length,
        capabilities=_capabilities(first, [_header(seen) for seen in projectors]),
        digest=manifest.digest if manifest is not None else digest,
        created_at=max(one.mtime_ns // 1_000_000_000 for one in facts),
        mmproj=Path(projectors[0].path) if projectors else None,
    )


def headers_of(verdict: SetVerdict) -> tuple[list[GgufHeader], GgufHeader | None]:
    """Of the shards in order, and of the projector that is given to an engine with them, if one is.
    For a verdict that is OK, but for hashes perhaps."""
    shards, projectors = _parts(verdict)
    first = _header(shards[0])
    fitting = [_header(seen) for seen in projectors if pairs(first, _header(seen)) is None]
    return [_header(seen) for seen in shards], fitting[0] if fitting else None


def misfit(verdict: SetVerdict) -> str | None:
    """Words on a projector of the set that is not the model's; None if there is none."""
    shards, projectors = _parts(verdict)
    model = shards[0].header
    for seen in projectors:
        if model is not None and seen.header is not None:
            problem = pairs(model, seen.header)
            if problem is not None:
                return f"{seen.path} {problem}"
    return None


def local_set(path: Path, headers: Headers | None = None) -> tuple[Expected, ...]:
    """The set a local file belongs to, as far as its name tells, and the projector beside it that
    fits by its metadata. Raises BadReference."""
    shards = shard_paths(path)
    expected = [Expected(str(shard)) for shard in shards]
    projector = _projector_beside(shards[0], headers)
    if projector is not None:
        expected.append(Expected(projector, projector=True))
    return tuple(expected)


def _projector_beside(shard: Path, headers: Headers | None) -> str | None:
    beside = sorted(shard.parent.glob("*mmproj*.gguf"))[:MAX_PROJECTORS]
    if not beside or (model := observe(shard, headers).header) is None:
        return None
    seen = {str(path): observe(path, headers).header for path in beside if path != shard}
    return best_pair(model, {path: header for path, header in seen.items() if header is not None})


def expected_of(manifest: Manifest, places: Places) -> tuple[Expected, ...]:
    """The files of a manifest where engines open them: in the snapshot of its revision."""
    return tuple(
        Expected(
            str(places.snapshot(manifest.repo, manifest.revision, file.path)),
            file.size,
            file.sha256,
            projector=file is manifest.mmproj,
        )
        for file in manifest.files
    )


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the set `path` belongs to, itself if it is not split."""
    shard = SHARD.match(path.name)
    if shard is None:
        return (path,)
    count = int(shard["count"])
    if count > MAX_SHARDS:
        raise BadReference(f"{path}: no set has {count} shards", param="ref")
    if not 1 <= int(shard["number"]) <= count:
        raise BadReference(f"{path}: there is no shard {shard['number']} of {count}", param="ref")
    return tuple(path.with_name(f"{shard['stem']}-{n:05d}-of-{count:05d}.gguf")
                 for n in range(1, count + 1))  # fmt: skip


def _known(observations: Sequence[Observation], ledger: Ledger | None) -> list[str | None]:
    return [
        ledger.known(seen.facts) if ledger is not None and seen.facts is not None else None
        for seen in observations
    ]


def _parts(verdict: SetVerdict) -> tuple[list[Observation], list[Observation]]:
    """(shards, projectors)"""
    shards: list[Observation] = []
    projectors: list[Observation] = []
    for expected, seen in zip(verdict.expected, verdict.observations, strict=True):
        (projectors if expected.projector else shards).append(seen)
    return shards, projectors


def _header(seen: Observation) -> GgufHeader:
    assert seen.header is not None, "a file without one has a fault"
    return seen.header


def _capabilities(header: GgufHeader, projectors: Sequence[GgufHeader]) -> tuple[str, ...]:
    if header.embeds:
        return ("embeddings",)
    found = ["completion"]
    if header.text("tokenizer.chat_template"):
        found.append("chat")
    for projector in projectors:
        if projector.metadata.get("clip.has_vision_encoder", True):
            found.append("vision")
        if projector.metadata.get("clip.has_audio_encoder", False):
            found.append("audio")
    return tuple(found)
