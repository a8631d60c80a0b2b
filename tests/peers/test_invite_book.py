"""Which invites are open: uses counted once, on disk before they are given, whatever crashes."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.errors import BadConfig, JoinRefused, NoSpace, NotIssuer
from meshd.ids import NodeId
from meshd.peers.joining import invite_book
from meshd.peers.joining.invite_book import KEPT_AFTER_S, MAX_OPEN, InviteBook, Redemption
from meshd.peers.joining.invites import Invite, derive_key, encode_invite
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import load_or_create, node_id
from meshd.peers.trust.membership import Membership
from meshd.view import Role

NODES = [node_id(Ed25519PrivateKey.generate()) for _ in range(4)]


class Wall:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def membership(tmp_path: Path) -> Membership:
    return MeshStore(tmp_path / "mesh", load_or_create(tmp_path)).found("home")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "invites.json"


@pytest.fixture
def book(path: Path, wall: Wall) -> InviteBook:
    return InviteBook(path, wall)


Issue = Callable[..., Invite]


@pytest.fixture
def issue(book: InviteBook, membership: Membership) -> Issue:
    def make(**wanted: Any) -> Invite:
        asked: dict[str, Any] = {"ttl_s": 3600.0, "uses": 1, "role": Role.MEMBER, "issuer": False}
        return book.issue(membership, addresses=("10.0.0.1:9338",) * 9, **(asked | wanted))

    return make


def reason(book: InviteBook, invite_id: bytes, node: NodeId = NODES[0]) -> str:
    with pytest.raises(JoinRefused) as caught:
        book.redeem(invite_id, node)
    assert caught.value.detail is not None
    assert "meshd invite" in caught.value.message
    return str(caught.value.detail["reason"])


def test_an_invite_says_what_a_newcomer_needs(
    issue: Issue, membership: Membership, wall: Wall
) -> None:
    invite = issue()
    assert invite.mesh_id == membership.mesh_id
    assert invite.ca_fingerprint == membership.ca_fingerprint
    assert invite.expires_at == wall.now + 3600
    assert len(invite.addresses) == 8
    assert issue().secret != invite.secret


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("issuer", [True, False])
def test_a_use_is_worth_what_was_issued(
    issue: Issue, book: InviteBook, role: Role, issuer: bool
) -> None:
    invite = issue(role=role, issuer=issuer)
    assert book.key(invite.invite_id) == invite.key
    assert book.redeem(invite.invite_id, NODES[0]) == Redemption(role, issuer)


def test_good_for_so_many_nodes_and_no_more(issue: Issue, book: InviteBook) -> None:
    invite = issue(uses=2)
    book.redeem(invite.invite_id, NODES[0])
    book.redeem(invite.invite_id, NODES[1])
    assert reason(book, invite.invite_id, NODES[2]) == "used_up"
    with pytest.raises(JoinRefused, match="good for joining 2 times and is used up"):
        book.redeem(invite.invite_id, NODES[2])


def test_a_node_that_comes_again_costs_nothing_and_gets_the_same(
    issue: Issue, book: InviteBook
) -> None:
    invite = issue()
    first = book.redeem(invite.invite_id, NODES[0])
    assert book.redeem(invite.invite_id, NODES[0]) == first
    with pytest.raises(JoinRefused, match="good for joining once and is used up"):
        book.redeem(invite.invite_id, NODES[1])
    assert book.redeem(invite.invite_id, NODES[0]) == first


def test_an_invite_ends_when_it_says(issue: Issue, book: InviteBook, wall: Wall) -> None:
    invite = issue(uses=5)
    wall.now += 3599
    book.redeem(invite.invite_id, NODES[0])
    wall.now += 1
    for node in NODES[:2]:  # also for who joined with it
        assert reason(book, invite.invite_id, node) == "expired"


def test_an_unknown_one_has_no_key_and_no_use(book: InviteBook) -> None:
    assert reason(book, b"12345678") == "unknown_invite"
    with pytest.raises(JoinRefused, match="does not know the invite"):
        book.key(b"12345678")


def test_who_comes_late_is_told_for_a_week(issue: Issue, book: InviteBook, wall: Wall) -> None:
    old = issue()
    wall.now += 3600 + KEPT_AFTER_S - 1
    issue()
    assert reason(book, old.invite_id) == "expired"
    wall.now += 1
    issue()
    assert reason(book, old.invite_id) == "unknown_invite"


def test_uses_and_invites_outlive_a_restart(
    issue: Issue, book: InviteBook, path: Path, wall: Wall
) -> None:
    used, open_, gone = issue(), issue(role=Role.CLIENT, uses=3), issue(ttl_s=60)
    book.redeem(used.invite_id, NODES[0])
    book.redeem(open_.invite_id, NODES[0])
    wall.now += 61
    again = InviteBook(path, wall)
    again.load()
    assert reason(again, used.invite_id, NODES[1]) == "used_up"
    assert again.redeem(used.invite_id, NODES[0]) == Redemption(Role.MEMBER, False)
    assert reason(again, gone.invite_id) == "expired"
    for node in NODES[:3]:
        assert again.redeem(open_.invite_id, node).role is Role.CLIENT
    assert reason(again, open_.invite_id, NODES[3]) == "used_up"


def test_a_use_that_cannot_be_written_is_not_given(
    issue: Issue, book: InviteBook, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = issue()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(invite_book, "write_atomic", full)
        with pytest.raises(NoSpace, match=r"invites\.json cannot be written: No space left"):
            book.redeem(invite.invite_id, NODES[0])
        with pytest.raises(NoSpace):
            issue()
    book.redeem(invite.invite_id, NODES[1])
    assert reason(book, invite.invite_id, NODES[0]) == "used_up"


def test_only_who_holds_the_mesh_s_key_invites(
    book: InviteBook, membership: Membership, path: Path
) -> None:
    with pytest.raises(NotIssuer, match="run `meshd invite` on the node that founded"):
        book.issue(
            replace(membership, authority=None),
            ttl_s=60, uses=1, role=Role.MEMBER, issuer=False, addresses=(),
        )  # fmt: skip
    assert not path.exists()


def test_the_number_of_open_invites_is_bounded(
    issue: Issue, book: InviteBook, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invite_book, "write_atomic", lambda *_: None)  # 500 fsyncs say nothing
    first, *_ = [issue() for _ in range(MAX_OPEN)]
    with pytest.raises(NoSpace, match=f"{MAX_OPEN} invites are open already"):
        issue()
    book.redeem(first.invite_id, NODES[0])
    issue()  # a used-up one is none that is open
    wall.now += 3600
    for _ in range(2 * MAX_OPEN):
        wall.now += 1
        issue(ttl_s=1)
        assert len(book._entries) <= 2 * MAX_OPEN


def test_the_file_is_private_and_holds_no_secret(
    issue: Issue, book: InviteBook, path: Path, wall: Wall, caplog: pytest.LogCaptureFixture
) -> None:
    invite = issue()
    assert path.stat().st_mode & 0o777 == 0o600
    data = path.read_bytes()
    for form in (invite.secret, base64.b64encode(invite.secret), invite.secret.hex().encode()):
        assert form not in data
    assert encode_invite(invite).encode() not in data
    shown = repr(book._entries)
    assert repr(invite.key) not in shown
    path.chmod(0o644)
    again = InviteBook(path, wall)
    again.load()
    assert path.stat().st_mode & 0o777 == 0o600
    assert "was open to others" in caplog.text
    assert again.key(invite.invite_id) == derive_key(invite.secret)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"invites": 1}', '{"invites": [{}]}', "x"])
def test_a_damaged_file_is_named_and_kept(path: Path, wall: Wall, content: str) -> None:
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(BadConfig, match=r"invites\.json is damaged; remove it"):
        InviteBook(path, wall).load()
    assert path.read_text() == content


@pytest.mark.parametrize("change", [{"key": "AAAA"}, {"uses": 0}, {"role": "king"}, {"odd": 1}])
def test_a_file_that_was_tampered_with(
    issue: Issue, path: Path, wall: Wall, change: dict[str, Any]
) -> None:
    issue()
    held = orjson.loads(path.read_bytes())
    held["invites"][0].update(change)
    path.write_bytes(orjson.dumps(held))
    with pytest.raises(BadConfig, match="is damaged"):
        InviteBook(path, wall).load()


def test_an_unreadable_file_is_named(path: Path, wall: Wall) -> None:
    path.mkdir()
    with pytest.raises(BadConfig, match=r"invites\.json cannot be read"):
        InviteBook(path, wall).load()


def test_of_many_at_once_as_many_are_let_in_as_it_says(issue: Issue, book: InviteBook) -> None:
    invite, results = issue(uses=3), []
    nodes = [node_id(Ed25519PrivateKey.generate()) for _ in range(12)]
    start = threading.Barrier(len(nodes))

    def come(node: NodeId) -> None:
        start.wait(10)
        try:
            book.redeem(invite.invite_id, node)
        except JoinRefused as error:
            results.append((error.detail or {})["reason"])
        else:
            results.append("in")

    threads = [threading.Thread(target=come, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == ["in"] * 3 + ["used_up"] * 9
