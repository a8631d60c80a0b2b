"""Reads requests of the plain kind without a framework, and knows which are not plain.

Plain is `POST` to a relay path, HTTP/1.1, kept alive, with one Host, one Content-Length, nothing
that needs a decision (transfer codings, Expect, Upgrade, content codings, Origin), a head of at
most 16 KiB and no more than 256 KiB in all. llhttp is the judge of syntax. Everything else is
`UNUSUAL`: the caller hands the very same bytes to aiohttp.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import httptools

from meshd.api.paths import FORWARDED, RELAY_PATHS

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_TOTAL_BYTES: Final = 256 * 1024
MAX_HEADERS: Final = 100

_START: Final = b"POST /"


class Verdict(IntEnum):
    INCOMPLETE = 0
    COMPLETE = 1
    UNUSUAL = 2


class _Unusual(Exception):
    """Ends the parser's run; never leaves this module."""


class RequestReader:
    """One per connection. After `COMPLETE` the attributes describe the request, of `total` bytes;
    `next` makes ready for the one behind it. After `UNUSUAL` it is of no more use."""

    __slots__ = (
        "_ended",
        "_header_count",
        "_length",
        "_parser",
        "_seen",
        "api_key",
        "authorization",
        "body",
        "forward",
        "head_bytes",
        "host",
        "needs_slot",
        "path",
        "request_id",
        "total",
        "wait_s",
    )

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self.next()

    def next(self) -> None:
        self._length = -1
        self._seen = self._ended = False
        self._header_count = 0
        self.path = b""
        """Path and query."""
        self.needs_slot = False
        self.host: bytes | None = None
        self.authorization: bytes | None = None
        self.api_key: bytes | None = None
        self.request_id: bytes | None = None
        self.wait_s: bytes | None = None
        self.forward: list[bytes] = []
        self.head_bytes = 0
        """Length of the head; 0 until it is there."""
        self.total = 0
        self.body = b""

    def read(self, raw: bytes) -> Verdict:
        """Look at everything received since the last request; `raw` starts where it ended."""
        if not self.head_bytes:
            if not raw.startswith(_START[: len(raw)]):
                return Verdict.UNUSUAL
            end = raw.find(b"\r\n\r\n")
            if end < 0:
                return Verdict.UNUSUAL if len(raw) > MAX_HEAD_BYTES else Verdict.INCOMPLETE
            if not self._read_head(raw[: end + 4]):
                return Verdict.UNUSUAL
            self.head_bytes = end + 4
            self.total = end + 4 + self._length
        if len(raw) < self.total:
            return Verdict.INCOMPLETE
        self.body = raw[self.head_bytes : self.total]
        # Only keeps the parser in step with the stream; it skips the body in one stride.
        try:
            self._parser.feed_data(self.body)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return Verdict.UNUSUAL
        return Verdict.COMPLETE if self._ended else Verdict.UNUSUAL

    def _read_head(self, head: bytes) -> bool:
        if len(head) > MAX_HEAD_BYTES or head.find(b" HTTP/1.1\r\n", 0, head.find(b"\n") + 1) < 0:
            return False
        try:
            self._parser.feed_data(head)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return False
        return (
            self._seen
            and not self._ended
            and self.host is not None
            and 0 < self._length <= MAX_TOTAL_BYTES - len(head)
        )

    # -- httptools --------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        path = self.path = self.path + url
        needs_slot = RELAY_PATHS.get(path.partition(b"?")[0])
        if needs_slot is None:
            raise _Unusual
        self.needs_slot = needs_slot

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        name = name.lower()
        if name in FORWARDED:
            self.forward.append(b"%b: %b\r\n" % (name, value))
            return
        keep = _HEADERS.get(name)
        if keep is not None:
            keep(self, value.strip())

    def on_headers_complete(self) -> None:
        if self._header_count > MAX_HEADERS or not self._parser.should_keep_alive():
            raise _Unusual
        self._seen = True

    def on_message_complete(self) -> None:
        self._ended = True


def _host(reader: RequestReader, value: bytes) -> None:
    if reader.host is not None or not value:
        raise _Unusual
    reader.host = value


def _content_length(reader: RequestReader, value: bytes) -> None:
    if reader._length >= 0 or not value.isdigit() or len(value) > 9:  # noqa: SLF001
        raise _Unusual
    reader._length = int(value)  # noqa: SLF001


def _connection(reader: RequestReader, value: bytes) -> None:
    if value.lower() != b"keep-alive":
        raise _Unusual


def _authorization(reader: RequestReader, value: bytes) -> None:
    if reader.authorization is not None:
        raise _Unusual
    reader.authorization = value


def _api_key(reader: RequestReader, value: bytes) -> None:
    if reader.api_key is not None:
        raise _Unusual
    reader.api_key = value


def _request_id(reader: RequestReader, value: bytes) -> None:
    reader.request_id = value


def _wait_s(reader: RequestReader, value: bytes) -> None:
    reader.wait_s = value


def _unusual(reader: RequestReader, value: bytes) -> None:
    raise _Unusual


_HEADERS: Final = {
    b"host": _host,
    b"content-length": _content_length,
    b"connection": _connection,
    b"authorization": _authorization,
    b"x-api-key": _api_key,
    b"x-request-id": _request_id,
    b"x-meshd-wait-s": _wait_s,
    b"origin": _unusual,
    b"transfer-encoding": _unusual,
    b"expect": _unusual,
    b"upgrade": _unusual,
    b"content-encoding": _unusual,
    b"te": _unusual,
    b"trailer": _unusual,
}
