"""The worker's side of splits: other nodes' loans, each with an RPC server of its own.

The election has the books, the mesh the streams, the runtime the servers; here they are brought
together. A loan begins with its lease and ends with the end of its server, in this order, whatever
happens in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from meshd.config import Config
from meshd.errors import MeshdError, PeerRefused
from meshd.ids import LoanId, NodeId
from meshd.kernel import Board, Pool, Service
from meshd.node.supplying import Supplying
from meshd.peers.loans.lending import LoanDesk
from meshd.runtime.lending import rpc_words
from meshd.runtime.lending.extents import TensorExtent, held_by
from meshd.runtime.lending.rpc_server import RpcServer, RpcSpec
from meshd.runtime.lending.tensor_cache import Kept, TensorCache, TensorCaches
from meshd.runtime.lending.warming import warm
from meshd.runtime.supervisor import EnginePlaces
from meshd.sizes import parse_size
from meshd.view import Loan, LoanAsk, RuntimeView, View

if TYPE_CHECKING:
    from meshd.cache.room import CacheRoom
    from meshd.election.room import ElectionRoom
    from meshd.peers.links.streams import Open

log = logging.getLogger(__name__)

WATCH_S: Final = 1.0
"""How often it is looked who is connected to the servers."""


@dataclass(slots=True)
class _Held:
    """What one loan has here."""

    loan: Loan
    server: RpcServer | None = None
    tunnelled: bool = False
    """Its host has opened a tunnel to the server."""
    cache: TensorCache | None = None
    keeps: str | None = None
    """Digest of the weights whose tensors nobody but its server keeps meanwhile."""
    before: Kept | None = None
    """What lay in the cache when it was last counted what its host sends."""
    besieged: bool = False
    """Another user is connected to the server."""


class Lending(Service):
    """`peers.loans.lending.Lender`, and what else of other rooms has to do with it.

    `pool`: for what reads and writes whole tensors; `room`: once it is there; `expect_tunnel`: a
    host is about to open one to here."""

    name = "lending"

    def __init__(
        self,
        config: Config,
        board: Board[View],
        cache: CacheRoom,
        room: Callable[[], ElectionRoom],
        *,
        expect_tunnel: Callable[[], None],
        rng: random.Random,
        pool: Pool,
    ) -> None:
        super().__init__()
        self._config = config
        self._board = board
        self._cache = cache
        self._room = room
        self._expect_tunnel = expect_tunnel
        self._rng = rng
        self._pool = pool
        self._caches = TensorCaches(
            config.data_dir / "tensors", parse_size(config.engine.tensor_cache)
        )
        self._supplying = Supplying(board, cache)
        self._held: dict[LoanId, _Held] = {}
        self._leaving: dict[asyncio.Task[None], str | None] = {}
        """What takes loans back, with the digest of the weights each was for."""
        self._keeping: set[str] = set()
        """Digests of weights whose tensors a server keeps, or may still write."""
        self._returned = asyncio.Event()
        """No loan is left."""
        self._open = False
        self.pushed_bytes = 0
        """Of tensors that hosts had to send since this node began."""
        self.desk = LoanDesk(self, lambda work: self.spawn(work, name="a loan"))

    # -- service ----------------------------------------------------------------------------------

    async def main(self) -> None:
        self._open = True
        self.ready.set()
        self.spawn(self._watch(), name="watch")
        try:
            await self.stopping.wait()
        finally:
            self._open = False
            self.desk.close("this node ends")
            if self._held or self._leaving:
                self._returned.clear()
                await self._returned.wait()

    def problem(self) -> str | None:
        """Why this node lends nothing; None if it can."""
        runtime = self._board.current.runtime
        if not self._config.engine.lend:
            return "it is told to lend nothing (`engine.lend`)"
        if runtime is None or runtime.rpc_protocol is None or _rpc_binary(runtime) is None:
            return "its engine has no RPC server"
        return None

    # -- loans.lending.Lender ---------------------------------------------------------------------

    def grant(self, host: NodeId, ask: LoanAsk) -> Loan:
        problem = self.problem() if self._open else "this node is about to end"
        if problem is not None:
            raise PeerRefused(problem, reason="no_service")
        if ask.part.node != self._board.current.node.id:
            raise PeerRefused("you took it for another node", reason="other_node")
        runtime = self._runtime()
        if ask.rpc_protocol != runtime.rpc_protocol:
            raise PeerRefused(
                f"its engine speaks RPC protocol {runtime.rpc_protocol}, and yours "
                f"{ask.rpc_protocol}",
                reason="other_protocol",
            )
        loan = Loan(LoanId(f"loan-{self._rng.getrandbits(128):032x}"), host, ask)
        refusal = self._room().lend(loan)
        if refusal is not None:
            raise PeerRefused(refusal, reason="no_memory")
        self._held[loan.id] = _Held(loan)
        log.info("%s is lent to %s for %s", _words(ask), host[:8], ask.model)
        return loan

    async def commit(self, loan: Loan, moved: Callable[[str], None]) -> int:
        held, ask, runtime = self._held[loan.id], loan.ask, self._runtime()
        binary = _rpc_binary(runtime)
        assert binary is not None, "looked at when it was granted"
        moved("looking for its weights")
        self._expect_tunnel()
        held.cache = await self._cache_for(held)
        if held.cache is not None and ask.rpc_protocol == rpc_words.PROTOCOL:
            kept = await self._pool.run(held.cache.files)
            kept_bytes = sum(file.size for file in kept.values())
            await self._supplying.supply(loan, kept_bytes, moved)
        tensors = await self._tensors(ask)
        moved("starting the RPC server")
        held.server = await RpcServer.start(
            RpcSpec(
                loan=loan.id,
                model=ask.model,
                binary=binary,
                devices=tuple(device for device, _ in ask.part.memory),
                rpc_protocol=ask.rpc_protocol,
                threads=self._config.engine.threads,
                cache_dir=None if held.cache is None else held.cache.path,
            ),
            places=EnginePlaces(self._config.run_dir, self._config.log_dir),
            log_bytes=self._config.engine.log_bytes,
            on_exit=lambda why: self.desk.end(loan.id, why),
        )
        if held.cache is None:
            return 0
        warmed = await warm(
            held.cache,
            held.server.port,
            tensors,
            rpc_protocol=ask.rpc_protocol,
            pool=self._pool,
            moved=moved,
        )
        held.before = await self._pool.run(held.cache.files)
        return warmed.held

    def loaded(self, loan: Loan) -> None:
        held = self._held[loan.id]
        self.spawn(self._settle(held), name="count what was sent")

    def renew(self, loan: Loan) -> None:
        self._room().loan_renewed(loan.id)

    def end(self, loan: Loan, reason: str) -> None:
        held = self._held.pop(loan.id)
        log.info("the loan for %s ends: %s", loan.ask.model, reason)
        task = self.spawn(self._take_back(held), name="take a loan back")
        self._leaving[task] = _weights(loan.ask)
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        del self._leaving[task]
        if not self._held and not self._leaving:
            self._returned.set()

    # -- for other rooms --------------------------------------------------------------------------

    def end_loan(self, loan: LoanId, reason: str) -> None:
        """The election's order."""
        self.desk.end(loan, reason)

    def tunnel(self, node: NodeId, wanted: Open) -> dict[str, Any]:
        """What a carrier is to do for a stream to an RPC server. Raises PeerRefused."""
        held = self._held.get(LoanId(wanted.instance or ""))
        if held is None or held.loan.host != node or held.server is None:
            raise PeerRefused("you have no such loan here", reason="no_loan")
        held.tunnelled = True
        return {"port": held.server.port}

    def tunnels_lost(self) -> None:
        """The process that carried them is gone. An engine outlives the end of none of its tunnels
        and cannot say whose it was; its host has to hear that from here."""
        for loan, held in tuple(self._held.items()):
            if held.tunnelled:
                self.desk.end(loan, "the process that carries its tunnels ended")

    def metrics(self) -> Iterable[tuple[str, Mapping[str, str], float]]:
        yield "meshd_loans", {}, len(self._held)
        yield "meshd_tensors_pushed_bytes_total", {}, self.pushed_bytes
        yield "meshd_shards_fetched_bytes_total", {}, self._supplying.fetched_bytes

    # -- one loan ---------------------------------------------------------------------------------

    def _runtime(self) -> RuntimeView:
        runtime = self._board.current.runtime
        assert runtime is not None, "an engine that was found stays"
        return runtime

    async def _tensors(self, ask: LoanAsk) -> tuple[TensorExtent, ...]:
        """Of its part, as far as they lie verified on this disk."""
        if ask.digest is None:
            return ()
        try:
            held = await self._cache.held_shards(ask.digest)
        except (MeshdError, OSError) as error:
            log.warning("weights of %s are not looked for: %s", ask.model, error)
            return ()
        if held is None:
            return ()
        all_known = held.whole or (ask.weights is not None and held.has(ask.weights.files))
        tensors = tuple(TensorExtent(*place) for place in held.tensors)
        return held_by(ask.part, tensors, all_known=all_known)

    async def _cache_for(self, held: _Held) -> TensorCache | None:
        """One server at a time keeps tensors of one digest: another one would take what that has
        half written for whole."""
        digest, part = _weights(held.loan.ask), held.loan.ask.part
        if leaving := [t for t, other in self._leaving.items() if other == digest]:
            await asyncio.wait(leaving)
        if digest is None or digest in self._keeping:
            return None
        self._keeping.add(digest)
        held.keeps = digest
        cache = None
        try:
            cache = await self._pool.run(self._open_cache, digest, part.bytes, set(self._keeping))
        except (MeshdError, OSError) as error:
            log.warning("no tensors are kept of %s: %s", held.loan.ask.model, error)
        if cache is None:
            self._keep_no_more(held)
        return cache

    def _keep_no_more(self, held: _Held) -> None:
        if held.keeps is not None:
            self._keeping.remove(held.keeps)
            held.keeps = None

    def _open_cache(
        self, digest: str, needed_bytes: int, in_use: Collection[str]
    ) -> TensorCache | None:
        cache = self._caches.directory(digest, needed_bytes)
        self._caches.prune(in_use)
        return cache

    async def _settle(self, held: _Held) -> None:
        """Its host is served: what its server has written is whole."""
        try:
            await self._count(held, whole=True)
        except (MeshdError, OSError) as error:
            log.warning("what was sent of %s is not counted: %s", held.loan.ask.model, error)

    async def _take_back(self, held: _Held) -> None:
        try:
            if held.server is not None:
                at_rest = await held.server.stop(at_once=held.besieged)
                await self._count(held, whole=at_rest)
        except (MeshdError, OSError) as error:
            log.warning("what was sent of %s is not counted: %s", held.loan.ask.model, error)
        finally:
            self._keep_no_more(held)
            self._room().loan_ended(held.loan.id)

    # -- watching ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for held in tuple(self._held.values()):
                with contextlib.suppress(MeshdError, OSError):  # busy: the next look comes
                    await self._look(held)

    async def _look(self, held: _Held) -> None:
        if held.server is None:
            return
        strangers = await self._pool.run(held.server.strangers)
        if strangers:
            users = ", ".join(str(user) for user in sorted(strangers))
            log.warning("user %s is connected to the RPC server of %s", users, held.loan.ask.model)
            held.besieged = True
            self.desk.end(held.loan.id, f"another user ({users}) is connected to its RPC server")

    async def _count(self, held: _Held, *, whole: bool) -> None:
        """What its host sent since it was last counted. `whole`: its server is at rest."""
        cache, before = held.cache, held.before
        if cache is None or before is None:
            return
        pushed = await self._pool.run(cache.measure, before, whole=whole)
        held.before = await self._pool.run(cache.files)
        self.pushed_bytes += pushed
        if not pushed:
            return
        log.info("%d bytes of tensors of %s were sent by its host", pushed, held.loan.ask.model)


def _rpc_binary(runtime: RuntimeView) -> str | None:
    return next((b.path for b in runtime.binaries if b.name.endswith("rpc-server")), None)


def _weights(ask: LoanAsk) -> str | None:
    """Their digest, written in the one of its two ways that names directories."""
    return None if ask.digest is None else ask.digest.removeprefix("sha256:")


def _words(ask: LoanAsk) -> str:
    return ", ".join(f"{size} bytes of {device}" for device, size in ask.part.memory)
