"""A membership on disk: whole or none, private, and refused in words when it is not right."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import BadConfig, NoSpace, PeerRefused, ProtocolError
from meshd.ids import MeshId
from meshd.kernel.files import write_atomic
from meshd.peers.trust import authority as authorities
from meshd.peers.trust import credentials
from meshd.peers.trust.certificates import (
    DAY_S,
    LIFETIME_S,
    RENEW_BELOW_S,
    certificate_der,
    certificate_pem,
    make_csr,
)
from meshd.peers.trust.credentials import MAX_REMEMBERED, MeshStore
from meshd.peers.trust.denylist import DenyEntry
from meshd.peers.trust.identity import Identity, load_or_create, node_id_of
from meshd.peers.trust.membership import Grant, Membership, needs_renewal
from meshd.peers.trust.wire import KnownPeer
from meshd.view import Role
from tests.peers.reception import new_node

NOW = time.time()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    path = tmp_path / "node"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def identity(data_dir: Path) -> Identity:
    return load_or_create(data_dir)


@pytest.fixture
def store(data_dir: Path, identity: Identity) -> MeshStore:
    return MeshStore(data_dir / "mesh", identity)


def authority(name: str = "home") -> authorities.Authority:
    return authorities.found(MeshId("ab" * 16), name, NOW)


def grant(
    identity: Identity,
    by: authorities.Authority | None = None,
    role: Role = Role.MEMBER,
    at: float = NOW,
    **more: Any,
) -> Grant:
    by = by or authority()
    certificate = certificate_der(by.sign(make_csr(identity), role, at))
    return Grant(by.ca_certificate, certificate, role, **more)


def tree(directory: Path) -> dict[str, str]:
    """Every file and directory below, with the hash of its contents."""
    return {
        str(p.relative_to(directory)): "" if p.is_dir() else sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
    }


# -- founding and joining -------------------------------------------------------------------------


def test_no_membership_is_none_and_leaves_no_trace(store: MeshStore, data_dir: Path) -> None:
    before = tree(data_dir)
    assert store.load() is None
    assert tree(data_dir) == before


@pytest.mark.parametrize("role", Role)
def test_founding(store: MeshStore, identity: Identity, role: Role) -> None:
    made = store.found("home", role)
    assert (made.mesh_name, made.role, made.issuer) == ("home", role, True)
    assert store.load() == made
    assert made.authority is not None
    assert not needs_renewal(made, NOW)
    assert not store.had_others


def test_joining(store: MeshStore, identity: Identity) -> None:
    by = authority()
    known = KnownPeer(node_id="a" * 51 + "q", name="a", addresses=("10.0.0.1:9338",))
    joined = store.install(grant(identity, by, Role.CLIENT, peers=(known,)))
    assert (joined.mesh_id, joined.mesh_name, joined.role) == (by.mesh_id, "home", Role.CLIENT)
    assert not joined.issuer
    assert store.load() == joined
    assert store.remembered() == (known,)
    assert store.had_others


def test_an_issuer_keeps_the_mesh_s_key(store: MeshStore, identity: Identity) -> None:
    by = authority()
    joined = store.install(grant(identity, by, ca_key=by.key_pem()))
    assert joined.authority is not None
    again = store.load()
    assert again is not None
    assert again.authority is not None
    assert again.authority.key_pem() == by.key_pem()


def test_files_are_0600_and_directories_0700(store: MeshStore, data_dir: Path) -> None:
    store.found("home")
    store.remember([])
    store.next_start()
    modes = {str(p.relative_to(data_dir)): p.stat().st_mode for p in data_dir.rglob("*")}
    assert set(modes) == {
        "node.key", "starts", "mesh",
        "mesh/ca.crt", "mesh/ca.key", "mesh/node.crt", "mesh/peers.json",
    }  # fmt: skip
    for name, mode in modes.items():
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), name


def test_an_open_key_of_the_mesh_is_closed(
    store: MeshStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.found("home")
    key = store.directory / "ca.key"
    key.chmod(0o644)
    store.load()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "was open to others" in caplog.text


def test_no_representation_shows_a_key(store: MeshStore, identity: Identity) -> None:
    by = authority()
    given = grant(identity, by, ca_key=by.key_pem())
    joined = store.install(given)
    secret = by.key_pem().splitlines()[1].decode()
    for shown in (repr(given), repr(joined), str(joined), repr(identity)):
        assert secret not in shown
        assert "BEGIN" not in shown
        assert "PrivateKey" not in shown


# -- whole or none --------------------------------------------------------------------------------


def forged_entry(_: Identity) -> dict[str, Any]:
    return {"denied": (DenyEntry(node="a" * 51 + "q", at=1, signature=bytes(64)),)}


BAD: dict[str, Callable[[Identity], Grant]] = {
    "another mesh's certificate": lambda i: replace(
        grant(i), ca_certificate=authority().ca_certificate
    ),
    "another mesh's key": lambda i: replace(grant(i), ca_key=authority().key_pem()),
    "no key": lambda i: replace(grant(i), ca_key=b"x"),
    "no certificate": lambda i: replace(grant(i), certificate=b"x"),
    "no mesh": lambda i: replace(grant(i), ca_certificate=b"x"),
    "long over": lambda i: grant(i, at=NOW - LIFETIME_S - DAY_S),
    "a forged entry": lambda i: replace(grant(i), **forged_entry(i)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("before", [True, False], ids=["member", "alone"])
def test_a_grant_that_does_not_hold_together_changes_nothing(
    store: MeshStore, identity: Identity, data_dir: Path, bad: Callable[[Identity], Grant],
    before: bool,
) -> None:  # fmt: skip
    if before:
        store.found("home")
    held = tree(data_dir)
    with pytest.raises(BadConfig):
        store.install(bad(identity))
    assert tree(data_dir) == held


def test_a_grant_for_another_node_changes_nothing(
    store: MeshStore, data_dir: Path, tmp_path: Path
) -> None:
    other, _ = new_node(tmp_path, "other")
    held = tree(data_dir)
    with pytest.raises(BadConfig, match="belongs to another node than"):
        store.install(grant(other))
    assert tree(data_dir) == held


class Crash(BaseException):
    """The process ends here."""


def crashing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `at`-th rename of a directory, and every later clean-up, does not happen any more."""
    rename, calls = Path.replace, 0

    def replace_(self: Path, target: Any) -> Path:
        nonlocal calls
        if self.is_dir():
            calls += 1
            if calls >= at:
                raise Crash
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace_)
    monkeypatch.setattr(MeshStore, "_sweep", lambda self: None)


