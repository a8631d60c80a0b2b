"""Memory this node lends to hosts of models that lie on several nodes. Pure.

Part of the machine in election.py; it leases from the same ledger. A loan is asked for by the host
of a plan, and lives for as long as that says it needs it. Rules, numbered as in the code:

1. One loan for each host and model: what a host asks for anew ends what it had.
2. Nothing is lent while this node is draining; when it begins to drain, all loans end: their hosts
   plan anew.
3. A loan serves the host that stands. Where one replica is wanted, and another node contends for
   the model that goes before the loan's host (claims.py, rule 2: ready first, then the higher
   epoch), the loan is refused, or ends. A host whose claim has not come counts as preparing.
4. A loan that is not renewed for `RENEWED_S` ends: its host is gone, or cannot be heard.
5. Its memory is free when the process that used it is gone (`LoanEnded`), not before. So a loan
   that is to end is ordered to end once, and then waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from meshd.election.claims import CONTENDING, wanted_replicas
from meshd.election.ledger import Ledger
from meshd.election.outlook import Outlook
from meshd.election.words import Effect, EndLoan, LoanAnswered, LoanAsked
from meshd.ids import LoanId, ModelId
from meshd.view import Claim, ClaimState, Loan

RENEWED_S: Final = 5.0
"""Longer than a suspicion of membership lasts, and five beats of a host."""


@dataclass(frozen=True, slots=True)
class Lent:
    """One loan from its grant to the end of its process."""

    loan: Loan
    until: float
    """When it ends if it is not renewed."""
    ending: bool = False


class Lending:
    """`leases_moved`: called when a lease began or ended."""

    def __init__(self, ledger: Ledger, leases_moved: Callable[[], None]) -> None:
        self._ledger = ledger
        self._leases_moved = leases_moved
        self._lent: dict[LoanId, Lent] = {}

    @property
    def lent(self) -> Mapping[LoanId, Lent]:
        return MappingProxyType(self._lent)

    def due(self) -> float | None:
        return min((lent.until for lent in self._lent.values() if not lent.ending), default=None)

    def asked(
        self, event: LoanAsked, outlook: Outlook, own: Claim | None, now: float
    ) -> list[Effect]:
        """`own`: this node's claim of the model, if it has one."""
        loan = event.loan
        host, model = loan.host, loan.ask.model
        before = [
            lent.loan.id
            for lent in self._lent.values()
            if (lent.loan.host, lent.loan.ask.model) == (host, model)
        ]
        effects = [order for old in before for order in self._end(old, "asked for anew")]  # 1
        refusal = "this node is draining" if outlook.draining else None  # 2
        refusal = refusal or self._outdated(loan, outlook, own)  # 3
        if refusal is None:
            memory = dict(loan.ask.part.memory)
            shortage = self._ledger.lease(loan.id, loan.ask.epoch, memory)
            refusal = None if shortage is None else str(shortage)
        if refusal is None:
            self._lent[loan.id] = Lent(loan, now + RENEWED_S)
            self._leases_moved()
        return [*effects, LoanAnswered(loan.id, refusal)]

    def renewed(self, loan: LoanId, now: float) -> None:
        lent = self._lent.get(loan)
        if lent is not None and not lent.ending:
            self._lent[loan] = replace(lent, until=now + RENEWED_S)

    def ended(self, loan: LoanId) -> None:
        """Its process is gone, or never came to be (5)."""
        self._lent.pop(loan, None)
        if self._ledger.release(loan):
            self._leases_moved()

    def look(self, outlook: Outlook, claims: Mapping[ModelId, Claim], now: float) -> list[Effect]:
        """After every event: what is to end. `claims`: this node's own."""
        effects: list[Effect] = []
        for lent in tuple(self._lent.values()):
            loan = lent.loan
            reason = "this node is draining" if outlook.draining else None  # 2
            reason = reason or self._outdated(loan, outlook, claims.get(loan.ask.model))  # 3
            if reason is None and lent.until <= now:  # 4
                reason = f"its host was not heard of for {RENEWED_S:g} s"
            if reason is not None:
                effects += self._end(loan.id, reason)
        return effects

    def _end(self, loan: LoanId, reason: str) -> list[Effect]:
        lent = self._lent[loan]
        if lent.ending:
            return []
        self._lent[loan] = replace(lent, ending=True)
        return [EndLoan(loan, reason)]

    def _outdated(self, loan: Loan, outlook: Outlook, own: Claim | None) -> str | None:
        """Why its host does not stand (any more) (3)."""
        model, host = loan.ask.model, loan.host
        deployment = outlook.deployments.get(model)
        if deployment is None or wanted_replicas(deployment, outlook.demand) > 1:
            return None
        standing, rivals = (False, loan.ask.epoch), []
        for node in outlook.claimants(model, own):
            claim = node.claims[model]
            precedence = claim.state is ClaimState.READY, claim.epoch
            if node.node == host:
                standing = max(standing, precedence)
            elif claim.state in CONTENDING:
                rivals.append((precedence, node.name))
        first, name = max(rivals, default=(standing, ""))
        return f"{name} hosts it, with epoch {first[1]}" if first > standing else None
