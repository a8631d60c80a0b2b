"""Several elections at one table: what one publishes the others see at once, unless they are cut
off from each other. Everything that happens is written down as a transcript.

At a table that `splits`, a node that has room for half of a model bids with a worker for the other
half: the first other one it sees that has room. Loans are asked for when an engine is started, and
renewed as long as both ends see each other and the host has its engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from meshd.election.election import Election
from meshd.election.words import (
    CapacityMeasured,
    DeploymentsSeen,
    DrainAsked,
    Effect,
    EndLoan,
    EpochSaved,
    Event,
    HostChanged,
    HostReported,
    LeasesChanged,
    LoanAnswered,
    LoanAsked,
    LoanEnded,
    LoanRenewed,
    NodesSeen,
    Offer,
    OffersMade,
    PublishClaims,
    PutToSleep,
    SaveEpoch,
    Standing,
    StartHost,
    StopHost,
)
from meshd.ids import LoanId, ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.sizes import format_size
from meshd.view import (
    Bid,
    Claim,
    Deployment,
    Loan,
    LoanAsk,
    ModelState,
    Part,
    SplitPlan,
    Suits,
)


@dataclass
class Seat:
    """One node: its machine, and what it would say of itself."""

    election: Election
    bid: Bid
    size: int
    capacity: int
    epochs: dict[ModelId, int]
    draining: bool = False
    records: Mapping[ModelId, Deployment] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()

    @property
    def free(self) -> int:
        return self.capacity - sum(self.election.ledger.leased().values())

    def offers(self, worker: str | None) -> tuple[Offer, ...]:
        """For every record, after what is leased now; `worker` has half of what it takes."""
        offers = []
        for record in self.records.values():
            held = self.election.ledger.leases.get(record.model)
            free = self.free + (0 if held is None else held.memory["CUDA0"])
            bid = replace(self.bid, model=record.model, version=record.version)
            if held is not None or self.size <= free:
                offers.append(Offer(bid, {"CUDA0": self.size}))
            elif worker is not None and self.size // 2 <= free:
                bid = replace(bid, suits=Suits.SPLIT, workers=1)
                half = self.size // 2
                part = Part(NodeId(worker), worker, (("CUDA0", half),), (4,), 0, False, 0.5)
                plan = SplitPlan((part,), (("CUDA0", 4),))
                offers.append(Offer(bid, {"CUDA0": half}, plan=plan))
            else:
                reason = f"needs {format_size(self.size)}, {format_size(self.free)} free on CUDA0"
                offers.append(Offer(replace(bid, suits=Suits.NO, reason=reason)))
        return tuple(offers)


class Table:
    """`now` is the scene's; it moves by `wait_until` only."""

    def __init__(self, *, splits: bool = False) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.seats: dict[str, Seat] = {}
        self._groups: list[set[str]] = []
        self._splits = splits
        self._pending: deque[tuple[str, Event]] = deque()
        self._loans = 0
        """That were ever asked for."""

    # -- what happens -----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self.lines.append(f"# {text}" if not self.lines else f"\n# {text}")

    def join(self, name: str, bid: Bid, *, size: int, capacity: int) -> None:
        """Also back again after `crash`, with the epochs it saved."""
        before = self.seats.get(name)
        epochs = {} if before is None else before.epochs
        election = Election(NodeId(name), name, epochs)
        records = {} if before is None else before.records
        self.seats[name] = Seat(election, bid, size, capacity, epochs, records=records)
        self._groups = [set(self.seats)]
        self._post(name, CapacityMeasured({"CUDA0": capacity}))
        if records:
            self._post(name, DeploymentsSeen(tuple(records.values())))
            self._post(name, OffersMade(self._offers(name)))
        self._tell_all()

    def write(self, record: Deployment) -> None:
        for name in self._present():
            seat = self.seats[name]
            seat.records = {**seat.records, record.model: record}
            self._pending.append((name, DeploymentsSeen(tuple(seat.records.values()))))
            self._pending.append((name, OffersMade(self._offers(name))))
        self._settle()
        self._tell_all()

    def report(
        self, name: str, state: ModelState, model: ModelId, reason: str = "", *, lost: bool = False
    ) -> None:
        self._post(name, HostReported(model, state, reason or None, worker_lost=lost))

    def returned(self, name: str) -> None:
        """What used memory that this node lent, and was told to end, is gone."""
        for loan, lent in tuple(self.seats[name].election.lent.items()):
            if lent.ending:
                self._post(name, LoanEnded(loan))

    def drain(self, name: str, on: bool = True) -> None:
        self.seats[name].draining = on
        self._post(name, DrainAsked(on))
        self._tell_all()

    def part(self, *groups: Iterable[str]) -> None:
        """Only who is in one group sees each other; who is in none is gone."""
        self._groups = [set(group) for group in groups]
        self._tell_all()

    def wait_until(self, at: float) -> None:
        """Renewals come before what is due: the time between is not lived through."""
        self.now = at
        for name in self._present():
            self._pending.extend((name, LoanRenewed(loan)) for loan in self._needed(name))
        for name in self._present():
            due = self.seats[name].election.due()
            if due is not None and due <= at:
                self._pending.append((name, Tick()))
        self._settle()

    # -- how it goes round ------------------------------------------------------------------------

    def _present(self) -> list[str]:
        return sorted(set().union(*self._groups))

    def _post(self, name: str, event: Event) -> None:
        self._pending.append((name, event))
        self._settle()

    def _tell_all(self) -> None:
        self._pending.extend((name, NodesSeen(self._seen_by(name))) for name in self._present())
        if self._splits:
            self._pending.extend((n, OffersMade(self._offers(n))) for n in self._present())
        self._settle()

    def _group(self, name: str) -> set[str]:
        return next(group for group in self._groups if name in group)

    def _offers(self, name: str) -> tuple[Offer, ...]:
        seat = self.seats[name]
        others = sorted(self._group(name) - {name}) if self._splits else []
        roomy = (other for other in others if self.seats[other].free >= seat.size // 2)
        return seat.offers(next(roomy, None))

    def _needed(self, name: str) -> list[LoanId]:
        """Loans of this node whose hosts are there and still need them."""
        return [
            loan
            for loan, lent in self.seats[name].election.lent.items()
            if lent.loan.host in self._group(name)
            and (hosted := self.seats[lent.loan.host].election.hosted.get(lent.loan.ask.model))
            and hosted.engine
        ]

    def _seen_by(self, name: str) -> tuple[Standing, ...]:
        group = self._group(name)
        return tuple(
            Standing(
                NodeId(other),
                other,
                {offer.bid.model: offer.bid for offer in self._offers(other)},
                {claim.model: claim for claim in seat.claims},
                seat.draining,
            )
            for other, seat in sorted(self.seats.items())
            if other in group and other != name
        )

    def _settle(self) -> None:
        for _ in range(1_000):
            if not self._pending:
                return
            name, event = self._pending.popleft()
            effects = self.seats[name].election.handle(event, self.now)
            if effects or _happens(event):
                self.lines.append(f"{self.now:7.1f} {name:<6} {show_event(event)}")
            for effect in effects:
                self.lines.append(f"{'':14}   {show_effect(effect)}")
                self._run(name, effect)
        raise AssertionError("the table does not come to rest")

    def _run(self, name: str, effect: Effect) -> None:
        seat = self.seats[name]
        match effect:
            case SaveEpoch(model, epoch):
                seat.epochs[model] = epoch
                self._pending.append((name, EpochSaved(model, epoch)))
            case PublishClaims(claims):
                seat.claims = claims
                self._tell_others()
            case StartHost(plan=SplitPlan(parts)):
                self._pending.extend((p.name, self._asked(name, effect, p)) for p in parts)
            case LeasesChanged():
                self._pending.append((name, OffersMade(self._offers(name))))
                self._tell_others()
            case _:
                pass

    def _asked(self, host: str, order: StartHost, part: Part) -> LoanAsked:
        self._loans += 1
        ask = LoanAsk(order.deployment.model, order.epoch, "7.0.0", part, None)
        return LoanAsked(Loan(LoanId(f"loan-{self._loans}"), NodeId(host), ask))

    def _tell_others(self) -> None:
        self._pending.extend((name, NodesSeen(self._seen_by(name))) for name in self._present())


def _happens(event: Event) -> bool:
    """Worth a line although nothing follows from it."""
    return isinstance(event, HostReported | DrainAsked)


def show_event(event: Event) -> str:
    match event:
        case NodesSeen(nodes):
            words = "; ".join(
                f"{n.name}{' (draining)' if n.draining else ''}"
                + "".join(f" {c.state} {c.model} e{c.epoch}" for c in n.claims.values())
                for n in nodes
            )
            return f"sees {words or 'nobody'}"
        case DeploymentsSeen(records):
            return "records: " + ", ".join(_show_record(r) for r in records)
        case OffersMade(offers):
            return "offers " + ", ".join(f"{o.bid.model} {o.bid.suits}" for o in offers)
        case HostReported(model, state, reason):
            return f"engine of {model} is {state}" + (f": {reason}" if reason else "")
        case EpochSaved(model, epoch):
            return f"saved epoch {epoch} of {model}"
        case DrainAsked(on):
            return "is asked to drain" if on else "is asked to take part again"
        case LoanAsked(loan):
            return f"is asked by {loan.host} for {format_size(loan.ask.part.bytes)} as {loan.id}"
        case LoanEnded(loan):
            return f"has back what {loan} had"
        case Tick():
            return "wakes"
        case _:
            return type(event).__name__


def show_effect(effect: Effect) -> str:
    match effect:
        case PublishClaims(claims):
            return f"claims: {'; '.join(map(_show_claim, claims)) or 'none'}"
        case SaveEpoch(model, epoch):
            return f"save epoch {epoch} of {model}"
        case StartHost(deployment, epoch, plan):
            workers = "" if plan is None else f" with {', '.join(p.name for p in plan.parts)}"
            return f"start {deployment.model} e{epoch}{workers}"
        case StopHost(model, reason, drain):
            return f"stop {model}{' after its requests' if drain else ''}: {reason}"
        case LeasesChanged(leased):
            words = [f"{device} {format_size(size)}" for device, size in leased.items()]
            return f"leased: {', '.join(words)}"
        case PutToSleep(model, wanted_for):
            return f"put {model} to sleep for {wanted_for}"
        case HostChanged(model, why, cause):
            return f"{model} [{cause}] {why}"
        case LoanAnswered(loan, refusal):
            return f"grants {loan}" if refusal is None else f"refuses {loan}: {refusal}"
        case EndLoan(loan, reason):
            return f"ends {loan}: {reason}"


def _show_claim(claim: Claim) -> str:
    workers = "".join(f" with {w.name} {w.share:.0%}" for w in claim.workers)
    return f"{claim.state} {claim.model} e{claim.epoch}{workers} ({claim.reason})"


def _show_record(record: Deployment) -> str:
    words = [f"{record.model} v{record.version}", f"x{record.replicas or 'demand'}"]
    if record.host is not None:
        words.append(f"at {record.host}")
    words += [word for word in ("asleep", "removed") if getattr(record, word)]
    return " ".join(words)
