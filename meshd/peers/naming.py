"""Which node a person means. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from meshd.errors import NotFound
from meshd.ids import NodeId
from meshd.peers.trust.identity import public_key_of
from meshd.view import PeerView


def resolve_node(text: str, peers: Iterable[PeerView]) -> NodeId:
    """The id of the node called `text`.

    1. A name: names are unique in a mesh.
    2. A whole id, known or not: a node that was lost long ago can still be revoked.
    3. The beginning of an id that only one node has.

    Raises NotFound, naming what there is.
    """
    known = sorted(peers, key=lambda p: (p.name, p.id))
    for peer in known:
        if peer.name == text:  # 1
            return peer.id
    lower = text.lower()
    if _is_id(lower):  # 2
        return NodeId(lower)
    matching = [p for p in known if lower and p.id.startswith(lower)]  # 3
    if len(matching) == 1:
        return matching[0].id
    if matching:
        which = ", ".join(f"{p.name} ({p.id[:12]})" for p in matching[:8])
        raise NotFound(f"{text!r} is the beginning of several ids: {which}; give more of it")
    names = ", ".join(p.name for p in known[:16]) or "none"
    raise NotFound(f"no node is called {text!r}; nodes known here: {names} (see `meshd peers`)")


def _is_id(text: str) -> bool:
    try:
        public_key_of(text)
    except ValueError:
        return False
    return True
