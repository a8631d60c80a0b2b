"""The opening of a bulk stream to another node; for processes without a session. Blocks."""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any, Final, Protocol

from meshd.config import split_address
from meshd.errors import MeshdError, PeerRefused, PeerUnreachable, ProtocolError
from meshd.peers.bulk.stream import BulkStream, TlsFailed
from meshd.peers.bulk.words import ANSWER_LIMIT, der_from_wire
from meshd.peers.links.hello import parse_refusal
from meshd.peers.protocol import ALPN_BULK
from meshd.peers.trust.certificates import authenticate_leaf
from meshd.peers.trust.tls import carrier_context

CONNECT_S: Final = 3.0
"""For the TCP connection to one address."""
OPEN_S: Final = 15.0
"""From there to the answer; the other side may have to start its carrier first."""


class Credentials(Protocol):
    """This node's; see `words.Credentials`."""

    @property
    def ca_der(self) -> str: ...
    @property
    def certificate_path(self) -> str: ...
    @property
    def key_path(self) -> str: ...


class Peer(Protocol):
    """Whom to dial."""

    @property
    def node_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def addresses(self) -> tuple[str, ...]: ...


def open_stream(
    credentials: Credentials, peer: Peer, wanted: dict[str, Any]
) -> tuple[BulkStream, dict[str, Any]]:
    """A stream to `peer` and its answer to the `open` frame `wanted`.

    Its addresses are tried in order. Whether it may be dialled at all (the deny list) is for
    whoever names it to know. Raises PeerUnreachable, PeerRefused (the other side's words, or ours
    about its certificate), ProtocolError.
    """
    problem: MeshdError = PeerUnreachable(f"no address of node {peer.name} is known")
    for address in peer.addresses:
        try:
            stream = _secured(credentials, peer, address)
        except (PeerUnreachable, PeerRefused) as error:
            problem = error
            continue
        try:
            return stream, _answer(stream, peer, wanted)
        except BaseException:
            stream.close()
            raise
    raise problem


def _secured(credentials: Credentials, peer: Peer, address: str) -> BulkStream:
    """A connection that `peer` has proved to be at the other end of."""
    ca_certificate = der_from_wire(credentials.ca_der)
    try:
        context = carrier_context(
            ca_certificate, credentials.certificate_path, credentials.key_path, server=False
        )
        connection = socket.create_connection(split_address(address), timeout=CONNECT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, ValueError) as error:  # ValueError: a host that can be no name (`a..b`)
        why = getattr(error, "strerror", None) or error
        raise PeerUnreachable(f"node {peer.name} at {address}: {why}") from None
    stream = BulkStream(connection, context, server=False, limit=ANSWER_LIMIT, within_s=OPEN_S)
    try:
        stream.secure()
        if stream.alpn != ALPN_BULK:
            raise PeerRefused(f"node {peer.name} serves no bulk streams", reason="no_service")
        certificate = authenticate_leaf(stream.certificate, ca_certificate, (), time.time())
        if certificate.node_id != peer.node_id:
            raise PeerRefused(
                f"at {address} answers {certificate.node_id[:8]}, not {peer.node_id[:8]}",
                reason="other_node",
            )
    except ssl.SSLCertVerificationError as error:
        stream.close()
        raise PeerRefused(
            f"the certificate at {address} is not of this mesh: {error.verify_message}",
            reason="wrong_mesh",
        ) from None
    except BaseException:
        stream.close()
        raise
    return stream


def _answer(stream: BulkStream, peer: Peer, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        stream.send(wanted)
        answer = stream.receive()
    except TlsFailed as error:
        if not error.alert:
            raise
        # A TLS 1.3 client learns only here what the other side thinks of its certificate.
        raise PeerRefused(
            f"node {peer.name} does not accept this node's certificate ({error.message})",
            reason="wrong_mesh",
        ) from None
    if answer.get("t") == "refused":
        raise parse_refusal(answer)
    if answer.get("t") != "open":
        raise ProtocolError(f"node {peer.name} answered with neither `open` nor `refused`")
    stream.unhurried()
    return answer
