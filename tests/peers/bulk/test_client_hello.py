"""The look at a ClientHello: real ones, split ones, and rubbish."""

from __future__ import annotations

import itertools
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.peers.links.client_hello import MAX_PREFIX, NeedMore, alpn_of
from meshd.peers.protocol import ALPN_BULK, ALPN_CTL, ALPN_JOIN

RANDOM = bytes(range(32))


def real_hello(*alpns: str, name: str | None = None) -> bytes:
    """What OpenSSL sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpns:
        context.set_alpn_protocols(list(alpns))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def in_records(message: bytes, sizes: list[int]) -> bytes:
    """A handshake message in records of those sizes, the last of them again and again."""
    out, at = b"", 0
    for size in itertools.chain(sizes, itertools.repeat(sizes[-1])):
        if at >= len(message):
            return out
        piece = message[at : at + size]
        out += b"\x16\x03\x01" + len(piece).to_bytes(2) + piece
        at += size
    raise AssertionError


def hello(extensions: bytes | None) -> bytes:
    """A handshake message; `extensions` with their length, None for a hello of old times."""
    body = b"\3\3" + RANDOM + b"\0" + b"\0\2\x13\1" + b"\1\0" + (extensions or b"")
    return b"\1" + len(body).to_bytes(3) + body


def ask(stream: bytes) -> tuple[tuple[str, ...] | None, int]:
    """As the listener does: only as much as was asked for; the answer and how often it looked."""
    total = 1
    for looks in itertools.count(1):
        found = alpn_of(stream[:total])
        if not isinstance(found, NeedMore):
            return found, looks
        assert total < found.total <= MAX_PREFIX
        if found.total > len(stream):
            return None, looks  # it would wait
        total = found.total
    raise AssertionError


@pytest.mark.parametrize(
    "alpns", [(), (ALPN_BULK,), (ALPN_JOIN,), (ALPN_CTL, ALPN_BULK), ("h2", "http/1.1")]
)
@pytest.mark.parametrize("name", [None, "example.org"])
def test_a_real_hello_is_read(alpns: tuple[str, ...], name: str | None) -> None:
    data = real_hello(*alpns, name=name)
    assert alpn_of(data) == alpns
    assert alpn_of(data + b"and more") == alpns
    assert ask(data)[0] == alpns


@given(st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_a_hello_in_several_records_is_put_together(sizes: list[int]) -> None:
    data = in_records(real_hello(ALPN_BULK)[5:], sizes)
    assert alpn_of(data) == (ALPN_BULK,)
    assert ask(data)[0] == (ALPN_BULK,)


@pytest.mark.parametrize("length", range(1, 280, 3))
def test_a_beginning_asks_for_no_more_than_there_is(length: int) -> None:
    data = real_hello(ALPN_BULK)
    found = alpn_of(data[:length])
    assert isinstance(found, NeedMore)
    assert length < found.total <= len(data)


def test_a_hello_byte_by_byte_is_looked_at_a_few_times() -> None:
    """Records of one byte must not make the listener read again for each of them."""
    data = in_records(real_hello(ALPN_BULK)[5:], [1])
    found, looks = ask(data)
    assert found == (ALPN_BULK,)
    assert looks < 100


def test_a_hello_without_extensions_offers_nothing() -> None:
    assert alpn_of(in_records(hello(None), [1000])) == ()
    assert alpn_of(in_records(hello(b"\0\0"), [1000])) == ()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x02\x01\0\5",
        b"\x17\x03\x01\0\5hello",
        b"\x16\x03\x01\0\0",
        in_records(b"\2" + hello(None)[1:], [1000]),
        in_records(hello(b"\0\4\0\x10\0\5"), [1000]),
        in_records(hello(b"\0\5\0\x10\0\1\0"), [1000]),
        in_records(b"\1\0\0\1\3", [1000]),
        b"\x16\x03\x01\xff\xff" + b"\1\0\xff\xff",
        in_records(b"\1\xff\xff\xff" + RANDOM, [1000]),
    ],
)
def test_what_is_no_hello_is_none(data: bytes) -> None:
    assert alpn_of(data) is None


@given(st.binary(max_size=400))
def test_rubbish_never_raises(data: bytes) -> None:
    alpn_of(data)
    alpn_of(b"\x16\x03\x01" + data)
    alpn_of(in_records(hello(data), [1 << 14]))


@given(st.data())
def test_a_damaged_hello_never_raises(data: st.DataObject) -> None:
    good = bytearray(HELLO)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=6)):
        good[place] = data.draw(st.integers(0, 255))
    found = alpn_of(bytes(good))
    assert not isinstance(found, NeedMore) or len(good) < found.total <= MAX_PREFIX


HELLO = real_hello(ALPN_BULK, name="example.org")
