"""What this node hosts: one entry a model, its lease, and the orders about it. Pure.

Part of the machine in election.py, whose rules the numbers are of: that decides what begins and
ends, this is how. Nothing here looks at other nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from meshd.election.hosted import PROVED_S, REPLAN_WAIT_S, REPLANS, Hosted, Phase, backoff_s
from meshd.election.ledger import Ledger
from meshd.election.words import (
    Effect,
    HostChanged,
    HostReported,
    Offer,
    PutToSleep,
    StartHost,
    StopHost,
)
from meshd.ids import ModelId
from meshd.view import Deployment, ModelState

_WORKING = frozenset(
    {ModelState.FETCHING, ModelState.VERIFYING, ModelState.WAITING, ModelState.LOADING}
)


class Holdings:
    """`name`: of this node, for what is said to people."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.hosted: dict[ModelId, Hosted] = {}
        self.ledger = Ledger()
        self.failures: dict[ModelId, int] = {}
        """In a row."""
        self._sent_to_sleep: dict[ModelId, int] = {}
        """Version of the victim's record (10)."""
        self.orders: list[Effect] = []
        """Of the event that is being handled."""
        self.leases_moved = False
        """By that event."""
        self.offers_hold = False
        """The offers were made with the leases there are (11)."""

    def begin(self) -> None:
        """A new event is handled."""
        self.orders, self.leases_moved = [], False

    # -- the engine -------------------------------------------------------------------------------

    def reported(self, event: HostReported, now: float) -> None:
        hosted = self.hosted.get(event.model)
        if hosted is None or not hosted.engine:
            return
        if event.state is ModelState.ABSENT:
            self._engine_gone(hosted, now)
        elif hosted.phase not in (Phase.PREPARING, Phase.READY):
            return  # it was given up; only its end is of interest
        elif event.state is ModelState.FAILED:
            reason = event.reason or "its engine failed"
            if event.worker_lost and self._failures_before(hosted, now) < REPLANS:
                self._plan_anew(hosted, reason, now)  # 15
                return
            forgiven = REPLANS if event.worker_lost else 0
            at_least_s = event.retry_after_s or 0.0
            self.fail(hosted, reason, now, at_least_s=at_least_s, forgiven=forgiven)
        elif event.state is ModelState.READY:
            since = now if hosted.ready_at is None else hosted.ready_at
            self.put(replace(hosted, phase=Phase.READY, ready_at=since, at=None, reason=""))
        elif event.state in _WORKING and event.state is not hosted.at:
            reason = event.reason or str(event.state)
            preparing = replace(hosted, phase=Phase.PREPARING, at=event.state, reason=reason)
            self.put(replace(preparing, ready_at=None))

    def _engine_gone(self, hosted: Hosted, now: float) -> None:
        self._release(hosted.model)
        gone = replace(hosted, engine=False)
        match hosted.phase:
            case Phase.DRAINING:
                del self.hosted[hosted.model]  # 8
            case Phase.RESTARTING:
                until = now + REPLAN_WAIT_S if hosted.replanning else None
                self.put(replace(gone, replan_until=until))
            case Phase.FAILED:
                self.put(gone)
            case _:
                self.fail(gone, "its engine ended without being asked to", now)

    def start(self, hosted: Hosted) -> None:
        """Its memory is leased and its epoch saved."""
        self.put(replace(hosted, engine=True))
        self.orders.append(StartHost(hosted.deployment, hosted.epoch, hosted.plan))

    def restart(self, hosted: Hosted) -> None:
        """Stop its engine and keep its claim; `hosted` has the record to be started with."""
        reason = "restarting with other options"
        again = replace(hosted, phase=Phase.RESTARTING, reason=reason, at=None, ready_at=None)
        split = hosted.plan is not None
        self.put(replace(again, plan=None, replanning=split, replan_until=None))
        self.orders.append(StopHost(hosted.model, reason, hosted.phase is Phase.READY))  # 13

    def _plan_anew(self, hosted: Hosted, reason: str, now: float) -> None:
        """End what is left of the engine and keep the claim, until offers say who could lend what
        the lost worker did."""
        self.failures[hosted.model] = self._failures_before(hosted, now) + 1
        words = f"planning anew: {reason}"
        again = replace(hosted, phase=Phase.RESTARTING, reason=words, at=None, ready_at=None)
        self.put(replace(again, plan=None, replanning=True, replan_until=None))
        self.orders.append(StopHost(hosted.model, reason, drain=False))
        self.orders.append(HostChanged(hosted.model, f"{self._name} is {words}", "failed"))  # 12

    def _failures_before(self, hosted: Hosted, now: float) -> int:
        """In a row; none count once it has been READY for long."""
        if hosted.ready_at is not None and now - hosted.ready_at >= PROVED_S:
            return 0
        return self.failures.get(hosted.model, 0)

    def fail(
        self,
        hosted: Hosted,
        reason: str,
        now: float,
        *,
        at_least_s: float = 0.0,
        forgiven: int = 0,
    ) -> None:
        """Say that it was this node's turn and why it came to nothing; end what there is of it.
        `forgiven`: failures before that do not make the back-off longer: they were others'."""
        before = self._failures_before(hosted, now)
        wait_s = max(backoff_s(max(0, before - forgiven)), at_least_s)
        self.failures[hosted.model] = before + 1
        failed = replace(hosted, phase=Phase.FAILED, reason=reason, at=None, ready_at=None)
        self.put(replace(failed, raising=None, retry_at=now + wait_s, backoff_s=wait_s))  # 7
        if hosted.engine:
            self.orders.append(StopHost(hosted.model, reason, drain=False))
        why = f"{self._name} could not: {reason}; passed over for {wait_s:.0f} s"
        self.orders.append(HostChanged(hosted.model, why, "failed"))  # 12

    def give_up(self, hosted: Hosted, reason: str, cause: str) -> None:
        """Others host it, or nobody; `cause` is a word of HostChanged."""
        if hosted.phase is Phase.CLAIMING:
            self.drop(hosted)
            return
        if hosted.engine:
            self.put(replace(hosted, phase=Phase.DRAINING, reason=reason, at=None, raising=None))
            if hosted.phase is not Phase.RESTARTING:
                drain = hosted.phase is Phase.READY
                self.orders.append(StopHost(hosted.model, reason, drain))
        else:
            self.drop(hosted)
        why = f"{self._name} gives it up: {reason}"
        self.orders.append(HostChanged(hosted.model, why, cause))  # 12

    def make_room(self, offer: Offer, deployments: Mapping[ModelId, Deployment]) -> None:
        """Ask that its victims be put to sleep."""
        for victim in offer.victims:  # 10
            record = deployments.get(victim)
            if record is None or record.asleep or record.removed:
                continue
            if self._sent_to_sleep.get(victim) != record.version:
                self._sent_to_sleep[victim] = record.version
                self.orders.append(PutToSleep(victim, offer.bid.model))

    # -- books ------------------------------------------------------------------------------------

    def put(self, hosted: Hosted) -> Hosted:
        self.hosted[hosted.model] = hosted
        return hosted

    def drop(self, hosted: Hosted) -> None:
        """Forget what has no engine, and give its lease back."""
        del self.hosted[hosted.model]
        self._release(hosted.model)

    def _release(self, model: ModelId) -> None:
        if self.ledger.release(model):
            self.outdate_offers()

    def outdate_offers(self) -> None:
        """Leases changed (11)."""
        self.leases_moved, self.offers_hold = True, False
