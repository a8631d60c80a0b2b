"""How many hosts a model should have by its load, where the deployment leaves it to demand. Pure.

Rules, numbered as in the code:

1. More are wanted when the load is above `FULL_SHARE` of the slots there are, fewer when it would
   be below `SPARE_SHARE` of those that would remain. Between the two nothing changes.
2. More only after the need has held for `HOLD_UP_S`, and only as many as were needed all that time:
   a burst is over before a model is loaded.
3. Fewer only after `HOLD_DOWN_S`, and as many stay as were needed at any time of it: loading again
   costs minutes, an idle replica costs memory, which a swap may take.
4. Each change begins a new wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

FULL_SHARE: Final = 0.8
"""Above it a random arrival finds all slots taken often enough to notice the queue."""
SPARE_SHARE: Final = 0.5
"""Far enough below, so that what one replica less would bear does not call it back."""
HOLD_UP_S: Final = 30.0
"""Half the half-life of a rate: a burst of a few seconds does not reach it."""
HOLD_DOWN_S: Final = 300.0
"""Several times what loading a large model takes: what is given up is not to be missed before it
would be back."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Where the scaling of one model stands; `initial` for a model that is new."""

    replicas: int
    candidate: int | None = None
    """What it will be changed to when the need has held; None if nothing asks for a change."""
    since: float = 0.0
    """Since when it is needed."""


def initial(replicas: int = 1) -> Scale:
    """`replicas`: hosts there are already, so that a node that starts does not begin from one."""
    return Scale(max(1, replicas))


def scaled(scale: Scale, load: float, slots: int, now: float, *, most: int) -> Scale:
    """The scale after looking at the load once more.

    `load`: slots kept busy in the whole mesh. `slots`: of one host; with none known yet nothing
    changes. `most`: nodes that could host it. To be called every few seconds, and whenever the load
    may have changed: a need counts as held from one call to the next.
    """
    if slots <= 0:
        return replace(scale, candidate=None)
    most = max(1, most)
    needed = min(most, _hosts(load, FULL_SHARE * slots))
    enough = min(most, _hosts(load, SPARE_SHARE * slots))
    if scale.replicas > most:  # there is nobody to wait for
        return Scale(most)
    if needed > scale.replicas:  # 1, 2
        return _held(scale, needed, now, HOLD_UP_S, up=True)
    if enough < scale.replicas:  # 1, 3
        return _held(scale, enough, now, HOLD_DOWN_S, up=False)
    return replace(scale, candidate=None)


def due(scale: Scale) -> float | None:
    """When a change takes place if the need goes on; None if none is ahead."""
    if scale.candidate is None:
        return None
    return scale.since + (HOLD_UP_S if scale.candidate > scale.replicas else HOLD_DOWN_S)


def _held(scale: Scale, needed: int, now: float, hold_s: float, *, up: bool) -> Scale:
    candidate = scale.candidate
    if candidate is None or (candidate > scale.replicas) is not up:
        return replace(scale, candidate=needed, since=now)
    candidate = min(candidate, needed) if up else max(candidate, needed)
    if now - scale.since >= hold_s:
        return Scale(candidate)  # 4
    return replace(scale, candidate=candidate)


def _hosts(load: float, slots: float) -> int:
    """At least one; a rounding error is not worth a host."""
    return max(1, math.ceil(load / slots - 1e-9))
