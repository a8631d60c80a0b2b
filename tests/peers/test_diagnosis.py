"""`meshd doctor --peer`: for every step a far side that fails it, and one that passes them all."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from meshd.cli.doctor import patient as read_patient
from meshd.config import load
from meshd.errors import MeshdError
from meshd.ids import BootId
from meshd.kernel.findings import Finding, Verdict
from meshd.peers import diagnosis
from meshd.peers.diagnosis import Patient, diagnose
from meshd.peers.lan.discovery import Discovery
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.frames import CONTROL_LIMIT
from meshd.peers.links.handshake import attend_doctor, welcome
from meshd.peers.links.hello import Hello, make_hello
from meshd.peers.trust.certificates import certificate_der, make_csr
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import Identity, load_or_create
from meshd.peers.trust.membership import Grant, Membership
from meshd.peers.trust.tls import server_context
from meshd.view import Role

STEPS = [
    *("name", "tcp", "tls", "certificate", "mesh", "version", "clock", "round trip", "multicast"),
]

Speak = Callable[[FrameChannel], Awaitable[None]]


@dataclass(frozen=True)
class Member:
    identity: Identity
    membership: Membership

    def hello(self, **changes: Any) -> Hello:
        said = make_hello(
            node=self.identity.node_id,
            name="attic",
            mesh=self.membership.mesh_id,
            boot=BootId("1" * 16),
            role=Role.MEMBER,
            version="0.1.7",
            time=time.time(),
        )
        return said.model_copy(update=changes)


@pytest.fixture
def founder(tmp_path: Path) -> Member:
    return founded(tmp_path / "founder")


@pytest.fixture
def second(tmp_path: Path, founder: Member) -> Member:
    """A member that is no issuer; the far side of most tests."""
    return admitted(founder, tmp_path / "second")


@pytest.fixture
def patient(founder: Member) -> Patient:
    return Patient("study", founder.identity, founder.membership, mdns=False)


def founded(directory: Path) -> Member:
    directory.mkdir()
    identity = load_or_create(directory)
    return Member(identity, MeshStore(directory / "mesh", identity).found("home"))


def admitted(founder: Member, directory: Path) -> Member:
    directory.mkdir()
    identity = load_or_create(directory)
    authority = founder.membership.authority
    assert authority is not None
    signed = authority.sign(make_csr(identity), Role.MEMBER, time.time())
    grant = Grant(founder.membership.ca_certificate, certificate_der(signed), Role.MEMBER)
    return Member(identity, MeshStore(directory / "mesh", identity).install(grant))


class Arrival(FrameChannel):
    """The far side of one connection; `served` is set when nothing of it is left."""

    def __init__(self, speak: Speak) -> None:
        super().__init__(CONTROL_LIMIT)
        self.served = asyncio.Event()
        self._speak = speak

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        task = asyncio.create_task(self._serve())
        task.add_done_callback(lambda _: self.served.set())

    async def _serve(self) -> None:
        with suppress(MeshdError):
            await self._speak(self)
        self.close()
        await self.closed.wait()


@asynccontextmanager
async def listening(
    context: ssl.SSLContext | None, speak: Speak, *, refuses: bool = False
) -> AsyncIterator[str]:
    """HOST:PORT of a server that lets `speak` have each connection. Whoever dials closes first.
    `refuses`: it will not have the dialler's certificate, so that nothing arrives."""
    arrivals: list[Arrival] = []

    def arrive() -> Arrival:
        arrivals.append(Arrival(speak))
        return arrivals[-1]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(arrive, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        async with asyncio.timeout(10):
            for arrival in () if refuses else arrivals:
                await arrival.served.wait()
        server.close()


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """HOST:PORT of a server without TLS that answers whatever comes with `answer`."""
    connections: list[asyncio.Transport] = []

    class Raw(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connections.append(cast("asyncio.Transport", transport))

        def data_received(self, data: bytes) -> None:
            connections[-1].write(answer)

    server = await asyncio.get_running_loop().create_server(Raw, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in connections:
            connection.abort()


def member_of_mesh(member: Member) -> ssl.SSLContext:
    return server_context(member.membership, member.identity)


def well(hello: Callable[[], Hello]) -> Speak:
    """A far side as the links of a member serve it."""

    async def nothing_against(_: Hello) -> None:
        return None

    async def speak(channel: FrameChannel) -> None:
        said = await welcome(channel, hello(), nothing_against)
        assert said.purpose == "doctor"
        await attend_doctor(channel)

    return speak


async def silent(channel: FrameChannel) -> None:
    await channel.closed.wait()


async def hang_up(channel: FrameChannel) -> None:
    channel.close()


def stopped_at(findings: list[Finding], step: str) -> Finding:
    """The finding of `step`: everything before it went well, everything after it was left out."""
    assert [f.step for f in findings] == STEPS
    at = STEPS.index(step)
    assert all(f.state is not Verdict.FAILED for f in findings[:at]), findings
    assert all(f.state is Verdict.SKIPPED for f in findings[at + 1 :])
    assert all(f"since {step} failed" in f.evidence for f in findings[at + 1 :])
    assert findings[at].state is Verdict.FAILED
    assert findings[at].remedy
    return findings[at]


# -- everything in order --------------------------------------------------------------------------


async def test_a_way_that_is_in_order(second: Member, patient: Patient) -> None:
    told: list[Finding] = []
    async with listening(member_of_mesh(second), well(second.hello)) as address:
        findings = await diagnose(address, patient, told.append)
    assert told == findings
    assert [f.step for f in findings] == STEPS
    assert [f.state for f in findings] == [Verdict.PASSED] * 8 + [Verdict.SKIPPED]
    evidence = {f.step: f.evidence for f in findings}
    assert evidence["name"] == "127.0.0.1 is an address"
    assert evidence["tls"] == "TLS 1.3, meshd-ctl/1"
    assert second.identity.node_id[:8] in evidence["certificate"]
    assert "valid for 90 days" in evidence["certificate"]
    assert "both are in mesh home" in evidence["mesh"]
    assert "protocol 1; meshd 0.1.7 there" in evidence["version"]
    assert "median of 5" in evidence["round trip"]
    assert "--no-mdns" in evidence["multicast"]


async def test_a_node_can_look_at_itself(founder: Member, patient: Patient) -> None:
    async with listening(member_of_mesh(founder), well(founder.hello)) as address:
        findings = await diagnose(address, patient)
    assert all(f.state is not Verdict.FAILED for f in findings)


async def test_a_peer_that_announces_itself_is_heard(second: Member, patient: Patient) -> None:
    discovery = Discovery(True)
    task = asyncio.create_task(discovery.run())
    try:
        async with listening(member_of_mesh(second), well(second.hello)) as address:
            port = int(address.rpartition(":")[2])
            mine = second.membership
            discovery.set_identity(
                mine.mesh_id, "home", second.identity.node_id, "attic", port, (address,)
            )
            findings = await diagnose(address, replace(patient, mdns=True))
    finally:
        discovery.stopping.set()
        await task
    assert findings[-1].state is Verdict.PASSED, findings[-1]
    assert address in findings[-1].evidence


# -- name and TCP ---------------------------------------------------------------------------------


async def test_a_name_nobody_knows(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    finding = stopped_at(await diagnose("attic.example:9338", patient), "name")
    assert "attic.example cannot be resolved: Name or service not known" in finding.evidence


async def test_nobody_listens(patient: Patient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    finding = stopped_at(await diagnose(f"127.0.0.1:{port}", patient), "tcp")
    assert finding.evidence == "127.0.0.1: connection refused"
    assert "--peer-listen" in str(finding.remedy)


async def test_a_machine_that_is_silent(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "TCP_TIMEOUT_S", 0.2)
    # A full queue of connections: the kernel drops whoever comes next.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(address)
        finding = stopped_at(await diagnose(f"127.0.0.1:{address[1]}", patient), "tcp")
        for client in waiting:
            client.close()
    assert "did not answer within" in finding.evidence
    assert "firewall" in str(finding.remedy)


# -- TLS ------------------------------------------------------------------------------------------


async def test_a_service_without_tls(patient: Patient) -> None:
    async with answering(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n") as address:
        finding = stopped_at(await diagnose(address, patient), "tls")
    assert finding.evidence == "what answers does not speak TLS"
    assert "meshd's API" in str(finding.remedy)


async def test_old_tls(patient: Patient) -> None:
    alert = bytes.fromhex("15 0303 0002 02 46")  # fatal: protocol version
    async with answering(alert) as address:
        finding = stopped_at(await diagnose(address, patient), "tls")
    assert "does not speak TLS 1.3" in finding.evidence


async def test_another_tls_service(founder: Member, patient: Patient) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(founder.membership.certificate_path, founder.identity.key_path)
    async with listening(context, silent) as address:
        finding = stopped_at(await diagnose(address, patient), "tls")
    assert "does not speak meshd's protocols" in finding.evidence


async def test_a_handshake_that_is_not_answered(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "ANSWER_S", 0.2)
    async with answering(b"") as address:
        finding = stopped_at(await diagnose(address, patient), "tls")
    assert "no answer to the TLS handshake" in finding.evidence


async def test_a_handshake_that_breaks_off(patient: Patient) -> None:
    async with listening(None, hang_up) as address:
        finding = stopped_at(await diagnose(address, patient), "tls")
    assert "the TLS handshake broke off (connection" in finding.evidence


# -- certificate ----------------------------------------------------------------------------------


async def test_a_member_of_another_mesh(patient: Patient, tmp_path: Path) -> None:
    stranger = founded(tmp_path / "stranger")
    async with listening(member_of_mesh(stranger), silent, refuses=True) as address:
        finding = stopped_at(await diagnose(address, patient), "certificate")
    assert finding.evidence == "the certificate is not of this mesh"
    assert "meshd leave" in str(finding.remedy)


async def test_a_revoked_node(second: Member, patient: Patient) -> None:
    denied = frozenset({second.identity.node_id})
    async with listening(member_of_mesh(second), well(second.hello)) as address:
        findings = await diagnose(address, replace(patient, denied=denied))
    assert "was revoked" in stopped_at(findings, "certificate").evidence


async def test_a_certificate_that_ran_out(founder: Member, patient: Patient) -> None:
    authority = founder.membership.authority
    assert authority is not None
    old = authority.sign(make_csr(founder.identity), Role.MEMBER, time.time() - 200 * 86_400)
    founder.membership.certificate_path.write_bytes(old)
    async with listening(member_of_mesh(founder), silent, refuses=True) as address:
        finding = stopped_at(await diagnose(address, patient), "certificate")
    assert "is valid from" in finding.evidence
    assert "clocks" in str(finding.remedy)


# -- mesh -----------------------------------------------------------------------------------------


async def test_a_node_without_a_mesh_needs_an_invite(second: Member, patient: Patient) -> None:
    for outsider in (
        replace(patient, membership=None),
        replace(patient, membership=None, identity=None),
    ):
        async with listening(member_of_mesh(second), silent) as address:
            findings = await diagnose(address, outsider)
        assert "meshd invite" in str(stopped_at(findings, "mesh").remedy)
        states = {f.step: f.state for f in findings}
        assert states["tls"] is Verdict.PASSED
        assert states["certificate"] is Verdict.SKIPPED


async def test_a_refusal_is_told_in_the_far_sides_words(second: Member, patient: Patient) -> None:
    async def refuse(channel: FrameChannel) -> None:
        await channel.read()
        channel.send({"t": "refused", "reason": "denied", "message": "study was\nrevoked"})

    async with listening(member_of_mesh(second), refuse) as address:
        finding = stopped_at(await diagnose(address, patient), "mesh")
    assert finding.evidence == "study was revoked"
    assert "revoked for good" in str(finding.remedy)


async def test_a_far_side_that_hangs_up(second: Member, patient: Patient) -> None:
    async with listening(member_of_mesh(second), hang_up) as address:
        finding = stopped_at(await diagnose(address, patient), "mesh")
    assert "hung up without a word" in finding.evidence


async def test_our_certificate_is_refused_in_tls(
    second: Member, patient: Patient, tmp_path: Path
) -> None:
    """The far side trusts another mesh's key although its own certificate is of this mesh."""
    strict = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    strict.load_cert_chain(second.membership.certificate_path, second.identity.key_path)
    strict.set_alpn_protocols(["meshd-ctl/1"])
    strict.verify_mode = ssl.CERT_REQUIRED
    other = founded(tmp_path / "other").membership
    strict.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(other.ca_certificate))
    async with listening(strict, silent, refuses=True) as address:
        finding = stopped_at(await diagnose(address, patient), "mesh")
    assert "hung up" in finding.evidence


async def test_a_far_side_that_says_nothing(
    second: Member, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "ANSWER_S", 0.5)
    async with listening(member_of_mesh(second), silent) as address:
        finding = stopped_at(await diagnose(address, patient), "mesh")
    assert "did not answer our hello" in finding.evidence


@pytest.mark.parametrize("answer", [{"t": "hello"}, {"t": "pong", "n": 1}, {}])
async def test_a_far_side_that_talks_nonsense(
    second: Member, patient: Patient, answer: dict[str, Any]
) -> None:
    async def speak(channel: FrameChannel) -> None:
        await channel.read()
        channel.send(answer)
        await channel.closed.wait()

    async with listening(member_of_mesh(second), speak) as address:
        finding = stopped_at(await diagnose(address, patient), "mesh")
    assert "hello is malformed" in finding.evidence


async def test_a_hello_of_another_node(second: Member, founder: Member, patient: Patient) -> None:
    lie = second.hello(node=founder.identity.node_id)
    async with listening(member_of_mesh(second), well(lambda: lie)) as address:
        finding = stopped_at(await diagnose(address, patient), "mesh")
    assert "another node than its key" in finding.evidence


# -- version, clock, round trip, multicast --------------------------------------------------------


async def test_version_skew_seen_here(second: Member, patient: Patient) -> None:
    newer = second.hello(protocol=(2, 3))

    async def speak(channel: FrameChannel) -> None:
        await channel.read()
        channel.send(newer.to_wire())
        await channel.closed.wait()

    async with listening(member_of_mesh(second), speak) as address:
        finding = stopped_at(await diagnose(address, patient), "version")
    assert "upgrade meshd on study" in finding.evidence


async def test_version_skew_seen_there(second: Member, patient: Patient) -> None:
    older = second.hello(protocol=(0, 0))
    async with listening(member_of_mesh(second), well(lambda: older)) as address:
        finding = stopped_at(await diagnose(address, patient), "version")
    assert "upgrade meshd on attic" in finding.evidence


@pytest.mark.parametrize(("off_s", "word"), [(120.0, "ahead"), (-120.0, "behind")])
async def test_a_clock_that_is_off(
    second: Member, patient: Patient, off_s: float, word: str
) -> None:
    async with listening(
        member_of_mesh(second), well(lambda: second.hello(time=time.time() + off_s))
    ) as address:
        finding = stopped_at(await diagnose(address, patient), "clock")
    assert finding.evidence.startswith(("theirs is 120.", "theirs is 119.9"))
    assert finding.evidence.endswith(word)


async def test_pings_that_come_back_wrong_or_not_at_all(
    second: Member, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "ANSWER_S", 0.5)
    for answer, words in ((None, "not answered"), ({"t": "pong", "n": 99}, "something else")):

        async def speak(channel: FrameChannel, answer: Any = answer) -> None:
            await channel.read()
            channel.send(second.hello().to_wire())
            await channel.read()
            if answer is not None:
                channel.send(answer)
            await channel.closed.wait()

        async with listening(member_of_mesh(second), speak) as address:
            finding = stopped_at(await diagnose(address, patient), "round trip")
        assert words in finding.evidence


async def test_a_peer_that_is_not_heard(
    second: Member, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "MULTICAST_S", 0.2)
    async with listening(member_of_mesh(second), well(second.hello)) as address:
        finding = stopped_at(await diagnose(address, replace(patient, mdns=True)), "multicast")
    assert "attic was not heard" in finding.evidence
    assert "5353" in str(finding.remedy)


async def test_no_multicast_at_all(
    second: Member, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unusable(*_: object, **__: object) -> Any:
        raise OSError("No such device")

    monkeypatch.setattr(diagnosis, "find", unusable)
    async with listening(member_of_mesh(second), well(second.hello)) as address:
        finding = stopped_at(await diagnose(address, replace(patient, mdns=True)), "multicast")
    assert "No such device" in finding.evidence


async def test_multicast_is_not_expected_from_afar(
    second: Member, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "on_own_network", lambda _: False)
    async with listening(member_of_mesh(second), well(second.hello)) as address:
        findings = await diagnose(address, replace(patient, mdns=True))
    assert findings[-1].state is Verdict.SKIPPED
    assert "not on a network of this machine" in findings[-1].evidence


# -- whose eyes it looks with ---------------------------------------------------------------------


def test_the_patient_is_read_from_disk_and_nothing_is_written(tmp_path: Path) -> None:
    def read(directory: Path) -> Patient:
        return read_patient(load({"data_dir": str(directory)}, environ={"HOME": "/"}).config)

    none = tmp_path / "none"
    assert read(none).identity is None
    assert not none.exists()
    member = founded(tmp_path / "a")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    found = read(tmp_path / "a")
    assert found.identity is not None
    assert found.identity.node_id == member.identity.node_id
    assert found.membership is not None
    assert found.membership.mesh_id == member.membership.mesh_id
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before
    assert json.dumps([f.value for f in Verdict]) == '["passed", "failed", "skipped"]'
