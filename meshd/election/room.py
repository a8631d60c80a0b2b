"""The shell around the election: what it sees, and what it orders.

It follows the view and the clock, tells the machine what changed, and carries out its orders: by
way of `Needs`, which node.py wires. It publishes the deployments, bids, claims and demand of this
node, and how the deployments look that no node works on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from meshd.config import Config
from meshd.election.appraisal import Appraiser
from meshd.election.bidding import Bidding
from meshd.election.demand import Demand
from meshd.election.desk import Desk
from meshd.election.election import Election
from meshd.election.flags import Flags
from meshd.election.lenders import lendable
from meshd.election.loads import Loads
from meshd.election.memory import Memory
from meshd.election.needs import Needs
from meshd.election.orders import Orders
from meshd.election.settling import Settling
from meshd.election.shapes import Shapes
from meshd.election.showing import Showing
from meshd.election.standings import Standings, myself
from meshd.election.store import ElectionStore, Saved
from meshd.election.table import Table
from meshd.election.watching import Watching, read_corrections
from meshd.election.words import (
    DemandMoved,
    DeploymentsSeen,
    DrainAsked,
    Effect,
    Event,
    LoanAsked,
    LoanEnded,
    LoanRenewed,
    NodesSeen,
    OffersMade,
    Standing,
)
from meshd.ids import LoanId
from meshd.kernel import Board, Clock, Driver, FlightRecorder, Pool, Service
from meshd.sizes import parse_size
from meshd.view import Lendable, Loan, NodeState, Role, View

__all__ = ["ElectionRoom", "Needs"]

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
"""How often what only time changes is looked at: demand, idleness, waits that are over."""
CORRECTIONS: Final = "corrections.json"


class ElectionRoom(Service):
    """`saved`: what `store.load` found. `usage` methods (api.usage.Usage) are part of it: `asked`,
    `answered`, `began`, `ended`, `missing`. What is asked before it runs is done when it does."""

    name = "election"

    def __init__(
        self,
        config: Config,
        board: Board[View],
        needs: Needs,
        store: ElectionStore,
        saved: Saved,
        *,
        clock: Clock,
        recorder: FlightRecorder,
        pool: Pool,
    ) -> None:
        """Blocking: reads what earlier runs learned."""
        super().__init__()
        self._config = config
        self._board = board
        self._needs = needs
        self._clock = clock
        self._pool = pool
        for problem in saved.problems:
            log.warning("%s", problem)
        view, corrections = board.current, config.data_dir / CORRECTIONS
        appraiser = Appraiser(config.engine, read_corrections(corrections))
        memory = Memory(None if config.max_vram is None else parse_size(config.max_vram))
        self._memory = memory
        demand = Demand()
        machine = Election(view.node.id, view.node.name, saved.epochs, saved.floor)
        self._machine = machine
        self._driver: Driver[Event, Effect] = Driver(
            self.name, machine, self._run, clock=clock, recorder=recorder
        )
        self._table = Table(
            store,
            saved.deployments,
            board,
            pool,
            spread=needs.spread,
            changed=self._deployments_changed,
        )
        self._shapes = Shapes(
            needs.shape,
            needs.prepare,
            clock=clock,
            spawn=lambda work: self.spawn(work, name="what a model needs"),
            found=self._table.complete,
            changed=self.look_again,
        )
        self._watching = Watching(
            board,
            needs,
            machine,
            appraiser,
            memory,
            demand,
            corrections=corrections,
            post=self._driver.post,
            spawn=lambda work: self.spawn(work, name="keep corrections"),
            clock=clock,
            pool=pool,
        )
        self._orders = Orders(
            board,
            needs,
            store,
            self._table,
            appraiser,
            pool,
            post=self._driver.post,
            spawn=lambda work: self.spawn(work, name="keep an epoch"),
            started=self._watching.started,
            leases_changed=lambda: self._make_offers(anew=True),
            look_again=self.look_again,
        )
        self._bidding = Bidding(
            needs,
            machine,
            appraiser,
            memory,
            self._shapes,
            demand,
            disk_problem=lambda: self._orders.disk_problem,
            clock=clock,
        )
        self._loads = Loads(board, machine, demand, idle_unload_s=config.idle_unload_s, clock=clock)
        self._showing = Showing(board, self._shapes, clock=clock)
        self._settling = Settling(clock.now())
        self._standings = Standings()
        self.desk = Desk(
            board,
            self._table,
            self._shapes,
            appraiser,
            on_demand=config.on_demand,
            identify=needs.identify,
            find_node=needs.find_node,
            demand=lambda: self._loads.wanted,
            bid=lambda deployment: self._bidding.bid(
                deployment, board.current, draining=self._draining
            ),
        )
        self._flags = Flags(config, needs, self._table, self.desk, memory, pool)
        self.shared = self._table.shared
        self.asked, self.answered = self._loads.asked, self._loads.answered
        self.began, self.ended = self._loads.began, self._loads.ended
        self._open = False
        """It runs, and has not been told to withdraw."""
        self._withdrawn = False
        self._draining = False
        self._nodes: tuple[Standing, ...] | None = None
        self._news = asyncio.Event()
        """There may be something to look at."""
        self._look_later: asyncio.TimerHandle | None = None

    # -- service ----------------------------------------------------------------------------------

    async def main(self) -> None:
        self._open = not self._withdrawn
        self._board.publish(replace(self._board.current, deployments=self._table.records))
        self._driver.post(DeploymentsSeen(self._table.records))
        self.spawn(self._table.keep(), name="keep deployments")
        await self._flags.take(self._board.current.node.id)
        unsubscribe = self._board.subscribe(self._view_changed)
        try:
            self.ready.set()
            self.spawn(self._watch(), name="watch")
            self.spawn(self._look_at_news(), name="look")
            await self.stopping.wait()
            await self._table.save()
        finally:
            self._open = False
            unsubscribe()
            self._driver.close()
            if self._look_later is not None:
                self._look_later.cancel()

    def _run(self, effect: Effect) -> None:
        self._orders.run(effect)

    def withdraw(self) -> None:
        """The node ends: from now on it hosts nothing as far as others are told."""
        self._withdrawn, self._open = True, False
        self._driver.close()
        self._board.publish(replace(self._board.current, claims=(), bids=()))

    @property
    def overdue_s(self) -> float:
        return self._driver.overdue_s

    def metrics(self) -> Iterable[tuple[str, Mapping[str, str], float]]:
        for (model, cause), count in sorted(self._orders.host_changes.items()):
            yield "meshd_host_changes_total", {"model": model, "reason": cause}, count

    async def _watch(self) -> None:
        while True:
            self.look_again()
            await asyncio.sleep(LOOK_S)
            if not self._open:
                return
            self._look_at_demand()
            if self._nodes is not None:
                deployed = [r.model for r in self._table.records if not r.removed]
                await self._orders.keep_heard(self._nodes, deployed)
            await self._bidding.look_for_files(self._table.records, self._pool)
            if self._settling.over:
                await self._flags.choose()

    # -- what is seen -----------------------------------------------------------------------------

    def look_again(self) -> None:
        """Something may have changed: look soon, once for all that changes now."""
        self._news.set()

    async def _look_at_news(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._open:
                self._look()
            await asyncio.sleep(0)  # others have their turn, whatever a look brings about

    def _view_changed(self, view: View) -> None:
        self.look_again()

    def _look(self) -> None:
        """Each part reads the view anew: what one of them posts may have changed it."""
        self._look_at_nodes()
        self._watching.look()
        self._watching.look_at_memory()
        draining = self._board.current.node.state is NodeState.DRAINING
        if draining is not self._draining:
            self._draining = draining
            self._driver.post(DrainAsked(draining))
        if self._settling.over:
            self._shapes.look(self._table.records, self._board.current)
        self._make_offers(anew=False)
        self._show()

    def _look_at_nodes(self) -> None:
        view = self._board.current
        if not self._settling.over:
            now, expects = self._clock.now(), self._needs.expects_others()
            left_s = self._settling.left_s(view, now, expects_others=expects)
            if left_s > 0:
                if self._look_later is not None:
                    self._look_later.cancel()
                loop = asyncio.get_running_loop()
                self._look_later = loop.call_later(left_s + 0.001, self.look_again)
                return
        nodes = self._standings.others(view)
        if nodes is not self._nodes:
            self._nodes = nodes
            self._driver.post(NodesSeen(nodes))

    def _show(self) -> None:
        view = self._board.current
        nodes = (myself(view), *self._standings.others(view))
        self._showing.show(self._table.records, nodes, self._loads.wanted, self._watching.failed)

    # -- deployments ------------------------------------------------------------------------------

    def _deployments_changed(self) -> None:
        records = self._table.records
        self._watching.forget_failures(frozenset(r.model for r in records if not r.removed))
        if self._open:
            self._driver.post(DeploymentsSeen(records))
            self.look_again()

    # -- offers -----------------------------------------------------------------------------------

    def _make_offers(self, *, anew: bool) -> None:
        view = self._board.current
        if view.node.role == Role.CLIENT.value:
            return
        self._show_lends()
        view = self._board.current
        made = self._bidding.make(self._table.records, view, draining=self._draining, anew=anew)
        if made is None:
            return
        bids = tuple(offer.bid for offer in made)
        if bids != view.bids:
            self._board.publish(replace(view, bids=bids))
        self._driver.post(OffersMade(made))

    # -- loans ------------------------------------------------------------------------------------

    def lend(self, loan: Loan) -> str | None:
        """Lease the memory a host asks for; why not, in words, or None if it is leased now. Each
        loan that was granted ends in `loan_ended`."""
        if not self._open:
            return "this node is about to end, or has just begun"
        self._driver.post(LoanAsked(loan))
        return self._orders.answers.pop(loan.id)

    def loan_renewed(self, loan: LoanId) -> None:
        self._driver.post(LoanRenewed(loan))

    def loan_ended(self, loan: LoanId) -> None:
        """What used its memory is gone."""
        self._driver.post(LoanEnded(loan))
        self._needs.look_at_devices()
        self.look_again()

    def _show_lends(self) -> None:
        view = self._board.current
        lends: tuple[Lendable, ...] = ()
        if not self._draining and self._needs.lends() is None:
            lends = lendable(self._memory.budgets, self._machine.ledger.free())
        if lends != view.lends:
            self._board.publish(replace(view, lends=lends))

    # -- demand -----------------------------------------------------------------------------------

    def missing(self, name: str) -> bool:
        changed = self.desk.missing(name)
        if changed:
            self._show()
        return changed

    def _look_at_demand(self) -> None:
        self._loads.exchange()
        view = self._board.current
        nodes = (myself(view), *self._standings.others(view))
        if self._loads.scale(self._table.records, nodes):
            self._driver.post(DemandMoved(self._loads.wanted))
        for model, why in tuple(self._loads.unused()):
            self._table.put_to_sleep(model, why)
