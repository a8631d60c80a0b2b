from __future__ import annotations

import pytest

from meshd.api.request_reader import RequestReader, Verdict
from tests.api.scripted import CHAT, request


def test_a_plain_request_in_one_piece() -> None:
    reader, raw = RequestReader(), request(CHAT, "/v1/chat/completions?x=1", "X-Request-Id: abc")
    assert reader.read(raw) is Verdict.COMPLETE
    assert reader.total == len(raw)
    assert reader.path == b"/v1/chat/completions?x=1"
    assert (reader.host, reader.request_id, reader.needs_slot) == (b"localhost", b"abc", True)
    assert reader.forward == [b"content-type: application/json\r\n"]
    assert raw.endswith(b"\r\n\r\n" + reader.body)


def test_byte_by_byte() -> None:
    reader, raw = RequestReader(), request(CHAT)
    for end in range(1, len(raw)):
        assert reader.read(raw[:end]) is Verdict.INCOMPLETE
    assert reader.read(raw) is Verdict.COMPLETE


def test_pipelined_requests_are_taken_one_by_one() -> None:
    reader = RequestReader()
    first, second = request(CHAT), request({"model": "other"}, "/tokenize")
    raw = first + second
    assert reader.read(raw) is Verdict.COMPLETE
    assert reader.total == len(first)
    reader.next()
    assert reader.read(raw[len(first) :]) is Verdict.COMPLETE
    assert (reader.path, reader.needs_slot) == (b"/tokenize", False)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        request(CHAT, "/v1/nothing"),
        request(CHAT, version="1.0"),
        request(CHAT, "/tokenize", "Host: again"),
        request(CHAT, "/tokenize", "Content-Length: 3"),
        request(CHAT, "/tokenize", "Transfer-Encoding: chunked"),
        request(CHAT, "/tokenize", "Expect: 100-continue"),
        request(CHAT, "/tokenize", "Connection: close"),
        request(CHAT, "/tokenize", "Connection: upgrade", "Upgrade: websocket"),
        request(CHAT, "/tokenize", "Content-Encoding: gzip"),
        request(CHAT, "/tokenize", "Origin: https://x"),
        request(CHAT, "/tokenize", "X-Api-Key: a", "X-Api-Key: b"),
        request(CHAT, "/tokenize", "Bad Name: x"),
        request(CHAT, "/tokenize", "X: a\x00b"),
        request(CHAT, "/tokenize", "X: y\n folded: z"),
        request(CHAT, "/tokenize", *(f"x-{n}: y" for n in range(200))),
        request(CHAT, "/tokenize", "X: " + "y" * 17_000),
        request(b"", "/tokenize"),
        request(b"x" * 300_000, "/tokenize"),
        b"POST /tokenize HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2, 2\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\nHost: x\nContent-Length: 2\n\n{}\r\n\r\n",
        b"POST http://x/tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        b"\r\nPOST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /" + b"a" * 20_000,
    ],
)
def test_what_is_not_plain(raw: bytes) -> None:
    assert RequestReader().read(raw) is Verdict.UNUSUAL
