"""Reading the first bytes of a GGUF file from front to back, within bounds. Pure."""

from __future__ import annotations

import functools
import re
import struct
from typing import Any, Final

MAX_KEPT_BYTES: Final = 4 << 20
"""Of all names and strings that are kept; decoded they may take four times as much."""
MAX_FILE_BYTES: Final = 1 << 46
"""What a header promises beyond this is no promise but damage."""
LONG_ARRAY: Final = 4096
"""Strings; for fewer the pattern that walks over them costs more to make than it saves."""
STRINGS_A_BLOCK: Final = 256
SHORT_STRING_BYTES: Final = 32

U32: Final = struct.Struct("<I")
U64: Final = struct.Struct("<Q")

Walks = dict[int, tuple[int, int]]
"""How far long arrays of strings were walked over: (strings left, offset of the next one) by the
offset of the first."""


class GgufError(ValueError):
    """The bytes are not a GGUF header that can be used; the message says what is wrong."""


class GgufTruncated(GgufError):
    """The file ends before what its header promises."""


class NeedMore(Exception):
    """The header goes on behind the bytes given; `size` bytes from the start are wanted."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class Cursor:
    """A place in the first bytes of a file. Every method raises NeedMore if they end before what is
    asked for, GgufTruncated or GgufError if the file does."""

    __slots__ = ("at", "buffer", "end", "file_bytes", "kept", "walks")

    def __init__(self, buffer: bytes, file_bytes: int, walks: Walks) -> None:
        self.buffer = buffer
        self.end = len(buffer)
        self.file_bytes = file_bytes
        self.walks = walks
        self.at = 0
        self.kept = 0

    def reach(self, end: int) -> None:
        """Make sure that the bytes up to `end` are there."""
        if end > self.end:
            if end > self.file_bytes:
                raise beyond(
                    end,
                    f"the header is cut off: it goes on to byte {end}, the file ends at "
                    f"{self.file_bytes}",
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

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        at = self.at
        if (end := at + form.size) > self.end:
            self.reach(end)
        self.at = end
        return form.unpack_from(self.buffer, at)

    def u32(self) -> int:
        value: int = self.unpack(U32)[0]
        return value

    def u64(self) -> int:
        value: int = self.unpack(U64)[0]
        return value

    def string(self, limit: int) -> str | None:
        """A string of at most `limit` bytes; None if it is longer, or if too much is kept already:
        then it is skipped."""
        start = self.at + 8
        length = self.u64()
        if length > limit or self.kept + length > MAX_KEPT_BYTES:
            self.skip(length)
            return None
        if (end := start + length) > self.end:
            self.reach(end)
        self.kept += length
        self.at = end
        return self.buffer[start:end].decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Walk over `count` strings; vocabularies have hundreds of thousands, mostly short."""
        start = self.at
        left, self.at = self.walks.get(start, (count, start))
        pattern = _block_of_short_strings() if count >= LONG_ARRAY else None
        try:
            while left:
                block = min(left, STRINGS_A_BLOCK)
                match = pattern.match(self.buffer, self.at) if pattern is not None else None
                if match is not None and block == STRINGS_A_BLOCK:
                    self.at = match.end()
                else:
                    self._walk(block)
                left -= block
        finally:
            if count >= LONG_ARRAY:
                self.walks[start] = (left, self.at)

    def _walk(self, count: int) -> None:
        buffer, at, end, unpack = self.buffer, self.at, self.end, U64.unpack_from
        for _ in range(count):
            if at + 8 > end:
                self.reach(at + 8)
            at += 8 + unpack(buffer, at)[0]
        self.reach(at)
        self.at = at


@functools.cache
def _block_of_short_strings() -> re.Pattern[bytes]:
    """Exactly STRINGS_A_BLOCK strings shorter than SHORT_STRING_BYTES each.

    The engine of `re` walks over them three times as fast as a loop can. The usual lengths come
    first because it tries one after the other; it never looks back (`+`).
    """
    lengths = sorted(range(SHORT_STRING_BYTES), key=lambda length: abs(length - 7))
    strings = (re.escape(U64.pack(length)) + b".{%d}" % length for length in lengths)
    return re.compile(b"(?s:%s){%d}+" % (b"|".join(strings), STRINGS_A_BLOCK))


def beyond(end: int, words: str) -> GgufError:
    """The file ends before `end`: it was cut, unless no file goes that far."""
    return GgufTruncated(words) if end <= MAX_FILE_BYTES else GgufError(words)
