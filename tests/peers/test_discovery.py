"""Members on the LAN: what they say, what is believed of it, and multicast DNS itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.ids import MeshId, NodeId
from meshd.peers.lan import discovery as discovering
from meshd.peers.lan import lan as lans
from meshd.peers.lan.announcement import (
    MAX_FOUND_ADDRESSES,
    Announcement,
    Found,
    only_here,
    properties_of,
    read_service,
)
from meshd.peers.lan.discovery import MAX_SEEN, Discovery
from meshd.peers.lan.lan import find_mesh

MESH = MeshId("0" * 32)
OTHER_MESH = MeshId("f" * 32)
ALPHA, BETA, GAMMA = (NodeId(letter * 52) for letter in "abc")

Proposal = tuple[NodeId, MeshId, str, tuple[str, ...]]


def announcement(node: NodeId = ALPHA, **changes: Any) -> Announcement:
    said: dict[str, Any] = {
        "mesh_id": MESH,
        "mesh_name": "home",
        "node_id": node,
        "name": f"node-{node[:1]}",
        "port": 9338,
        "addresses": ("192.168.1.7:9338",),
    }
    return Announcement(**said | changes)


def raw(said: dict[str, str]) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in said.items()}


# -- words ----------------------------------------------------------------------------------------


def test_what_is_said_is_what_is_read() -> None:
    said = announcement(addresses=("home.example:444", "[fd00::1]:9338"))
    found = read_service(raw(properties_of(said)), 9338, ["192.168.1.7", "fe80::1", "fd00::1"])
    assert found == Found(
        ALPHA,
        MESH,
        "home",
        "node-a",
        (1, 1),
        ("home.example:444", "[fd00::1]:9338", "192.168.1.7:9338"),
    )


def test_a_record_holds_as_many_addresses_as_fit() -> None:
    many = tuple(f"{'x' * 100}{n}:1" for n in range(4))
    assert properties_of(announcement(addresses=many))["at"] == ",".join(many[:2])
    assert properties_of(announcement(addresses=("x" * 260 + ":1", "b:2")))["at"] == "b:2"


@pytest.mark.parametrize("key", ["mesh", "meshname", "node", "name", "proto"])
@pytest.mark.parametrize("value", [None, b"", b"\xff", b"a b", b"x" * 300])
def test_a_service_that_lacks_something_is_none_of_ours(key: str, value: bytes | None) -> None:
    assert read_service(raw(properties_of(announcement())) | {key.encode(): value}, 1, []) is None


keys = st.sampled_from([b"mesh", b"meshname", b"node", b"name", b"proto", b"at"])


@given(
    st.dictionaries(keys | st.binary(max_size=8), st.none() | st.binary(max_size=300)),
    st.none() | st.integers(-1, 70_000),
    st.lists(st.ip_addresses().map(str) | st.text(max_size=9), max_size=20),
)
def test_nothing_that_is_said_hurts(
    changes: dict[bytes, bytes | None], port: int | None, ips: list[str]
) -> None:
    found = read_service(raw(properties_of(announcement())) | changes, port, ips)
    if found is not None:
        assert len(found.addresses) <= MAX_FOUND_ADDRESSES
        assert all(a.isprintable() and " " not in a for a in found.addresses)


def test_loopback_is_only_here() -> None:
    assert only_here(("127.0.0.1:1", "[::1]:1"))
    assert not only_here(("127.0.0.1:1", "10.0.0.1:1"))
    assert not only_here(())


# -- the service ----------------------------------------------------------------------------------


class Heard(list[Proposal]):
    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()

    def __call__(self, *proposal: Any) -> None:
        self.append(proposal)
        self._more.set()

    async def wait(self, condition: Callable[[Heard], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition(self):
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def running(service: Discovery) -> AsyncIterator[Discovery]:
    task = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        service.stopping.set()
        async with asyncio.timeout(service.stop_limit_s):
            await task


def member(
    service: Discovery, node: NodeId, *addresses: str, mesh: MeshId = MESH, name: str = "home"
) -> None:
    port = int(addresses[0].rpartition(":")[2])
    service.set_identity(mesh, name, node, f"node-{node[:1]}", port, addresses)


async def test_members_find_each_other_and_nobody_else() -> None:
    heard = {node: Heard() for node in (ALPHA, BETA, GAMMA)}
    async with (
        running(Discovery(True, heard[ALPHA])) as alpha,
        running(Discovery(True, heard[BETA])) as beta,
        running(Discovery(True, heard[GAMMA])) as gamma,
    ):
        member(alpha, ALPHA, "127.0.0.1:1001")
        member(beta, BETA, "127.0.0.1:1002")
        member(gamma, GAMMA, "127.0.0.1:1003", mesh=OTHER_MESH)
        await heard[ALPHA].wait(lambda h: (BETA, MESH, "home", ("127.0.0.1:1002",)) in h)
        await heard[BETA].wait(lambda h: (ALPHA, MESH, "home", ("127.0.0.1:1001",)) in h)
        # What changes is told again.
        member(alpha, ALPHA, "127.0.0.1:1009")
        await heard[BETA].wait(lambda h: any("127.0.0.1:1009" in p[3] for p in h))
        # Gamma was announced as early as the others, and found by one that looks for its mesh.
        seeker = Heard()
        async with running(Discovery(True, seeker)) as looking:
            looking.look_for(OTHER_MESH, "")
            await seeker.wait(bool)
        assert {p[0] for p in seeker} == {GAMMA}
    assert {p[0] for p in heard[ALPHA]} == {BETA}
    assert {p[0] for p in heard[BETA]} == {ALPHA}
    assert heard[GAMMA] == []


async def test_a_mesh_is_found_by_name_and_by_a_command() -> None:
    heard = Heard()
    async with running(Discovery(True)) as alpha, running(Discovery(True, heard)) as looking:
        member(alpha, ALPHA, "127.0.0.1:1001", name="attic")
        looking.look_for(None, "attic")
        await heard.wait(bool)
        assert heard[0] == (ALPHA, MESH, "attic", ("127.0.0.1:1001",))
        (found,) = await find_mesh("attic", 2.0)
        assert (found.node_id, found.name) == (ALPHA, "node-a")
        assert await find_mesh("cellar", 0.2) == []


async def test_a_wish_that_comes_late_is_told_what_was_heard_before() -> None:
    heard = Heard()
    async with running(Discovery(True)) as alpha, running(Discovery(True, heard)) as looking:
        member(alpha, ALPHA, "127.0.0.1:1001")
        looking.look_for(MESH, "")
        await heard.wait(bool)
        looking.look_for(OTHER_MESH, "")
        heard.clear()
        looking.look_for(MESH, "")
        assert [p[0] for p in heard] == [ALPHA]


async def test_who_rests_is_withdrawn() -> None:
    async with running(Discovery(True)) as alpha, running(Discovery(True)) as looking:
        gone = asyncio.Event()
        heard = Heard()
        looking.proposed = heard
        member(alpha, ALPHA, "127.0.0.1:1001")
        looking.look_for(MESH, "")
        await heard.wait(bool)
        forget = looking._forgotten

        def forgotten(instance: str) -> None:
            forget(instance)
            gone.set()

        assert looking._lan is not None
        looking._lan._forgotten = forgotten
        alpha.rest()
        async with asyncio.timeout(10):
            await gone.wait()
        assert not looking._seen


async def test_turned_off_it_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovering, "Lan", None)
    async with running(Discovery(False)) as service:
        member(service, ALPHA, "127.0.0.1:1001")
        await asyncio.sleep(0)


async def test_no_multicast_is_one_warning_and_another_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = asyncio.Semaphore(0)
    works = False
    real = lans._open_sockets

    def refuse(only_here: bool) -> Any:
        tried.release()
        if works:
            return real(only_here)
        raise OSError(19, "No such device")

    monkeypatch.setattr(lans, "_open_sockets", refuse)
    monkeypatch.setattr(discovering, "POLL_S", 0.02)
    heard = Heard()
    with caplog.at_level(logging.INFO, "meshd.peers.lan.discovery"):
        async with running(Discovery(True, heard)) as service, asyncio.timeout(10):
            member(service, ALPHA, "127.0.0.1:1001")
            for _ in range(3):
                await tried.acquire()
            works = True
            async with running(Discovery(True)) as other:
                member(other, BETA, "127.0.0.1:1002")
                await heard.wait(bool)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "No such device" in line] == [said[0]]
    assert "--no-mdns" in said[0]
    assert "members on the LAN are looked for again" in said


async def test_what_is_remembered_is_bounded() -> None:
    service = Discovery(True)
    found = read_service(raw(properties_of(announcement())), 1, [])
    assert found is not None
    for number in range(MAX_SEEN + 50):
        service._heard(f"{number}", found)
    assert len(service._seen) == MAX_SEEN
    assert "0" not in service._seen
    service._forgotten(f"{MAX_SEEN}")
    service._forgotten("never seen")
    assert len(service._seen) == MAX_SEEN - 1


async def test_names_without_records_are_asked_for_within_bounds() -> None:
    from zeroconf import ServiceStateChange

    lan = lans.Lan(lambda _name, _found: None, only_here=True)
    try:
        for number in range(lans.MAX_RESOLVING * 3):
            lan._changed(
                lan._zeroconf.zeroconf,
                "_meshd._tcp.local.",
                f"ghost{number}._meshd._tcp.local.",
                ServiceStateChange.Added,
            )
        assert len(lan._resolving) == lans.MAX_RESOLVING
    finally:
        await lan.close()
    await asyncio.sleep(0)
    assert not lan._resolving
