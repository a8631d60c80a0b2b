"""Reads the header of a GGUF file: metadata and the extent of every tensor.

Source: the GGUF specification, versions 2 and 3, little endian (`docs/gguf.md` of the ggml
project). Pure: it is given the first bytes of a file and the file's size. Bounded: counts and
lengths are checked against both before anything is allocated, so no input needs more memory than
a few times the bytes it is given.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

from meshd.cache.gguf_cursor import U32, U64, Cursor, GgufError, Walks, beyond
from meshd.cache.gguf_types import TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_TENSORS = 16_384
"""A file; the largest models have some 2000, in many files."""
MAX_METADATA = 4_096
MAX_NAME_BYTES = 65_535
MAX_KEPT_STRING_BYTES = 1 << 20
"""Longer strings are skipped; chat templates are the longest that anybody asks for."""
MAX_DIMENSIONS = 4

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class ArrayLength:
    """Stands for an array in the metadata: arrays are walked over, not kept."""

    items: int


class TensorInfo(NamedTuple):
    name: str
    dimensions: tuple[int, ...]
    type: str
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    version: int
    metadata: Mapping[str, Scalar | ArrayLength]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    """Where tensor data starts, bytes from the start of the file."""

    @property
    def needed_bytes(self) -> int:
        """Size below which the file is truncated."""
        return max((t.offset + t.size for t in self.tensors), default=self.data_offset)

    def integer(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    @property
    def architecture(self) -> str | None:
        return self.text("general.architecture")

    @property
    def context_length(self) -> int | None:
        """Tokens the model was trained for."""
        return self.integer(f"{self.architecture}.context_length")

    @property
    def split(self) -> tuple[int, int, int] | None:
        """(number of this shard from 0, shards, tensors in all shards); None if not split."""
        count = self.integer("split.count")
        if count is None or count <= 1:
            return None
        return (
            self.integer("split.no") or 0,
            count,
            self.integer("split.tensors.count") or 0,
        )

    @property
    def embeds(self) -> bool:
        """The model turns text into vectors and does not generate."""
        return self.integer(f"{self.architecture}.pooling_type") is not None


def parse_header(prefix: bytes, file_bytes: int, walks: Walks | None = None) -> GgufHeader:
    """The header of a file of `file_bytes` bytes that starts with `prefix`.

    `walks`: given again with a longer prefix, or with the same file later, it saves walking over
    long arrays anew; filled here.

    Raises NeedMore if `prefix` ends inside the header, GgufError if the header is wrong: other
    magic or version, absurd counts, truncated, a tensor of unknown type, outside the file,
    misaligned, doubled or overlapping another.
    """
    cursor = Cursor(prefix, file_bytes, walks if walks is not None else {})
    if cursor.take(4) != MAGIC:
        raise GgufError(f"it does not begin with {MAGIC.decode()} but with {prefix[:4]!r}")
    version = cursor.u32()
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = "; it is big endian, which is not supported" if swapped in VERSIONS else ""
        raise GgufError(f"GGUF version {version} is not one of {VERSIONS}{hint}")
    tensor_count, metadata_count = cursor.u64(), cursor.u64()
    if tensor_count > MAX_TENSORS:
        raise GgufError(f"{tensor_count} tensors are more than {MAX_TENSORS}")
    if metadata_count > MAX_METADATA:
        raise GgufError(f"{metadata_count} metadata entries are more than {MAX_METADATA}")
    metadata = _metadata(cursor, metadata_count)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise GgufError(f"alignment {alignment!r} is not a power of two of at least 8")
    raw = [_raw_tensor(cursor) for _ in range(tensor_count)]
    data_offset = -(-cursor.at // alignment) * alignment
    tensors = tuple(_placed(r, data_offset, alignment, file_bytes) for r in raw)
    _check_distinct(tensors)
    return GgufHeader(version, MappingProxyType(metadata), tensors, alignment, data_offset)


# -- reading --------------------------------------------------------------------------------------

_STRING, _ARRAY = 8, 9
_FIXED = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""GGUF value types of fixed size."""
_EXTENTS = tuple(struct.Struct(f"<{count}QIQ") for count in range(MAX_DIMENSIONS + 1))
"""What follows the number of dimensions: each of them, the type, the offset."""


