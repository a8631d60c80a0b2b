"""From an invite to a membership, over real TLS; and every way in which it is not to be had."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from meshd.errors import JoinRefused, MeshdError, PeerUnreachable
from meshd.ids import MeshId, NodeId
from meshd.kernel import Pool
from meshd.peers.joining import invite_book, join_desk
from meshd.peers.joining.admission import NONCE_BYTES, Admitted, Greeting, Request, proof
from meshd.peers.joining.invites import Invite, encode_invite
from meshd.peers.joining.joining import AT_ONCE, join
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.frames import JOIN_LIMIT
from meshd.peers.links.listener import PeerListener, Speakers
from meshd.peers.trust.certificates import PeerCertificate, make_csr
from meshd.peers.trust.membership import Grant
from meshd.peers.trust.tls import joining_context, server_context
from meshd.view import Role
from tests.peers.reception import Newcomer, Reception, new_node


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop the daemon runs on."""
    return {"uvloop": uvloop.new_event_loop}


Open = Callable[..., Awaitable[Reception]]


@pytest.fixture
async def receive(tmp_path: Path) -> AsyncIterator[Open]:
    """`await receive("a")` founds a mesh and admits to it; with a newcomer, that one does."""
    pool, opened = Pool("work", workers=2), []

    async def one(name: str, node: Newcomer | None = None) -> Reception:
        if node is None:
            identity, store = new_node(tmp_path, name)
            store.found(name)
        else:
            identity, store = node.identity, node.store
        reception = await Reception(name, identity, store, pool).start()
        opened.append(reception)
        return reception

    yield one
    for reception in opened:
        await reception.stop()
    pool.close()


@pytest.fixture
async def a(receive: Open) -> Reception:
    return await receive("a")


@pytest.fixture
def b(tmp_path: Path) -> Newcomer:
    return Newcomer(tmp_path, "b")


async def refused(newcomer: Newcomer, invite: Invite) -> JoinRefused:
    before = sorted(newcomer.store.directory.parent.rglob("*"))
    with pytest.raises(JoinRefused) as caught:
        await newcomer.join(invite)
    assert sorted(newcomer.store.directory.parent.rglob("*")) == before  # nothing half-written
    assert "\n" not in caught.value.message
    return caught.value


def reason(error: MeshdError) -> str:
    return str((error.detail or {}).get("reason"))


# -- admitted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
async def test_a_node_becomes_what_it_was_invited_as(a: Reception, b: Newcomer, role: Role) -> None:
    joined = await b.join(a.invite(role=role))
    assert (joined.mesh_id, joined.mesh_name, joined.role) == (a.membership.mesh_id, "a", role)
    assert not joined.issuer
    assert b.store.load() == joined
    assert b.store.remembered() == (a.known(),)
    await a.idle()
    assert a.admitted == [(b.id, "b", role)]


async def test_an_issuer_admits_others(
    a: Reception, b: Newcomer, receive: Open, tmp_path: Path
) -> None:
    assert (await b.join(a.invite(issuer=True))).issuer
    at_b = await receive("b", b)
    c = Newcomer(tmp_path, "c")
    joined = await c.join(at_b.invite())
    assert joined.mesh_id == a.membership.mesh_id
    assert at_b.admitted == [(c.id, "c", Role.MEMBER)]
    # What one issuer issued, another does not know: uses are counted in one place.
    error = await refused(Newcomer(tmp_path, "d"), a.invite(addresses=(at_b.address,)))
    assert reason(error) == "unknown_invite"


async def test_who_joins_knows_whom_not_to_trust(a: Reception, b: Newcomer) -> None:
    gone = NodeId("a" * 51 + "q")
    a.denied.deny(a.membership.authority, gone, "stolen")
    joined = await b.join(a.invite())
    assert gone in b.store.deny_list(joined)


async def test_one_invite_for_several_nodes(a: Reception, tmp_path: Path) -> None:
    invite = a.invite(uses=3)
    newcomers = [Newcomer(tmp_path, f"n{n}") for n in range(4)]
    results = await asyncio.gather(*(n.ask(invite) for n in newcomers), return_exceptions=True)
    assert sum(isinstance(r, Grant) for r in results) == 3
    (error,) = [r for r in results if isinstance(r, BaseException)]
    assert isinstance(error, JoinRefused)
    assert reason(error) == "used_up"