@pytest.mark.parametrize(("at", "whose"), [(1, "old"), (2, "old"), (3, "new")])
def test_a_crash_at_any_rename_leaves_one_of_the_two_whole(
    store: MeshStore, identity: Identity, data_dir: Path, monkeypatch: pytest.MonkeyPatch,
    at: int, whose: str,
) -> None:  # fmt: skip
    store.found("old")
    new = grant(identity, authority("new"))
    with monkeypatch.context() as patch:
        crashing(at, patch)
        if at < 3:
            with pytest.raises(Crash):
                store.install(new)
        else:
            store.install(new)
    assert (at == 2) == (not (data_dir / "mesh").exists())
    again = MeshStore(data_dir / "mesh", identity)
    membership = again.load()
    assert membership is not None
    assert membership.mesh_name == whose
    again.next_start()
    assert {p.name for p in data_dir.iterdir()} == {"mesh", "node.key", "starts"}
    again.install(new)
    assert again.load() is not None


@pytest.mark.parametrize("full", ["node.crt", "ca.key"])
def test_a_full_disk_leaves_what_was(
    store: MeshStore, identity: Identity, data_dir: Path, monkeypatch: pytest.MonkeyPatch,
    full: str,
) -> None:  # fmt: skip
    store.found("old")
    held = tree(data_dir)

    def write(path: Path, data: bytes) -> None:
        if path.name == full:
            raise OSError(28, "No space left on device", str(path))
        write_atomic(path, data)

    by = authority("new")
    with monkeypatch.context() as patch:
        patch.setattr(credentials, "write_atomic", write)
        with pytest.raises(NoSpace, match="No space left"):
            store.install(grant(identity, by, ca_key=by.key_pem()))
    assert tree(data_dir) == held


