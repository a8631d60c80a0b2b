"""What the daemon and its process of tunnels tell each other, and what they may not."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ProtocolError
from meshd.ids import LoanId, NodeId
from meshd.peers.bulk.tunnel_words import (
    MAX_ENDS,
    Carried,
    Ends,
    Listening,
    Refused,
    TunnelEnd,
    parse_ends,
    parse_news,
)
from meshd.peers.bulk.words import Credentials
from meshd.peers.links.frames import frame, parse

END = TunnelEnd(NodeId("n" * 52), "b", ("127.0.0.1:9338", "[::1]:9338"), LoanId("loan-1"))
ORDER = Ends(credentials=Credentials("Y2E=", "/c.pem", "/k.pem", "0" * 32), ends=(END, END))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def travelled(message: Any) -> dict[str, Any]:
    return parse(frame(message.model_dump())[4:])


def test_an_order_travels() -> None:
    assert parse_ends(travelled(ORDER)) == ORDER


@pytest.mark.parametrize(
    "news",
    [
        Listening(ports=(1, 65_535)),
        Carried(bytes=((0, 7), (1 << 50, 0)), strangers=3),
        Refused(end=1, reason="denied", message="not you"),
    ],
)
def test_news_travel(news: Any) -> None:
    assert parse_news(travelled(news)) == news


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ends": []}, "ends: "),
        ({"ends": [travelled(ORDER)["ends"][0]] * (MAX_ENDS + 1)}, "ends: "),
        ({"ends": [{"node_id": "n"}]}, "ends.0.name: "),
        ({"credentials": {}}, "credentials.ca_der: "),
        ({"t": "listening"}, "t: "),
    ],
)
def test_an_order_is_whole(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        parse_ends(travelled(ORDER) | change)


@pytest.mark.parametrize(
    "news",
    [
        {},
        {"t": "from-the-future"},
        {"t": "listening", "ports": [0]},
        {"t": "listening", "ports": [65_536]},
        {"t": "carried", "bytes": [[1]]},
        {"t": "carried", "bytes": [[1, -1]]},
        {"t": "refused", "end": -1, "reason": "", "message": ""},
        {"t": "refused", "end": 0, "reason": "denied"},
    ],
)
def test_news_are_whole(news: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="news of tunnels"):
        parse_news(news)


@given(st.dictionaries(st.sampled_from(("t", "ports", "bytes", "end", "ends", "x")), json_values))
def test_nothing_else_is_understood_or_breaks(message: dict[str, Any]) -> None:
    for kind in ("ends", "listening", "carried", "refused", message.get("t")):
        for read in (parse_ends, parse_news):
            with contextlib.suppress(ProtocolError):
                read(message | {"t": kind})


@given(st.data())
def test_an_order_with_a_hole_is_refused_or_the_same(data: st.DataObject) -> None:
    """One field of it, at any depth, replaced by anything."""
    order = json.loads(json.dumps(travelled(ORDER)))
    at = order
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(json_values)
    with contextlib.suppress(ProtocolError):
        assert isinstance(parse_ends(order), Ends)
