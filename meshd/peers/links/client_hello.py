"""What a TLS client asks for, read from its first bytes without touching the connection.

Pure. A connection that goes to another process must be given away before TLS begins, so the first
message of the client, the ClientHello (RFC 8446, 4.1.2), is looked at while it still lies in the
socket. Nothing is decided about trust here: whoever takes the connection does the real handshake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_PREFIX: Final = 16 * 1024
"""A ClientHello that does not fit into so many bytes is not looked at; ours have some 300."""
_RECORD_HEADER: Final = 5
_HANDSHAKE_RECORD: Final = 22
_CLIENT_HELLO: Final = 1
_ALPN_EXTENSION: Final = 16


@dataclass(frozen=True, slots=True)
class NeedMore:
    """Nothing can be said before there are `total` bytes; more than were given, and at most
    `MAX_PREFIX`."""

    total: int


class _Malformed(Exception):
    """The bytes are no ClientHello."""


def alpn_of(prefix: bytes) -> tuple[str, ...] | NeedMore | None:
    """The protocols a client offers, in its order, empty if it offers none; None if these are not
    the first bytes of a ClientHello, or one that is too long. Never raises."""
    try:
        message = _message(prefix)
        return message if isinstance(message, NeedMore) else _offered(message)
    except _Malformed:
        return None


def _message(prefix: bytes) -> bytes | NeedMore:
    """The body of the ClientHello, put together out of as many records as it is spread over."""
    message, start = b"", 0
    while True:
        header = prefix[start : start + _RECORD_HEADER]
        if header[:1] not in (b"", bytes((_HANDSHAKE_RECORD,))) or header[1:2] not in (b"", b"\3"):
            raise _Malformed
        if len(header) < _RECORD_HEADER:
            return _more(start + _RECORD_HEADER)
        end = start + _RECORD_HEADER + int.from_bytes(header[3:])
        message += prefix[start + _RECORD_HEADER : end]
        if end == start + _RECORD_HEADER or message[:1] not in (b"", bytes((_CLIENT_HELLO,))):
            raise _Malformed
        length = 4 + int.from_bytes(message[1:4]) if len(message) >= 4 else 4
        if len(message) >= length and len(message) > 4:
            return message[4:length]
        if len(prefix) < end:
            return _more(end)
        # What is missing comes with at least one more header.
        start = end
        if len(prefix) <= start:
            return _more(start + _RECORD_HEADER + max(1, length - len(message)))


def _more(total: int) -> NeedMore:
    if total > MAX_PREFIX:
        raise _Malformed
    return NeedMore(total)


def _offered(body: bytes) -> tuple[str, ...]:
    reader = _Reader(body)
    reader.take(2 + 32)  # version, random
    reader.vector(1)  # session id
    reader.vector(2)  # cipher suites
    reader.vector(1)  # compression methods
    if reader.empty:
        return ()
    extensions = _Reader(reader.vector(2))
    while not extensions.empty:
        kind = int.from_bytes(extensions.take(2))
        value = extensions.vector(2)
        if kind == _ALPN_EXTENSION:
            names = _Reader(_Reader(value).vector(2))
            offered = []
            while not names.empty:
                offered.append(names.vector(1).decode("latin-1"))
            return tuple(offered)
    return ()


class _Reader:
    """Takes bytes off the front; raises _Malformed where there are too few."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def empty(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise _Malformed
        return self._data[start : self._at]

    def vector(self, header: int) -> bytes:
        """Bytes behind their length, which is `header` bytes long."""
        return self.take(int.from_bytes(self.take(header)))
