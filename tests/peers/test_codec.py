"""Gossip to JSON and back: what goes out comes in again, and nothing else comes in."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ProtocolError
from meshd.ids import NodeId
from meshd.peers.links.codec import (
    MAX_UPDATES,
    alive_from_wire,
    alive_to_wire,
    message_from_wire,
    message_to_wire,
)
from meshd.peers.swim.gossip import (
    Ack,
    Alive,
    Dead,
    Digest,
    Gossip,
    Message,
    Nack,
    Ping,
    PingReq,
    Suspect,
    Sync,
    Update,
)

A, B = NodeId("a" * 52), NodeId("b" * 52)
ALIVE = Alive(A, 1 << 20, 7, ("10.0.0.1:9338", "[fd00::1]:9338"), False, bytes(range(64)))

nodes = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52).map(NodeId)
counters = st.integers(0, (1 << 53) - 1)
addresses = st.lists(
    st.sampled_from(["10.0.0.1:9338", "[fd00::1]:1", "host.example:65535"]), max_size=4
).map(tuple)
updates = st.lists(
    st.one_of(
        st.builds(
            Alive, nodes, counters, counters, addresses, st.booleans(),
            st.binary(min_size=64, max_size=64),
        ),
        st.builds(Suspect, nodes, counters, nodes),
        st.builds(Dead, nodes, counters, nodes),
    ),
    max_size=6,
).map(tuple)  # fmt: skip
messages = st.one_of(
    st.builds(Ping, counters, updates),
    st.builds(Ack, counters, updates),
    st.builds(Nack, counters, updates),
    st.builds(PingReq, counters, nodes, updates),
    st.builds(Gossip, updates),
    st.builds(
        Digest, st.lists(st.integers(0, (1 << 64) - 1), max_size=16).map(tuple), st.booleans()
    ),
    st.builds(Sync, st.lists(st.integers(0, 63), max_size=16).map(tuple), updates, st.booleans()),
)


@given(messages)
def test_what_goes_out_comes_in_again(message: Message) -> None:
    assert message_from_wire(orjson.loads(orjson.dumps(message_to_wire(message)))) == message


def test_a_frame_of_another_kind_is_no_message() -> None:
    assert message_from_wire({"t": "adverts", "list": []}) is None
    assert message_from_wire({}) is None
    assert message_from_wire({"t": ["ping"]}) is None


@pytest.mark.parametrize(
    "frame",
    [
        {"t": "ping"},
        {"t": "ping", "n": -1, "u": []},
        {"t": "ping", "n": 1 << 53, "u": []},
        {"t": "ping", "n": True, "u": []},
        {"t": "ping", "n": 1.0, "u": []},
        {"t": "ping", "n": 1, "u": {}},
        {"t": "ping", "n": 1, "u": [["s", A, 1, B]] * (MAX_UPDATES + 1)},
        {"t": "ping", "n": 1, "u": [[]]},
        {"t": "ping", "n": 1, "u": [["x", A, 1, B]]},
        {"t": "ping", "n": 1, "u": [["s", A, 1]]},
        {"t": "ping", "n": 1, "u": [["s", A.upper(), 1, B]]},
        {"t": "ping", "n": 1, "u": [["s", A[:-1], 1, B]]},
        {"t": "pingreq", "n": 1, "to": "b", "u": []},
        {"t": "digest", "b": [1 << 64], "a": True},
        {"t": "digest", "b": [0] * 65, "a": True},
        {"t": "sync", "b": [64], "u": [], "a": True},
    ],
)
def test_what_is_out_of_bounds_is_refused(frame: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        message_from_wire(frame)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (4, ["10.0.0.1:9338"] * 5),
        (4, ["10.0.0.1"]),
        (4, ["10.0.0.1:0"]),
        (4, ["10.0.0.1:65536"]),
        (4, [":9338"]),
        (4, ["é:9338"]),
        (4, ["h" * 300 + ":1"]),
        (5, 2),
        (5, "yes"),
        (6, "AAAA"),
        (6, "*" * 88),
        (6, None),
    ],
)
def test_a_statement_is_checked_field_by_field(place: int, value: Any) -> None:
    wire = alive_to_wire(ALIVE)
    assert alive_from_wire(wire) == ALIVE
    wire[place] = value
    with pytest.raises(ProtocolError):
        alive_from_wire(wire)


def test_only_a_living_node_s_statement_is_one() -> None:
    with pytest.raises(ProtocolError, match="living node"):
        alive_from_wire(["d", A, 1, B])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=60),
    lambda inner: (
        st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(
    st.sampled_from(["ping", "ack", "nack", "pingreq", "gossip", "digest", "sync"]),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("n", "u", "to", "b", "a"), json_values)),
)
def test_any_json_is_a_message_or_refused(kind: str, fields: dict[str, Any]) -> None:
    try:
        message = message_from_wire({"t": kind, **fields})
    except ProtocolError:
        return
    assert message is not None
    assert message_from_wire(message_to_wire(message)) == message


def test_an_update_of_every_kind_is_short() -> None:
    """The budget of a gossip message counts on it."""
    kinds: tuple[Update, ...] = (ALIVE, Suspect(A, 1 << 40, B), Dead(A, 1 << 40, B))
    for update in kinds:
        assert len(orjson.dumps(message_to_wire(Gossip((update,))))) < 330
