"""The shell around offering.py: the facts about this node, put together when they change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from meshd.election.appraisal import Appraiser
from meshd.election.demand import Demand
from meshd.election.election import Election
from meshd.election.fit import Fit
from meshd.election.fit.splitting import SplitFit
from meshd.election.hosted import Phase
from meshd.election.lenders import candidates
from meshd.election.memory import Memory, untried
from meshd.election.needs import Needs
from meshd.election.offering import SWAP_IDLE_S, NodeFacts, Use, barred, offers
from meshd.election.shapes import Shapes
from meshd.election.splitting import Candidate, choose_workers, unsplittable
from meshd.election.words import Offer
from meshd.errors import MeshdError
from meshd.ids import ModelId
from meshd.kernel import Clock, Pool
from meshd.view import Bid, Deployment, View

log = logging.getLogger(__name__)

BUILTIN = ModelId("builtin")


class Bidding:
    """Of a member; a client bids nothing. `disk_problem`: why no epoch can be saved, so that
    nothing may be claimed; None if one can."""

    def __init__(
        self,
        needs: Needs,
        machine: Election,
        appraiser: Appraiser,
        memory: Memory,
        shapes: Shapes,
        demand: Demand,
        *,
        disk_problem: Callable[[], str | None],
        clock: Clock,
    ) -> None:
        self._needs = needs
        self._machine = machine
        self._appraiser = appraiser
        self._memory = memory
        self._shapes = shapes
        self._demand = demand
        self._clock = clock
        self._disk_problem = disk_problem
        self._elsewhere: dict[str, str | None] = {}
        """Of each REF what `Needs.here` said last: it asks the disk."""
        self._looked = 0
        """Times that this changed."""
        self._lenders: tuple[Candidate, ...] = ()
        """Other nodes, as of the last offers."""
        self._rpc_protocol: str | None = None
        """Of this node's engine."""
        self._made: tuple[Offer, ...] = ()
        self._made_of: tuple[object, ...] = ()
        """All that offers are made of, but for the records."""
        self._known: Mapping[ModelId, tuple[Deployment, Offer | None]] = {}
        """By model: the record and what was made of it."""

    def make(
        self, records: tuple[Deployment, ...], view: View, *, draining: bool, anew: bool = False
    ) -> tuple[Offer, ...] | None:
        """The offers, or None if they are as they were. `anew`: the last ones are out of date,
        even if they look the same, so they are given either way."""
        bar, facts = self._bar(view, draining=draining), self._facts(records, view)
        digests = _digests(records, view)
        self._look_at_lenders(view)
        made_of = (
            bar,
            self._memory.budgets,
            tuple((m, tuple(held.items())) for m, held in facts.leases.items()),
            self._unused(facts),
            facts.weights,
            facts.tokens_per_s,
            tuple(digests.items()),
            self._needs.engine(),
            self._shapes.changes,
            self._appraiser.changes,
            self._looked,
            self._lenders,
            self._rpc_protocol,
        )
        known = self._known if made_of == self._made_of else {}
        lacking = [r for r in records if r.model not in known or known[r.model][0] != r]
        new = offers(
            lacking,
            facts,
            lambda deployment, free: self._fit(deployment, digests.get(deployment.model), free),
            self._clock.now(),
            bar=bar,
            split=lambda deployment, free: self._split(
                deployment, digests.get(deployment.model), free
            ),
        )
        by_model = {offer.bid.model: offer for offer in new}
        found = {r.model: (r, by_model.get(r.model)) for r in lacking}
        self._known = {r.model: found.get(r.model) or known[r.model] for r in records}
        self._made_of = made_of
        made = tuple(offer for _, offer in self._known.values() if offer is not None)
        if made == self._made and not anew:
            return None
        self._made = made
        return made

    def bid(self, deployment: Deployment, view: View, *, draining: bool) -> Bid:
        """For what need not be deployed; its size is known."""
        digest = _digests((deployment,), view).get(deployment.model)
        self._look_at_lenders(view)
        (offer,) = offers(
            (deployment,),
            self._facts((deployment,), view),
            lambda deployment, free: self._fit(deployment, digest, free),
            self._clock.now(),
            bar=self._bar(view, draining=draining),
            split=lambda deployment, free: self._split(deployment, digest, free),
        )
        return offer.bid

    async def look_for_files(self, records: Iterable[Deployment], pool: Pool) -> None:
        """Files that REFs name come and go."""
        deployed = {record.ref for record in records if not record.removed}
        refs = [ref for ref in self._elsewhere if ref in deployed]
        try:
            found = await pool.run(lambda: {ref: self._needs.here(ref) for ref in refs})
        except MeshdError as error:
            log.info("files are not looked for now: %s", error.message)
            return
        if found != self._elsewhere:
            self._elsewhere, self._looked = found, self._looked + 1

    def _bar(self, view: View, *, draining: bool) -> str | None:
        problem = untried(view.runtime, view.devices, self._needs.engine()[1])
        if problem is None and not self._memory.budgets:
            problem = "its memory is not known yet"
        return barred(
            client=False, draining=draining, engine_problem=problem or self._disk_problem()
        )

    def _facts(self, records: tuple[Deployment, ...], view: View) -> NodeFacts:
        uses = {}
        for model, hosted in self._machine.hosted.items():
            if hosted.phase is Phase.READY:
                last_at = self._demand.last_at(model)
                since = hosted.ready_at if hosted.ready_at is not None else self._clock.now()
                uses[model] = Use(
                    self._demand.busy(model), max(since, last_at if last_at is not None else since)
                )
        return NodeFacts(
            capacity=self._memory.capacity,
            leases={h: lease.memory for h, lease in self._machine.ledger.leases.items()},
            uses=uses,
            weights=_on_disk(records, view),
            tokens_per_s=None if view.runtime is None else view.runtime.tokens_per_s,
        )

    def _unused(self, facts: NodeFacts) -> tuple[ModelId, ...]:
        """What of the uses makes a difference to offers: who may be put to sleep, in order."""
        now = self._clock.now()
        unused = [
            (use.last_at, model)
            for model, use in facts.uses.items()
            if not use.busy and now - use.last_at >= SWAP_IDLE_S
        ]
        return tuple(model for _, model in sorted(unused))

    def _fit(
        self, deployment: Deployment, digest: str | None, free: Mapping[str, int]
    ) -> Fit | None:
        ref = deployment.ref
        if ref not in self._elsewhere:
            self._elsewhere[ref] = self._needs.here(ref)
        elsewhere = self._elsewhere[ref]
        if elsewhere is not None:
            return Fit(False, elsewhere)
        engine, _ = self._needs.engine()
        found = self._appraiser.fit(
            deployment, self._memory.budgets, free, digest=digest, engine=engine
        )
        problem = self._shapes.problem(deployment)
        if found is None and problem is not None:
            return Fit(False, problem.words)
        return found

    def _split(
        self, deployment: Deployment, digest: str | None, free: Mapping[str, int]
    ) -> SplitFit | None:
        """The same with memory of other nodes; asked after `_fit`."""
        if not self._lenders or self._elsewhere[deployment.ref] is not None:
            return None
        engine, _ = self._needs.engine()
        needed = self._appraiser.corrected(deployment, digest, engine)
        if needed is None:
            return None
        found = choose_workers(
            needed,
            self._memory.budgets,
            free,
            self._lenders,
            rpc_protocol=self._rpc_protocol,
        )
        if found.fits:
            return found
        return replace(found, words=unsplittable(found, self._lenders))

    def _look_at_lenders(self, view: View) -> None:
        self._lenders = candidates(view, self._needs.avoided(), self._needs.bytes_per_s())
        self._rpc_protocol = None if view.runtime is None else view.runtime.rpc_protocol


def names_a_file(ref: str) -> bool:
    """Whether REF is a path: the weights are where it can be read, and nowhere else."""
    return ref.startswith(("/", ".", "~"))


def _on_disk(records: tuple[Deployment, ...], view: View) -> frozenset[ModelId]:
    """A model of the catalog is known on the disk by its file, not by its name."""
    models, refs = {w.model for w in view.weights}, {w.ref for w in view.weights}
    return frozenset(
        record.model
        for record in records
        if record.model == BUILTIN
        or record.model in models
        or record.ref in refs
        or names_a_file(record.ref)
    )


def _digests(records: tuple[Deployment, ...], view: View) -> Mapping[ModelId, str]:
    """Of weights that are known here, by model: of those an engine runs on, else on the disk."""
    by_model = {w.model: w.digest for w in view.weights}
    by_ref = {w.ref: w.digest for w in view.weights}
    found = {}
    for record in records:
        seen = view.local.get(record.model)
        digest = None if seen is None else seen.digest
        digest = digest or by_ref.get(record.ref) or by_model.get(record.model)
        if digest is not None:
            found[record.model] = digest
    return found