def test_leaving_leaves_the_node_and_nothing_of_the_mesh(store: MeshStore, data_dir: Path) -> None:
    store.found("home")
    store.next_start()
    store.remove()
    assert {p.name for p in data_dir.iterdir()} == {"node.key", "starts"}
    store.remove()  # as good as done
    assert store.load() is None


def test_leaving_is_whole_after_a_crash_too(
    store: MeshStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.found("home")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        store.remove()
    assert store.load() is None
    store.next_start()
    assert {p.name for p in data_dir.iterdir()} == {"node.key", "starts"}


# -- what is on disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ca.crt", "node.crt", "ca.key"])
@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_damaged_file(store: MeshStore, name: str, content: bytes) -> None:
    store.found("home")
    (store.directory / name).write_bytes(content)
    held = tree(store.directory)
    with pytest.raises(BadConfig, match=r"restore it from a backup, or move the directory away"):
        store.load()
    assert tree(store.directory) == held


@pytest.mark.parametrize("name", ["ca.crt", "node.crt"])
def test_a_missing_file(store: MeshStore, name: str) -> None:
    store.found("home")
    (store.directory / name).unlink()
    with pytest.raises(BadConfig, match=rf"damaged \({name} is missing\)"):
        store.load()


def test_a_file_where_the_directory_should_be(store: MeshStore) -> None:
    store.directory.write_text("")
    with pytest.raises(BadConfig, match="cannot be read"):
        store.load()


def test_certificates_of_two_meshes(store: MeshStore) -> None:
    store.found("home")
    ca = certificate_pem(authority().ca_certificate)
    (store.directory / "ca.crt").write_bytes(ca)
    with pytest.raises(BadConfig, match=r"node\.crt: the certificate is not of this mesh"):
        store.load()


def test_put_together_from_two_nodes(store: MeshStore, tmp_path: Path) -> None:
    store.found("home")
    other, _ = new_node(tmp_path, "other")
    with pytest.raises(BadConfig, match=r"node\.crt belongs to another node than .*node\.key"):
        MeshStore(store.directory, other).load()


def test_run_out_or_not_begun(store: MeshStore, identity: Identity) -> None:
    store.install(grant(identity))
    store.load(NOW + LIFETIME_S - 1)
    for now in (NOW + LIFETIME_S + 1, NOW - DAY_S - 1):
        with pytest.raises(BadConfig, match="set the clocks, or admit the node again"):
            store.load(now)


def test_an_issuer_that_was_away_too_long_helps_itself(store: MeshStore) -> None:
    founded = store.found("home")
    later = NOW + 2 * LIFETIME_S
    again = store.load(later)
    assert again is not None
    assert again.certificate != founded.certificate
    assert again.not_after == int(later) + LIFETIME_S
    assert store.load(later) == again


# -- renewal --------------------------------------------------------------------------------------


def test_when_a_renewal_is_due(store: MeshStore) -> None:
    membership = store.found("home")
    due = membership.not_after - RENEW_BELOW_S
    assert not needs_renewal(membership, due)
    assert needs_renewal(membership, due + 1)


def renewed(by: authorities.Authority, identity: Identity, role: Role = Role.MEMBER) -> bytes:
    return by.sign(make_csr(identity), role, NOW + 60)


def test_a_renewed_certificate_takes_the_place_of_the_old_one(
    store: MeshStore, identity: Identity
) -> None:
    by = authority()
    old = store.install(grant(identity, by))
    new = store.replace_certificate(renewed(by, identity))
    assert new.not_after == old.not_after + 60
    assert store.load() == new
    assert (store.directory / "node.crt").stat().st_mode & 0o777 == 0o600


def test_no_other_certificate_does(store: MeshStore, identity: Identity, tmp_path: Path) -> None:
    by = authority()
    store.install(grant(identity, by))
    other, _ = new_node(tmp_path, "other")
    held = tree(store.directory)
    wrong: list[tuple[bytes, type[Exception]]] = [
        (renewed(by, other), ProtocolError),
        (renewed(by, identity, Role.CLIENT), ProtocolError),
        (by.sign(make_csr(identity), Role.MEMBER, NOW - 60), ProtocolError),
        (by.sign(make_csr(identity), Role.MEMBER, NOW), ProtocolError),
        (by.sign(make_csr(identity), Role.MEMBER, NOW + 2 * DAY_S), PeerRefused),
        (renewed(authority(), identity), PeerRefused),
        (b"junk", ProtocolError),
        (b"", ProtocolError),
    ]
    for pem, error in wrong:
        with pytest.raises(error):
            store.replace_certificate(pem)
        assert tree(store.directory) == held


def test_only_an_issuer_renews_by_its_own_key(store: MeshStore, identity: Identity) -> None:
    founded = store.found("home")
    assert store.renew_own(founded, NOW + 60).not_after == int(NOW + 60) + LIFETIME_S
    store.install(grant(identity))
    membership = store.load()
    assert membership is not None
    with pytest.raises(ValueError, match="only an issuer"):
        store.renew_own(membership)


# -- small state ----------------------------------------------------------------------------------


def test_starts_never_count_back(store: MeshStore, identity: Identity) -> None:
    assert [store.next_start() for _ in range(3)] == [1, 2, 3]
    store.found("home")
    store.remove()
    assert MeshStore(store.directory, identity).next_start() == 4


def test_a_damaged_count_is_not_begun_again(store: MeshStore, data_dir: Path) -> None:
    (data_dir / "starts").write_text("x")
    with pytest.raises(BadConfig, match="write a number into it that is larger"):
        store.next_start()


def peer(number: int) -> tuple[Any, str, tuple[str, ...]]:
    return node_id_of(number.to_bytes(32)), f"n{number}", ("10.0.0.1:1",) * 12


def test_peers_are_remembered_up_to_a_bound(store: MeshStore) -> None:
    store.found("home")
    store.remember(peer(n) for n in range(MAX_REMEMBERED + 9))
    kept = store.remembered()
    assert [p.name for p in kept] == [f"n{n}" for n in range(MAX_REMEMBERED)]
    assert len(kept[0].addresses) == 8
    assert store.had_others
    store.remember([])
    assert store.remembered() == ()
    assert store.had_others


def test_peers_that_cannot_be_dialled_are_left_out(store: MeshStore) -> None:
    store.found("home")
    node, name, _ = peer(1)
    store.remember([("x", name, ()), (node, "no name", ()), (node, name, ("nowhere",)), peer(2)])  # type: ignore[list-item]
    assert [p.name for p in store.remembered()] == ["n2"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"peers": [{}]}', b'{"peers": 1}'])
def test_damaged_memories_are_only_ignored(
    store: MeshStore, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.found("home")
    (store.directory / "peers.json").write_bytes(content)
    assert store.remembered() == ()
    assert not store.had_others
    assert "is ignored" in caplog.text
    assert store.load() is not None


def test_the_deny_list_of_the_grant_holds_from_the_first_moment(
    store: MeshStore, identity: Identity, tmp_path: Path
) -> None:
    by = authority()
    issuer, at_issuer = new_node(tmp_path, "issuer")
    held = at_issuer.install(grant(issuer, by, ca_key=by.key_pem()))
    denied = at_issuer.deny_list(held)
    entry = denied.deny(held.authority, peer(1)[0], "stolen")
    joined: Membership = store.install(grant(identity, by, denied=(entry,)))
    assert peer(1)[0] in store.deny_list(joined)