async def converse(
    a: Reception, b: Newcomer, invite: Invite, spoil: Callable[[Request], Request] = lambda r: r
) -> FrameChannel:
    """Say everything a joiner says, and leave the answer unread."""
    loop = asyncio.get_running_loop()
    _, channel = await loop.create_connection(
        lambda: FrameChannel(JOIN_LIMIT), "127.0.0.1", a.port,
        ssl=joining_context(), server_hostname="",
    )  # fmt: skip
    greeting = Greeting.model_validate(await channel.read())
    assert channel.certificate is not None
    csr, nonce = make_csr(b.identity).decode(), secrets.token_bytes(NONCE_BYTES)
    request = Request(
        invite=invite.invite_id,
        node=b.id,
        name="b",
        csr=csr,
        nonce=nonce,
        proof=proof(
            invite.key,
            member_nonce=greeting.nonce,
            joiner_nonce=nonce,
            member_certificate=channel.certificate,
            node=b.id,
            csr=csr,
        ),
    )
    channel.send(spoil(request).model_dump(mode="json"))
    return channel


async def test_a_lost_answer_costs_no_second_use(a: Reception, b: Newcomer, tmp_path: Path) -> None:
    invite = a.invite()
    channel = await converse(a, b, invite)
    await a.idle()  # admitted, certificate sent
    channel.abort()
    assert [who for who, _, _ in a.admitted] == [b.id]
    await b.join(invite)
    assert reason(await refused(Newcomer(tmp_path, "c"), invite)) == "used_up"


async def test_a_use_outlives_a_restart_of_the_issuer(
    a: Reception, b: Newcomer, receive: Open, tmp_path: Path
) -> None:
    invite = a.invite()
    await b.join(invite)
    await a.stop()
    pool = Pool("again", workers=1)
    again = await Reception("a", a.identity, a.store, pool).start()
    try:
        moved = replace(invite, addresses=(again.address,))
        assert reason(await refused(Newcomer(tmp_path, "c"), moved)) == "used_up"
        await b.join(moved)
    finally:
        await again.stop()
        pool.close()


async def test_no_secret_in_any_log(
    a: Reception, b: Newcomer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    invite = a.invite(issuer=True)
    joined = await b.join(invite)
    await refused(Newcomer(tmp_path, "c"), invite)
    await refused(b, replace(invite, secret=bytes(16)))
    assert joined.authority is not None
    await a.idle()
    assert "used up" in caplog.text
    pem = joined.authority.key_pem().decode().splitlines()[1]
    for secret in (
        encode_invite(invite)[40:],
        invite.secret.hex(),
        base64.b64encode(invite.secret).decode(),
        base64.b64encode(invite.key).decode(),
        repr(invite.key),
        pem,
    ):
        assert secret not in caplog.text


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "why", "words"),
    [
        (lambda i: replace(i, secret=bytes(16)), "bad_proof", "secret of the invite was not"),
        (lambda i: replace(i, invite_id=bytes(8)), "unknown_invite", "does not know the invite"),
    ],
)
async def test_not_this_invite(
    a: Reception, b: Newcomer, spoil: Callable[[Invite], Invite], why: str, words: str
) -> None:
    invite = a.invite()
    error = await refused(b, spoil(invite))
    assert reason(error) == why
    assert words in error.message
    await b.join(invite)  # which cost no use


async def test_expired_at_the_issuer(a: Reception, b: Newcomer) -> None:
    invite = a.invite(ttl_s=60)
    a.book._wall = lambda: time.time() + 61
    error = await refused(b, invite)
    assert reason(error) == "expired"
    assert "make a new one with `meshd invite`" in error.message


async def test_used_up(a: Reception, b: Newcomer, tmp_path: Path) -> None:
    invite = a.invite()
    await b.join(invite)
    error = await refused(Newcomer(tmp_path, "c"), invite)
    assert "good for joining once and is used up" in error.message


async def test_a_revoked_node(a: Reception, b: Newcomer) -> None:
    a.denied.deny(a.membership.authority, b.id)
    invite = a.invite()
    error = await refused(b, invite)
    assert reason(error) == "denied"
    assert "new --data-dir" in error.message
    assert a.book._entries[invite.invite_id].used_by == ()


async def test_a_member_without_the_mesh_s_key_admits_nobody(
    a: Reception, b: Newcomer, receive: Open, tmp_path: Path
) -> None:
    await b.join(a.invite())
    at_b = await receive("b", b)
    c = Newcomer(tmp_path, "c")
    error = await refused(c, a.invite(addresses=(at_b.address,)))
    assert reason(error) == "not_issuer"
    assert "b does not hold the mesh's key" in error.message
    await c.join(a.invite(addresses=(at_b.address, a.address)))


async def test_another_mesh_at_that_address(a: Reception, b: Newcomer, receive: Open) -> None:
    other = await receive("other")
    invite = a.invite(addresses=(other.address,))
    error = await refused(b, invite)
    assert f"at {other.address} answers mesh `other`" in error.message
    assert "not the one this invite is for (`a`)" in error.message
    for addresses in ((other.address, a.address), (a.address, other.address)):
        await b.join(replace(invite, addresses=addresses))
    assert other.admitted == []


