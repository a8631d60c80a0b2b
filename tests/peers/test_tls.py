"""The gate: who gets through TLS at the peer port, and to what."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from meshd.kernel import Pool
from meshd.peers.links.frames import FrameReader, parse
from meshd.peers.protocol import ALPN_CTL, ALPN_JOIN, ALPN_RAW
from meshd.peers.trust.certificates import (
    DAY_S,
    LIFETIME_S,
    PeerCertificate,
    ca_fingerprint,
    certificate_der,
    certificate_pem,
    make_csr,
)
from meshd.peers.trust.identity import Identity
from meshd.peers.trust.membership import Grant, Membership
from meshd.peers.trust.tls import client_context, joining_context, may_speak, reload_certificate
from meshd.view import Role
from tests.peers.reception import Reception, new_node


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop the daemon runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Reception]:
    """The founder of a mesh, listening."""
    pool = Pool("work", workers=2)
    identity, store = new_node(tmp_path, "a")
    store.found("home")
    reception = await Reception("a", identity, store, pool).start()
    yield reception
    await reception.stop()
    pool.close()


Node = tuple[Identity, Membership]


def member(a: Reception, directory: Path, role: Role = Role.MEMBER) -> Node:
    identity, store = new_node(directory, "b")
    authority = a.membership.authority
    assert authority is not None
    pem = authority.sign(make_csr(identity), role, time.time())
    return identity, store.install(Grant(authority.ca_certificate, certificate_der(pem), role))


async def heard(a: Reception, context: ssl.SSLContext, say: bytes = b"") -> dict[str, Any] | None:
    """The first frame the port answers this client with; None if it hangs up without one."""
    async with asyncio.timeout(5):
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", a.port, ssl=context, server_hostname=""
            )
        except (OSError, ssl.SSLError):
            return None
        try:
            writer.write(say)
            frames = FrameReader(1 << 16)
            while data := await reader.read(4096):
                for body in frames.feed(data):
                    return parse(body)
        except (OSError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort()
            with contextlib.suppress(Exception):
                await writer.wait_closed()
    return None


# -- the gate -------------------------------------------------------------------------------------

SOMEBODY = PeerCertificate("a" * 51 + "q", Role.MEMBER, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("alpn", "certificate", "may"),
    [
        (ALPN_JOIN, None, True),
        (ALPN_JOIN, SOMEBODY, True),
        (ALPN_CTL, SOMEBODY, True),
        (ALPN_RAW, SOMEBODY, True),
        (ALPN_CTL, None, False),
        (ALPN_RAW, None, False),
        (None, None, False),
        (None, SOMEBODY, False),
        ("", None, False),
        ("", SOMEBODY, False),
        ("h2", None, False),
        ("h2", SOMEBODY, False),
        ("meshd-ctl/2", SOMEBODY, False),
        ("meshd-join/1 ", None, False),
        ("MESHD-JOIN/1", None, False),
    ],
)
def test_without_a_certificate_there_is_joining_and_nothing_else(
    alpn: str | None, certificate: PeerCertificate | None, may: bool
) -> None:
    assert may_speak(alpn, certificate) is may


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("alpn", [ALPN_CTL, ALPN_RAW])
async def test_a_member_has_the_service_it_asks_for(
    a: Reception, tmp_path: Path, alpn: str, role: Role
) -> None:
    identity, membership = member(a, tmp_path, role)
    assert await heard(a, client_context(membership, identity, alpn)) == {
        "t": "welcome",
        "alpn": alpn,
    }
    ((asked, certificate),) = a.heard
    assert asked == alpn
    assert (certificate.node_id, certificate.role) == (identity.node_id, role)


@pytest.mark.parametrize("alpn", [ALPN_CTL, ALPN_RAW, "h2", None])
async def test_a_stranger_hears_not_a_word(a: Reception, alpn: str | None) -> None:
    context = joining_context()
    context.set_alpn_protocols([alpn] if alpn is not None else ["http/1.1"])
    assert await heard(a, context, b"\0\0\0\2{}") is None
    assert a.heard == []
    await a.idle()


async def test_a_stranger_is_greeted_when_it_comes_to_join(a: Reception) -> None:
    greeting = await heard(a, joining_context())
    assert greeting is not None
    assert greeting["t"] == "greeting"


# -- certificates ---------------------------------------------------------------------------------


def shown(certificate_pem_: bytes, node: Node, alpn: str, directory: Path) -> ssl.SSLContext:
    """A client that trusts everybody and shows this certificate."""
    path = directory / "shown.crt"
    path.write_bytes(certificate_pem_)
    context = joining_context()
    context.set_alpn_protocols([alpn])
    context.load_cert_chain(path, node[0].key_path)
    return context


@pytest.mark.parametrize("alpn", [ALPN_JOIN, ALPN_CTL, ALPN_RAW])
async def test_a_foreign_certificate_fails_in_tls(a: Reception, tmp_path: Path, alpn: str) -> None:
    identity, store = new_node(tmp_path, "x")
    foreign = store.found("home")
    mine = (identity, foreign)
    context = shown(certificate_pem(foreign.certificate), mine, alpn, tmp_path)
    assert await heard(a, context, b"\0\0\0\2{}") is None
    assert a.heard == []
    assert not a.tasks  # nobody was asked to serve it


@pytest.mark.parametrize("days", [-LIFETIME_S / DAY_S - 2, 3])
async def test_a_certificate_out_of_its_time_fails_in_tls(
    a: Reception, tmp_path: Path, days: float
) -> None:
    node = member(a, tmp_path)
    authority = a.membership.authority
    assert authority is not None
    pem = authority.sign(make_csr(node[0]), Role.MEMBER, time.time() + days * DAY_S)
    assert await heard(a, shown(pem, node, ALPN_CTL, tmp_path)) is None
    assert a.heard == []


async def test_a_member_s_certificate_opens_no_door_without_its_key(
    a: Reception, tmp_path: Path
) -> None:
    _, membership = member(a, tmp_path)
    thief, _ = new_node(tmp_path, "thief")
    with pytest.raises(ssl.SSLError, match="mismatch"):
        shown(certificate_pem(membership.certificate), (thief, membership), ALPN_CTL, tmp_path)


async def test_a_revoked_node_is_told_so(a: Reception, tmp_path: Path) -> None:
    identity, membership = member(a, tmp_path)
    a.denied.deny(a.membership.authority, identity.node_id)
    for alpn in (ALPN_CTL, ALPN_RAW):
        answer = await heard(a, client_context(membership, identity, alpn))
        assert answer is not None
        assert (answer["t"], answer["reason"]) == ("refused", "denied")
        assert "deny list" in answer["message"]
    assert a.heard == []


async def test_a_node_that_dials_trusts_its_mesh_alone(a: Reception, tmp_path: Path) -> None:
    identity, store = new_node(tmp_path, "x")
    context = client_context(store.found("home"), identity, ALPN_CTL)
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.open_connection("127.0.0.1", a.port, ssl=context, server_hostname="")


@pytest.mark.parametrize("alpn", [ALPN_JOIN, ALPN_CTL])
async def test_tls_1_2_is_refused(a: Reception, tmp_path: Path, alpn: str) -> None:
    node = member(a, tmp_path)
    context = shown(certificate_pem(node[1].certificate), node, alpn, tmp_path)
    assert await heard(a, context) is not None
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, OSError)):
        await asyncio.open_connection("127.0.0.1", a.port, ssl=context, server_hostname="")


async def test_no_session_is_resumed(a: Reception, tmp_path: Path) -> None:
    """A resumed one would skip the look at the certificate."""
    identity, membership = member(a, tmp_path)
    context = client_context(membership, identity, ALPN_CTL)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", a.port, ssl=context, server_hostname=""
    )
    async with asyncio.timeout(5):
        assert b"welcome" in await reader.read(4096)  # tickets would have come before it
    session = writer.get_extra_info("ssl_object").session
    assert session is None or not session.has_ticket
    writer.close()
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.wait_closed()


async def test_a_renewed_certificate_is_shown_in_new_connections(
    a: Reception, tmp_path: Path
) -> None:
    identity, membership = member(a, tmp_path)

    async def seen() -> str:
        context = client_context(membership, identity, ALPN_CTL)
        _, writer = await asyncio.open_connection(
            "127.0.0.1", a.port, ssl=context, server_hostname=""
        )
        certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
        return ca_fingerprint(certificate).hex()

    before = ca_fingerprint(a.membership.certificate).hex()
    assert await seen() == before
    renewed = a.store.renew_own(a.membership, time.time() + 60)
    reload_certificate(a.context, renewed, a.identity)
    after = ca_fingerprint(renewed.certificate).hex()
    assert await seen() == after != before
