"""The member's side of joining: the one service a stranger can reach.

Bounded in every way: connections at once, time, frame size, log lines. A joiner is told why it is
refused; a stranger who does not speak the protocol is told nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from meshd import __version__
from meshd.errors import JoinRefused, MeshdError, PeerUnreachable, ProtocolError
from meshd.ids import NodeId
from meshd.peers.joining.admission import (
    MAX_MEMBERS,
    NONCE_BYTES,
    Admitted,
    Greeting,
    Request,
    proof,
)
from meshd.peers.joining.invite_book import InviteBook, refusal
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.frames import JOIN_LIMIT, frame
from meshd.peers.protocol import PROTOCOL
from meshd.peers.trust.certificates import read_csr
from meshd.peers.trust.denylist import MAX_MESSAGE_ENTRIES, DenyEntry, DenyList
from meshd.peers.trust.membership import Membership
from meshd.peers.trust.wire import KnownPeer, read
from meshd.view import Role

log = logging.getLogger(__name__)

DEADLINE_S: Final = 10.0
MAX_AT_ONCE: Final = 8
LOG_PAUSE_S: Final = 1.0
"""Least time between two log lines about refused joiners."""

Run = Callable[..., Awaitable[Any]]
"""Runs a blocking call elsewhere: `Pool.run`."""


class JoinDesk:
    """Serves joiners for one membership. `invites` is None on a node that is no issuer.

    `members`: whom a newcomer is told of. `admitted(node, name, role)` after each admission.
    """

    def __init__(
        self,
        membership: Callable[[], Membership],
        name: str,
        invites: InviteBook | None,
        denied: DenyList,
        *,
        members: Callable[[], tuple[KnownPeer, ...]],
        admitted: Callable[[NodeId, str, Role], None],
        run: Run,
    ) -> None:
        self._membership = membership
        self._name = name
        self._invites = invites
        self._denied = denied
        self._members = members
        self._admitted = admitted
        self._run = run
        self._serving = 0
        self._logged_at = float("-inf")

    async def serve(self, channel: FrameChannel) -> None:
        """One joiner, to the end. Never raises for what it sends; closes the channel."""
        if self._serving >= MAX_AT_ONCE:
            channel.send(_to_wire(refusal("busy", "many nodes join at once; try again")))
            channel.close()
            return
        self._serving += 1
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._admit(channel)
        except JoinRefused as error:
            self._say("%s may not join: %s", channel.origin, error.message)
            channel.send(_to_wire(error))
        except TimeoutError:
            self._say("%s began to join and said nothing more", channel.origin)
        except PeerUnreachable:
            pass  # it left
        except ProtocolError as error:
            self._say("%s is not a node that joins: %s", channel.origin, error.message)
        except MeshdError as error:
            log.warning("%s could not be admitted: %s", channel.origin, error.message)
            channel.send(_to_wire(refusal("failed", "the member failed to admit; see its log")))
        finally:
            self._serving -= 1
            channel.close()

    async def _admit(self, channel: FrameChannel) -> None:
        mine, nonce = self._membership(), secrets.token_bytes(NONCE_BYTES)
        greeting = Greeting(
            mesh=mine.mesh_id,
            mesh_name=mine.mesh_name,
            name=self._name,
            ca=mine.ca_certificate,
            nonce=nonce,
            protocol=PROTOCOL,
            version=__version__,
        )
        channel.send(greeting.model_dump(mode="json"))
        asked = read(Request, await channel.read(), "joining")
        if self._invites is None or mine.authority is None:
            raise refusal(
                "not_issuer",
                f"{self._name} does not hold the mesh's key and admits nobody; make the invite "
                "on a node that does (`meshd invite` says so if it does not)",
            )
        self._check(mine, asked, nonce)
        node = NodeId(asked.node)
        granted = await self._run(self._invites.redeem, asked.invite, node)
        certificate = mine.authority.sign(asked.csr.encode(), granted.role, time.time())
        key = mine.authority.key_pem().decode() if granted.issuer else None
        answer = Admitted(certificate=certificate.decode(), role=granted.role, ca_key=key)
        channel.send(_completed(answer, self._denied.entries, self._members()))
        self._admitted(node, asked.name, granted.role)

    def _check(self, mine: Membership, asked: Request, nonce: bytes) -> None:
        """1. The invite is known and its secret is proved, before more is said about it. 2. The
        request is the node's own. 3. The node is not on the deny list."""
        assert self._invites is not None
        expected = proof(
            self._invites.key(asked.invite),
            member_nonce=nonce,
            joiner_nonce=asked.nonce,
            member_certificate=mine.certificate,
            node=asked.node,
            csr=asked.csr,
        )
        if not hmac.compare_digest(expected, asked.proof):  # 1
            raise refusal(
                "bad_proof",
                "the secret of the invite was not proved; copy the whole token again, or make a "
                "new one with `meshd invite`",
            )
        node, _ = read_csr(asked.csr.encode())  # 2
        if node != asked.node:
            raise ProtocolError("the certificate request is another node's")
        if asked.node in self._denied:  # 3
            raise refusal(
                "denied",
                "this node was revoked for good; a new --data-dir (and with it a new identity) and "
                "a new invite admit its machine again",
            )

    def _say(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now - self._logged_at >= LOG_PAUSE_S:
            self._logged_at = now
            log.info(message, *arguments)


def _completed(
    answer: Admitted, denied: tuple[DenyEntry, ...], members: tuple[KnownPeer, ...]
) -> dict[str, Any]:
    """`answer` with as much of both lists as one frame holds; a link brings the rest."""
    most = MAX_MESSAGE_ENTRIES // 4
    while True:
        lists = {"denied": denied[:most], "members": members[: min(most, MAX_MEMBERS)]}
        wire = answer.model_copy(update=lists).model_dump(mode="json")
        if most == 0 or len(frame(wire)) <= JOIN_LIMIT:
            return wire
        most //= 2


def _to_wire(error: JoinRefused) -> dict[str, Any]:
    reason = (error.detail or {}).get("reason", "refused")
    return {"t": "refused", "reason": reason, "message": error.message}