def _metadata(cursor: Cursor, count: int) -> dict[str, Scalar | ArrayLength]:
    found: dict[str, Scalar | ArrayLength] = {}
    for _ in range(count):
        key = cursor.string(MAX_NAME_BYTES)
        if key is None:
            raise GgufError(f"a metadata key is longer than {MAX_NAME_BYTES} bytes")
        if key in found:
            raise GgufError(f"metadata key {key!r} stands twice")
        kind = cursor.u32()
        if kind == _STRING:
            found[key] = cursor.string(MAX_KEPT_STRING_BYTES) or ""
        elif kind == _ARRAY:
            found[key] = _array(cursor, key)
        elif kind in _FIXED:
            found[key] = cursor.unpack(_FIXED[kind])[0]
        else:
            raise GgufError(f"metadata {key!r} has the unknown type {kind}")
    return found


def _array(cursor: Cursor, key: str) -> ArrayLength:
    kind, items = cursor.u32(), cursor.u64()
    if kind == _STRING:
        if items * 8 > cursor.file_bytes:
            raise GgufError(f"metadata {key!r} claims {items} strings, more than the file can hold")
        cursor.skip_strings(items)
    elif kind in _FIXED:
        cursor.skip(items * _FIXED[kind].size)
    else:
        raise GgufError(f"metadata {key!r} is an array of the unknown type {kind}")
    return ArrayLength(items)


class _RawTensor(NamedTuple):
    name: str
    dimensions: tuple[int, ...]
    type: int
    offset: int


def _raw_tensor(cursor: Cursor) -> _RawTensor:
    name = cursor.string(MAX_NAME_BYTES)
    if not name:
        raise GgufError("a tensor has no name, or one of absurd length")
    count = cursor.u32()
    if count > MAX_DIMENSIONS:
        raise GgufError(f"tensor {name!r} has {count} dimensions, more than {MAX_DIMENSIONS}")
    *dimensions, kind, offset = cursor.unpack(_EXTENTS[count])
    return _RawTensor(name, tuple(dimensions), kind, offset)


# -- tensors --------------------------------------------------------------------------------------


def _placed(raw: _RawTensor, data_offset: int, alignment: int, file_bytes: int) -> TensorInfo:
    known = TYPES.get(raw.type)
    if known is None:
        raise GgufError(f"tensor {raw.name!r} has the unknown type {raw.type}")
    name, block, block_bytes = known
    elements = 1
    for dimension in raw.dimensions:
        elements *= dimension
    if raw.dimensions and raw.dimensions[0] % block:
        raise GgufError(
            f"tensor {raw.name!r}: rows of {raw.dimensions[0]} do not divide into {name} blocks "
            f"of {block}"
        )
    if raw.offset % alignment:
        raise GgufError(f"tensor {raw.name!r} at {raw.offset} is not aligned to {alignment}")
    size = elements // block * block_bytes
    end = data_offset + raw.offset + size
    if end > file_bytes:
        raise beyond(
            end,
            f"tensor {raw.name!r} ends at byte {end}, but the file has {file_bytes}: it is "
            f"{end - file_bytes} bytes short",
        )
    return TensorInfo(raw.name, raw.dimensions, name, data_offset + raw.offset, size)


def _check_distinct(tensors: tuple[TensorInfo, ...]) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        times = Counter(tensor.name for tensor in tensors)
        raise GgufError(f"tensor {times.most_common(1)[0][0]!r} stands twice")
    previous: TensorInfo | None = None
    for tensor in sorted(tensors, key=attrgetter("offset", "size")):
        if previous is not None and tensor.offset < previous.offset + previous.size:
            raise GgufError(f"tensors {previous.name!r} and {tensor.name!r} overlap")
        previous = tensor
