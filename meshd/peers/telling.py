"""Adverts on the wire: ours renewed when the view changes, others' asked for and checked.

An advert is pushed to every link when it changes and pulled (`want`) by nodes that hear of a newer
version through gossip. Free slots move faster than anything else and travel apart (`load`), to the
links alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, Final, Protocol

from pydantic import ValidationError

from meshd.errors import MeshdError, ProtocolError
from meshd.ids import InstanceId, NodeId
from meshd.kernel import Clock
from meshd.peers.adverts import Advert, AdvertBook, describe, slots_from_wire, told_of
from meshd.peers.links.codec import node_id_from_wire
from meshd.peers.links.links import ControlLink, LinkTable
from meshd.peers.trust.signing import SignedAdvert
from meshd.view import Role, View

log = logging.getLogger(__name__)

RENEW_PAUSE_S: Final = 0.3
"""Least time between two adverts of ours, unless requests must go elsewhere at once."""
MAX_WANTED: Final = 64
WANT_AGAIN_S: Final = 1.0


class Signer(Protocol):
    def seal(self, version: int, body: dict[str, Any]) -> dict[str, Any]: ...

    def open(self, envelope: Mapping[str, Any]) -> SignedAdvert:
        """Raises ProtocolError, PeerRefused."""


class Telling:
    """`newer(version)`: ours has changed and its statement must be signed anew. `changed(urgent)`:
    others' did."""

    def __init__(
        self,
        own: NodeId,
        name: str,
        role: Role,
        first_version: int,
        signer: Signer,
        links: LinkTable,
        *,
        clock: Clock,
        inflight: Callable[[InstanceId], int],
        newer: Callable[[int], None],
        changed: Callable[[bool], None],
    ) -> None:
        self.book = AdvertBook()
        self.version = first_version
        self._own = own
        self._name = name
        self._role = role
        self._signer = signer
        self._links = links
        self._clock = clock
        self._inflight = inflight
        self._newer = newer
        self._changed = changed
        self._body: dict[str, Any] | None = None
        self._told: tuple[object, ...] = ()
        """What of a view `_body` was made of."""
        self._envelope: dict[str, Any] = {}
        self._renewed_at = float("-inf")
        self._slots_free: dict[str, int] = {}
        self._wanted: dict[NodeId, tuple[int, float]] = {}

    # -- ours -------------------------------------------------------------------------------------

    def look(self, view: View) -> float | None:
        """Renew our advert if the view says something else by now.

        Returns the seconds after which to look again, if it is too early for what changed.
        """
        told = told_of(view)
        if len(told) == len(self._told) and all(map(is_, told, self._told)):
            return None  # the usual case: something of other nodes changed
        body = describe(view, self._name, self._role)
        if body == self._body:
            self._told = told
            return None
        now = self._clock.now()
        rest_s = self._renewed_at + RENEW_PAUSE_S - now
        if rest_s > 0 and not _urgent(self._body, body):
            return rest_s
        first = self._body is None
        self._body, self._told, self._renewed_at = body, told, now
        if first:
            self._tell()
        else:
            self.say_again()
        return None

    def say_again(self) -> None:
        """Sign what we say anew, under a new version, and tell it to every link."""
        if self._body is not None:
            self.version += 1
            self._tell()

    def _tell(self) -> None:
        assert self._body is not None
        self._envelope = self._signer.seal(self.version, self._body)
        for link in self._links:
            link.send({"t": "adverts", "list": [self._envelope]})
        self._newer(self.version)

    def tell_slots(self, view: View) -> None:
        """Called several times a second; sends only when a number changed."""
        free: dict[str, int] = {}
        for model in view.local.values():
            for target in model.targets:
                if target.local:
                    free[target.instance] = max(0, target.slots - self._inflight(target.instance))
        if free != self._slots_free:
            self._slots_free = free
            for link in self._links:
                link.send({"t": "load", "s": self._slots_free}, droppable=True)

    def greet(self, link: ControlLink) -> None:
        """What a new link is told at once."""
        if self._envelope:
            link.send({"t": "adverts", "list": [self._envelope]})
        if self._slots_free:
            link.send({"t": "load", "s": self._slots_free}, droppable=True)

    # -- others' ----------------------------------------------------------------------------------

    def want(self, node: NodeId, version: int, source: NodeId) -> None:
        """Gossip knows of a newer advert; `source` should have it."""
        if version <= self.book.version(node) or node == self._own:
            return
        link = self._links.get(node) or self._links.get(source)
        if link is not None:
            link.send({"t": "want", "nodes": [node]}, droppable=True)
        self._wanted[node] = (version, self._clock.now() + WANT_AGAIN_S)

    def want_again(self, choose: Callable[[list[ControlLink]], ControlLink]) -> None:
        """Ask somebody else for what was asked for and did not come."""
        now = self._clock.now()
        links = list(self._links)
        for node, (version, again_at) in tuple(self._wanted.items()):
            if version <= self.book.version(node):
                del self._wanted[node]
            elif now >= again_at and links:
                self._wanted[node] = (version, now + WANT_AGAIN_S)
                choose(links).send({"t": "want", "nodes": [node]}, droppable=True)

    def forget(self, node: NodeId) -> None:
        self.book.forget(node)
        self._wanted.pop(node, None)

    def frame_came(self, link: ControlLink, frame: dict[str, Any]) -> bool:
        """Whether the frame was one of ours. Raises ProtocolError."""
        match frame.get("t"):
            case "adverts":
                self._adverts_came(frame.get("list"))
            case "want":
                self._was_asked(link, frame.get("nodes"))
            case "load":
                if self.book.put_slots(link.remote.node, slots_from_wire(frame.get("s"))):
                    self._changed(False)
            case _:
                return False
        return True

    def _adverts_came(self, envelopes: Any) -> None:
        if type(envelopes) is not list or len(envelopes) > MAX_WANTED:
            raise ProtocolError(f"adverts come in lists of at most {MAX_WANTED}")
        for envelope in envelopes:
            try:
                self._advert_came(envelope)
            except ProtocolError:
                raise
            except MeshdError as error:
                # Passed on in good faith, perhaps: the node was denied meanwhile.
                log.debug("an advert was not taken: %s", error.message)

    def _advert_came(self, envelope: Any) -> None:
        if type(envelope) is not dict:
            raise ProtocolError("an advert is an object")
        signed = self._signer.open(envelope)
        if signed.node_id == self._own or signed.version <= self.book.version(signed.node_id):
            return
        try:
            advert = Advert.model_validate(signed.body)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            raise ProtocolError(f"an advert is malformed: {problem['msg']}") from None
        if signed.role is Role.CLIENT:
            advert = Advert(
                name=advert.name,
                version=advert.version,
                role=Role.CLIENT,
                draining=advert.draining,
                demand=advert.demand,
            )
        if self.book.put(signed.node_id, signed.version, advert, envelope):
            self._wanted.pop(signed.node_id, None)
            self._changed(True)

    def _was_asked(self, link: ControlLink, nodes: Any) -> None:
        if type(nodes) is not list or len(nodes) > MAX_WANTED:
            raise ProtocolError(f"adverts are asked for at most {MAX_WANTED} at once")
        for value in nodes:
            node = node_id_from_wire(value)
            envelope = self._envelope if node == self._own else self.book.envelope(node)
            if envelope:
                link.send({"t": "adverts", "list": [envelope]})


def _urgent(old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    """Whether other nodes must change where they send requests, what they count on, or what they
    host."""
    if old is None or old["draining"] != new["draining"]:
        return True
    if old.get("backend", "cpu") != new.get("backend", "cpu"):
        return True
    return _served(old) != _served(new) or _claimed(old) != _claimed(new)


def _served(body: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(m["id"], m["instance"]) for m in body.get("models", ())]


def _claimed(body: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(c["model"], c["epoch"], c["state"]) for c in body.get("claims", ())]
