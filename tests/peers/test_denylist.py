"""Revocation: what the mesh's key signed, once and for good, whatever the order it comes in."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import BadConfig, NoSpace, NotIssuer, ProtocolError
from meshd.ids import MeshId
from meshd.peers.links.frames import CONTROL_LIMIT, frame
from meshd.peers.trust import denylist
from meshd.peers.trust.authority import Authority, found
from meshd.peers.trust.denylist import MAX_MESSAGE_ENTRIES, DenyEntry, DenyList, from_wire
from meshd.peers.trust.identity import node_id

MESH = MeshId("ab" * 16)
HOME = found(MESH, "home", 1_800_000_000.0)
NODES = [node_id(Ed25519PrivateKey.generate()) for _ in range(6)]


def entry(node: str, reason: str = "", at: int = 1, authority: Authority = HOME) -> DenyEntry:
    message = denylist._canonical(authority.mesh_id, node, reason, at)
    return DenyEntry(node=node, reason=reason, at=at, signature=authority.statement(message))


def empty(path: Path) -> DenyList:
    return DenyList(path, MESH, HOME.ca_certificate)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deny.json"


ENTRIES = [entry(n, r, at) for n, r, at in itertools.product(NODES, ("", "stolen"), (1, 2))]
_paths: Iterator[int] = itertools.count()


def test_denied_at_once_and_after_a_restart(path: Path) -> None:
    denied = empty(path)
    made = denied.deny(HOME, NODES[0], "stolen")
    assert NODES[0] in denied
    assert NODES[1] not in denied
    assert path.stat().st_mode & 0o777 == 0o600
    again = empty(path)
    again.load()
    assert again.entries == (made,)
    assert again.digest() == denied.digest()
    assert len(again) == 1


def test_a_second_time_changes_nothing(path: Path) -> None:
    denied = empty(path)
    first = denied.deny(HOME, NODES[0], "stolen")
    assert denied.deny(HOME, NODES[0], "lost") == first
    path.unlink()
    assert denied.merge([first, first]) == ()
    assert not path.exists()  # nothing new, nothing written


def test_only_an_issuer_revokes_and_only_nodes(path: Path) -> None:
    denied = empty(path)
    with pytest.raises(NotIssuer, match="cannot revoke"):
        denied.deny(None, NODES[0])
    for name in ("", "node", NODES[0].upper(), NODES[0][:-1], "1" * 52):
        with pytest.raises(ValueError, match="not a node id"):
            denied.deny(HOME, name)
    assert not path.exists()
    assert len(denied) == 0


def test_a_reason_is_one_short_line(path: Path) -> None:
    made = empty(path).deny(HOME, NODES[0], "gone\n\x1b[31mé" + "x" * 200)
    assert made.reason == "gone??[31m?" + "x" * 109
    assert empty(path).merge(from_wire([made.to_wire()])) == (NODES[0],)


@given(
    st.lists(st.sampled_from(ENTRIES), max_size=12),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
)
def test_lists_merge_alike_in_any_order_and_in_any_parts(
    tmp_path_factory: pytest.TempPathFactory, entries: list[DenyEntry], rng: Any, parts: int
) -> None:
    directory = tmp_path_factory.getbasetemp()
    here, there = (empty(directory / f"deny-{next(_paths)}") for _ in range(2))
    here.merge(entries)
    shuffled = entries * 2
    rng.shuffle(shuffled)
    for part in range(parts):
        there.merge(shuffled[part::parts])
    assert here.entries == there.entries
    assert here.digest() == there.digest()
    assert {e.node for e in entries} == {e.node for e in here.entries}
    assert all(e.node in here for e in entries)
    for node, one in ((e.node, e) for e in here.entries):
        assert one == min((e for e in entries if e.node == node), key=denylist._order)


def test_what_is_new_is_named_once(path: Path) -> None:
    denied = empty(path)
    assert denied.merge([entry(NODES[0], at=5), entry(NODES[1]), entry(NODES[0], at=3)]) == (
        NODES[0],
        NODES[1],
    )
    assert denied.merge([entry(NODES[0], at=1), entry(NODES[2])]) == (NODES[2],)
    assert {e.node: e.at for e in denied.entries}[NODES[0]] == 1
    assert empty(path).digest() != denied.digest()


FOREIGN = found(MESH, "home", 1_800_000_000.0)
ELSEWHERE = Authority(MeshId("cd" * 16), "home", HOME.ca_certificate, HOME.key)
"""The same key for another mesh: what it signs there means nothing here."""
GOOD = entry(NODES[0], "stolen", 7)
FORGED = [
    entry(NODES[0], "stolen", 7, FOREIGN),
    GOOD.model_copy(update={"node": NODES[1]}),
    GOOD.model_copy(update={"at": 8}),
    GOOD.model_copy(update={"at": 7 + (1 << 32)}),
    GOOD.model_copy(update={"reason": "stolen "}),
    GOOD.model_copy(update={"reason": ""}),
    GOOD.model_copy(update={"signature": bytes(64)}),
    GOOD.model_copy(update={"signature": GOOD.signature[:-1] + bytes([GOOD.signature[-1] ^ 1])}),
    GOOD.model_copy(update={"signature": HOME.statement(b"another domain")}),
    GOOD.model_copy(update={"signature": entry(NODES[0], "stolen", 7, ELSEWHERE).signature}),
]


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forgery_is_refused_with_all_that_came_with_it(path: Path, forgery: DenyEntry) -> None:
    denied = empty(path)
    denied.merge([entry(NODES[5])])
    before = path.read_bytes()
    with pytest.raises(ProtocolError, match="not signed by the mesh"):
        denied.merge([entry(NODES[2]), forgery, entry(NODES[3])])
    assert [e.node for e in denied.entries] == [NODES[5]]
    assert path.read_bytes() == before


def test_a_full_list_keeps_what_it_has(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denylist, "MAX_ENTRIES", 3)
    denied = empty(path)
    assert len(denied.merge([entry(n) for n in NODES])) == 3
    held = {e.node for e in denied.entries}
    with pytest.raises(NoSpace, match="the deny list is full"):
        denied.deny(HOME, next(n for n in NODES if n not in held))
    assert {e.node for e in denied.entries} == held
    assert denied.deny(HOME, next(iter(held))).node in held


def test_a_list_that_cannot_be_written_holds_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    denied = empty(tmp_path / "missing" / "deny.json")
    with pytest.raises(NoSpace, match=r"is revoked, but .* could not be written"):
        denied.deny(HOME, NODES[0])
    assert NODES[0] in denied
    assert denied.merge([entry(NODES[1])]) == (NODES[1],)
    assert NODES[1] in denied
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[1]",
        b"[" * 5000,
        orjson.dumps([GOOD.to_wire() | {"node": NODES[1]}]),
        orjson.dumps([GOOD.to_wire() | {"at": -1}]),
        orjson.dumps([entry(NODES[0], authority=FOREIGN).to_wire()]),
    ],
)
def test_a_damaged_file_lets_nobody_back_in(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    denied = empty(path)
    with pytest.raises(BadConfig, match=r"deny\.json is damaged .*restore it .*or remove it"):
        denied.load()
    assert path.read_bytes() == content


def test_an_unreadable_file_is_named(path: Path) -> None:
    path.mkdir()
    with pytest.raises(BadConfig, match=r"deny\.json cannot be read"):
        empty(path).load()


# -- on the wire ----------------------------------------------------------------------------------


def test_entries_go_out_and_come_in_again(path: Path, tmp_path: Path) -> None:
    denied = empty(path)
    denied.merge([entry(n, "stolen", at) for at, n in enumerate(NODES)])
    wire = orjson.loads(orjson.dumps(denied.to_wire()))
    other = empty(tmp_path / "other.json")
    assert set(other.merge(from_wire(wire))) == set(NODES)
    assert other.digest() == denied.digest()
    assert [e["node"] for e in denied.to_wire(limit=2)] == [NODES[5], NODES[4]]


def test_the_longest_message_fits_a_frame() -> None:
    longest = entry(NODES[0], '"' * 120, 253_402_300_799).to_wire()
    message = {"t": "deny", "entries": [longest] * MAX_MESSAGE_ENTRIES}
    assert len(frame(message)) <= CONTROL_LIMIT
    assert len(from_wire(message["entries"])) == MAX_MESSAGE_ENTRIES


@pytest.mark.parametrize(
    "entries",
    [
        None,
        "x",
        {},
        [None],
        [[]],
        [{}],
        [GOOD.to_wire()] * (MAX_MESSAGE_ENTRIES + 1),
        [GOOD.to_wire() | {"node": NODES[0].upper()}],
        [GOOD.to_wire() | {"at": "7"}],
        [GOOD.to_wire() | {"at": 1e3}],
        [GOOD.to_wire() | {"at": 253_402_300_800}],
        [GOOD.to_wire() | {"reason": "x" * 121}],
        [GOOD.to_wire() | {"reason": "\x1b[2J"}],
        [GOOD.to_wire() | {"reason": "two\nlines"}],
        [GOOD.to_wire() | {"signature": "AAAA"}],
        [GOOD.to_wire() | {"signature": "*" * 88}],
        [GOOD.to_wire() | {"signature": None}],
    ],
)
def test_what_has_another_form_is_refused(entries: Any) -> None:
    with pytest.raises(ProtocolError, match="deny list"):
        from_wire(entries)


def test_what_a_later_version_adds_is_ignored() -> None:
    (read,) = from_wire([GOOD.to_wire() | {"severity": 3}])
    assert read == GOOD


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=90),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(
    json_values
    | st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "node": json_values | st.sampled_from(NODES),
                "at": json_values | st.integers(0, 9),
                "reason": json_values,
                "signature": json_values | st.just(GOOD.to_wire()["signature"]),
            },
        ),
        max_size=3,
    )
)
def test_any_json_is_entries_or_refused_and_never_a_revocation(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    denied = empty(tmp_path_factory.getbasetemp() / "never")
    with contextlib.suppress(ProtocolError):
        denied.merge(from_wire(value))
    assert len(denied) == 0
