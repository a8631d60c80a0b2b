"""Reads the header of a GGUF file: metadata and the extent of every tensor.

Source: the GGUF specification, versions 2 and 3, little endian (`docs/gguf.md` of the ggml
project). Pure: it is given the first bytes of a file and the file's size. Bounded: counts and
lengths are checked against both before anything is allocated, so no input needs more memory than
a few times the bytes it is given.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_TENSORS = 65_536
MAX_METADATA = 65_536
MAX_NAME_BYTES = 65_535
MAX_KEPT_STRING_BYTES = 1 << 20
"""Longer strings are skipped; chat templates are the longest that anybody asks for."""
MAX_DIMENSIONS = 4

Scalar = int | float | bool | str


class GgufError(ValueError):
    """The bytes are not a GGUF header that can be used; the message says what is wrong."""


class NeedMore(Exception):
    """The header goes on behind the bytes given; `size` bytes from the start are wanted."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


@dataclass(frozen=True, slots=True)
class ArrayLength:
    """Stands for an array in the metadata: arrays are walked over, not kept."""

    items: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
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


def parse_header(prefix: bytes, file_bytes: int) -> GgufHeader:
    """The header of a file of `file_bytes` bytes that starts with `prefix`.

    Raises NeedMore if `prefix` ends inside the header, GgufError if the header is wrong: other
    magic or version, absurd counts, truncated, a tensor of unknown type, outside the file,
    misaligned, doubled or overlapping another.
    """
    cursor = _Cursor(prefix, file_bytes)
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

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING, _ARRAY = 8, 9
_FIXED = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""GGUF value types of fixed size."""


class _Cursor:
    __slots__ = ("at", "buffer", "end", "file_bytes")

    def __init__(self, buffer: bytes, file_bytes: int) -> None:
        self.buffer = buffer
        self.end = len(buffer)
        self.file_bytes = file_bytes
        self.at = 0

    def reach(self, end: int) -> None:
        """Make sure that the bytes up to `end` are there."""
        if end > self.end:
            if end > self.file_bytes:
                raise GgufError(
                    f"the header is cut off: it goes on to byte {end}, the file ends at "
                    f"{self.file_bytes}"
                )
            raise NeedMore(end)

    def take(self, count: int) -> bytes:
        start = self.at
        self.reach(start + count)
        self.at = start + count
        return self.buffer[start : self.at]

    def skip(self, count: int) -> None:
        self.reach(self.at + count)
        self.at += count

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def string(self, limit: int) -> str | None:
        """A string of at most `limit` bytes; None if it is longer, and skipped."""
        length = self.u64()
        if length > limit:
            self.skip(length)
            return None
        return self.take(length).decode("utf-8", errors="replace")

    def skip_strings(self, count: int) -> None:
        """Walk over `count` strings; the vocabulary has hundreds of thousands."""
        buffer, at, end, unpack = self.buffer, self.at, self.end, _U64.unpack_from
        for _ in range(count):
            if at + 8 > end:
                self.reach(at + 8)
            at += 8 + unpack(buffer, at)[0]
        self.at = at
        self.reach(at)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Scalar | ArrayLength]:
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
            form = _FIXED[kind]
            found[key] = form.unpack(cursor.take(form.size))[0]
        else:
            raise GgufError(f"metadata {key!r} has the unknown type {kind}")
    return found


def _array(cursor: _Cursor, key: str) -> ArrayLength:
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


@dataclass(frozen=True, slots=True)
class _RawTensor:
    name: str
    dimensions: tuple[int, ...]
    type: int
    offset: int


def _raw_tensor(cursor: _Cursor) -> _RawTensor:
    name = cursor.string(MAX_NAME_BYTES)
    if not name:
        raise GgufError("a tensor has no name, or one of absurd length")
    count = cursor.u32()
    if count > MAX_DIMENSIONS:
        raise GgufError(f"tensor {name!r} has {count} dimensions, more than {MAX_DIMENSIONS}")
    dimensions = tuple(cursor.u64() for _ in range(count))
    return _RawTensor(name, dimensions, cursor.u32(), cursor.u64())


# -- tensors --------------------------------------------------------------------------------------

_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml type: name, elements a block, bytes a block. A test holds it against the gguf package."""


def _placed(raw: _RawTensor, data_offset: int, alignment: int, file_bytes: int) -> TensorInfo:
    known = _TYPES.get(raw.type)
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
        raise GgufError(
            f"tensor {raw.name!r} ends at byte {end}, but the file has {file_bytes}: it is "
            f"{end - file_bytes} bytes short"
        )
    return TensorInfo(raw.name, raw.dimensions, name, data_offset + raw.offset, size)


def _check_distinct(tensors: tuple[TensorInfo, ...]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise GgufError(f"tensor {tensor.name!r} stands twice")
        names.add(tensor.name)
    previous: TensorInfo | None = None
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.size)):
        if previous is not None and tensor.offset < previous.offset + previous.size:
            raise GgufError(f"tensors {previous.name!r} and {tensor.name!r} overlap")
        previous = tensor
