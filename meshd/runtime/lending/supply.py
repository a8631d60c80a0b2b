"""Whether a worker fetches the shards of its layers from other nodes before its host connects, or
is sent its tensors by the host. Pure.

What is compared is how long all workers of the split wait, in these steps:

1. The host has one uplink, and sends each worker its tensors over it, one after the other: a push
   takes `pushed_bytes` at the rate of that uplink.
2. All workers are taken to fetch at the same time, from the same nodes: the holders and the host,
   whose uplink is free meanwhile. Each gets its share of those uplinks, and no more than comes in
   over its own line. Then it has still to read its tensors from the disk and pass them to its RPC
   server.
3. Rates are measured ones where there are any, and if only one of the two ways was measured the
   other follows from it by 1 and 2. Then a fetch has to be `CLEARLY` faster.
4. Where nothing was measured all lines are taken to be alike. A fetch must not be slower if they
   are those of a wired LAN, and be `CLEARLY` faster if they are slow.

The rule errs towards the push. Where other workers cannot fetch (no room) or need nothing (tensors
of an earlier load), this one's fetch saves less than was thought; it is bounded by `limit_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CLEARLY: Final = 1.3
LAN_BYTES_PER_S: Final = 110e6
"""1 Gbit/s. Faster lines speed up both ways, to where RPC servers take tensors no faster."""
SLOW_BYTES_PER_S: Final = 12.5e6
"""100 Mbit/s. A fetch over lines that were not measured is given up if it does not keep up with a
push over these."""
START_S: Final = 2.0
"""From the decision until bytes come, and from the last of them until the tensors are passed on: a
process, connections, a hash of the end."""
WARM_BYTES_PER_S: Final = 150e6
"""At which an RPC server takes tensors, hashes and keeps them: measured on a small machine."""
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
    push, fetch = ways.push_bytes_per_s, ways.fetch_bytes_per_s
    share = min(1.0, (ways.holders + 1) / max(1, ways.pushed_to))  # 2
    if push is None and fetch is None:  # 4
        lan = _Times(ways, LAN_BYTES_PER_S, LAN_BYTES_PER_S * share)
        slow = _Times(ways, SLOW_BYTES_PER_S, SLOW_BYTES_PER_S * share)
        faster = lan.push_s >= lan.fetch_s and slow.push_s >= CLEARLY * slow.fetch_s
        return _choice(faster, lan, slow.push_s, "over 1 Gbit/s ")
    if push is None:  # 3
        assert fetch is not None, "one of the two was measured"
        push = fetch / share
    times = _Times(ways, push, push * share if fetch is None else fetch)
    return _choice(times.push_s >= CLEARLY * times.fetch_s, times, times.push_s, "")


class _Times:
    """Seconds of both ways at these rates."""

    def __init__(self, ways: Ways, push_bytes_per_s: float, fetch_bytes_per_s: float) -> None:
        self.push_s = max(ways.pushed_bytes, ways.own_bytes) / push_bytes_per_s
        after_s = START_S + ways.own_bytes / WARM_BYTES_PER_S
        self.fetch_s = ways.missing_bytes / fetch_bytes_per_s + after_s


def _choice(faster: bool, times: _Times, limit_s: float, lines: str) -> Choice:
    words = f"{lines}that takes some {times.fetch_s:.0f} s, its host's push {times.push_s:.0f} s"
    return Choice(True, words, max(SHORTEST_LIMIT_S, limit_s)) if faster else Choice(False, words)
