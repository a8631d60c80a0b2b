"""Dials of members: TCP, TLS with both certificates checked, the right node at the far end."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from meshd.config import split_address
from meshd.errors import PeerRefused, PeerUnreachable
from meshd.ids import NodeId
from meshd.peers.links.channel import FrameChannel
from meshd.peers.trust.certificates import PeerCertificate


class ConnectionRefused(PeerUnreachable):
    """The machine answered that nobody listens there."""


class Connector:
    """`context(alpn)`: TLS with this node's certificate; `authenticate(der)`: who a certificate is,
    or PeerRefused. Both are asked at every dial, so that renewals and denials count at once."""

    def __init__(
        self,
        context: Callable[[str], ssl.SSLContext],
        authenticate: Callable[[bytes | None], PeerCertificate],
    ) -> None:
        self._context = context
        self._authenticate = authenticate

    async def connect(
        self, address: str, alpn: str, limit: int, expected: NodeId | None = None
    ) -> tuple[FrameChannel, PeerCertificate]:
        """An authenticated connection. The caller bounds the time and closes the channel.

        Raises ConnectionRefused, PeerUnreachable, PeerRefused (another node than `expected`, one
        that is on the deny list, one of another mesh).
        """
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        try:
            _, channel = await loop.create_connection(
                lambda: FrameChannel(limit),
                host,
                port,
                ssl=self._context(alpn),
                server_hostname="",
                ssl_shutdown_timeout=1.0,
            )
        except ConnectionRefusedError:
            raise ConnectionRefused(f"nobody listens at {address}") from None
        except ssl.SSLCertVerificationError as error:
            raise PeerRefused(
                f"the certificate at {address} is not of this mesh: {error.verify_message}",
                reason="wrong_mesh",
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a host that can be no name (`a..b`)
            why = getattr(error, "strerror", None) or error
            raise PeerUnreachable(f"{address}: {why}") from None
        try:
            certificate = self._authenticate(channel.certificate)
            if expected is not None and certificate.node_id != expected:
                raise PeerRefused(
                    f"at {address} answers {certificate.node_id[:8]}, not {expected[:8]}",
                    reason="other_node",
                )
        except BaseException:
            channel.abort()
            raise
        return channel, certificate
