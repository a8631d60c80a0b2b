"""Ways into a mesh, and words for those who stay outside."""

from __future__ import annotations

import json
import shutil
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mesh.nodes import REACTION_S, Lan, MeshNode

pytestmark = pytest.mark.slow


def test_by_token(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home").start()
    done = a.meshd("invite", "--json")
    assert done.returncode == 0, done.stderr
    token = json.loads(done.stdout)["token"]
    assert token.startswith("meshd1-")
    b = lan.node("b", "--join", token).start()
    lan.say(f"each sees the other after {lan.wait_whole(a, b):.3f} s")

    assert a.mesh == b.mesh
    mesh = b.mesh
    assert (mesh["name"], mesh["state"], mesh["reason"]) == ("home", "member", None)
    assert (mesh["members"], mesh["alive"]) == (2, 2)
    assert a.peers()["b"]["id"] == b.id
    assert a.peers()["b"]["address"] == b.peer_address
    peers = json.loads(b.meshd("peers", "--json").stdout)
    assert [(p["name"], p["id"], p["state"]) for p in peers] == [("a", a.id, "alive")]

    secret = token.removeprefix("meshd1-")
    for node in (a, b):
        assert secret not in node.stderr()
        assert secret not in json.dumps(node.status())
        assert secret not in node.flight()
        assert _open_files(node) == []
    assert secret not in b.meshd("config", "show").stdout


def test_a_node_goes_back_where_it_was(lan: Lan) -> None:
    a, b, c = lan.mesh("a", "b", "c")
    before = b.id
    assert b.stop() == 0
    lan.wait_seen("b", "left", by=[a, c], timeout_s=2 + REACTION_S)
    b.start()
    lan.wait_whole(a, b, c)
    assert b.id == before


def test_all_at_once_after_a_power_cut(lan: Lan) -> None:
    nodes = lan.mesh("a", "b", "c")
    for node in nodes:
        node.close()
    for node in nodes:
        node.start()
    lan.say(f"one mesh again {lan.wait_whole(*nodes):.3f} s after the last one started")


def test_by_static_address_without_multicast(lan: Lan) -> None:
    """Everything else it could know is wrong: the other moved while it was off."""
    lan.network.block_multicast()
    a, b = lan.mesh("a", "b")
    a, b = _moved_while_off(lan, a, b)
    a.start()
    b = lan.node("b", "--join", a.peer_address, mdns=True).start()
    lan.wait_whole(a, b)


def test_by_name_through_mdns(lan: Lan) -> None:
    a, b = lan.mesh("a", "b")
    a, b = _moved_while_off(lan, a, b)
    a = lan.node("a", mdns=True).start()
    b = lan.node("b", "--join", "home", mdns=True).start()
    lan.say(f"each sees the other after {lan.wait_whole(a, b):.3f} s")


@pytest.mark.parametrize("ipv4", [True, False])
def test_a_token_with_stale_addresses_helps_itself_by_mdns(lan: Lan, ipv4: bool) -> None:
    a = lan.node("a", "--mesh", "home", mdns=True, ipv4=ipv4).start()
    token = a.invite()
    assert a.stop() == 0
    lan.network.readdress(a.host, 99)
    a = lan.node("a", mdns=True).start()
    b = lan.node("b", "--join", token, mdns=True, ipv4=ipv4).start()
    lan.wait_whole(a, b)


def test_ipv6_alone(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home", ipv4=False).start()
    b = lan.node("b", "--join", a.invite(), ipv4=False).start()
    lan.wait_whole(a, b)
    assert a.peers()["b"]["address"] == f"[{b.host.address6}]:9338"
    assert b.stop() == 0
    b.start()
    lan.wait_whole(a, b)


def test_an_address_that_changes_under_a_running_node(lan: Lan) -> None:
    a, b, c = lan.mesh("a", "b", "c")
    a.host = lan.network.readdress(a.host, 99)
    lan.wait_seen("a", "dead", by=[b, c], timeout_s=4 + REACTION_S)
    took_s = lan.wait_whole(a, b, c, timeout_s=20)
    lan.say(f"one mesh again {took_s:.3f} s after the old address was found dead")
    lan.until(
        lambda: b.peers()["a"]["address"] == a.peer_address, timeout_s=20, what="the new address"
    )


def test_an_issuer_and_only_an_issuer_can_invite(lan: Lan) -> None:
    a, b = lan.mesh("a", "b")
    refused = b.meshd("invite")
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "a" in refused.stderr
    c = lan.node("c", "--join", a.invite(issuer=True)).start()
    lan.wait_whole(a, b, c)
    d = lan.node("d", "--join", c.invite()).start()
    lan.wait_whole(a, b, c, d)


def test_joining_does_not_delay_serving(lan: Lan) -> None:
    """Nobody answers at the token's address; the API does, and says what it is waiting for."""
    a = lan.node("a", "--mesh", "home").start()
    token = a.invite()
    lan.network.isolate(a.host)
    began = time.monotonic()
    b = lan.node("b", "--join", token).start()
    assert b.request("GET", "/readyz")[0] == 200
    assert time.monotonic() - began < 2 + REACTION_S
    assert b.mesh["state"] == "joining"
    lan.until(lambda: a.peer_address in b.mesh["reason"], timeout_s=15, what="the reason")
    assert b.mesh["state"] == "joining"
    assert b.mesh_files() == []
    lan.network.heal()
    lan.wait_whole(a, b)


# -- who stays outside ----------------------------------------------------------------------------


def refused(node: MeshNode, *words: str) -> None:
    """`node`, started to join, ends with words, and has nothing of a membership on disk."""
    code, line = node.ends()
    assert code == 1, line
    for word in words:
        assert word in line
    assert node.mesh_files() == []
    assert not (node.data_dir / "admin.sock").exists()


def test_a_used_up_invite(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home").start()
    token = a.invite(uses=1)
    b = lan.node("b", "--join", token).start()
    lan.wait_whole(a, b)
    refused(lan.node("c", "--join", token), "used", "meshd invite")
    assert "c" not in a.peers()


def test_an_invite_that_ran_out_where_it_was_issued(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home").start()
    token = a.invite()
    assert a.stop() == 0
    _let_invites_expire(a.data_dir)
    a.start()
    refused(lan.node("b", "--join", token), "expired", "meshd invite")


def test_an_invite_the_issuer_does_not_know(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home").start()
    token = a.invite()
    assert a.stop() == 0
    (a.data_dir / "mesh" / "invites.json").unlink()
    a.start()
    refused(lan.node("b", "--join", token), "meshd invite")


def test_a_token_of_another_mesh(lan: Lan) -> None:
    """Its address is answered, but by a mesh with another root of trust."""
    from meshd.peers.joining.invites import decode_invite, encode_invite

    a = lan.node("a", "--mesh", "home").start()
    x = lan.node("x", "--mesh", "home").start()
    invite = replace(decode_invite(x.invite(), now=time.time()), addresses=(a.peer_address,))
    refused(lan.node("b", "--join", encode_invite(invite)), "another mesh")
    assert a.peers() == {}


def test_a_member_of_one_mesh_joins_no_other(lan: Lan) -> None:
    a, b = lan.mesh("a", "b")
    x = lan.node("x", "--mesh", "other").start()
    assert b.stop() == 0
    code, line = lan.node("b", "--join", x.invite()).ends()
    assert code == 1
    assert "`home`" in line
    assert "meshd leave" in line
    assert x.peers() == {}
    b.start()
    lan.wait_whole(a, b)


def test_a_name_or_an_address_lets_no_stranger_in(lan: Lan) -> None:
    a = lan.node("a", "--mesh", "home", mdns=True).start()
    for way in ("home", a.peer_address):
        refused(lan.node("b", "--join", way, mdns=True), way, "meshd invite")


def test_a_copied_data_directory(lan: Lan) -> None:
    a, b = lan.mesh("a", "b")
    assert b.stop() == 0
    copy = b.data_dir.with_name("copy")
    shutil.copytree(b.data_dir, copy)
    b.start()
    lan.wait_whole(a, b)
    c = lan.node("c", data_dir=copy).start()
    lan.until(lambda: c.mesh["state"] == "refused", timeout_s=15, what="the copy refused")
    assert "copy" in c.mesh["reason"]
    assert "node.key" in c.mesh["reason"]
    assert "copy" in c.stderr()
    assert a.sees("b") == "alive"
    assert a.peers()["b"]["address"] == b.peer_address
    assert b.mesh["state"] == "member"


@pytest.mark.parametrize(
    ("join", "words"),
    [
        ("meshd1-", "cut off"),
        ("meshd1-abcdefgh", "cut off"),
        ("half", "cut off"),
        ("typo", "mistyped"),
        ("expired", "expired"),
        ("10.77.0.1:99999", "HOST:PORT"),
        ("some where", "name of a mesh"),
    ],
)
def test_what_is_no_way_in(lan: Lan, join: str, words: str) -> None:
    from meshd.peers.joining.invites import decode_invite, encode_invite

    a = lan.node("a", "--mesh", "home").start()
    token = a.invite()
    if join == "half":
        join = token[: len(token) // 2]
    elif join == "typo":
        join = token[:-9] + ("a" if token[-9] != "a" else "b") + token[-8:]
    elif join == "expired":
        invite = decode_invite(token, now=time.time())
        join = encode_invite(replace(invite, expires_at=int(time.time()) - 60))
    b = lan.node("b", "--join", join)
    b.data_dir.mkdir()
    code, line = b.ends()
    assert code == 78, line
    assert words in line
    assert list(b.data_dir.iterdir()) == []


# -- steps ----------------------------------------------------------------------------------------


def _moved_while_off(lan: Lan, a: MeshNode, b: MeshNode) -> tuple[MeshNode, MeshNode]:
    for node in (a, b):
        assert node.stop() == 0
    a.host = lan.network.readdress(a.host, 99)
    return a, b


def _open_files(node: MeshNode) -> list[str]:
    """Those of the membership that others on the machine could read."""
    shown = []
    for path in [node.data_dir / "node.key", *(node.data_dir / "mesh").rglob("*")]:
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode) and mode & 0o077:
            shown.append(str(path))
    return shown


def _let_invites_expire(data_dir: Path) -> None:
    path = data_dir / "mesh" / "invites.json"
    book = json.loads(path.read_text())
    (entry,) = book["invites"]
    entry["expires_at"] = int(time.time()) - 1
    path.write_text(json.dumps(book))
