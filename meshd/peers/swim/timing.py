"""The times of membership, with what each of them buys and costs. Seconds throughout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Shorter times notice deaths sooner; longer ones forgive slow networks and busy machines.

    A silent death is known everywhere after about `2 * probe_interval_s` (the predecessor on the
    ring asks), `probe_timeout_s` (nobody got an answer), `suspicion_s` (nor did repeated tries)
    and a few `gossip_interval_s`.
    """

    probe_interval_s: float
    """Between two probes of this node. Halving it doubles the messages of an idle mesh."""
    direct_timeout_s: float
    """How long a probed node may take before others are asked to try. Well over a round trip, so
    that a healthy mesh sends no indirect probes; stretched by our own ill health."""
    probe_timeout_s: float
    """From the first Ping to the suspicion, indirect tries included; stretched likewise. Larger
    than `direct_timeout_s` + `relay_timeout_s` + a round trip, or every Nack comes too late."""
    relay_timeout_s: float
    """How long we wait for a node that we ping for somebody else before we say so (Nack)."""
    relays: int
    """How many others are asked at once. Each squares away loss, and costs up to four messages a
    failed probe."""
    suspicion_s: float
    """How long a node that did not answer *us* has to refute, nobody else having failed too. The
    time to notice a death contains it whole; false deaths fall with the power of the number of
    tries that fit into it (`suspicion_s / reprobe_interval_s`)."""
    suspicion_least_s: float
    """The same when `confirmations` others failed on their own account. Also how long any sign of
    life postpones the verdict."""
    confirmations: int
    """How many independent confirmations shorten a suspicion as far as it goes."""
    reprobe_interval_s: float
    """Between two tries to reach a node under our own suspicion, directly and through others."""
    heard_suspicion_s: float
    """How long we trust that whoever suspects a node sees it through; then we probe it ourselves.
    Longer than `suspicion_s` and its spreading, or all nodes probe what one probes already."""
    refused_confirm_s: float
    """After a broken link and a refused dial: how long until that is a death. Shorter than a
    restart is pointless (it comes back with a higher incarnation); long enough for a second dial.
    """
    gossip_interval_s: float
    """Least time between two pushes of news that wait for no probe."""
    gossip_fanout: int
    """To how many members a push goes. News reach n nodes in about log(n) / log(fanout) hops."""
    digest_interval_s: float
    """Between two comparisons of tables with a random member: repairs what gossip missed."""
    retry_interval_s: float
    """Between two thoughts of trying a dead member again. Heals partitions; one such ping costs a
    dial that mostly fails."""
    retries_per_dead: float
    """How many nodes of the whole mesh try each dead member in one such interval, on average."""
    dead_kept_s: float
    """How long a dead member is shown and retried."""
    left_kept_s: float
    """How long a member that left is shown, and older statements about it are refused."""
    stall_s: float
    """Being woken this much too late means that *we* stood still (a suspended machine, a starved
    process): all deadlines move by the delay, since answers may wait unread."""


LAN = Timing(
    probe_interval_s=0.4,
    direct_timeout_s=0.25,
    probe_timeout_s=0.5,
    relay_timeout_s=0.15,
    relays=3,
    suspicion_s=1.8,
    suspicion_least_s=1.2,
    confirmations=2,
    reprobe_interval_s=0.2,
    heard_suspicion_s=4.0,
    refused_confirm_s=0.45,
    gossip_interval_s=0.2,
    gossip_fanout=3,
    digest_interval_s=4.0,
    retry_interval_s=1.0,
    retries_per_dead=4.0,
    dead_kept_s=24 * 3600.0,
    left_kept_s=3600.0,
    stall_s=0.25,
)
"""Round trips of a few milliseconds: SIGKILL known in under 1.5 s, silence in under 4 s."""

WAN = Timing(
    probe_interval_s=2.0,
    direct_timeout_s=1.25,
    probe_timeout_s=2.5,
    relay_timeout_s=0.75,
    relays=3,
    suspicion_s=9.0,
    suspicion_least_s=6.0,
    confirmations=2,
    reprobe_interval_s=1.0,
    heard_suspicion_s=20.0,
    refused_confirm_s=1.5,
    gossip_interval_s=0.5,
    gossip_fanout=3,
    digest_interval_s=15.0,
    retry_interval_s=4.0,
    retries_per_dead=4.0,
    dead_kept_s=24 * 3600.0,
    left_kept_s=3600.0,
    stall_s=0.5,
)
"""Round trips of up to some hundred milliseconds; about five times slower, and a fifth of the
messages."""
