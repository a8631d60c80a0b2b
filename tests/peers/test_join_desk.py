"""The one service a stranger reaches: bounded, unmoved by nonsense, and open again afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvloop

from meshd.errors import JoinRefused, ProtocolError
from meshd.kernel import Pool
from meshd.peers.joining import join_desk
from meshd.peers.joining.admission import (
    MAX_MEMBERS,
    NONCE_BYTES,
    Admitted,
    Greeting,
    Request,
    proof,
)
from meshd.peers.joining.invites import Invite
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.frames import JOIN_LIMIT, frame, parse
from meshd.peers.trust.certificates import make_csr
from meshd.peers.trust.denylist import DenyEntry
from meshd.peers.trust.tls import joining_context
from meshd.peers.trust.wire import KnownPeer, read
from meshd.view import Role
from tests.peers.reception import Newcomer, Reception, new_node

CASES = 120
NODE = "a" * 51 + "q"


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop the daemon runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Reception]:
    pool = Pool("work", workers=2)
    identity, store = new_node(tmp_path, "a")
    store.found("home")
    reception = await Reception("a", identity, store, pool).start()
    yield reception
    await reception.stop()
    pool.close()


@pytest.fixture
def b(tmp_path: Path) -> Newcomer:
    return Newcomer(tmp_path, "b")


async def arrive(a: Reception) -> tuple[FrameChannel, Greeting]:
    """A joiner that was greeted."""
    loop = asyncio.get_running_loop()
    _, channel = await loop.create_connection(
        lambda: FrameChannel(JOIN_LIMIT), "127.0.0.1", a.port,
        ssl=joining_context(), server_hostname="",
    )  # fmt: skip
    async with asyncio.timeout(5):
        return channel, read(Greeting, await channel.read(), "greeting")


def request(
    b: Newcomer, invite: Invite, greeting: Greeting, certificate: bytes | None
) -> dict[str, Any]:
    """What an honest joiner says."""
    assert certificate is not None
    csr, nonce = make_csr(b.identity).decode(), secrets.token_bytes(NONCE_BYTES)
    made = Request(
        invite=invite.invite_id,
        node=b.id,
        name="b",
        csr=csr,
        nonce=nonce,
        proof=proof(
            invite.key,
            member_nonce=greeting.nonce,
            joiner_nonce=nonce,
            member_certificate=certificate,
            node=b.id,
            csr=csr,
        ),
    )
    return made.model_dump(mode="json")


async def last_words(channel: FrameChannel) -> dict[str, Any] | None:
    """What the desk says before it hangs up, if it says something."""
    async with asyncio.timeout(5):
        with contextlib.suppress(Exception):
            said = await channel.read()
            await channel.closed.wait()
            return said
        await channel.closed.wait()
    return None


def unmoved(a: Reception, invite: Invite) -> None:
    assert a.bugs == []
    assert a.admitted == []
    assert a.book._entries[invite.invite_id].used_by == ()
    assert a.desk._serving == 0


# -- what is proved -------------------------------------------------------------------------------

REPLACED: dict[str, Any] = {
    "invite": "AAAAAAAAAAA=",
    "node": NODE,
    "nonce": "A" * 22 + "==",
    "proof": "A" * 43 + "=",
}


@pytest.mark.parametrize("field", REPLACED)
async def test_any_exchanged_field_breaks_the_proof(a: Reception, b: Newcomer, field: str) -> None:
    invite = a.invite()
    channel, greeting = await arrive(a)
    said = request(b, invite, greeting, channel.certificate) | {field: REPLACED[field]}
    channel.send(said)
    answer = await last_words(channel)
    assert answer is not None
    assert answer["reason"] == ("unknown_invite" if field == "invite" else "bad_proof")
    await a.idle()
    unmoved(a, invite)


async def test_another_s_request_breaks_the_proof(
    a: Reception, b: Newcomer, tmp_path: Path
) -> None:
    invite = a.invite()
    channel, greeting = await arrive(a)
    other, _ = new_node(tmp_path, "other")
    said = request(b, invite, greeting, channel.certificate) | {"csr": make_csr(other).decode()}
    channel.send(said)
    answer = await last_words(channel)
    assert answer is not None
    assert answer["reason"] == "bad_proof"
    unmoved(a, invite)


async def test_a_proof_is_for_one_connection(a: Reception, b: Newcomer) -> None:
    invite = a.invite()
    first, greeting = await arrive(a)
    said = request(b, invite, greeting, first.certificate)
    first.abort()
    second, _ = await arrive(a)
    second.send(said)
    answer = await last_words(second)
    assert answer is not None
    assert answer["reason"] == "bad_proof"
    await a.idle()
    unmoved(a, invite)


async def test_who_has_the_secret_gets_a_certificate_for_its_own_key_only(
    a: Reception, b: Newcomer, tmp_path: Path
) -> None:
    """The proof is right, the request is another node's."""
    invite = a.invite()
    other, _ = new_node(tmp_path, "other")
    channel, greeting = await arrive(a)
    assert channel.certificate is not None
    csr, nonce = make_csr(other).decode(), bytes(NONCE_BYTES)
    said = request(b, invite, greeting, channel.certificate)
    right = proof(
        invite.key,
        member_nonce=greeting.nonce,
        joiner_nonce=nonce,
        member_certificate=channel.certificate,
        node=b.id,
        csr=csr,
    )
    made = Request.model_validate(said).model_copy(
        update={"csr": csr, "nonce": nonce, "proof": right}
    )
    channel.send(made.model_dump(mode="json"))
    assert await last_words(channel) is None
    await a.idle()
    unmoved(a, invite)


