"""Nobody can speak for another node, nor repeat in one place what was said in another."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import PeerRefused, ProtocolError
from meshd.ids import MeshId, NodeId
from meshd.peers.links.frames import CONTROL_LIMIT, frame
from meshd.peers.swim.gossip import Alive
from meshd.peers.trust import authority as authorities
from meshd.peers.trust.certificates import LIFETIME_S, ca_fingerprint, certificate_der, make_csr
from meshd.peers.trust.identity import Identity, load_or_create
from meshd.peers.trust.membership import Membership
from meshd.peers.trust.signing import (
    MAX_ADDRESS_BYTES,
    MAX_ADVERT_BYTES,
    alive_is_genuine,
    open_advert,
    seal_advert,
    sign_alive,
)
from meshd.view import Role

NOW = float(int(time.time()))
ADDRESSES = ("10.0.0.1:9338", "[fd00::1]:9338")
U64 = (1 << 64) - 1


class Node:
    """A member of a mesh, in memory but for its key."""

    def __init__(self, directory: Path, authority: authorities.Authority, role: Role) -> None:
        directory.mkdir(exist_ok=True)
        self.identity: Identity = load_or_create(directory)
        pem = authority.sign(make_csr(self.identity), role, NOW)
        self.certificate = certificate_der(pem)
        self.membership = Membership(
            mesh_id=authority.mesh_id,
            mesh_name=authority.mesh_name,
            role=role,
            ca_certificate=authority.ca_certificate,
            ca_fingerprint=ca_fingerprint(authority.ca_certificate),
            certificate=self.certificate,
            certificate_path=directory / "node.crt",
            not_after=NOW + LIFETIME_S,
        )

    @property
    def id(self) -> NodeId:
        return self.identity.node_id

    @property
    def mesh(self) -> MeshId:
        return self.membership.mesh_id

    def say(self, left: bool = False) -> Alive:
        return sign_alive(self.identity, self.mesh, 1 << 20, 7, ADDRESSES, left)

    def seal(self, body: dict[str, Any], version: int = 3) -> dict[str, Any]:
        return seal_advert(self.identity, self.certificate, self.mesh, version, body)


HOME = authorities.found(MeshId("ab" * 16), "home", NOW)
AWAY = authorities.found(MeshId("cd" * 16), "away", NOW)


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("a"), HOME, Role.MEMBER)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("b"), HOME, Role.CLIENT)


# -- statements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
def test_a_node_speaks_for_itself(a: Node, left: bool) -> None:
    assert alive_is_genuine(a.say(left), a.mesh)


def test_any_changed_field_is_noticed(a: Node, b: Node) -> None:
    said = a.say()
    forgeries = [
        replace(said, node=b.id),
        replace(said, incarnation=said.incarnation + 1),
        replace(said, version=said.version + 1),
        replace(said, incarnation=said.version, version=said.incarnation),
        replace(said, addresses=()),
        replace(said, addresses=ADDRESSES[::-1]),
        replace(said, addresses=(ADDRESSES[0] + ADDRESSES[1],)),
        replace(said, addresses=("10.0.0.1:9338[", "fd00::1]:9338")),
        replace(said, left=True),
        replace(said, signature=bytes(64)),
        replace(said, signature=said.signature[:-1]),
        replace(said, signature=b.say().signature),
    ]
    for forgery in forgeries:
        assert not alive_is_genuine(forgery, a.mesh), forgery
    assert not alive_is_genuine(said, AWAY.mesh_id)
    assert alive_is_genuine(said, a.mesh)


@given(place=st.integers(0, 63), bit=st.integers(0, 7))
def test_any_changed_bit_of_a_signature_is_noticed(a: Node, place: int, bit: int) -> None:
    said = a.say()
    signature = bytearray(said.signature)
    signature[place] ^= 1 << bit
    assert not alive_is_genuine(replace(said, signature=bytes(signature)), a.mesh)


@pytest.mark.parametrize(
    "wrong",
    [
        {"node": ""},
        {"node": "é" * 52},
        {"node": 7},
        {"incarnation": -1},
        {"incarnation": U64 + 1},
        {"incarnation": 1.5},
        {"incarnation": "1"},
        {"version": U64 + 1},
        {"addresses": None},
        {"addresses": (7,)},
        {"addresses": ("\ud800",)},
        {"addresses": ("a:1",) * 5},
        {"addresses": ("a" * (MAX_ADDRESS_BYTES + 1),)},
        {"left": 1},
        {"signature": "text"},
        {"signature": None},
        {"signature": bytearray(64)},
    ],
)
def test_what_is_no_statement_is_not_genuine_and_no_error(a: Node, wrong: dict[str, Any]) -> None:
    assert not alive_is_genuine(replace(a.say(), **wrong), a.mesh)


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()


@given(
    st.builds(
        Alive, anything, anything, anything, anything | st.lists(anything).map(tuple),
        anything, anything,
    ),
    anything,
)  # fmt: skip
def test_nothing_is_an_error(alive: Alive, mesh: Any) -> None:
    assert not alive_is_genuine(alive, mesh)
    assert not alive_is_genuine(alive, HOME.mesh_id)


@pytest.mark.parametrize(
    ("incarnation", "version", "addresses"),
    [(-1, 0, ()), (0, U64 + 1, ()), (0, 0, ("a:1",) * 5), (0, 0, ("a" * 263,))],
)
def test_what_others_would_not_take_is_not_said(
    a: Node, incarnation: int, version: int, addresses: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"out of range|too many addresses"):
        sign_alive(a.identity, a.mesh, incarnation, version, addresses, False)
    assert alive_is_genuine(sign_alive(a.identity, a.mesh, U64, U64, (), False), a.mesh)


# -- adverts --------------------------------------------------------------------------------------


def test_an_advert_says_who_and_what(a: Node, b: Node) -> None:
    wire = orjson.loads(orjson.dumps(b.seal({"models": ["m"]}, 9)))
    opened = open_advert(wire, a.membership, ())
    assert (opened.node_id, opened.role, opened.version) == (b.id, Role.CLIENT, 9)
    assert opened.body == {"models": ["m"]}


def test_an_advert_as_large_as_may_be_fits_a_frame(a: Node) -> None:
    rest = len(orjson.dumps({"mesh": a.mesh, "node": a.id, "version": 3, "body": {"x": ""}}))
    envelope = a.seal({"x": "y" * (MAX_ADVERT_BYTES - rest)})
    assert open_advert(envelope, a.membership, ()).version == 3
    assert len(frame({"t": "adverts", "list": [envelope]})) < CONTROL_LIMIT
    with pytest.raises(ValueError, match="is over"):
        a.seal({"x": "y" * (MAX_ADVERT_BYTES - rest + 1)})


def test_an_advert_of_a_node_that_is_not_of_this_mesh_any_more(a: Node, b: Node) -> None:
    envelope = b.seal({})
    with pytest.raises(PeerRefused) as caught:
        open_advert(envelope, a.membership, {b.id})
    assert caught.value.reason == "denied"
    with pytest.raises(PeerRefused) as caught:
        open_advert(envelope, a.membership, (), NOW + LIFETIME_S + 1)
    assert caught.value.reason == "expired"


def test_an_advert_of_another_mesh(a: Node, tmp_path: Path) -> None:
    other = Node(tmp_path / "other", AWAY, Role.MEMBER)
    with pytest.raises(PeerRefused) as caught:
        open_advert(other.seal({}), a.membership, ())
    assert caught.value.reason == "wrong_mesh"


def repacked(node: Node, changes: dict[str, Any]) -> dict[str, Any]:
    """An advert whose payload says something else and is signed all the same."""
    payload = {"mesh": node.mesh, "node": node.id, "version": 3, "body": {}} | changes
    return with_payload(node, orjson.dumps(payload))


def with_payload(node: Node, payload: bytes) -> dict[str, Any]:
    signature = node.identity.key.sign(b"meshd advert v1\0" + payload)
    return {
        "certificate": base64.b64encode(node.certificate).decode(),
        "payload": base64.b64encode(payload).decode(),
        "signature": base64.b64encode(signature).decode(),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": "cd" * 16},
        {"mesh": None},
        {"node": "a" * 52},
        {"node": "x"},
        {"version": -1},
        {"version": 1 << 63},
        {"version": True},
        {"version": "3"},
        {"body": []},
        {"body": None},
    ],
)
def test_a_signed_payload_of_another_form(a: Node, changes: dict[str, Any]) -> None:
    assert open_advert(repacked(a, {}), a.membership, ()).version == 3
    with pytest.raises(ProtocolError):
        open_advert(repacked(a, changes), a.membership, ())


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"1", b"[" * 2000, b"\xff"])
def test_a_signed_payload_that_is_no_object(a: Node, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        open_advert(with_payload(a, payload), a.membership, ())


Forge = Callable[[Node, Node], dict[str, Any]]


@pytest.mark.parametrize(
    "forge",
    [
        lambda a, b: a.seal({}) | {"certificate": b.seal({})["certificate"]},
        lambda a, b: a.seal({}) | {"signature": b.seal({})["signature"]},
        lambda a, b: a.seal({}) | {"payload": a.seal({}, 4)["payload"]},
        lambda a, b: (
            a.seal({})
            | {"signature": base64.b64encode(a.identity.key.sign(b"meshd alive v1\0")).decode()}
        ),
        lambda a, b: {k: v for k, v in a.seal({}).items() if k != "signature"},
        lambda a, b: a.seal({}) | {"signature": "AAAA"},
        lambda a, b: a.seal({}) | {"payload": "*"},
        lambda a, b: a.seal({}) | {"payload": 7},
        lambda a, b: (
            a.seal({}) | {"payload": base64.b64encode(b" " * (MAX_ADVERT_BYTES + 1)).decode()}
        ),
        lambda a, b: a.seal({}) | {"certificate": base64.b64encode(b"x" * 4097).decode()},
        lambda a, b: {},
    ],
)
def test_a_forged_envelope(a: Node, b: Node, forge: Forge) -> None:
    with pytest.raises(ProtocolError):
        open_advert(forge(a, b), a.membership, ())


@pytest.mark.parametrize("field", ["certificate", "payload", "signature"])
@given(data=st.data())
def test_any_changed_byte_is_noticed(a: Node, field: str, data: st.DataObject) -> None:
    envelope = a.seal({"models": ["m"]})
    raw = bytearray(base64.b64decode(envelope[field]))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises((ProtocolError, PeerRefused)):
        open_advert(envelope | {field: base64.b64encode(raw).decode()}, a.membership, ())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=90),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=8,
)


@given(data=st.data())
def test_any_json_is_refused(a: Node, data: st.DataObject) -> None:
    value = data.draw(json_values)
    fields = data.draw(
        st.dictionaries(st.sampled_from(["certificate", "payload", "signature"]), json_values)
    )
    cases: tuple[Any, ...] = (value, a.seal({}) | fields)
    for wrong in cases:
        if wrong != a.seal({}):
            with contextlib.suppress(PeerRefused), pytest.raises(ProtocolError):
                open_advert(wrong, a.membership, ())
