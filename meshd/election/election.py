"""Which models this node hosts: a pure machine that decides about its own node only.

It sees the deployments, what the other nodes say of themselves and what its own node could do, and
claims a model, keeps it or gives it up. There is no master: all nodes rank by the same words
(ranking.py, claims.py), so at most one of them finds that it is its turn; if words crossed and two
claimed, both see which one gives up. One entry a model, in one of the phases of `Phase`:

    (none) ──our turn──> CLAIMING ──EpochSaved──> PREPARING <──────> READY ──options──> RESTARTING
      ▲                     │                      │      ▲            │                    │
      │<──somebody was first┘        engine failed │      └────────────│────engine gone─────┘
      │                                            ▼                   │ outranked, unloaded,
      │<──────back-off over, engine gone──────── FAILED                ▼ handed over
      └<──────────────────────────engine gone──────────────────────── DRAINING

Rules, numbered as in the code:

1. A removed deployment, or one that sleeps, is hosted by nobody.
2. The first claims of the order in claims.py stand, as many as replicas are wanted; a claim beyond
   them gives up.
3. A host that stands, or serves on until it is replaced (9), takes a higher epoch than every claim
   that lost to it, and leaves its engine alone. A single host takes a higher one than any that was
   ever heard: a worker may have served it.
4. A gap is filled by the nodes that are first in the ranking; each claims for itself only.
5. The first claim waits until all who may host have bid, `BID_WAIT_S` at most since the record was
   seen. Whoever replaces a host finds the bids that were made before.
6. A claim starts with a lease, then a saved epoch above all that were ever seen; nobody is told and
   nothing starts before. If the turn was somebody else's meanwhile, the lease is given back.
7. A host that failed says why and is passed over for a back-off, longer after each failure in a
   row, and as long at least as whatever refused it asks for; a new version of the record ends it
   at once. A bid that the own ledger does not honour is such a failure: it would otherwise be
   ranked first for ever.
8. A claim stays published until its engine is gone and its lease released.
9. Where it may host no longer (pinned elsewhere, draining), a READY claim serves on until enough
   others do; one that is not READY ends at once. A draining node does not wait for nobody.
10. With only SWAP to bid, nobody bidding YES and its turn, it asks that its victims be put to
    sleep, each once for every version of its record, and claims when its bid has become YES.
11. Memory is leased before it is used. After a change of leases the offers are out of date, and
    nothing is claimed until they are made anew: so one claim for each set of offers.
12. What begins and ends says why, with figures.
13. Other options than its engine was started with (reference, context, slots): the host stops it,
    keeps its claim, and starts it anew once the old one is gone and the new memory is leased.
14. Who lets its turn to claim pass (turns.py) is passed over for a while.
15. With SPLIT to bid it claims as with YES, with a plan of who lends what. If a worker refuses or
    is lost, the host keeps its claim and plans anew with those that are left, `REPLANS` times in a
    row; it gives up if nothing fits, and others may try.
16. Memory is lent to hosts of other plans from the same ledger (lending.py).

What an event cannot have touched is not looked at anew: in a large mesh nearly every event is about
none of the models, or one. A model stays open, and is reviewed at every event, while it is hosted
here, or while this node would fill a gap of it: that depends on all the others' bids, on the own
offers and on the time. Otherwise it is settled, and reviewed only when what settled it may be
otherwise: its record, the claims of it and whether their nodes may host, the hosts that are wanted,
the own offer, and whether this node drains.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import assert_never

from meshd.election.claims import (
    Contender,
    contenders,
    outranked_epoch,
    ready_elsewhere,
    standing,
    wanted_replicas,
)
from meshd.election.explain import why_claim, why_outranked
from meshd.election.holdings import Holdings
from meshd.election.hosted import Hosted, Phase, same_engine
from meshd.election.ledger import Ledger
from meshd.election.lending import Lending, Lent
from meshd.election.outlook import Outlook
from meshd.election.ranking import Ranked, all_have_bid, may_not_host, ranked
from meshd.election.turns import Turns
from meshd.election.words import (
    CapacityMeasured,
    DemandMoved,
    DeploymentsSeen,
    DrainAsked,
    Effect,
    EpochSaved,
    Event,
    HostChanged,
    HostMeasured,
    HostReported,
    LeasesChanged,
    LoanAsked,
    LoanEnded,
    LoanRenewed,
    NodesSeen,
    Offer,
    OffersMade,
    PublishClaims,
    SaveEpoch,
)
from meshd.ids import LoanId, ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.view import Claim, Deployment, Suits

BID_WAIT_S = 1.0
"""Longer than a record and the bids for it take through a LAN; a node that says nothing by then
does not hold up the others."""


class Election:
    """See the module's docstring. `epochs`, `floor`: what the store kept of earlier runs of this
    node."""

    def __init__(
        self, own: NodeId, name: str, epochs: Mapping[ModelId, int], floor: int = 0
    ) -> None:
        self._outlook = Outlook(own, name, epochs, floor)
        self._held = Holdings(name)
        self._lending = Lending(self._held.ledger, self._held.outdate_offers)
        self._turns = Turns()
        self._offers: Mapping[ModelId, Offer] = {}
        self._open: set[ModelId] = set()
        """To be reviewed at every event."""
        self._waits: list[float] = []
        """When bids or claims of others need no longer be waited for, as of the last event."""
        self._published: tuple[Claim, ...] = ()

    @property
    def hosted(self) -> Mapping[ModelId, Hosted]:
        return MappingProxyType(self._held.hosted)

    @property
    def lent(self) -> Mapping[LoanId, Lent]:
        """Memory that hosts of other models have of this node."""
        return self._lending.lent

    @property
    def ledger(self) -> Ledger:
        """To be looked at only."""
        return self._held.ledger

    def due(self) -> float | None:
        hosted = self._held.hosted.values()
        backoffs = (h.retry_at for h in hosted if h.retry_at is not None and not h.engine)
        lent = (until,) if (until := self._lending.due()) is not None else ()
        return min((*backoffs, *self._waits, *lent), default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        holdings, self._waits = self._held, []
        holdings.begin()
        touched = self._take(event, now)
        for model in sorted({*touched, *self._open}):
            self._review(model, now)
        claims = tuple(c for _, h in sorted(holdings.hosted.items()) if (c := h.claim) is not None)
        holdings.orders += self._lending.look(self._outlook, {c.model: c for c in claims}, now)
        if claims != self._published:
            self._published = claims
            holdings.orders.insert(0, PublishClaims(claims))
        if holdings.leases_moved:
            holdings.orders.append(LeasesChanged(holdings.ledger.leased()))  # 11
        return holdings.orders

    # -- events -----------------------------------------------------------------------------------

    def _take(self, event: Event, now: float) -> Collection[ModelId]:
        """The models that may not be settled any more."""
        match event:
            case NodesSeen() | DeploymentsSeen() | DemandMoved() | DrainAsked():
                return self._outlook.take(event, now)
            case OffersMade():
                self._offers = {offer.bid.model: offer for offer in event.offers}
                self._held.offers_hold = True
                return self._outlook.deployments
            case CapacityMeasured():
                self._held.ledger.set_capacity(event.memory)
            case HostReported():
                self._held.reported(event, now)
            case HostMeasured():
                if self._held.ledger.measure(event.model, event.memory):
                    self._held.outdate_offers()
            case EpochSaved():
                self._saved(event, now)
            case LoanAsked() | LoanRenewed() | LoanEnded():
                self._lend(event, now)
            case Tick():
                pass
            case _:
                assert_never(event)
        return ()

    def _lend(self, event: LoanAsked | LoanRenewed | LoanEnded, now: float) -> None:
        """Rule 16."""
        match event:
            case LoanAsked():
                hosted = self._held.hosted.get(event.loan.ask.model)
                own = None if hosted is None else hosted.claim
                self._held.orders += self._lending.asked(event, self._outlook, own, now)
            case LoanRenewed():
                self._lending.renewed(event.loan, now)
            case LoanEnded():
                self._lending.ended(event.loan)

    def _saved(self, event: EpochSaved, now: float) -> None:
        hosted = self._held.hosted.get(event.model)
        if hosted is None:
            return
        if hosted.raising == event.epoch:
            raised = replace(hosted, epoch=event.epoch, raising=None)  # 3
            if hosted.wanted == 1 and self._outlook.heard_epoch(event.model) >= event.epoch:
                raised = replace(hosted, raising=self._save_next_epoch(event.model))
            self._held.put(raised)
            return
        if hosted.phase is not Phase.CLAIMING or hosted.epoch != event.epoch:
            return
        self._review(event.model, now)  # 6
        hosted = self._held.hosted.get(event.model)
        if hosted is None:
            return
        if self._outlook.heard_epoch(event.model) >= hosted.epoch:
            self._held.put(replace(hosted, epoch=self._save_next_epoch(event.model)))
            return
        self._held.start(replace(hosted, phase=Phase.PREPARING, reason=hosted.why))
        self._held.orders.append(HostChanged(event.model, hosted.why, hosted.cause))  # 12

    # -- decisions --------------------------------------------------------------------------------

    def _review(self, model: ModelId, now: float) -> None:
        deployment, hosted = self._outlook.deployments.get(model), self._held.hosted.get(model)
        if hosted is not None:
            self._keep(hosted, deployment, now)
        settled = model not in self._held.hosted and (
            deployment is None or not self._consider(deployment, now)
        )
        (self._open.discard if settled else self._open.add)(model)

    def _keep(self, hosted: Hosted, deployment: Deployment | None, now: float) -> None:
        """Whether what is hosted goes on."""
        if hosted.phase is Phase.DRAINING:
            return
        if hosted.phase is Phase.FAILED:
            renewed = deployment is None or deployment.stamp != hosted.deployment.stamp
            over = hosted.retry_at is not None and hosted.retry_at <= now
            if not hosted.engine and (renewed or over):
                del self._held.hosted[hosted.model]  # 7
            return
        if deployment is None or deployment.removed:
            self._held.give_up(hosted, "it was unloaded", "asked")  # 1
        elif deployment.asleep:
            self._held.give_up(hosted, "it sleeps until it is asked for", "asked")  # 1
        else:
            self._contend(hosted, deployment, now)

    def _contend(self, hosted: Hosted, deployment: Deployment, now: float) -> None:
        """Whether its claim stands among the others; with what engine, only if it does."""
        claimants = self._outlook.claimants(deployment.model, hosted.claim)
        found = contenders(deployment, claimants)
        wanted = wanted_replicas(deployment, self._outlook.demand)
        self._outlook.note_hosts(deployment.model, found[:wanted], wanted)
        barred = may_not_host(self._outlook.myself(deployment.model), deployment)
        if hosted.phase is Phase.CLAIMING:
            same = same_engine(hosted.deployment, deployment)
            if barred is not None or not same or len(found) >= wanted:
                self._held.drop(hosted)  # 6
        elif barred is not None:
            self._hand_over(hosted, deployment, barred, found, now)
        elif all(c.node.node != self._outlook.own for c in found[:wanted]):
            cause = "scaled" if wanted < hosted.wanted else "conflict"
            self._held.give_up(hosted, why_outranked(found, self._outlook.own, wanted), cause)  # 2
        else:
            self._serve(replace(hosted, wanted=wanted), deployment, now)
        stand = standing(deployment, claimants, found, wanted)
        if any(c.node.node == self._outlook.own for c in stand):
            rival = outranked_epoch(deployment.model, claimants, stand)
            self._outbid(deployment.model, rival, wanted)

    def _outbid(self, model: ModelId, rival: int | None, wanted: int) -> None:
        """See that its epoch is above those of claims that lost to it (3)."""
        hosted = self._held.hosted.get(model)
        if hosted is None or hosted.phase in (Phase.DRAINING, Phase.FAILED):
            return  # it was given up just now
        lost = rival is not None and rival >= hosted.epoch
        ever = wanted == 1 and self._outlook.epoch(model) > hosted.epoch
        if hosted.raising is None and (lost or ever):
            raising = self._save_next_epoch(model)
            self._held.put(replace(hosted, raising=raising, wanted=wanted))

    def _hand_over(
        self,
        hosted: Hosted,
        deployment: Deployment,
        barred: str,
        found: Sequence[Contender],
        now: float,
    ) -> None:
        """Whether a host that may host no longer has served long enough (9)."""
        own, wanted = self._outlook.own, wanted_replicas(deployment, self._outlook.demand)
        serving = ready_elsewhere(found, own)
        if hosted.phase is not Phase.READY:
            self._held.give_up(hosted, barred, "moved")
        elif serving >= wanted:
            names = ", ".join(c.node.name for c in found if c.node.node != own)
            self._held.give_up(hosted, f"{barred}; {names} serves it", "moved")
        elif serving < len(found):
            self._turns.over(deployment.model)
        elif (
            self._outlook.draining
            and not self._bids_missing(deployment, now)
            and not self._awaits_claim(deployment, None, wanted - serving, now)
        ):
            self._held.give_up(hosted, f"{barred}; no other node can host it", "moved")

    def _consider(self, deployment: Deployment, now: float) -> bool:
        """Claim what it does not host if it is its turn. Whether there is a gap that it would
        fill."""
        model, outlook = deployment.model, self._outlook
        if deployment.removed:
            self._held.failures.pop(model, None)
            self._turns.forget(model)
            return False
        claimants = outlook.claimants(model, None)
        found = contenders(deployment, claimants)
        wanted = wanted_replicas(deployment, outlook.demand)
        outlook.note_hosts(model, found[:wanted], wanted)
        offer = self._offers.get(model)
        own = None
        if len(found) < wanted and offer is not None and outlook.heard:  # 1, 2
            own = ranked(outlook.myself(model, bid=offer.bid), deployment)
        if own is None or offer is None:
            self._turns.over(model)
            return False
        if not self._held.offers_hold or self._bids_missing(deployment, now):  # 11, 5
            return True
        if self._awaits_claim(deployment, own, wanted - len(found), now):  # 4, 10
            return True
        if offer.bid.suits is Suits.SWAP:
            self._held.make_room(offer, outlook.deployments)
            return True
        cause, lead = outlook.cause_of_claim(
            deployment, found, wanted, self._held.failures.get(model, 0)
        )
        if silent := self._turns.passed(model, outlook.others):
            lead = f"{lead}; {', '.join(silent)} let its turn pass"  # 14
        why = why_claim(deployment, own, outlook.others.values(), lead)
        claiming = Hosted(deployment, 0, own.score, Phase.CLAIMING, why, cause, wanted, offer.plan)
        epoch = outlook.epoch(model)
        shortage = self._held.ledger.lease(model, epoch + 1, offer.memory)
        if shortage is not None:
            claiming = replace(claiming, epoch=epoch)
            self._held.fail(claiming, f"its bid was wrong: {shortage}", now)  # 7
            return True
        self._held.outdate_offers()
        self._held.put(replace(claiming, epoch=self._save_next_epoch(model)))  # 6
        return True

    def _bids_missing(self, deployment: Deployment, now: float) -> bool:
        """Whether others may yet bid; asks to be woken when that is over (5)."""
        until = self._outlook.seen_at[deployment.model] + BID_WAIT_S
        if now >= until or all_have_bid(deployment, self._outlook.others.values()):
            return False
        self._waits.append(until)
        return True

    def _awaits_claim(
        self, deployment: Deployment, own: Ranked | None, places: int, now: float
    ) -> bool:
        """Whether others come before `own`, or may host at all if that is None, who are believed to
        claim; asks to be woken when one no longer is (14)."""
        until = self._turns.awaited(deployment, own, self._outlook.others, places, now)
        if until is not None:
            self._waits.append(until)
        return until is not None

    # -- the engine -------------------------------------------------------------------------------

    def _serve(self, hosted: Hosted, deployment: Deployment, now: float) -> None:
        """It stands: see that its engine is, or will be, the one that is asked for (13)."""
        same = hosted.phase is Phase.RESTARTING or same_engine(hosted.deployment, deployment)
        hosted = self._held.put(replace(hosted, deployment=deployment))
        if not same:
            self._held.restart(hosted)
        elif hosted.phase is Phase.RESTARTING and not hosted.engine and self._held.offers_hold:
            offer = self._offers.get(hosted.model)
            if offer is not None and offer.bid.version >= deployment.version:
                self._start_anew(hosted, offer, now)

    def _start_anew(self, hosted: Hosted, offer: Offer, now: float) -> None:
        if offer.bid.suits not in (Suits.YES, Suits.SPLIT):
            if hosted.replan_until is not None and now < hosted.replan_until:  # 15
                self._waits.append(hosted.replan_until)
                return
            self._held.give_up(hosted, f"not any more: {offer.bid.reason}", "moved")
            return
        shortage = self._held.ledger.lease(hosted.model, hosted.epoch, offer.memory)
        if shortage is not None:
            self._held.fail(hosted, f"its bid was wrong: {shortage}", now)  # 7
            return
        self._held.outdate_offers()
        anew = replace(hosted, phase=Phase.PREPARING, plan=offer.plan)  # 13, 15
        self._held.start(replace(anew, replanning=False, replan_until=None))

    def _save_next_epoch(self, model: ModelId) -> int:
        epoch = self._outlook.next_epoch(model)
        self._held.orders.append(SaveEpoch(model, epoch))
        return epoch
