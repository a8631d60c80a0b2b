"""`meshd doctor --peer`: the way to another node, hop by hop, with this node's own credentials.

    name → tcp → tls → certificate → mesh → version → clock → round trip → multicast

It runs in the command's own process and makes one connection, whose hello says `doctor`: the far
side answers it and never takes it for this node's link, so a running daemon is not disturbed. After
the first step that failed there is nothing left to look at; the rest is skipped.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import socket
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from meshd import __version__
from meshd.config import split_address
from meshd.errors import MeshdError, PeerRefused, PeerUnreachable, ProtocolError
from meshd.ids import BootId
from meshd.kernel.findings import Fault, Finding, NotApplicable, Verdict
from meshd.peers.lan.addresses import on_own_network
from meshd.peers.lan.lan import find
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.frames import CONTROL_LIMIT
from meshd.peers.links.hello import Hello, judge, make_hello, parse_hello, refusal
from meshd.peers.protocol import ALPN_CTL, PROTOCOL, common_version
from meshd.peers.remedies import ASK_MEMBER, NO_MULTICAST, REMEDIES, tls_fault
from meshd.peers.trust.certificates import PeerCertificate
from meshd.peers.trust.identity import Identity
from meshd.peers.trust.membership import Membership, authenticate
from meshd.peers.trust.tls import client_context, joining_context

STEP_TIMEOUT_S: Final = 30.0
ANSWER_S: Final = 5.0
TCP_TIMEOUT_S: Final = 3.0
"""For each address of the name."""
MAX_TRIED: Final = 4
MULTICAST_S: Final = 3.0
PINGS: Final = 5
MAX_SKEW_S: Final = 60.0
"""Certificates begin a day early and last for months; a clock that is off by more than a minute is
one that nobody sets."""


@dataclass(frozen=True, slots=True)
class Patient:
    """The node on whose behalf the way is looked at."""

    name: str
    identity: Identity | None
    """None if it was never started."""
    membership: Membership | None
    denied: Container[str] = frozenset()
    mdns: bool = True


async def diagnose(
    address: str, patient: Patient, tell: Callable[[Finding], None] = lambda _: None
) -> list[Finding]:
    """Every step towards HOST:PORT, in order; `tell` gets each as it is known. Each step takes
    at most `STEP_TIMEOUT_S`. What goes wrong is a finding; nothing is raised for it."""
    examination = _Examination(address, patient)
    findings: list[Finding] = []
    failed: str | None = None
    try:
        for step, look in examination.steps():
            if failed is None:
                finding = await _outcome(step, look)
            else:
                finding = Finding(step, Verdict.SKIPPED, f"not looked at, since {failed} failed")
            if finding.state is Verdict.FAILED:
                failed = step
            findings.append(finding)
            tell(finding)
    finally:
        await examination.close()
    return findings


async def _outcome(step: str, look: Callable[[], Awaitable[str]]) -> Finding:
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            return Finding(step, Verdict.PASSED, await look())
    except NotApplicable as reason:
        return Finding(step, Verdict.SKIPPED, str(reason))
    except Fault as fault:
        return Finding(step, Verdict.FAILED, fault.evidence, fault.remedy)
    except TimeoutError:
        return Finding(
            step,
            Verdict.FAILED,
            "it took too long",
            "look at the load of the machine there (`meshd status`, `top`) and try again",
        )


class _Examination:
    """What one step found out for the next. Each step returns its evidence, or raises Fault or
    NotApplicable."""

    def __init__(self, address: str, patient: Patient) -> None:
        self._address = address
        self._host, self._port = split_address(address)
        self._patient = patient
        self._ips: list[tuple[int, str]] = []
        self._ip = ""
        self._socket: socket.socket | None = None
        self._channel: FrameChannel | None = None
        self._certificate: PeerCertificate | None = None
        self._hello: Hello | None = None
        self._skew: str | None = None
        self._asked_at = self._answered_at = 0.0

    def steps(self) -> tuple[tuple[str, Callable[[], Awaitable[str]]], ...]:
        return (
            ("name", self._name),
            ("tcp", self._tcp),
            ("tls", self._tls),
            ("certificate", self._look_at_certificate),
            ("mesh", self._mesh),
            ("version", self._version),
            ("clock", self._clock),
            ("round trip", self._round_trip),
            ("multicast", self._multicast),
        )

    async def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            await self._channel.closed.wait()  # TLS gives it a second
        elif self._socket is not None:
            self._socket.close()

    # -- the steps, in order ----------------------------------------------------------------------

    async def _name(self) -> str:
        with suppress(ValueError):
            ip = ipaddress.ip_address(self._host)
            family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
            self._ips = [(family, self._host)]
            return f"{self._host} is an address"
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            words = error.strerror if isinstance(error, OSError) else "it is no name"
            raise Fault(
                f"{self._host} cannot be resolved: {words}",
                "use the IP address of that machine, or mend its entry in DNS or /etc/hosts",
            ) from None
        self._ips = [(int(family), str(at[0])) for family, _, _, _, at in found][:MAX_TRIED]
        return f"{self._host} is {', '.join(ip for _, ip in self._ips)}"

    async def _tcp(self) -> str:
        problems: list[str] = []
        for family, ip in self._ips:
            began = time.monotonic()
            try:
                await self._connect(family, ip)
            except TimeoutError:
                problems.append(f"{ip} did not answer within {TCP_TIMEOUT_S:.0f} s")
            except OSError as error:
                # The loop puts words of its own into `strerror`.
                problems.append(f"{ip}: {os.strerror(error.errno or 0).lower()}")
            else:
                return f"connected to {ip} in {(time.monotonic() - began) * 1000:.1f} ms"
        refused = all("refused" in problem for problem in problems)
        raise Fault(
            "; ".join(problems),
            f"nobody listens on port {self._port} there: start meshd, or look at --peer-listen"
            if refused
            else f"see that the machine is on and that no firewall stops TCP port {self._port}",
        )

    async def _tls(self) -> str:
        context = self._context()
        loop = asyncio.get_running_loop()
        try:
            _, self._channel = await loop.create_connection(
                lambda: FrameChannel(CONTROL_LIMIT),
                sock=self._socket,
                ssl=context,
                server_hostname="",
                ssl_handshake_timeout=ANSWER_S,
                ssl_shutdown_timeout=1.0,
            )
        except OSError as error:  # ssl.SSLError is one
            raise tls_fault(error, self._port, ANSWER_S) from None
        tls = self._channel.alpn
        if tls is None:
            raise Fault(
                "a TLS server answers that does not speak meshd's protocols",
                f"another service listens on port {self._port}; use meshd's peer port (9338, or "
                "--peer-listen)",
            )
        return f"TLS 1.3, {tls}"

    async def _look_at_certificate(self) -> str:
        membership = self._patient.membership
        channel = self._open_channel()
        if membership is None:
            raise NotApplicable("this node is in no mesh whose key it could be checked with")
        try:
            self._certificate = authenticate(channel.certificate, membership, self._patient.denied)
        except PeerRefused as error:
            raise Fault(error.message, REMEDIES.get(error.reason, ASK_MEMBER)) from None
        days = (self._certificate.not_after - time.time()) / 86_400
        return (
            f"node {self._certificate.node_id[:8]}, {self._certificate.role}, signed by mesh "
            f"{membership.mesh_name}, valid for {days:.0f} days"
        )

    async def _mesh(self) -> str:
        channel, patient = self._open_channel(), self._patient
        if patient.membership is None or patient.identity is None:
            raise Fault(
                "this node belongs to no mesh, so the other side talks of nothing but joining",
                "run `meshd invite` on a member, and `meshd run --join TOKEN` here",
            )
        ours = make_hello(
            purpose="doctor",
            node=patient.identity.node_id,
            name=patient.name,
            mesh=patient.membership.mesh_id,
            boot=BootId(secrets.token_hex(8)),
            role=patient.membership.role,
            version=__version__,
            time=time.time(),
        )
        try:
            objection = await self._greet(channel, ours)
        except PeerRefused as error:
            objection = error
        except PeerUnreachable as error:
            raise Fault(
                f"it hung up without a word ({error.message})",
                "it may hold this node's certificate for revoked or expired: see `meshd status` "
                "here and `meshd logs` there",
            ) from None
        except ProtocolError as error:
            raise Fault(error.message, "see that both machines run the same meshd") from None
        if objection is not None and objection.reason == "version_skew":
            self._skew = objection.message
        elif objection is not None:
            raise Fault(objection.message, REMEDIES.get(objection.reason, ASK_MEMBER))
        return f"both are in mesh {patient.membership.mesh_name} ({patient.membership.mesh_id[:8]})"

    async def _version(self) -> str:
        if self._skew is not None:
            raise Fault(self._skew, "upgrade meshd on the older of the two")
        theirs = self._their_hello()
        common = common_version(PROTOCOL, theirs.protocol)
        return f"protocol {common}; meshd {theirs.version} there, {__version__} here"

    async def _clock(self) -> str:
        """Their time was read between our question and their answer; half of that is the middle."""
        skew = self._their_hello().time - (self._asked_at + self._answered_at) / 2
        words = f"theirs is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        if abs(skew) > MAX_SKEW_S:
            raise Fault(words, "set both clocks (`timedatectl set-ntp true`): certificates need it")
        return words

    async def _round_trip(self) -> str:
        channel = self._open_channel()
        trips = []
        try:
            for number in range(PINGS):
                began = time.monotonic()
                channel.send({"t": "ping", "n": number})
                async with asyncio.timeout(ANSWER_S):
                    answer = await channel.read()
                if answer.get("t") != "pong" or answer.get("n") != number:
                    raise ProtocolError("the answer to a ping was something else")
                trips.append(time.monotonic() - began)
        except TimeoutError:
            raise Fault(
                f"a ping was not answered within {ANSWER_S:.0f} s",
                "look at the load of the machine there, and for packet loss (`ping -f`, `mtr`)",
            ) from None
        except MeshdError as error:
            raise Fault(error.message, "see `meshd logs` there") from None
        return f"{statistics.median(trips) * 1000:.2f} ms (median of {PINGS})"

    async def _multicast(self) -> str:
        if not self._patient.mdns:
            raise NotApplicable("turned off (--no-mdns)")
        if not on_own_network(self._ip):
            raise NotApplicable(f"{self._ip} is not on a network of this machine")
        theirs = self._their_hello()
        try:
            found = await find(lambda f: f.node_id == theirs.node, MULTICAST_S, enough=1)
        except OSError as error:
            raise Fault(f"multicast cannot be used here: {error}", NO_MULTICAST) from None
        if not found:
            raise Fault(f"{theirs.name} was not heard within {MULTICAST_S:.0f} s", NO_MULTICAST)
        return f"{found[0].name} says it is at {', '.join(found[0].addresses) or 'no address'}"

    # -- parts of them ----------------------------------------------------------------------------

    async def _connect(self, family: int, ip: str) -> None:
        attempt = socket.socket(family, socket.SOCK_STREAM)
        attempt.setblocking(False)
        try:
            async with asyncio.timeout(TCP_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(attempt, (ip, self._port))
        except BaseException:
            attempt.close()
            raise
        self._socket, self._ip = attempt, ip

    def _context(self) -> ssl.SSLContext:
        """With our certificate if there is one. Theirs is judged in the next step, in words."""
        identity, membership = self._patient.identity, self._patient.membership
        if identity is None or membership is None:
            return joining_context()
        context = client_context(membership, identity, ALPN_CTL)
        context.verify_mode = ssl.CERT_NONE
        return context

    async def _greet(self, channel: FrameChannel, ours: Hello) -> PeerRefused | None:
        self._asked_at = time.time()
        channel.send(ours.to_wire())
        try:
            async with asyncio.timeout(ANSWER_S):
                theirs = parse_hello(await channel.read())
        except TimeoutError:
            raise ProtocolError(f"it did not answer our hello within {ANSWER_S:.0f} s") from None
        self._answered_at = time.time()
        self._hello = theirs
        objection = judge(ours, theirs)
        shown = self._certificate
        if objection is None and shown is not None and theirs.node != shown.node_id:
            objection = PeerRefused("its hello names another node than its key", reason="id")
        if objection is not None:
            channel.send(refusal(objection))
        return objection

    def _open_channel(self) -> FrameChannel:
        assert self._channel is not None, "the step before opened it"
        return self._channel

    def _their_hello(self) -> Hello:
        assert self._hello is not None, "the step before heard it"
        return self._hello
