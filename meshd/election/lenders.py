"""Memory between nodes: what this one lends, and who could lend to it. Pure; bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from meshd.election.fit import Budget
from meshd.election.offering import coarse
from meshd.election.splitting import Candidate
from meshd.election.standings import REACHABLE
from meshd.ids import NodeId
from meshd.view import Lendable, PeerState, PeerView, Role, View


def lendable(budgets: Sequence[Budget], free: Mapping[str, int]) -> tuple[Lendable, ...]:
    """What this node lends: its accelerators, or its main memory if it has none. `free`: what no
    lease has, by device."""
    fast = any(budget.accelerator for budget in budgets)
    return tuple(
        Lendable(b.device, coarse(free.get(b.device, 0)), b.accelerator, b.bytes_per_s)
        for b in budgets
        if b.accelerator or not fast
    )


def candidates(
    view: View, avoided: Collection[NodeId], bytes_per_s: Mapping[NodeId, float]
) -> tuple[Candidate, ...]:
    """All other nodes that can be reached, as workers, by id. `avoided`: that refused, or were
    lost, a moment ago; `bytes_per_s`: to those of them where that was measured."""
    found = (
        _candidate(peer, avoided, bytes_per_s.get(peer.id))
        for peer in view.peers
        if peer.state in REACHABLE
    )
    return tuple(sorted(found, key=lambda c: c.node))


def _candidate(peer: PeerView, avoided: Collection[NodeId], bytes_per_s: float | None) -> Candidate:
    return Candidate(
        peer.id,
        peer.name,
        peer.lends,
        rtt_s=None if peer.rtt_s is None else _stepped(peer.rtt_s),
        bytes_per_s=None if not bytes_per_s else 2.0 ** math.floor(math.log2(bytes_per_s)),
        rpc_protocol=peer.rpc_protocol,
        barred=_barred(peer, avoided),
    )


def _barred(peer: PeerView, avoided: Iterable[NodeId]) -> str | None:
    if peer.role is Role.CLIENT:
        return "a client node lends nothing"
    if peer.state is not PeerState.ALIVE:
        return f"it is {peer.state}"
    if peer.draining:
        return "it is draining"
    if peer.id in avoided:
        return "it refused, or was lost, a moment ago"
    return None


def _stepped(rtt_s: float) -> float:
    """The next power of two of a quarter of a millisecond: what trembles must not move plans."""
    return 0.00025 * 2.0 ** max(0, math.ceil(math.log2(max(rtt_s, 1e-6) / 0.00025)))
