"""What the peer port does with those who have no business there, and with those who lost it."""

from __future__ import annotations

import itertools
import random
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from meshd.peers.links.frames import CONTROL_LIMIT, FrameReader, frame, parse
from meshd.peers.protocol import ALPN_CTL, ALPN_JOIN, ALPN_RAW
from tests.mesh.network import Host
from tests.mesh.nodes import PEER_PORT, REACTION_S, Lan, MeshNode

pytestmark = pytest.mark.slow

REVOKE_LIMIT_S = 2.0
TIMEOUT_S = 15.0
"""Longer than the port waits for a stranger's first words."""


@contextmanager
def connection(host: Host, to: MeshNode) -> Iterator[socket.socket]:
    with host.inside():
        made = socket.create_connection((to.host.address, PEER_PORT), timeout=TIMEOUT_S)
    with made:
        yield made


def all_of(made: socket.socket) -> bytes:
    """Everything up to the end of the connection, however it ends."""
    found = b""
    try:
        while piece := made.recv(65_536):
            found += piece
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
    return found


def test_what_is_no_tls_gets_nothing(lan: Lan) -> None:
    a, b = lan.mesh("a", "b")
    stranger = lan.network.add("stranger")
    noise = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x00" * 4096,
        b"\xff" * 4096,
        b"\x16\x03\x01\x40\x00" + b"\x01" * 0x3FFF,  # a client hello without an end
        random.Random(1).randbytes(70_000),
    ]
    with ExitStack() as stack:
        made = [stack.enter_context(connection(stranger, a)) for _ in range(10 * len(noise))]
        for one, words in zip(made, itertools.cycle(noise), strict=False):
            with suppress(OSError):  # it has heard enough
                one.sendall(words)
        for one in made:
            answer = all_of(one)
            assert answer == b"" or answer[0] == 0x15, answer  # a TLS alert at most
    assert (a.sees("b"), b.sees("a")) == ("alive", "alive")
    assert "Traceback" not in a.stderr()


def test_silent_strangers_hold_nobody_up(lan: Lan) -> None:
    a, b = lan.mesh("a", "b")
    stranger = lan.network.add("stranger")
    before = len(_connections(a))
    with stranger.inside():
        silent = [
            socket.create_connection((a.host.address, PEER_PORT), timeout=TIMEOUT_S)
            for _ in range(300)
        ]
    try:
        c = lan.node("c", "--join", a.invite()).start()
        lan.wait_whole(a, b, c)
        lan.until(
            lambda: len(_connections(a)) < before + 20,
            timeout_s=TIMEOUT_S,
            what="strangers shown out",
        )
    finally:
        for made in silent:
            made.close()


def test_without_a_certificate_nothing_but_joining_answers(lan: Lan) -> None:
    a, _b = lan.mesh("a", "b")
    stranger = lan.network.add("stranger")
    for alpn in (ALPN_CTL, ALPN_RAW, "http/1.1", None):
        # Refused in the handshake, or closed without a word after it.
        with (
            connection(stranger, a) as plain,
            suppress(ssl.SSLError),
            _anybody(alpn).wrap_socket(plain) as made,
        ):
            made.sendall(frame({"t": "hello", "purpose": "doctor"}))
            assert all_of(made) == b"", alpn
    with connection(stranger, a) as plain, _anybody(ALPN_JOIN).wrap_socket(plain) as made:
        assert _first_frame(made)["mesh"] == a.mesh["id"]


def test_a_certificate_of_another_mesh_opens_nothing(lan: Lan) -> None:
    a, _b = lan.mesh("a", "b")
    x = lan.node("x", "--mesh", "home").start()
    hello = frame(_hello(x, a))
    with _as_member(x, a, ALPN_CTL) as made:
        made.sendall(hello)
        assert all_of(made) == b""


def test_another_protocol_is_refused_with_words_on_both_sides(lan: Lan) -> None:
    a, b = lan.mesh("a", "b")
    assert b.stop() == 0
    b_id = a.peers()["b"]["id"]
    with _as_member(b, a, ALPN_CTL) as made:
        made.sendall(frame(_hello(b, a) | {"protocol": [0, 0]}))
        answer = _first_frame(made)
        assert all_of(made) == b""
    assert answer["t"] == "refused"
    assert answer["reason"] == "version_skew"
    assert "upgrade meshd on b" in answer["message"]
    lan.until(lambda: "upgrade meshd on b" in a.stderr(), timeout_s=5, what="the same words at a")
    assert a.sees("b") == "left"
    assert a.peers()["b"]["id"] == b_id


