"""The host's side of splits: memory of other nodes for one engine of this one."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from meshd.errors import MeshdError, NoMesh, PeerUnreachable, SplitFailed
from meshd.ids import LoanId, ModelId, NodeId
from meshd.kernel import Board, Clock
from meshd.runtime.process import guarded
from meshd.sizes import format_size
from meshd.view import ModelState, NeededWeights, Part, SplitPlan, View

if TYPE_CHECKING:
    from meshd.cache.room import CacheRoom
    from meshd.peers.bulk.tunnels import Tunnels
    from meshd.peers.loans.borrowing import Borrowed
    from meshd.peers.mesh import MeshService
    from meshd.runtime.group import LoanOrder

log = logging.getLogger(__name__)

TUNNELS: Final = (sys.executable, "-P", "-m", "meshd.tunnel")
COUNTED_S: Final = 2.0
"""After which what tunnels carried until now has been counted."""
LOOK_S: Final = 2.0
"""How long it is looked for what workers need of the weights; without it the host sends it."""
BUSY_BYTES: Final = 8 << 20
"""A second in which a tunnel carried less says nothing about what it could have carried."""
AVOIDED_S: Final = 3.0
"""How long a node that refused, or was lost, is left out of plans. If it is dead, membership says
so by then; if it is not, it may be the only one there is."""


class Borrowing:
    """`borrow` is what `runtime.group` calls so. `mesh`: once it is there."""

    def __init__(
        self,
        board: Board[View],
        cache: CacheRoom,
        mesh: Callable[[], MeshService],
        *,
        clock: Clock,
    ) -> None:
        self._board = board
        self._cache = cache
        self._mesh = mesh
        self._clock = clock
        self._avoided: dict[NodeId, float] = {}
        """Until when."""
        self._fastest: dict[NodeId, float] = {}
        """Bytes per second of the busiest second of a tunnel."""
        self._pushed: dict[NodeId, float] = {}
        """Bytes that were sent in the best second in which there was much to send."""
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
                    model,
                    order.epoch,
                    runtime.rpc_protocol,
                    order.digest,
                    order.plan,
                    await self._needs(order),
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

    async def _needs(self, order: LoanOrder) -> Mapping[NodeId, NeededWeights]:
        """What each worker needs of the weights; nothing if that cannot be told soon."""
        from meshd.runtime.lending.extents import TensorExtent
        from meshd.runtime.lending.needs import needs

        digest = order.digest
        if digest is None:
            return {}
        try:
            async with asyncio.timeout(LOOK_S):
                held = await self._cache.held_shards(digest)
        except (MeshdError, OSError) as error:  # TimeoutError is one
            log.warning("what workers need of %s is not known: %r", order.model, error)
            return {}
        if held is None or not held.whole:
            return {}
        return needs(
            order.plan.parts,
            held.ref,
            [TensorExtent(*place) for place in held.tensors],
            {path: (shard.sha256, shard.size) for path, shard in held.files.items()},
            holders={peer.id for peer in self._board.current.peers if digest in peer.weights},
            bytes_per_s=self._pushed,
        )

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
        if sent >= BUSY_BYTES:
            self._pushed[node] = max(self._pushed.get(node, 0.0), float(sent))
