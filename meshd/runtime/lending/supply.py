"""Whether a worker fetches the shards of its layers from other nodes before its host connects, or
is sent its tensors by the host. Pure.

What is compared is how long all workers of the split wait, in these steps:

1. The host has one uplink, and sends each worker its tensors over it, one after the other: a push
   takes `pushed_bytes` at the rate of that uplink.
2. All workers are taken to fetch at the same time, from the same nodes: the holders and the host,
   whose uplink is free meanwhile. Each gets its share of those uplinks, and no more than comes in
   over its own line.
3. Rates are measured ones where there are any. Where there are none all lines are taken to be
   alike, and if only one of the two ways was measured the other follows from it by 1 and 2.
4. A fetch has to be `CLEARLY` faster, and to spare the host's uplink at least `WORTHWHILE_BYTES`,
   which pay for its start: a process, and reading the tensors from the disk afterwards.

The rule errs towards the push. Where other workers cannot fetch (no room) or need nothing (tensors
of an earlier load), this one's fetch saves less than was thought; it is bounded by `limit_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CLEARLY: Final = 1.3
WORTHWHILE_BYTES: Final = 64 << 20
SLOW_BYTES_PER_S: Final = 12.5e6
"""100 Mbit/s: an unmeasured fetch that does not keep up with this is given up."""
SHORTEST_LIMIT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Ways:
    """What is known of the two ways to a worker's weights. Bytes, and bytes per second."""

    missing_bytes: int
    """Of the shards in which its tensors lie: what a fetch brings."""
    own_bytes: int
    """Of its tensors: what the host would send it, if nothing of it is kept from before."""
    kept_bytes: int
    """Of tensors kept from earlier loads of these weights."""
    pushed_bytes: int
    """What the host would send to all workers, this one included."""
    pushed_to: int
    """How many workers those are."""
    holders: int
    """Nodes besides the host that hold the weights."""
    push_bytes_per_s: float | None
    """What the host has sent it in a second."""
    fetch_bytes_per_s: float | None
    """What the last fetch from these holders brought."""


@dataclass(frozen=True, slots=True)
class Choice:
    fetch: bool
    reason: str
    """For the log."""
    limit_s: float = 0.0
    """When to give a fetch up: it takes longer than the push would have, by what is known now."""


def choose(ways: Ways) -> Choice:
    """By the steps above."""
    if ways.missing_bytes <= 0:
        return Choice(False, "they are here")
    if ways.kept_bytes >= ways.own_bytes:
        return Choice(False, "its tensors are kept from an earlier load")
    if ways.holders < 1:
        return Choice(False, "no other node holds them")
    push_rate, fetch_rate = _rates(ways)
    pushed = max(ways.pushed_bytes, ways.own_bytes)
    gain = (pushed / push_rate) / (ways.missing_bytes / fetch_rate)
    spared_bytes = pushed - ways.missing_bytes * push_rate / fetch_rate
    words = f"that takes {1 / gain:.2f} of the time of the host's push"
    if gain < CLEARLY or spared_bytes < WORTHWHILE_BYTES:
        return Choice(False, words)
    measured = ways.push_bytes_per_s is not None or ways.fetch_bytes_per_s is not None
    limit_s = pushed / (push_rate if measured else SLOW_BYTES_PER_S)
    return Choice(True, words, max(SHORTEST_LIMIT_S, limit_s))


def _rates(ways: Ways) -> tuple[float, float]:
    """(of the push, of the fetch); of lines that were never measured, in lines."""
    share = min(1.0, (ways.holders + 1) / max(1, ways.pushed_to))  # 2
    push, fetch = ways.push_bytes_per_s, ways.fetch_bytes_per_s
    if push is not None:  # 3
        return push, push * share if fetch is None else fetch
    if fetch is not None:
        return fetch / share, fetch
    return 1.0, share
