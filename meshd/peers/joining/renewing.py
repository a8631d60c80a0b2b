"""Certificates renewed before they run out: asked for on a link, given by whoever holds the key.

A node asks one of its links every quarter of an hour from the day a third of the certificate's life
is left; an issuer signs its own. The answer keeps the role of the certificate the asker showed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from meshd.errors import MeshdError, ProtocolError
from meshd.ids import NodeId
from meshd.kernel import Clock
from meshd.peers.links.links import ControlLink
from meshd.peers.swim.throttle import Throttle
from meshd.peers.trust.certificates import make_csr, read_csr
from meshd.peers.trust.trust import Trust

log = logging.getLogger(__name__)

ASK_AGAIN_S: Final = 900.0
SIGN_AGAIN_S: Final = 60.0
"""Between two certificates for one node; who asks more often is not answered."""
MAX_ASKERS: Final = 4096
MAX_PEM: Final = 8 * 1024


class Renewing:
    """`choose`: one of the links; chance decides, so that one that cannot is not asked for ever."""

    def __init__(
        self, trust: Trust, clock: Clock, choose: Callable[[list[ControlLink]], ControlLink]
    ) -> None:
        self._trust = trust
        self._clock = clock
        self._choose = choose
        self._next_at = float("-inf")
        self._signed = Throttle(SIGN_AGAIN_S, MAX_ASKERS)

    async def look(self, links: list[ControlLink]) -> None:
        """Called now and then. What goes wrong is tried again: there is a month for it."""
        trust, now = self._trust, self._clock.now()
        if not trust.due_for_renewal() or now < self._next_at:
            return
        if trust.membership.authority is not None:
            self._next_at = now + ASK_AGAIN_S
            try:
                await trust.renew_by_own_key()
            except MeshdError as error:
                log.warning("the certificate of this node could not be renewed: %s", error.message)
        elif links:
            self._next_at = now + ASK_AGAIN_S
            self._choose(links).send({"t": "renew", "csr": make_csr(trust.identity).decode()})

    async def frame_came(self, link: ControlLink, frame: dict[str, Any]) -> None:
        """A `renew` or `renewed` frame. Who asks for what is not its own loses the link; an answer
        may be one to a question of yesterday and is only not taken."""
        if link.transport is None or link.transport.is_closing():
            return  # lost for an earlier frame, perhaps one of many
        asked = frame["t"] == "renew"
        try:
            if asked:
                self._sign(link, _pem(frame.get("csr")))
            else:
                await self._take(link, frame)
        except MeshdError as error:
            log.log(
                logging.WARNING if asked else logging.DEBUG,
                "renewal with %s: %s", link.remote.name, error.message,
            )  # fmt: skip
            if asked:
                link.drop()

    def _sign(self, link: ControlLink, csr: bytes) -> None:
        authority = self._trust.membership.authority
        if authority is None:
            link.send({"t": "renewed", "why": "this node does not hold the mesh's key"})
            return
        node, _ = read_csr(csr)
        asker = link.remote
        if node != asker.node or NodeId(node) in self._trust.denied:
            raise ProtocolError("a node can only renew its own certificate")
        if not self._signed.try_pass(asker.node, self._clock.now()):
            return
        certificate = authority.sign(csr, asker.role, time.time())
        log.info("renewed the certificate of %s", asker.name)
        link.send({"t": "renewed", "certificate": certificate.decode()})

    async def _take(self, link: ControlLink, frame: dict[str, Any]) -> None:
        if self._next_at == float("-inf"):
            raise ProtocolError("it sent a certificate nobody asked for")
        if "certificate" in frame:
            await self._trust.use(_pem(frame["certificate"]))
            self._next_at = float("-inf")
        else:
            log.debug("%s cannot renew certificates", link.remote.name)


def _pem(value: Any) -> bytes:
    if type(value) is str and len(value) <= MAX_PEM and value.isascii():
        return value.encode()
    raise ProtocolError("a certificate or request is PEM text")
