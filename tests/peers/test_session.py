"""Memberships in action: links, gossip, adverts, denials between real sessions on loopback."""

from __future__ import annotations

import asyncio
import base64
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from meshd.errors import PeerRefused, PeerUnreachable
from meshd.ids import ModelId, NodeId
from meshd.kernel import Pool
from meshd.peers.links.codec import message_to_wire
from meshd.peers.links.frames import frame
from meshd.peers.links.links import ControlLink
from meshd.peers.protocol import ALPN_CTL, ALPN_RAW
from meshd.peers.swim.gossip import Dead, Gossip
from meshd.peers.trust.certificates import certificate_der
from meshd.view import (
    Bid,
    Claim,
    ClaimState,
    MeshState,
    NodeState,
    PeerState,
    Role,
    Suits,
    View,
    WeightsView,
)
from tests.peers.station import EchoBack, Station

Maker = Callable[..., Awaitable[Station]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Maker]:
    """`await make("a")` founds a mesh; `await make("b", a)` joins it and knows where `a` is."""
    pool, made = Pool("work", workers=2), []

    async def one(
        name: str, issuer: Station | None = None, role: Role = Role.MEMBER, **peers: Any
    ) -> Station:
        station = Station(name, tmp_path, pool, **peers)
        if issuer is None:
            station.found()
            await station.start()
        else:
            station.join(issuer, role)
            await station.start(issuer.address)
        made.append(station)
        return station

    yield one
    for station in made:
        await station.stop()
    pool.close()


def alive(at: Station, other: Station) -> bool:
    peer = at.peer(other)
    return peer is not None and peer.state is PeerState.ALIVE and peer.name == other.name


async def all_see_all(*stations: Station) -> None:
    for station in stations:
        others = [o for o in stations if o is not station]
        seen = partial(all_alive, station, others)
        await station.until(seen, f"{[o.name for o in others]} alive")


def all_alive(at: Station, others: list[Station]) -> bool:
    return all(alive(at, other) for other in others)


def links(at: Station) -> int:
    return len(at.session.linking.links)