async def test_an_invite_that_appears_meanwhile_is_not_given_without_a_proof(
    a: Reception, b: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown when the proof was to be checked, known when the use would be counted."""
    invite = a.invite()
    known = a.book._entries
    key = a.book.key

    def appears(invite_id: bytes) -> bytes:
        a.book._entries = {}
        try:
            return key(invite_id)
        finally:
            a.book._entries = known

    monkeypatch.setattr(a.book, "key", appears)
    channel, greeting = await arrive(a)
    said = request(b, invite, greeting, channel.certificate) | {"proof": REPLACED["proof"]}
    channel.send(said)
    answer = await last_words(channel)
    assert answer is not None
    assert answer["reason"] == "unknown_invite"
    await a.idle()
    unmoved(a, invite)


# -- nonsense -------------------------------------------------------------------------------------


def nonsense(rng: random.Random, honest: dict[str, Any]) -> bytes:
    """Bytes of some kind: noise, a frame of noise, an honest request cut, twisted or repeated."""
    good = frame(honest)
    match rng.randrange(7):
        case 0:
            return rng.randbytes(rng.randint(0, 2000))
        case 1:
            body = rng.randbytes(rng.randint(0, 2000))
            return len(body).to_bytes(4) + body
        case 2:
            return rng.choice([JOIN_LIMIT + 1, 1 << 31, 0xFFFFFFFF]).to_bytes(4) + good
        case 3:
            changed = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                changed[rng.randrange(4, len(changed))] = rng.randrange(256)
            return bytes(changed)
        case 4:
            odd: list[Any] = [None, 0, -1, 1e308, True, "", "x" * 9000, [], {}, ["\0"], "\u202e"]
            return frame(honest | {rng.choice(list(honest)): rng.choice(odd)})
        case 5:
            without = dict(honest)
            del without[rng.choice([k for k in honest if k != "t"])]
            return frame(without)
        case _:
            value: Any = rng.choice([[], 0, None, "request", {}, [[]] * 500, {"t": "greeting"}])
            return frame(value) * rng.randint(1, 50)


async def test_nonsense_admits_nobody_and_holds_nobody_up(
    a: Reception, b: Newcomer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    rng, invite = random.Random(20_260_101), a.invite()
    for number in range(CASES):
        channel, greeting = await arrive(a)
        # A proof of another secret: whatever the changes make of it, it is not to be let in.
        honest = request(b, invite, greeting, channel.certificate) | {"proof": REPLACED["proof"]}
        assert channel.transport is not None
        words = nonsense(rng, honest)
        channel.transport.write(words)
        if rng.random() < 0.5:
            channel.close()
        answer = await last_words(channel) if ends_in_answer(words) else None
        assert answer is None or answer["t"] == "refused", (number, words[:200])
        channel.abort()
        await channel.closed.wait()
    await a.idle()
    unmoved(a, invite)
    assert problems == []
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    assert len(caplog.records) < CASES / 2  # strangers cannot fill the log
    assert (await b.join(invite)).mesh_id == a.membership.mesh_id


def ends_in_answer(words: bytes) -> bool:
    """Whether at least one frame is whole, or too long: the desk acts and hangs up."""
    if len(words) < 4:
        return False
    length = int.from_bytes(words[:4])
    return length > JOIN_LIMIT or len(words) >= length + 4


@pytest.mark.parametrize(
    "words", [b"", b"\0\0", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_who_does_not_get_through_tls_is_nobody(a: Reception, words: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", a.port)
    writer.write(words)
    writer.write_eof()
    async with asyncio.timeout(5):
        with contextlib.suppress(OSError):
            await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    assert not a.tasks


# -- bounds ---------------------------------------------------------------------------------------


async def test_a_joiner_that_falls_silent_is_let_go(
    a: Reception, b: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_desk, "DEADLINE_S", 0.1)
    channel, _ = await arrive(a)
    assert channel.transport is not None
    channel.transport.write(b"\0\0\1")
    assert await last_words(channel) is None
    await a.idle()
    assert a.desk._serving == 0
    assert a.bugs == []


async def test_so_many_at_once_and_the_next_when_one_has_gone(
    a: Reception, b: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [await arrive(a) for _ in range(join_desk.MAX_AT_ONCE)]
    loop = asyncio.get_running_loop()
    _, late = await loop.create_connection(
        lambda: FrameChannel(JOIN_LIMIT), "127.0.0.1", a.port,
        ssl=joining_context(), server_hostname="",
    )  # fmt: skip
    answer = await last_words(late)
    assert answer is not None
    assert answer["reason"] == "busy"
    for channel, _ in waiting:
        channel.abort()
    await a.idle()
    await b.join(a.invite())


async def test_a_flood_of_frames_is_not_kept(a: Reception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stops while some wait: what a stranger can make this side hold has an end."""
    flood = frame({"x": "y" * 30_000}) * 2000  # 60 MB
    received = 0
    served: list[FrameChannel] = []
    let_go = asyncio.Event()
    receive = FrameChannel.data_received

    def counted(self: FrameChannel, data: bytes) -> None:
        nonlocal received
        if self in served:
            received += len(data)
        receive(self, data)

    async def idle(channel: FrameChannel) -> None:
        served.append(channel)
        await let_go.wait()
        channel.abort()

    monkeypatch.setattr(FrameChannel, "data_received", counted)
    speakers = a.listener._speakers
    assert speakers is not None
    a.listener._speakers = replace(speakers, join=idle)
    loop = asyncio.get_running_loop()
    _, channel = await loop.create_connection(
        lambda: FrameChannel(JOIN_LIMIT), "127.0.0.1", a.port,
        ssl=joining_context(), server_hostname="",
    )  # fmt: skip
    assert channel.transport is not None
    channel.transport.write(flood)
    before = -1
    while received != before:  # until nothing comes through any more
        before = received
        await asyncio.sleep(0.3)
    assert 0 < received < 4 << 20
    channel.abort()
    let_go.set()
    await a.idle()


def test_an_answer_fits_one_frame_whatever_there_is_to_tell() -> None:
    entry = DenyEntry(node=NODE, reason='"' * 120, at=253_402_300_799, signature=bytes(64))
    address = "h" * 250 + ":65535"
    member = KnownPeer(node_id=NODE, name="n" * 63, addresses=(address,) * 8)
    answer = Admitted(certificate="x" * 2000, role=Role.MEMBER, ca_key="y" * 200)
    for denied, members in ((4096, 500), (4096, 0), (0, 500), (3, 2), (0, 0)):
        wire = join_desk._completed(answer, (entry,) * denied, (member,) * members)
        whole = frame(wire)
        assert len(whole) <= JOIN_LIMIT
        told = read(Admitted, parse(whole[4:]), "admission")
        assert (told.certificate, told.ca_key) == (answer.certificate, answer.ca_key)
        assert bool(told.denied) == bool(denied)
        assert bool(told.members) == bool(members)
        assert len(told.members) <= MAX_MEMBERS
    assert len(join_desk._completed(answer, (entry,) * 3, (member,) * 2)["denied"]) == 3


@pytest.mark.parametrize("model", [Greeting, Request, Admitted])
def test_any_json_is_a_message_or_refused(model: Any) -> None:
    rng = random.Random(7)
    values: list[Any] = [None, True, -1, 1 << 62, 0.5, "", "x" * 9000, "AAAA", [], [0, 1], {}, NODE]
    for _ in range(2000):
        said = {name: rng.choice(values) for name in model.model_fields}
        with contextlib.suppress(ProtocolError):
            read(model, orjson.loads(orjson.dumps(said)), "message")


async def test_an_error_names_the_field_and_never_its_value(a: Reception) -> None:
    secret = "s" * 43 + "="
    with pytest.raises(ProtocolError) as caught:
        read(Request, {"t": "request", "proof": secret, "csr": 7}, "joining")
    assert secret not in caught.value.message
    with pytest.raises(ProtocolError) as caught:
        read(Admitted, {"certificate": "c", "role": "x", "ca_key": [secret]}, "admission")
    assert secret not in caught.value.message


def test_a_refusal_without_a_reason_still_has_words() -> None:
    assert join_desk._to_wire(JoinRefused("no")) == {
        "t": "refused",
        "reason": "refused",
        "message": "no",
    }


def test_the_binding_is_the_certificate_shown() -> None:
    """RFC 5929: another member's certificate makes another proof."""
    said = {"member_nonce": b"m", "joiner_nonce": b"j", "node": "n", "csr": "c"}
    proofs = {
        proof(key, member_certificate=certificate, **said)  # type: ignore[arg-type]
        for key in (b"k", b"l")
        for certificate in (b"one", b"two")
    }
    assert len(proofs) == 4
