"""When a node that has just started knows enough of the others to decide anything. Pure.

1. A node whose mesh is known to have no other member knows enough at once.
2. Who decided before the others have said what they host would host everything itself: it waits
   `SETTLE_S` for the first advert, and `ADVERTS_S` from then on, since adverts come together.
"""

from __future__ import annotations

from typing import Final

from meshd.view import MeshState, PeerState, View

SETTLE_S: Final = 3.0
"""How long a node that knows of others waits for their adverts before it decides alone."""
ADVERTS_S: Final = 0.3
"""From the first advert to a decision."""


class Settling:
    """`started_at`: monotonic seconds."""

    def __init__(self, started_at: float) -> None:
        self.over = False
        """Once it is, it stays so."""
        self._until = started_at + SETTLE_S
        self._heard = False

    def left_s(self, view: View, now: float, *, expects_others: bool) -> float:
        """How long to wait yet; 0.0 when it is over."""
        if view.mesh.state is MeshState.MEMBER and not expects_others:  # 1
            self.over = True
        if not self._heard and _any_advert(view):
            self._heard = True
            self._until = now + ADVERTS_S  # 2
        self.over = self.over or self._until <= now
        return 0.0 if self.over else self._until - now


def _any_advert(view: View) -> bool:
    """An advert says which version its node runs."""
    return any(peer.version and peer.state is PeerState.ALIVE for peer in view.peers)
