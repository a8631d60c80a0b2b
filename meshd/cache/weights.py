"""The cheap checks before every load: what they find wrong reaches no engine.

`observe` looks (blocking, a few milliseconds a shard), `judge` decides. Checked for every shard of
a set: it is there, a readable regular file, GGUF of a known version, its header whole, every tensor
inside the file, and the set consistent in itself.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from meshd.cache import builtin
from meshd.cache.gguf_header import GgufError, GgufHeader, NeedMore, parse_header
from meshd.cache.references import SHARD, BuiltinRef, FileRef, model_id, parse_ref
from meshd.errors import BadReference, BrokenWeights
from meshd.ids import ModelId

FIRST_READ_BYTES = 64 * 1024
MAX_HEADER_BYTES = 48 * 1024 * 1024
"""Vocabularies of a quarter million tokens need about 10 MB."""
DEFAULT_CREATED_AT = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of one shard. Exactly one of `problem` and `header` is set."""

    path: str
    number: int
    """From 1."""
    size: int | None = None
    created_at: int = DEFAULT_CREATED_AT
    header: GgufHeader | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """A set of files that passed the checks."""

    model: ModelId
    ref: str
    paths: tuple[Path, ...]
    total_bytes: int
    architecture: str
    trained_context: int | None
    capabilities: tuple[str, ...]
    digest: str | None
    """sha256 if it is known; cheap checks do not hash."""
    created_at: int

    @property
    def first_shard(self) -> Path:
        return self.paths[0]


def inspect(ref: str, models_dir: Path) -> Weights:
    """The weights `ref` names, checked. Blocking. `models_dir`: where the built-in model lives.

    Raises BadReference if the reference or its file does not exist, BrokenWeights naming the shard,
    its path, what was expected and found, and what to do.
    """
    parsed = parse_ref(ref)
    digest = None
    if isinstance(parsed, BuiltinRef):
        path = builtin.ensure(models_dir)
        digest = f"sha256:{builtin.SHA256}"
    elif isinstance(parsed, FileRef):
        path = parsed.path
    else:
        raise BadReference(f"`{ref}` is not a file of this machine", param="ref")
    observations = [observe(p, n) for n, p in enumerate(shard_paths(path), start=1)]
    if len(observations) == 1 and observations[0].size is None:
        raise BadReference(f"{path}: {observations[0].problem}", param="ref")
    broken = judge(observations)
    if broken is not None:
        raise broken
    first = observations[0].header
    assert first is not None, "judge passes only observations with a header"
    return Weights(
        model=model_id(ref),
        ref=ref,
        paths=tuple(Path(o.path) for o in observations),
        total_bytes=sum(o.size or 0 for o in observations),
        architecture=first.architecture or "",
        trained_context=first.context_length,
        capabilities=_capabilities(first),
        digest=digest,
        created_at=max(o.created_at for o in observations),
    )


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the set `path` belongs to, itself if it is not split."""
    shard = SHARD.match(path.name)
    if shard is None:
        return (path,)
    count = int(shard["count"])
    if not 1 <= int(shard["number"]) <= count:
        raise BadReference(f"{path}: there is no shard {shard['number']} of {count}", param="ref")
    return tuple(path.with_name(f"{shard['stem']}-{n:05d}-of-{count:05d}.gguf")
                 for n in range(1, count + 1))  # fmt: skip


def observe(path: Path, number: int) -> Observation:
    """Look at one shard; problems are part of what is seen, nothing is raised for them."""
    text = str(path)
    try:
        # Without O_NONBLOCK a named pipe would keep us until somebody writes into it.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
                return Observation(text, number, problem=f"is {kind}, not a regular file")
            size = status.st_size
            prefix = file.read(FIRST_READ_BYTES)
            problem = _foreign(prefix, size)
            header = None if problem else _read_header(file, prefix, size)
    except OSError as error:
        return Observation(text, number, problem=_why_unreadable(path, error))
    if isinstance(header, str):
        header, problem = None, header
    return Observation(text, number, size, int(status.st_mtime), header, problem)


def _read_header(file: IO[bytes], prefix: bytes, size: int) -> GgufHeader | str:
    """The header, or words for what is wrong with it. Reads on while the parser asks for more."""
    while True:
        try:
            return parse_header(prefix, size)
        except GgufError as error:
            return f"is damaged: {error}"
        except NeedMore as more:
            if more.size > MAX_HEADER_BYTES:
                return f"has a header of more than {MAX_HEADER_BYTES} bytes"
            wanted = min(max(more.size, 4 * len(prefix)), MAX_HEADER_BYTES)
            prefix += file.read(wanted - len(prefix))
            if len(prefix) < more.size:
                return "became shorter while it was read"


def judge(observations: Sequence[Observation]) -> BrokenWeights | None:
    """The first thing wrong with a set, or None. The order: each file, then the set."""
    total = len(observations)
    for seen in observations:
        if seen.problem is not None or seen.header is None:
            return _broken(seen, total, seen.problem or "was not read")
        split = seen.header.split
        if total == 1:
            if split is not None:
                return _broken(
                    seen, total, f"is shard {split[0] + 1} of {split[1]}, but its name does not "
                    "say so, and the others cannot be found"
                )  # fmt: skip
            continue
        if split is None or split[1] != total:
            said = f"of {split[1]} shards" if split else "not split"
            return _broken(seen, total, f"says it is {said}, its name says {total}")
        if split[0] != seen.number - 1:
            return _broken(seen, total, f"holds shard {split[0] + 1}")
    if not observations[0].header.architecture:  # type: ignore[union-attr]
        return _broken(observations[0], total, "names no architecture (general.architecture)")
    if total > 1:
        declared = observations[0].header.split[2]  # type: ignore[union-attr,index]
        found = sum(len(o.header.tensors) for o in observations if o.header)
        if declared != found:
            return _broken(
                observations[0], total, f"promises {declared} tensors, the set holds {found}"
            )
    return None


def _broken(seen: Observation, total: int, problem: str) -> BrokenWeights:
    which = f"shard {seen.number:05d}-of-{total:05d} " if total > 1 else ""
    return BrokenWeights(
        f"{which}{seen.path} {problem}; put the right file there (loading is tried again by "
        "itself), or `meshd load` another",
        path=seen.path,
    )


def _foreign(prefix: bytes, size: int) -> str | None:
    """Words for what is not weights at all: the usual left-overs of a failed download."""
    if size == 0:
        return "is empty"
    start = prefix[:64].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights (`git lfs pull` fetches them)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: what was saved is an error page"
    if start.startswith((b"{", b"[")):
        return "is JSON, not weights: what was saved is an error message"
    return None


def _why_unreadable(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        if path.is_symlink():
            return f"is a link to {path.readlink()}, which does not exist"
        return "is missing"
    return f"cannot be read: {error.strerror}"


def _capabilities(header: GgufHeader) -> tuple[str, ...]:
    if header.embeds:
        return ("embeddings",)
    if header.text("tokenizer.chat_template"):
        return ("completion", "chat")
    return ("completion",)