async def test_a_token_whose_mesh_id_was_exchanged(a: Reception, b: Newcomer) -> None:
    invite = replace(a.invite(), mesh_id=MeshId("0" * 32))
    assert "another mesh than the invite names" in (await refused(b, invite)).message


async def test_versions_without_overlap(
    a: Reception, b: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = a.invite()
    monkeypatch.setattr(join_desk, "PROTOCOL", (7, 9))
    error = await refused(b, invite)
    assert "b speaks protocol 1" in error.message
    assert "a 7 to 9" in error.message
    assert "upgrade meshd on b" in error.message


async def test_an_invite_without_addresses(a: Reception, b: Newcomer) -> None:
    assert "names no address" in (await refused(b, a.invite(addresses=()))).message
    grant = await join(
        a.invite(addresses=()), b.identity, "b", timeout_s=5, also=(a.address, a.address)
    )
    assert grant.role is Role.MEMBER


# -- not now --------------------------------------------------------------------------------------


async def unreachable(newcomer: Newcomer, invite: Invite, timeout_s: float = 5.0) -> str:
    with pytest.raises(PeerUnreachable) as caught:
        await newcomer.ask(invite, timeout_s)
    assert "may this machine reach its peer port?" in caught.value.message
    return caught.value.message


async def test_nobody_listens(a: Reception, b: Newcomer) -> None:
    with socket.socket() as taken:  # so that nobody else can listen there meanwhile
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = await unreachable(b, a.invite(addresses=(address,)))
    assert f"{address}: nobody listens there" in said


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "."])
async def test_a_host_that_can_be_none(a: Reception, b: Newcomer, host: str) -> None:
    """Refused before any name server is asked."""
    address = f"{host}:9338"
    assert f"{address}: " in await unreachable(b, a.invite(addresses=(address,)))
    await b.join(a.invite(addresses=(address, a.address)))


