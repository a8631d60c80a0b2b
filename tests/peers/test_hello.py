"""The first frame of a link: what is read, what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import PeerRefused, ProtocolError
from meshd.ids import BootId, MeshId, NodeId
from meshd.peers.links.hello import Hello, judge, make_hello, parse_hello, parse_refusal, refusal
from meshd.view import Role

OURS = NodeId("a" * 52)
THEIRS = NodeId("b" * 52)


def hello(node: NodeId = OURS, name: str = "alpha", **changes: Any) -> Hello:
    said: dict[str, Any] = {
        "node": node,
        "name": name,
        "mesh": MeshId("0" * 32),
        "boot": BootId("1" * 16),
        "role": Role.MEMBER,
        "version": "0.2.0",
        "time": 1_700_000_000.5,
    }
    protocol = changes.pop("protocol", None)
    made = make_hello(**said | changes)
    return made if protocol is None else made.model_copy(update={"protocol": protocol})


def test_a_hello_survives_the_wire() -> None:
    said = hello(engine="b10076 (cpu)", rpc="7.1.2", statement={"alive": [1, 2]})
    frame = orjson.loads(orjson.dumps(said.to_wire()))
    assert frame["t"] == "hello"
    assert frame["protocol"] == [1, 1]
    assert parse_hello(frame) == said


def test_fields_of_a_newer_version_are_ignored() -> None:
    said = hello()
    assert parse_hello(said.to_wire() | {"color": "green"}) == said


def test_what_does_not_fit_is_cut_from_our_own_words() -> None:
    said = hello(engine="b1\n" + "x" * 500, rpc="")
    assert said.engine == "b1?" + "x" * 125
    assert said.rpc is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("t", "ping"),
        ("purpose", "espionage"),
        ("protocol", [1]),
        ("protocol", [1, 70_000]),
        ("version", "1\n2"),
        ("version", "x" * 129),
        ("node", "B" * 52),
        ("node", "b" * 51),
        ("node", "b" * 52 + "\n"),
        ("name", "\x1b[31m"),
        ("mesh", "0" * 31),
        ("boot", None),
        ("role", "king"),
        ("engine", "x" * 129),
        ("statement", [1]),
        ("time", float("nan")),
        ("time", 1e300),
        ("time", -1),
    ],
)
def test_malformed_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(ProtocolError, match=field):
        parse_hello(hello().to_wire() | {field: value})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(Hello.model_fields)) | st.text(), json_values))
def test_anything_else_is_a_protocol_error(changes: dict[str, Any]) -> None:
    try:
        parsed = parse_hello(hello().to_wire() | changes)
    except (ProtocolError, PeerRefused):
        return
    there, back = judge(hello(), parsed), judge(parsed, hello())
    assert (there and there.reason) == (back and back.reason)


@given(json_values, json_values)
def test_a_refusal_is_one_clean_line_whatever_was_sent(reason: Any, message: Any) -> None:
    with pytest.raises(PeerRefused) as caught:
        parse_hello({"t": "refused", "reason": reason, "message": message})
    assert caught.value.message.isprintable()
    assert 0 < len(caught.value.message) <= 600
    assert 0 < len(caught.value.reason) <= 64


def test_a_refusal_keeps_reason_and_words() -> None:
    told = parse_refusal(refusal(PeerRefused("denied: lost laptop", reason="denied")))
    assert (told.reason, told.message) == ("denied", "denied: lost laptop")


def test_two_nodes_of_one_mesh_may_talk() -> None:
    assert judge(hello(), hello(THEIRS, "beta")) is None


def test_another_mesh_is_named_first() -> None:
    theirs = hello(THEIRS, "beta", mesh=MeshId("f" * 32), protocol=(7, 9))
    objection = judge(hello(), theirs)
    assert objection is not None
    assert objection.reason == "wrong_mesh"
    assert "beta is in mesh ffffffff, alpha in mesh 00000000" in objection.message


@pytest.mark.parametrize(
    ("protocol", "old"), [((0, 0), "upgrade meshd on beta"), ((2, 3), "upgrade meshd on alpha")]
)
def test_version_skew_says_whom_to_upgrade_on_both_sides(
    protocol: tuple[int, int], old: str
) -> None:
    ours, theirs = hello(), hello(THEIRS, "beta", version="0.0.9", protocol=protocol)
    for objection in (judge(ours, theirs), judge(theirs, ours)):
        assert objection is not None
        assert objection.reason == "version_skew"
        assert old in objection.message
        assert "0.0.9" in objection.message


def test_overlapping_ranges_are_no_skew() -> None:
    assert judge(hello(protocol=(1, 4)), hello(THEIRS, "beta", protocol=(4, 9))) is None


def test_oneself_is_not_a_copy_and_a_copy_is_not_oneself() -> None:
    same = judge(hello(), hello())
    assert same is not None
    assert same.reason == "self"
    copy = judge(hello(), hello(name="gamma", boot=BootId("2" * 16)))
    assert copy is not None
    assert copy.reason == "copied_identity"
    assert "data directory" in copy.message


def test_a_doctor_borrows_the_id_of_its_node() -> None:
    doctor = hello(boot=BootId("2" * 16), purpose="doctor")
    assert judge(hello(), doctor) is None
    assert judge(doctor, hello()) is None
