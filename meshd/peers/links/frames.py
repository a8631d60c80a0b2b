"""Frames on a link: a 4-byte big-endian length and that many bytes of JSON.

Pure. The length is checked against the cap before a byte of the body is kept, so that a peer can
make this side hold no more than `limit` + 4 bytes.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from meshd.errors import ProtocolError

HEADER_BYTES: Final = 4
JOIN_LIMIT: Final = 64 * 1024
CONTROL_LIMIT: Final = 256 * 1024
RAW_OPEN_LIMIT: Final = 4 * 1024


class FrameReader:
    """Cuts a stream of bytes into frames; one per connection and direction."""

    __slots__ = ("_buffer", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are whole now, in order. Raises ProtocolError for one over the limit."""
        buffer = self._buffer + data if self._buffer else data
        frames: list[bytes] = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            length = int.from_bytes(buffer[start : start + HEADER_BYTES])
            if length > self._limit:
                self._buffer = b""
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {self._limit}")
            end = start + HEADER_BYTES + length
            if len(buffer) < end:
                break
            frames.append(buffer[start + HEADER_BYTES : end])
            start = end
        self._buffer = buffer[start:]
        return frames

    def take_rest(self) -> bytes:
        """What came after the last whole frame; the reader is empty then."""
        rest, self._buffer = self._buffer, b""
        return rest


def frame(value: Any) -> bytes:
    """One frame holding `value` as JSON."""
    body = orjson.dumps(value)
    return len(body).to_bytes(HEADER_BYTES) + body


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a frame. Raises ProtocolError for anything else."""
    try:
        value: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"a frame is not JSON: {error}") from None
    if type(value) is not dict:
        raise ProtocolError("a frame must hold a JSON object")
    return value
