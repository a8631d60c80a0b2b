"""One suspicion: since when, by whom, and when it ends (Lifeguard, section IV B).

Two kinds. *Own*: we probed the node and nobody got an answer; its end is a verdict of death.
*Heard*: somebody else said so; its end only means that we should look for ourselves.
"""

from __future__ import annotations

import math

from meshd.ids import NodeId
from meshd.peers.swim.timing import Timing


class Suspicion:
    """Public attributes are for reading."""

    __slots__ = (
        "_began_at",
        "_confirmed",
        "_life_at",
        "_timing",
        "confirmers",
        "link_lost",
        "own",
        "refused_at",
    )

    def __init__(self, timing: Timing, now: float) -> None:
        self.own = False
        self.link_lost = False
        self.refused_at: float | None = None
        """When the first dial since was refused."""
        self.confirmers: set[NodeId] = set()
        """Who else suspects on its own account; at most `confirmations`."""
        self._timing = timing
        self._began_at = now
        self._life_at: float | None = None
        self._confirmed = False

    def adopt(self, now: float) -> None:
        """It is our own from now on."""
        if not self.own:
            self.own = True
            self._began_at = now

    def try_confirm(self, by: NodeId) -> bool:
        """Count `by`, once; False if that changes nothing."""
        if by in self.confirmers or len(self.confirmers) >= self._timing.confirmations:
            return False
        self.confirmers.add(by)
        return True

    def confirm_fully(self) -> None:
        """Somebody has seen a suspicion through to its end."""
        self._confirmed = True

    def live(self, now: float) -> None:
        """The node gave a sign of life."""
        self._life_at = now
        self.link_lost = False
        self.refused_at = None

    def refuse(self, now: float) -> bool:
        """A dial was refused; whether that settles it: it was declared dead, or this is the second
        dial after a broken link."""
        if self.refused_at is None:
            self.refused_at = now
            return self._confirmed
        # Dials to several addresses of one node are one refusal.
        settled = now - self.refused_at >= 0.4 * self._timing.refused_confirm_s
        return self.link_lost and settled

    def wait_again(self, now: float) -> None:
        """A heard one: trust those who suspect for another while."""
        self._began_at = now

    def postpone(self, by_s: float) -> None:
        self._began_at += by_s
        if self._life_at is not None:
            self._life_at += by_s
        if self.refused_at is not None:
            self.refused_at += by_s

    def ends_at(self) -> float:
        """Logarithmic in the confirmations: the first ones tell most."""
        timing = self._timing
        if not self.own:
            return self._began_at + timing.heard_suspicion_s
        span = timing.suspicion_s - timing.suspicion_least_s
        share = math.log(len(self.confirmers) + 1) / math.log(timing.confirmations + 1)
        share = 1.0 if self._confirmed else share
        end = self._began_at + timing.suspicion_s - span * share
        if self.link_lost and self.refused_at is not None:
            end = min(end, self.refused_at + timing.refused_confirm_s)
        if self._life_at is not None:
            end = max(end, self._life_at + timing.suspicion_least_s)
        return end
