"""REF: how people name a model.

    builtin                                the small model made here
    /path/to/file.gguf  ./f.gguf  ~/f.gguf a local file; any shard names the set
    owner/repo[@revision][:QUANT]          a Hugging Face repository
    owner/repo[@revision]/path/file.gguf   a file in one
    some-name                              a catalog name

Only the first two can be opened by this version; the others are recognised, so that the refusal
says what is missing instead of guessing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from meshd.errors import BadReference
from meshd.ids import ModelId

BUILTIN = "builtin"

SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""File name of a shard; numbers count from 1."""

_HUB = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w.-]+)?(/.+\.gguf)?$")


@dataclass(frozen=True, slots=True)
class BuiltinRef:
    """The model made on this machine."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """A local file; absolute, links not resolved (a Hugging Face cache is made of them)."""

    path: Path


def parse_ref(ref: str) -> BuiltinRef | FileRef:
    """What `ref` names. Raises BadReference, saying what would be right."""
    if ref == BUILTIN:
        return BuiltinRef()
    if ref.startswith(("/", "./", "../", "~")) or ref in (".", ".."):
        return FileRef(Path(ref).expanduser().absolute())
    if ref.lower().endswith(".gguf") and Path(ref).exists():
        return FileRef(Path(ref).absolute())
    if _HUB.match(ref):
        raise BadReference(
            f"`{ref}` names a model on the Hugging Face hub; this version opens `{BUILTIN}` and "
            "local files only: download it and give its path",
            param="ref",
        )
    raise BadReference(
        f"`{ref}` is neither `{BUILTIN}` nor the path of a file; a path begins with / or ./ or ~",
        param="ref",
    )


def model_id(ref: str) -> ModelId:
    """The name clients use for `ref`: `builtin`, or the file's name without shard number."""
    parsed = parse_ref(ref)
    if isinstance(parsed, BuiltinRef):
        return ModelId(BUILTIN)
    name = parsed.path.name
    shard = SHARD.match(name)
    stem = shard["stem"] if shard else re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)
    if not stem:
        raise BadReference(f"`{ref}` has no file name", param="ref")
    return ModelId(stem)
