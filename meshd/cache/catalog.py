"""The catalog: short names for well-known models.

Names, and where their files are; nothing in it is trusted: sizes and hashes come from the hub when
a model is fetched. More can be added in a file of one's own, JSON of the same shape:

    [{"name": "Mine", "repo": "me/Mine-GGUF", "file": "Mine-Q4_K_M.gguf",
      "size_bytes": 2500000000, "draft": "Qwen3-0.6B-Q4_K_M"}]
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from meshd.cache.manifest import RepoName, RepoPath
from meshd.cache.references import HubRef, parse_hub_ref
from meshd.errors import BadConfig, BadReference

MAX_CATALOG_BYTES = 4 * 1024 * 1024
CLOSE_NAMES = 3

EntryName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$")]


class Entry(BaseModel):
    """One model. Its projector for images, if it has one, is found beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: EntryName
    repo: RepoName
    file: RepoPath
    """The only file, or any shard."""
    size_bytes: Annotated[int, Field(gt=0)] | None = None
    """About; for people who choose."""
    draft: EntryName | None = None
    """Name of a small model with the same vocabulary, for speculative decoding."""

    @model_validator(mode="after")
    def _names_a_file_of_the_hub(self) -> Entry:
        try:
            _ = self.ref
        except BadReference as error:
            raise ValueError(error.message) from None
        return self

    @property
    def ref(self) -> HubRef:
        return parse_hub_ref(f"{self.repo}/{self.file}")


class Catalog:
    """Names in any case to entries; of two entries of one name the later one counts."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_name = {entry.name.lower(): entry for entry in entries}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """By name."""
        return tuple(self._by_name[name] for name in sorted(self._by_name))

    def find(self, name: str) -> Entry | None:
        return self._by_name.get(name.lower())

    def close_names(self, name: str) -> tuple[str, ...]:
        """At most three that may have been meant: those that contain `name`, then those that look
        like it."""
        asked = name.lower()
        if not asked:
            return ()
        inside = sorted(known for known in self._by_name if asked in known)
        alike = difflib.get_close_matches(asked, self._by_name, CLOSE_NAMES, 0.6)
        found = dict.fromkeys((*inside, *alike))
        return tuple(self._by_name[known].name for known in list(found)[:CLOSE_NAMES])


def load_catalog(extra: Path | None = None) -> Catalog:
    """The packaged catalog and, over it, the one in the file `extra` if that exists. Blocking.

    Raises BadConfig for a file that is none, saying which entry is wrong and why.
    """
    packaged = _packaged()
    if extra is None:
        return packaged
    try:
        with extra.open("rb") as file:
            data = file.read(MAX_CATALOG_BYTES + 1)
    except FileNotFoundError:
        return packaged
    except OSError as error:
        raise BadConfig(f"the catalog {extra} cannot be read: {error.strerror}") from None
    if len(data) > MAX_CATALOG_BYTES:
        raise BadConfig(f"the catalog {extra} is larger than {MAX_CATALOG_BYTES} bytes")
    try:
        own = _ENTRIES.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        where = f" in entry {place}" if place else ""
        raise BadConfig(f"the catalog {extra} is wrong{where}: {first['msg']}") from None
    return Catalog((*packaged.entries, *own))


_ENTRIES = TypeAdapter(tuple[Entry, ...])


@functools.cache
def _packaged() -> Catalog:
    # Late: names of the catalog are rare at start, and this brings zipfile and more.
    from importlib.resources import files

    return Catalog(_ENTRIES.validate_json((files(__package__) / "catalog.json").read_bytes()))