async def test_too_many_at_once(a: Reception, b: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    invite = a.invite()
    with monkeypatch.context() as patch:
        patch.setattr(join_desk, "MAX_AT_ONCE", 0)
        assert "many nodes join at once" in await unreachable(b, invite)
    await b.join(invite)


async def test_a_use_that_cannot_be_written_is_no_refusal_for_good(
    a: Reception, b: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = a.invite()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(invite_book, "write_atomic", full)
        assert "failed to admit; see its log" in await unreachable(b, invite)
    await b.join(invite)


# -- other things at an address -------------------------------------------------------------------

Speak = Callable[[FrameChannel], Awaitable[None]]


@contextlib.asynccontextmanager
async def somebody(context: ssl.SSLContext, speak: Speak) -> AsyncIterator[str]:
    """Whoever answers `speak` on the peer port; the address."""
    tasks: set[asyncio.Task[None]] = set()

    async def no(_: FrameChannel, __: PeerCertificate) -> None:
        raise AssertionError("only joining is asked for")

    def spawn(work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        return task

    listener = PeerListener("127.0.0.1", 0)
    port = listener.bind()
    await listener.start(context, Speakers(lambda _: None, speak, no, no), spawn)  # type: ignore[arg-type, return-value]
    try:
        yield f"127.0.0.1:{port}"
    finally:
        listener.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def never(channel: FrameChannel) -> None:
    await channel.closed.wait()


async def test_a_member_that_says_nothing(a: Reception, b: Newcomer) -> None:
    async with somebody(a.context, never) as address:
        invite = a.invite(addresses=(address,))
        assert f"{address}: no answer within" in await unreachable(b, invite, 0.3)
        # It holds up no other: each address has its own time, and several are asked at once.
        await b.join(replace(invite, addresses=(*(address,) * (AT_ONCE - 1), a.address)))


async def test_a_port_that_never_speaks_tls(a: Reception, b: Newcomer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        invite = a.invite(addresses=(address,))
        assert f"{address}: no answer within" in await unreachable(b, invite, 0.3)


async def test_a_port_that_speaks_something_else(a: Reception, b: Newcomer) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(http, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert f"{address}: " in await unreachable(b, a.invite(addresses=(address,)))
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    "words",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\2[]",
        b"\0\0\0\2{}",
        b"\0\0\0\1{",
        b'\0\0\0\x10{"t":"greeting"}',
        (JOIN_LIMIT + 1).to_bytes(4) + b"x" * 100,
        b"",
    ],
)
async def test_a_member_that_talks_nonsense(a: Reception, b: Newcomer, words: bytes) -> None:
    async def speak(channel: FrameChannel) -> None:
        assert channel.transport is not None
        channel.transport.write(words)
        channel.close()

    async with somebody(a.context, speak) as address:
        assert await unreachable(b, a.invite(addresses=(address,)))
        await b.join(a.invite(addresses=(address, a.address)))


async def test_a_stranger_s_refusal_ends_nothing(a: Reception, b: Newcomer, tmp_path: Path) -> None:
    """It has not proved to be a member, whatever it says."""
    identity, store = new_node(tmp_path, "stranger")
    foreign = server_context(store.found("stranger"), identity)

    async def speak(channel: FrameChannel) -> None:
        words = "you are\nnot \x1b[31mwelcome"
        channel.send({"t": "refused", "reason": "denied", "message": words})
        channel.close()

    async with somebody(foreign, speak) as address:
        invite = a.invite(addresses=(address,))
        assert "you are not  [31mwelcome" in await unreachable(b, invite)
        await b.join(replace(invite, addresses=(address, a.address)))


async def test_a_stranger_with_the_mesh_s_greeting_hears_no_proof(
    a: Reception, b: Newcomer, tmp_path: Path
) -> None:
    identity, store = new_node(tmp_path, "stranger")
    foreign = server_context(store.found("stranger"), identity)
    heard: list[dict[str, Any]] = []

    async def speak(channel: FrameChannel) -> None:
        channel.send(greeting_of(a))
        with contextlib.suppress(MeshdError):
            heard.append(await channel.read())

    async with somebody(foreign, speak) as address:
        error = await refused(b, a.invite(addresses=(address,)))
    assert f"{address} is not a member of its mesh" in error.message
    assert heard == []


def greeting_of(member: Reception) -> dict[str, Any]:
    return Greeting(
        mesh=member.membership.mesh_id,
        mesh_name=member.membership.mesh_name,
        name=member.name,
        ca=member.membership.ca_certificate,
        nonce=bytes(NONCE_BYTES),
        protocol=(1, 1),
        version="0",
    ).model_dump(mode="json")


async def test_a_member_in_the_middle_cannot_pass_the_proof_on(
    a: Reception, b: Newcomer, tmp_path: Path
) -> None:
    """It would get a certificate for a request of its choice, or watch the mesh's key go by."""
    middle = Newcomer(tmp_path, "middle")
    membership = await middle.join(a.invite())
    passed: list[dict[str, Any]] = []

    async def relay(channel: FrameChannel) -> None:
        loop = asyncio.get_running_loop()
        _, there = await loop.create_connection(
            lambda: FrameChannel(JOIN_LIMIT), "127.0.0.1", a.port,
            ssl=joining_context(), server_hostname="",
        )  # fmt: skip
        channel.send(await there.read())
        there.send(await channel.read())
        passed.append(await there.read())
        channel.send(passed[0])
        there.close()
        channel.close()

    invite = a.invite(issuer=True)
    async with somebody(server_context(membership, middle.identity), relay) as address:
        error = await refused(b, replace(invite, addresses=(address,)))
    assert reason(error) == "bad_proof"
    assert [frame["reason"] for frame in passed] == ["bad_proof"]
    assert a.book._entries[invite.invite_id].used_by == ()
    await b.join(invite)


@pytest.mark.parametrize("flaw", ["node", "role", "mesh", "certificate", "denied", "form"])
async def test_a_member_that_gives_what_was_not_asked_for(
    a: Reception, b: Newcomer, tmp_path: Path, flaw: str
) -> None:
    other, at_other = new_node(tmp_path, "other")
    authority = a.membership.authority
    assert authority is not None
    if flaw == "mesh":
        authority = at_other.found("other").authority
        assert authority is not None
    identity = other if flaw == "node" else b.identity
    pem = authority.sign(make_csr(identity), Role.MEMBER, time.time()).decode()
    answer = Admitted(
        certificate="junk" if flaw == "certificate" else pem,
        role=Role.CLIENT if flaw == "role" else Role.MEMBER,
    ).model_dump(mode="json")
    if flaw == "form":
        del answer["role"]
    if flaw == "denied":
        answer["denied"] = [{"node": "x"}]

    async def speak(channel: FrameChannel) -> None:
        channel.send(greeting_of(a))
        await channel.read()
        channel.send(answer)

    before = sorted(b.store.directory.parent.rglob("*"))
    async with somebody(a.context, speak) as address:
        with pytest.raises((JoinRefused, PeerUnreachable)):
            await b.join(a.invite(addresses=(address,)))
    assert sorted(b.store.directory.parent.rglob("*")) == before


async def test_a_call_that_is_given_up_leaves_no_task(a: Reception, b: Newcomer) -> None:
    reached = asyncio.Event()

    async def speak(channel: FrameChannel) -> None:
        reached.set()
        await channel.closed.wait()

    async with somebody(a.context, speak) as address:
        asking = asyncio.create_task(b.ask(a.invite(addresses=(address, "127.0.0.1:1"))))
        async with asyncio.timeout(5):
            await reached.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
