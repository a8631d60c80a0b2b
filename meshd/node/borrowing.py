"""The host's side of splits: memory of other nodes for one engine of this one."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from meshd.errors import NoMesh, PeerUnreachable, SplitFailed
from meshd.ids import LoanId, ModelId, NodeId
from meshd.kernel import Board, Clock
from meshd.runtime.process import guarded
from meshd.sizes import format_size
from meshd.view import ModelState, Part, SplitPlan, View

if TYPE_CHECKING:
    from meshd.peers.bulk.tunnels import Tunnels
    from meshd.peers.loans.borrowing import Borrowed
    from meshd.peers.mesh import MeshService
    from meshd.runtime.group import LoanOrder

log = logging.getLogger(__name__)

TUNNELS: Final = (sys.executable, "-P", "-m", "meshd.tunnel")
COUNTED_S: Final = 2.0
"""After which what tunnels carried until now has been counted."""
AVOIDED_S: Final = 3.0
"""How long a node that refused, or was lost, is left out of plans. If it is dead, membership says
so by then; if it is not, it may be the only one there is."""


class Borrowing:
    """`borrow` is what `runtime.group` calls so. `mesh`: once it is there."""

    def __init__(
        self, board: Board[View], mesh: Callable[[], MeshService], *, clock: Clock
    ) -> None:
        self._board = board
        self._mesh = mesh
        self._clock = clock
        self._avoided: dict[NodeId, float] = {}
        """Until when."""
        self._fastest: dict[NodeId, float] = {}
        """Bytes per second of the busiest second of a tunnel."""
        self._carried: Counter[tuple[NodeId, str]] = Counter()
        self._loading: dict[ModelId, tuple[Borrowed, SplitPlan, int]] = {}
        """What is borrowed for engines that load, and what its workers had been sent before."""
        board.subscribe(self._view_changed)

    async def borrow(
        self, order: LoanOrder, lost: Callable[[str], None], moved: Callable[[str], None]
    ) -> Borrowed:
        """See `runtime.group.Borrow`."""
        from meshd.peers.loans import borrowing
        from meshd.runtime.lending.rpc_client import probe

        runtime, model = self._board.current.runtime, order.model
        if runtime is None or runtime.rpc_protocol is None:
            raise NoMesh(f"the engine of this node has no RPC: {model} cannot be split here")

        def unit_lost(reason: str) -> None:
            self._avoid(borrowed.culprits)
            lost(reason)

        try:
            borrowed = await borrowing.borrow(
                borrowing.BorrowOrder(
                    model, order.epoch, runtime.rpc_protocol, order.digest, order.plan
                ),
                connect=self._connect,
                open_tunnels=self._open_tunnels,
                probe=probe,
                lost=unit_lost,
                moved=moved,
            )
        except SplitFailed as error:
            self._avoid(error.workers)
            raise
        self._loading[model] = borrowed, order.plan, self._sent(order.plan)
        return borrowed

    def avoided(self) -> Collection[NodeId]:
        now = self._clock.now()
        self._avoided = {node: until for node, until in self._avoided.items() if now < until}
        return frozenset(self._avoided)

    def bytes_per_s(self) -> Mapping[NodeId, float]:
        return self._fastest

    def metrics(self) -> Iterable[tuple[str, Mapping[str, str], float]]:
        names = {peer.id: peer.name for peer in self._board.current.peers}
        for (node, direction), count in sorted(self._carried.items()):
            labels = {"peer": names.get(node, node[:8]), "direction": direction}
            yield "meshd_tunnel_bytes_total", labels, count

    def _avoid(self, workers: Iterable[str]) -> None:
        until = self._clock.now() + AVOIDED_S
        self._avoided |= {NodeId(worker): until for worker in workers}

    async def _connect(
        self, node: NodeId, name: str, make_protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Protocol:
        from meshd.peers.links.streams import Open

        return await self._mesh().open_stream(node, name, Open(service="loan"), make_protocol)

    async def _open_tunnels(
        self, loans: Sequence[tuple[Part, LoanId]], lost: Callable[[str], None]
    ) -> Tunnels:
        from meshd.peers.bulk.tunnel_words import TunnelEnd
        from meshd.peers.bulk.tunnels import Tunnels

        credentials = self._mesh().bulk_credentials()
        if credentials is None:
            raise PeerUnreachable("this node belongs to no mesh any more")
        addresses = {p.node_id: tuple(p.addresses) for p in self._mesh().bulk_peers()}
        ends = [
            TunnelEnd(part.node, part.name, addresses.get(part.node, ()), loan)
            for part, loan in loans
        ]
        command = tuple(guarded(TUNNELS))
        return await Tunnels.open(command, credentials, ends, lost=lost, counted=self._count)

    def _view_changed(self, view: View) -> None:
        for model in tuple(self._loading):
            seen = view.local.get(model)
            if seen is None or seen.state is not ModelState.LOADING:
                borrowed, plan, before = self._loading.pop(model)
                if seen is not None and seen.state is ModelState.READY:
                    borrowed.loaded()
                    loop = asyncio.get_running_loop()
                    loop.call_later(COUNTED_S, self._tell_of_load, model, plan, before)

    def _tell_of_load(self, model: ModelId, plan: SplitPlan, before: int) -> None:
        names = ", ".join(part.name for part in plan.parts)
        sent = format_size(self._sent(plan) - before)
        log.info("%s is loaded: %s sent to %s for it", model, sent, names)

    def _sent(self, plan: SplitPlan) -> int:
        return sum(self._carried[part.node, "out"] for part in plan.parts)

    def _count(self, node: NodeId, received: int, sent: int) -> None:
        """About once a second while there is anything to count."""
        self._carried[node, "in"] += received
        self._carried[node, "out"] += sent
        self._fastest[node] = max(self._fastest.get(node, 0.0), float(received + sent))