async def link_from(at: Station, other: Station) -> ControlLink:
    async with asyncio.timeout(10):
        while (link := at.session.linking.links.get(other.id)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return link


def unknown(at: Station, other: Station) -> bool:
    return at.peer(other) is None


def runs_on(at: Station, other: Station, backend: str) -> bool:
    peer = at.peer(other)
    return peer is not None and peer.backend == backend


async def test_two_nodes_see_each_other_and_what_they_serve(make: Maker) -> None:
    a = await make("a")
    a.serve_model(slots=3)
    b = await make("b", a)
    await all_see_all(a, b)
    await b.until(b.targets, "a's model")
    (target,) = b.targets()
    assert (target.node, target.node_id, target.local) == ("a", a.id, False)
    assert (target.slots, target.slots_free, target.instance) == (3, 3, "~a")
    assert b.board.current.mesh.state is MeshState.MEMBER
    assert b.board.current.mesh.id == a.board.current.mesh.id
    assert (a.board.current.mesh.issuer, b.board.current.mesh.issuer) == (True, False)


async def test_the_weights_a_node_holds_are_known_to_the_others(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a)
    await all_see_all(a, b)
    held = WeightsView(ModelId("m"), "owner/m", "sha256:" + "a" * 64, 1 << 30)
    a.board.publish(replace(a.board.current, weights=(held,)))
    await b.until(lambda: b.peer(a).weights == {held.digest}, "a's weights")  # type: ignore[union-attr]
    a.board.publish(replace(a.board.current, weights=()))
    await b.until(lambda: not b.peer(a).weights, "their end")  # type: ignore[union-attr]


async def test_bids_and_claims_of_members_are_known_to_the_others(make: Maker) -> None:
    a = await make("a")
    b, client = await make("b", a), await make("client", a, Role.CLIENT)
    await all_see_all(a, b, client)
    bid = Bid(ModelId("m"), 7, Suits.YES, "fits", weights=True, headroom=12)
    claim = Claim(ModelId("m"), 3, ClaimState.PREPARING, 1 << 40, "loading")
    for station in (a, client):
        station.board.publish(replace(station.board.current, bids=(bid,), claims=(claim,)))
    await b.until(lambda: b.peer(a).claims == (claim,), "a's claim")  # type: ignore[union-attr]
    await client.heard_by(b)
    assert b.peer(a).bids == (bid,)  # type: ignore[union-attr]
    assert (b.peer(client).bids, b.peer(client).claims) == ((), ())  # type: ignore[union-attr]
    a.board.publish(replace(a.board.current, bids=(), claims=()))
    await b.until(lambda: not b.peer(a).claims, "their end")  # type: ignore[union-attr]


async def test_a_claim_does_not_wait_for_an_advert_that_may(make: Maker) -> None:
    a = await make("a")
    said = a.session.telling

    def bids(version: int) -> View:
        return replace(a.board.current, bids=(Bid(ModelId("m"), version, Suits.YES),))

    a.set_state(NodeState.DRAINING)  # urgent: the pause for what is not begins now
    before = said.version
    a.board.publish(bids(1))
    assert said.version == before, "told at once, though it may wait"
    claim = Claim(ModelId("m"), 1, ClaimState.PREPARING, 5)
    ready = replace(claim, state=ClaimState.READY)
    a.board.publish(replace(bids(1), claims=(claim,)))
    a.board.publish(replace(bids(1), claims=(ready,)))
    assert said.version == before + 2
    a.board.publish(replace(bids(1), claims=(replace(ready, reason="noise"),)))
    assert said.version == before + 2


async def test_a_gpu_that_is_lost_is_lost_everywhere_within_seconds(make: Maker) -> None:
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    a.prove("cuda")
    for other in (b, c):
        await other.until(partial(runs_on, other, a, "cuda"), "the proof")
    began = time.monotonic()
    a.prove("cpu", problem="the engine lists no such device: models would run on the CPU")
    for other in (b, c):
        await other.until(partial(runs_on, other, a, "cpu"), "the loss of the device")
        peer = other.peer(a)
        assert peer is not None
        assert peer.proof is not None
        assert "models would run on the CPU" in str(peer.proof.problem)
    assert time.monotonic() - began < 5.0


async def test_a_newcomer_that_knows_one_meets_all_and_each_pair_has_one_link(make: Maker) -> None:
    a = await make("a")
    others = [await make(name, a) for name in "bcde"]
    await all_see_all(a, *others)
    for station in (a, *others):
        async with asyncio.timeout(10):
            while links(station) != 4:  # noqa: ASYNC110  (no view tells of links)
                await asyncio.sleep(0.02)


async def test_a_stream_reaches_the_api_of_the_node_it_names(make: Maker) -> None:
    a = await make("a")
    a.serve_model()
    b = await make("b", a)
    await b.until(b.targets, "a's model")
    received = asyncio.Queue[bytes]()

    class Client(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            cast("asyncio.Transport", transport).write(b"hello")

        def data_received(self, data: bytes) -> None:
            received.put_nowait(data)

    await b.session.connect(b.targets()[0], Client)
    heard = b""
    async with asyncio.timeout(5):
        while len(heard) < 7:
            heard += await received.get()
    assert heard == b"b:hello"
    b.session.serving.streams.cut()  # of others only: ours is not among them
    (served,) = a.served
    assert not served.lost.is_set()
    a.session.serving.streams.cut(b.id)
    async with asyncio.timeout(5):
        await served.lost.wait()


async def test_a_draining_node_is_not_a_target_and_comes_back(make: Maker) -> None:
    a = await make("a")
    a.serve_model()
    b = await make("b", a)
    await b.until(b.targets, "a's model")
    a.set_state(NodeState.DRAINING)
    await b.until(lambda: not b.targets(), "no target")
    peer = b.peer(a)
    assert peer is not None
    assert peer.draining
    assert peer.state is PeerState.ALIVE
    a.set_state(NodeState.READY)
    await b.until(b.targets, "a's model again")


async def test_who_leaves_is_left_at_once_and_who_breaks_is_dead(make: Maker) -> None:
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    await all_see_all(a, b, c)
    await b.stop()
    await a.until(lambda: a.peer(b).state is PeerState.LEFT, "b left")  # type: ignore[union-attr]
    await c.stop(goodbye=False)
    await a.until(lambda: a.peer(c).state is PeerState.DEAD, "c dead")  # type: ignore[union-attr]


async def test_a_restarted_node_is_itself_again(make: Maker, tmp_path: Path) -> None:
    a = await make("a")
    b = await make("b", a)
    await all_see_all(a, b)
    await b.stop(goodbye=False)
    again = Station("b", tmp_path, b.pool)
    await again.start(a.address, port=b.port)
    await all_see_all(a, again)
    assert again.id == b.id
    await again.stop()


async def test_a_revoked_node_loses_its_links_and_cannot_come_back(
    make: Maker, tmp_path: Path
) -> None:
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    await all_see_all(a, b, c)
    await a.session.trust.deny(b.id)
    a.session.denied((b.id,))
    for station in (a, c):
        await station.until(partial(unknown, station, b), "b forgotten")
        assert station.session.linking.links.get(b.id) is None
    await b.until(lambda: b.board.current.mesh.state is MeshState.REFUSED, "b knows")
    assert "deny list" in (b.board.current.mesh.reason or "")
    await b.stop()
    again = Station("b", tmp_path, b.pool)
    await again.start(c.address)
    await again.until(lambda: again.board.current.mesh.state is MeshState.REFUSED, "refused again")
    assert c.peer(again) is None
    await again.stop()


async def test_a_renewed_certificate_reaches_the_advert(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a)
    await all_see_all(a, b)
    before = b.session.telling.book.envelope(a.id)
    await a.session.trust.renew_by_own_key()
    async with asyncio.timeout(10):
        while (after := b.session.telling.book.envelope(a.id)) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert before is not None
    assert after is not None
    assert after["certificate"] != before["certificate"]
    shown = certificate_der(a.session.trust.membership.certificate)
    assert base64.b64decode(after["certificate"]) == shown


async def test_an_address_that_can_be_no_name_ends_no_dial(make: Maker) -> None:
    """Any member can state one; every node that hears of it would dial it."""
    a = await make("a")
    for address in ("a..b:9338", "x" * 70 + ".example:9338"):
        with pytest.raises(PeerUnreachable):
            await a.session._connector.connect(address, ALPN_CTL, 1024)
        a.session.linking.propose(address)
    await asyncio.gather(*(t for t in a.tasks if "_dial" in str(t.get_coro())))


async def test_denials_older_than_the_link_arrive_with_it(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a)
    lost = NodeId("c" * 51 + "a")
    await a.session.trust.deny(lost)
    c = await make("c", a)
    for station in (c, b):  # b hears of it from c
        async with asyncio.timeout(10):
            while lost not in station.session.trust.denied:  # noqa: ASYNC110  (no view tells)
                await asyncio.sleep(0.02)


async def test_a_copied_data_directory_is_refused_with_words(make: Maker, tmp_path: Path) -> None:
    a = await make("a")
    b = await make("b", a)
    await all_see_all(a, b)
    half_written = shutil.ignore_patterns(".*")
    shutil.copytree(b.directory, tmp_path / "elsewhere" / "b", ignore=half_written)
    copy = Station("b", tmp_path / "elsewhere", b.pool)
    await copy.start(a.address)
    await copy.until(lambda: copy.board.current.mesh.state is MeshState.REFUSED, "refused")
    assert "copy of the other" in (copy.board.current.mesh.reason or "")
    await all_see_all(a, b)
    await copy.stop()
    await all_see_all(a, b)


async def test_a_client_s_capacity_is_not_believed(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a, Role.CLIENT)
    b.serve_model()
    await all_see_all(a, b)
    peer = a.peer(b)
    assert peer is not None
    assert peer.role is Role.CLIENT
    assert a.targets() == ()
    a.serve_model("other")
    await b.until(lambda: b.targets("other"), "a's model")
    target = replace(b.targets("other")[0], node_id=b.id)
    with pytest.raises(PeerRefused, match="serves no models"):
        await a.session.connect(target, lambda: EchoBack(""))


async def test_what_a_client_s_clients_ask_for_is_heard(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a, Role.CLIENT)
    demand = ((ModelId("m"), 1.5),)
    b.board.publish(replace(b.board.current, demand=demand))
    await a.until(lambda: (peer := a.peer(b)) is not None and peer.demand == demand, "demand")


async def test_a_death_that_is_a_lie_is_refuted(make: Maker) -> None:
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    await all_see_all(a, b, c)
    member = a.session._swim.members[c.id]
    link = await link_from(b, a)
    link.send(message_to_wire(Gossip((Dead(c.id, member.incarnation, b.id),))))
    await a.until(
        lambda: a.session._swim.members[c.id].incarnation > member.incarnation, "refutation"
    )
    await all_see_all(a, b, c)


async def test_a_false_statement_of_another_is_dropped(make: Maker) -> None:
    a = await make("a")
    b, c = await make("b", a), await make("c", a)
    await all_see_all(a, b, c)
    genuine = c.session._statement
    forged = replace(genuine, incarnation=genuine.incarnation + 5, left=True)
    link = await link_from(b, a)
    link.send(message_to_wire(Gossip((forged,))))
    await b.heard_by(a)
    assert a.session._swim.members[c.id].incarnation < forged.incarnation
    assert alive(a, c)
    assert a.session.linking.links.get(b.id) is not None


@pytest.mark.parametrize("alpn", [ALPN_CTL, ALPN_RAW])
async def test_without_a_certificate_only_joining_is_reached(make: Maker, alpn: str) -> None:
    a = await make("a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    reader, writer = await asyncio.open_connection("127.0.0.1", a.port, ssl=context)
    writer.write(frame({"t": "hello"}))
    async with asyncio.timeout(5):
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
    writer.close()
    assert a.joined == []
    assert len(a.session.linking.links) == 0


async def test_a_node_of_another_mesh_is_refused_both_ways(make: Maker) -> None:
    a, x = await make("a"), await make("x")
    x.session.linking.propose(a.address, asked=True)
    await x.until(lambda: x.board.current.mesh.state is MeshState.REFUSED, "refused")
    assert "not of this mesh" in (x.board.current.mesh.reason or "")
    assert a.board.current.peers == ()


async def test_no_stream_to_who_is_gone(make: Maker) -> None:
    a = await make("a")
    a.serve_model()
    b = await make("b", a)
    await b.until(b.targets, "a's model")
    (target,) = b.targets()
    await a.stop(goodbye=False)
    with pytest.raises(PeerUnreachable):
        await b.session.connect(target, lambda: EchoBack(""))


async def test_the_number_of_links_is_bounded(make: Maker) -> None:
    a = await make("a", max_links=4)
    others = [await make(f"n{number}", a) for number in range(6)]
    await all_see_all(a, *others)
    assert len(a.session.linking.links) <= 4
    assert NodeId(others[0].id) in a.session._swim.members


async def test_a_doubted_link_stays_if_it_answers_and_is_replaced_if_not(make: Maker) -> None:
    a = await make("a")
    b = await make("b", a)
    await all_see_all(a, b)
    old, there = await link_from(a, b), await link_from(b, a)
    await a.session.linking.end_if_silent(old)
    assert await link_from(a, b) is old
    # From now on b takes nothing from this connection, and nobody tells a.
    assert there.transport is not None
    there.transport.pause_reading()
    a.session.linking.doubt(b.id)
    await a.until(lambda: a.session.linking.links.get(b.id) is not old, "the silent link ended")
    there.drop()
    await all_see_all(a, b)
    assert await link_from(a, b) is not old
