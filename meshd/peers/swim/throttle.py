"""At most one answer per peer and time."""

from __future__ import annotations

from meshd.ids import NodeId


class Throttle:
    """Bounded by `most` peers. Full-policy: refuse; the attack is many peers that each ask for the
    one costly answer they are entitled to."""

    def __init__(self, gap_s: float, most: int) -> None:
        self._gap_s = gap_s
        self._most = most
        self._last: dict[NodeId, float] = {}

    def try_pass(self, peer: NodeId, now: float) -> bool:
        last = self._last.get(peer)
        if last is not None and now - last < self._gap_s:
            return False
        if len(self._last) >= self._most:
            self._last = {p: at for p, at in self._last.items() if now - at < self._gap_s}
            if len(self._last) >= self._most:
                return False
        self._last[peer] = now
        return True
