"""Certificates renewed in time: asked for and given over a link, and not one that was not due."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from meshd.ids import BootId, NodeId
from meshd.kernel import ManualClock, Pool
from meshd.peers.joining.renewing import ASK_AGAIN_S, MAX_PEM, SIGN_AGAIN_S, Renewing
from meshd.peers.links.links import ControlLink, Remote
from meshd.peers.protocol import ALPN_CTL
from meshd.peers.trust.certificates import (
    DAY_S,
    LIFETIME_S,
    ca_fingerprint,
    certificate_der,
    make_csr,
    read_leaf,
)
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import Identity
from meshd.peers.trust.membership import Grant
from meshd.peers.trust.trust import Trust
from meshd.view import Role
from tests.peers.reception import new_node


class Link(ControlLink):
    """A link to `node` that keeps what is sent over it."""

    def __init__(self, node: NodeId, role: Role = Role.MEMBER) -> None:
        remote = Remote(node, role, BootId("0" * 16), "far", "0", True, "10.0.0.1:9338")
        super().__init__(remote, lambda *_: None, lambda *_: None)
        self.sent: list[dict[str, Any]] = []
        self.dropped = False
        self.transport = Transport()  # type: ignore[assignment]

    def send(self, value: dict[str, Any], *, droppable: bool = False) -> bool:
        self.sent.append(value)
        return True

    def drop(self) -> None:
        self.dropped = True
        self.transport = None


class Transport:
    def is_closing(self) -> bool:
        return False


class Side:
    """One node: its trust, and its part in renewals."""

    def __init__(self, identity: Identity, store: MeshStore, pool: Pool) -> None:
        membership = store.load()
        assert membership is not None
        self.identity = identity
        self.store = store
        self.trust = Trust(membership, identity, store, pool)
        self.clock = ManualClock()
        self.chosen: list[list[ControlLink]] = []
        self.renewing = Renewing(self.trust, self.clock, self._choose)

    def link(self, role: Role = Role.MEMBER) -> Link:
        """To this node, as the other side has it."""
        return Link(self.identity.node_id, role)

    def _choose(self, links: list[ControlLink]) -> ControlLink:
        self.chosen.append(links)
        return links[0]


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool("work", workers=1)
    yield pool
    pool.close()


@pytest.fixture
def issuer(tmp_path: Path, pool: Pool) -> Side:
    identity, store = new_node(tmp_path, "issuer")
    store.found("home")
    return Side(identity, store, pool)


def joined(
    issuer: Side, directory: Path, pool: Pool, days_left: float, role: Role = Role.MEMBER
) -> Side:
    authority = issuer.trust.membership.authority
    assert authority is not None
    identity, store = new_node(directory, f"node-{role.value}")
    at = time.time() - LIFETIME_S + days_left * DAY_S
    pem = authority.sign(make_csr(identity), role, at)
    store.install(Grant(authority.ca_certificate, certificate_der(pem), role))
    return Side(identity, store, pool)


@pytest.fixture
def old(issuer: Side, tmp_path: Path, pool: Pool) -> Side:
    """A member whose certificate has 20 days left."""
    return joined(issuer, tmp_path, pool, 20)


# -- asking ---------------------------------------------------------------------------------------


async def test_nothing_is_asked_before_it_is_due(issuer: Side, tmp_path: Path, pool: Pool) -> None:
    node = joined(issuer, tmp_path, pool, 31)
    link = issuer.link()
    await node.renewing.look([link])
    assert link.sent == []


async def test_asked_once_a_quarter_of_an_hour(old: Side, issuer: Side) -> None:
    link = issuer.link()
    await old.renewing.look([])  # nobody to ask: no time is lost by it
    await old.renewing.look([link])
    assert [f["t"] for f in link.sent] == ["renew"]
    old.clock.advance(ASK_AGAIN_S - 1)
    await old.renewing.look([link])
    assert len(link.sent) == 1
    old.clock.advance(1)
    await old.renewing.look([link])
    assert len(link.sent) == 2
    assert old.chosen == [[link], [link]]


async def test_an_issuer_helps_itself(issuer: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    link = issuer.link()
    before = issuer.trust.membership
    later = time.time() + 61 * DAY_S
    monkeypatch.setattr(time, "time", lambda: later)
    await issuer.renewing.look([link])
    assert link.sent == []
    assert issuer.trust.membership.not_after > before.not_after
    assert issuer.store.load() == issuer.trust.membership
    await issuer.renewing.look([link])  # not due any more
    assert issuer.store.load() == issuer.trust.membership


# -- asking, giving and taking --------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
async def test_from_the_request_to_the_certificate_in_use(
    issuer: Side, tmp_path: Path, pool: Pool, role: Role
) -> None:
    node = joined(issuer, tmp_path, pool, 20, role)
    before = node.trust.membership
    to_issuer, to_node = issuer.link(), node.link(role)
    context = node.trust.client_context(ALPN_CTL)
    await node.renewing.look([to_issuer])
    await issuer.renewing.frame_came(to_node, to_issuer.sent[0])
    await node.renewing.frame_came(to_issuer, to_node.sent[0])
    after = node.trust.membership
    assert after.not_after > before.not_after + 60 * DAY_S
    assert after.role is role
    assert not node.trust.due_for_renewal()
    assert node.store.load() == after
    assert node.trust.client_context(ALPN_CTL) is context  # the same one shows the new one now
    seen = issuer.trust.authenticate(after.certificate)
    assert (seen.node_id, seen.role) == (node.identity.node_id, role)
    await node.renewing.look([to_issuer])
    assert len(to_issuer.sent) == 1
    # Taken once; what comes after it was not asked for.
    await node.renewing.frame_came(to_issuer, to_node.sent[0])
    assert node.trust.membership is after


async def test_new_connections_show_the_new_certificate_at_both_ends(
    issuer: Side, old: Side
) -> None:
    seen = asyncio.Queue[str]()

    def far(transport: asyncio.BaseTransport) -> str:
        return name(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))

    def name(certificate: bytes) -> str:
        return ca_fingerprint(certificate).hex()[:8]

    class Arrival(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            seen.put_nowait(far(transport))
            cast("asyncio.Transport", transport).abort()

    async def shown(server: Side, client: Side) -> tuple[str, str]:
        """The certificates of server and client in a handshake now."""
        loop = asyncio.get_running_loop()
        context = server.trust.server_context()
        listener = await loop.create_server(Arrival, "127.0.0.1", 0, ssl=context)
        transport, _ = await loop.create_connection(
            asyncio.Protocol, *listener.sockets[0].getsockname(), server_hostname="",
            ssl=client.trust.client_context(ALPN_CTL),
        )  # fmt: skip
        async with asyncio.timeout(5):
            both = far(transport), await seen.get()
        transport.abort()
        listener.close()
        await listener.wait_closed()
        return both

    before = name(old.trust.membership.certificate)
    authority = issuer.trust.membership.authority
    assert authority is not None
    assert (await shown(old, issuer))[0] == (await shown(issuer, old))[1] == before
    await old.trust.use(authority.sign(make_csr(old.identity), Role.MEMBER, time.time()))
    after = name(old.trust.membership.certificate)
    assert after != before
    assert (await shown(old, issuer))[0] == (await shown(issuer, old))[1] == after


async def test_the_certificate_keeps_the_role_the_asker_has_shown(
    issuer: Side, tmp_path: Path, pool: Pool
) -> None:
    client = joined(issuer, tmp_path, pool, 20, Role.CLIENT)
    link = client.link(Role.CLIENT)
    csr = make_csr(client.identity).decode()
    await issuer.renewing.frame_came(link, {"t": "renew", "csr": csr, "role": "member"})
    certificate = certificate_der(link.sent[0]["certificate"].encode())
    leaf = read_leaf(certificate, issuer.trust.membership.ca_certificate)
    assert leaf.role is Role.CLIENT


async def test_who_holds_no_key_says_so_and_stays(old: Side, issuer: Side) -> None:
    link = issuer.link()
    csr = make_csr(issuer.identity).decode()
    await old.renewing.frame_came(link, {"t": "renew", "csr": csr})
    assert link.sent == [{"t": "renewed", "why": "this node does not hold the mesh's key"}]
    assert not link.dropped
    asked = issuer.link()
    await old.renewing.look([asked])
    await old.renewing.frame_came(asked, link.sent[0])
    assert old.trust.due_for_renewal()
    old.clock.advance(ASK_AGAIN_S)
    await old.renewing.look([asked])
    assert len(asked.sent) == 2


async def test_a_node_renews_nobody_else_s(
    issuer: Side, old: Side, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, _ = new_node(tmp_path, "other")
    link = old.link()
    frame = {"t": "renew", "csr": make_csr(other).decode()}
    for _ in range(3):  # all in one packet: said once, and that was the end of it
        await issuer.renewing.frame_came(link, frame)
    assert link.sent == []
    assert link.dropped
    assert caplog.text.count("can only renew its own") == 1


async def test_a_revoked_node_gets_none(issuer: Side, old: Side) -> None:
    issuer.trust.denied.deny(issuer.trust.membership.authority, old.identity.node_id)
    link = old.link()
    await issuer.renewing.frame_came(link, {"t": "renew", "csr": make_csr(old.identity).decode()})
    assert link.sent == []
    assert link.dropped


async def test_who_asks_again_at_once_is_not_answered(issuer: Side, old: Side) -> None:
    link = old.link()
    frame = {"t": "renew", "csr": make_csr(old.identity).decode()}
    for _ in range(5):
        await issuer.renewing.frame_came(link, frame)
    assert len(link.sent) == 1
    issuer.clock.advance(SIGN_AGAIN_S)
    await issuer.renewing.frame_came(link, frame)
    assert len(link.sent) == 2
    assert not link.dropped


# -- what is not taken ----------------------------------------------------------------------------


async def test_a_certificate_nobody_asked_for(old: Side, issuer: Side) -> None:
    authority = issuer.trust.membership.authority
    assert authority is not None
    pem = authority.sign(make_csr(old.identity), Role.MEMBER, time.time()).decode()
    before = old.trust.membership
    link = issuer.link()
    await old.renewing.frame_came(link, {"t": "renewed", "certificate": pem})
    assert old.trust.membership is before
    assert old.store.load() == before
    assert not link.dropped


@pytest.mark.parametrize("flaw", ["node", "role", "mesh", "old", "junk", "long", "none", "list"])
async def test_a_certificate_that_is_not_the_right_one(
    old: Side, issuer: Side, tmp_path: Path, flaw: str, caplog: pytest.LogCaptureFixture
) -> None:
    authority = issuer.trust.membership.authority
    assert authority is not None
    other, at_other = new_node(tmp_path, "other")
    if flaw == "mesh":
        authority = at_other.found("home").authority
        assert authority is not None
    pem: Any = authority.sign(
        make_csr(other if flaw == "node" else old.identity),
        Role.CLIENT if flaw == "role" else Role.MEMBER,
        time.time() - (80 * DAY_S if flaw == "old" else 0),
    ).decode()
    pem = {"junk": "junk", "long": "x" * (MAX_PEM + 1), "none": None, "list": [pem]}.get(flaw, pem)
    before = old.trust.membership
    link = issuer.link()
    await old.renewing.look([link])
    with caplog.at_level(logging.DEBUG):
        await old.renewing.frame_came(link, {"t": "renewed", "certificate": pem})
    assert "renewal with far: " in caplog.text
    assert old.trust.membership is before
    assert old.store.load() == before
    assert old.trust.due_for_renewal()


async def test_any_frame_is_answered_or_refused(issuer: Side, old: Side) -> None:
    """Nothing but what is documented comes out of a frame: it would end the daemon."""
    rng = random.Random(11)
    csr = make_csr(old.identity).decode()
    values: list[Any] = [None, 0, True, 1.5, "", "é" * 50, "\0", [], {}, [csr], csr[:-30], csr * 9]
    before = old.trust.membership
    await old.renewing.look([issuer.link()])
    for _ in range(300):
        frame = {"t": rng.choice(["renew", "renewed"])}
        for key in ("csr", "certificate", "why"):
            if rng.random() < 0.7:
                frame[key] = rng.choice(values)
        cut = bytearray(csr.encode())
        cut[rng.randrange(len(cut))] = rng.randrange(32, 127)
        if rng.random() < 0.3:
            frame["csr"] = cut.decode()
        for side in (issuer, old):
            await side.renewing.frame_came(old.link(), frame)
    assert old.trust.membership is before