# -- revoked --------------------------------------------------------------------------------------


def test_a_revoked_node_is_out_at_once_and_for_good(lan: Lan) -> None:
    a, b, c = lan.mesh("a", "b", "c")
    began = time.monotonic()
    done = a.meshd("revoke", "c")
    assert done.returncode == 0, done.stderr
    lan.until(
        lambda: not _linked(c, [a, b]), timeout_s=REVOKE_LIMIT_S + REACTION_S, what="links of c end"
    )
    lan.say(f"links of a revoked node closed {time.monotonic() - began:.3f} s after the command")
    lan.until(
        lambda: (a.sees("c"), b.sees("c")) == (None, None), timeout_s=3, what="c is forgotten"
    )
    lan.until(lambda: c.mesh["state"] == "refused", timeout_s=15, what="c knows")
    assert "revoked" in c.mesh["reason"]
    assert c.request("GET", "/readyz")[0] == 200

    # Neither a restart of c nor one of those that shut it out changes anything.
    for node in (b, c):
        assert node.stop() == 0
        node.start()
    lan.wait_whole(a, b)
    lan.until(lambda: c.mesh["state"] == "refused", timeout_s=15, what="c knows again")
    assert (a.sees("c"), b.sees("c")) == (None, None)

    # A new invite does not let the same key in; the reason is said.
    assert c.stop() == 0
    (c.data_dir / "mesh").rename(c.data_dir / "old-mesh")
    code, line = lan.node("c", "--join", a.invite()).ends()
    assert code == 1
    assert "revoked" in line


def test_one_that_was_off_during_the_revocation_learns_of_it_first(lan: Lan) -> None:
    a, b, c = lan.mesh("a", "b", "c")
    assert b.stop() == 0
    assert a.meshd("revoke", "c").returncode == 0
    b.start()
    lan.wait_whole(a, b)
    assert a.stop() == 0
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert b.sees("c") != "alive"
    assert c.sees("b") != "alive"


def test_only_an_issuer_revokes(lan: Lan) -> None:
    a, b, c = lan.mesh("a", "b", "c")
    done = b.meshd("revoke", "c")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    unknown = a.meshd("revoke", "nobody")
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr
    lan.wait_whole(a, b, c)


# -- steps ----------------------------------------------------------------------------------------


def _anybody(alpn: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    return context


def _membership(node: MeshNode) -> tuple[Any, Any]:
    from meshd.peers.trust.credentials import MeshStore
    from meshd.peers.trust.identity import load_or_create

    identity = load_or_create(node.data_dir)
    membership = MeshStore(node.data_dir / "mesh", identity).load()
    assert membership is not None
    return membership, identity


@contextmanager
def _as_member(who: MeshNode, to: MeshNode, alpn: str) -> Iterator[ssl.SSLSocket]:
    """A connection with the genuine credentials of `who`, without its daemon."""
    from meshd.peers.trust.tls import client_context

    membership, identity = _membership(who)
    context = client_context(membership, identity, alpn)
    context.verify_mode = ssl.CERT_NONE  # it is `to` who is tested
    with connection(who.host, to) as plain, context.wrap_socket(plain) as made:
        yield made


def _hello(who: MeshNode, to: MeshNode) -> dict[str, Any]:
    from meshd.ids import BootId, MeshId
    from meshd.peers.links.hello import make_hello
    from meshd.view import Role

    _, identity = _membership(who)
    return make_hello(
        node=identity.node_id,
        name=who.name,
        mesh=MeshId(to.mesh["id"]),
        boot=BootId("0" * 16),
        role=Role.MEMBER,
        version="0.0.1",
        time=time.time(),
    ).to_wire()


def _first_frame(made: ssl.SSLSocket) -> dict[str, Any]:
    reader = FrameReader(CONTROL_LIMIT)
    while True:
        data = made.recv(65_536)
        assert data, "closed without a word"
        for body in reader.feed(data):
            return parse(body)


def _linked(node: MeshNode, others: list[MeshNode]) -> bool:
    """Whether its host has an established connection to one of theirs."""
    far_ends = {line.split()[-1].rpartition(":")[0] for line in _connections(node)}
    return bool(far_ends & {str(other.host.address) for other in others})


def _connections(node: MeshNode) -> list[str]:
    """Established TCP connections of its host, as its kernel lists them."""
    done = node.host.run(["ss", "-Htn", "state", "established"])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
