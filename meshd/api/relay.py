"""What exchanges share: the view, admission, pools of connections, and the counts of flights."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from meshd.api.admission import (
    Admission,
    CapacityChanged,
    Effect,
    Granted,
    ModelClosed,
    Refusal,
)
from meshd.api.breaker import NONE_SHUT, Breakers
from meshd.api.exchange import Exchange
from meshd.api.flights import Flights
from meshd.api.pool import ConnectRemote, Pool
from meshd.api.route import NOTHING, Route, find, plain_name, route
from meshd.api.traffic import Traffic
from meshd.api.usage import Usage
from meshd.api.withdrawal import drains_alone, withdrawn_models, without_withdrawn
from meshd.config import ApiSettings
from meshd.ids import InstanceId, ModelId, NodeId
from meshd.kernel import Clock, FlightRecorder
from meshd.kernel.machine import Tick
from meshd.view import ModelState, ModelView, PeerState, Target, View, exact_name

Capacity = int | Refusal | None
"""Slots, or why there is no queue, or None: not ready."""


class Relay:
    """One per API server. Synchronous, on the loop's thread.

    It drives the admission machine itself instead of through `kernel.Driver`: a request is two
    events, and a driver's queue, clock reading and flight record for each would cost a third of
    what the whole relay does. Capacity changes, which explain behaviour afterwards, are recorded;
    requests are not.
    """

    def __init__(
        self,
        settings: ApiSettings,
        *,
        clock: Clock,
        rng: random.Random,
        recorder: FlightRecorder | None,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        connect_remote: ConnectRemote | None = None,
        usage: Usage | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.rng = rng
        self.usage = usage
        self.traffic = Traffic()
        self.active: set[Exchange] = set()
        """Every exchange that has begun and not ended, waiting ones included."""
        self.draining = False
        """The node shuts down: no new request, of nobody. Never taken back."""
        self.withdrawn: frozenset[ModelId] = frozenset()
        """Models whose engines here take no new request: the node was drained by hand, and has
        handed them over, or cannot. Follows the view."""
        self.breakers = Breakers()
        self._recorder = recorder
        self._spawn = spawn
        self._connect_remote = connect_remote
        self._view: View | None = None
        self._standing: Mapping[NodeId, PeerState] = {}
        self._models: Mapping[ModelId, ModelView] = {}
        """For clients."""
        self._own: Mapping[ModelId, ModelView] = {}
        """For other nodes."""
        self._capacity: dict[ModelId, Capacity] = {}
        self._admission = Admission(settings.queue_per_model)
        self._timer: asyncio.TimerHandle | None = None
        self._pools: dict[InstanceId, Pool] = {}
        self.flights = Flights(clock, usage)
        self._all_idle_waiters: list[asyncio.Future[None]] = []
        self._node_lines: dict[InstanceId, bytes] = {}

    # -- the view ---------------------------------------------------------------------------------

    def apply(self, view: View) -> None:
        """Take over a new view: capacities to admission, pools of engines that are gone closed,
        requests taken off nodes that are.

        Called at every change of anything, so what did not change is passed over.
        """
        last, self._view = self._view, view
        withdrawn = withdrawn_models(view)
        if (
            last is None
            or view.models is not last.models
            or view.local is not last.local
            or withdrawn != self.withdrawn
        ):
            self.withdrawn = withdrawn
            self._apply_models(view)
        if last is None or view.peers is not last.peers:
            self._apply_peers(view)

    def _apply_models(self, view: View) -> None:
        self._own = dict(view.local)
        models = self._models = (
            {i: without_withdrawn(m, self.withdrawn) for i, m in view.models.items()}
            if self.withdrawn
            else dict(view.models)
        )
        self._node_lines.clear()
        for gone in [m for m in self._capacity if m not in models]:
            del self._capacity[gone]
            self._post(ModelClosed(gone, Refusal.GONE))
        for model_id, model in models.items():
            capacity = _capacity(model)
            if model_id in self._capacity and self._capacity[model_id] == capacity:
                continue
            self._capacity[model_id] = capacity
            if isinstance(capacity, Refusal):
                self._post(ModelClosed(model_id, capacity))
            else:
                self._post(CapacityChanged(model_id, capacity))
        self._forget_engines(view)

    def _forget_engines(self, view: View) -> None:
        """What is kept of engines that no node speaks of any more. Those of a suspect stay: it may
        be back in a second, and its streams with it."""
        live = {t.instance for m in view.models.values() for t in m.targets}
        live.update(
            m.instance
            for p in view.peers
            if p.state in (PeerState.ALIVE, PeerState.SUSPECT)
            for m in p.models
            if m.instance is not None
        )
        for instance in [i for i in self._pools if i not in live]:
            self._pools.pop(instance).close()
        self.flights.keep(live)
        self.breakers.keep(live)

    def _apply_peers(self, view: View) -> None:
        """Requests that are at a node which died, or is in doubt. One that drains or unloads the
        model is neither: it finishes what it has."""
        standing = {p.id: p.state for p in view.peers}
        if standing == self._standing:
            return
        self._standing = standing
        for exchange in tuple(self.active):
            target = exchange.target
            if target is None or target.node_id is None:
                continue
            state = standing.get(target.node_id)
            if state is None or state is PeerState.DEAD:
                what = "no member of the mesh any more" if state is None else "dead"
                exchange.node_changed(what, gone=True)
            elif state is not PeerState.ALIVE:
                exchange.node_changed(state.value, gone=False)

    def route(
        self, name: str, avoid: frozenset[InstanceId] = NOTHING, *, own: bool = False
    ) -> Route:
        """`own`: for another node's request, which goes no further."""
        breakers = self.breakers
        shut = breakers.shut(self.clock.now()) if breakers.troubled else NONE_SHUT
        models = self._own if own else self._models
        return route(name, models, self.flights.counts, self.rng, avoid, shut)

    def known_as(self, name: str, *, own: bool) -> str:
        """What `name` is queued, counted and routed under: one name for one set of weights.

        A name that is exact without need is the plain one; another node's plain name for what is
        ambiguous here is our exact one. `own`: as in `route`.
        """
        model = find(name, self._models)
        if model is not None and model.ambiguous and own:
            mine = self._own.get(model.id)
            if mine is not None and mine.digest is not None:
                return exact_name(mine.id, mine.digest)
        return name if model is None else model.id

    def knows(self, name: str) -> bool:
        return name in self._models

    def drains_alone(self, name: str, *, own: bool) -> bool:
        """Whether `name` finds no engine because this node was drained by hand. `own`: as above."""
        view = self._view
        return view is not None and drains_alone(view, name, own=own)

    # -- what is told of requests -----------------------------------------------------------------

    def asked(self, name: str) -> None:
        """A client of this node asked for `name`, as it is queued."""
        model = self._models.get(ModelId(name))
        if model is not None and self.usage is not None:
            self.usage.asked(plain_name(model))

    def answered(self, target: Target, sent_at: float, queued_there_s: float) -> None:
        """An engine is done with a request of a client of this node."""
        if self.usage is not None:
            service_s = self.clock.now() - sent_at - queued_there_s
            self.usage.answered(target.model, max(0.0, service_s))

    # -- admission --------------------------------------------------------------------------------

    def admit(self, exchange: Exchange) -> None:
        """Ask for a turn; `exchange` hears `granted` or `refused`, now or later."""
        now = exchange.arrived_at
        effects = self._admission.arrive(
            exchange,
            ModelId(exchange.model),
            exchange.origin,
            exchange.needs_slot,
            now + exchange.wait_s if exchange.wait_s > 0 else 0.0,
            now + max(self.settings.first_byte_timeout_s, exchange.wait_s),
            now,
        )
        if effects:
            self._run(effects)
        else:
            self._arm()

    def queue_depth(self, model: ModelId) -> int:
        return self._admission.waiting(model)

    def slots_in_use(self, model: ModelId) -> int:
        """By requests that went through here, wherever their engines are."""
        return self._admission.in_flight(model)

    def own_slots_in_use(self) -> Mapping[ModelId, int]:
        """Slots of this node's engines that are taken, whoever asked."""
        return Counter(
            e.target.model
            for e in self.active
            if e.needs_slot and e.target is not None and e.target.local
        )

    async def wait_all_idle(self) -> None:
        while self.active:
            waiter = asyncio.get_running_loop().create_future()
            self._all_idle_waiters.append(waiter)
            await waiter

    # -- for exchanges ----------------------------------------------------------------------------

    def pool(self, target: Target) -> Pool:
        pool = self._pools.get(target.instance)
        if pool is None:
            pool = Pool(target, self._connect_remote, self._spawn, self.clock)
            self._pools[target.instance] = pool
        return pool

    def node_lines(self, target: Target) -> bytes:
        """The header lines that say which node's engine answered."""
        lines = self._node_lines.get(target.instance)
        if lines is None:
            where = "local" if target.local else "remote"
            if workers := self._workers(target):
                where += f"; workers={workers}"
            lines = f"x-meshd-node: {target.node}\r\nx-meshd-route: {where}\r\n".encode("latin-1")
            self._node_lines[target.instance] = lines
        return lines

    def _workers(self, target: Target) -> str:
        """Who lends memory for that engine, with their shares: `b:0.34,c:0.33`; empty if nobody
        does."""
        model = self._models.get(target.model)
        hosts = () if model is None else model.hosts
        host = next((h for h in hosts if h.node == target.node), None)
        return ",".join(f"{w.name}:{w.share:.2f}" for w in (host.workers if host else ()))

    def finished(self, exchange: Exchange, outcome: str, bytes_out: int) -> None:
        """Called once by every exchange, when it is DONE."""
        self.active.discard(exchange)
        target, traffic = exchange.target, self.traffic
        known = exchange.model if exchange.model in self._models else ""
        taken = "none" if target is None else "local" if target.local else "remote"
        row = traffic.of(known, taken)
        row.count(outcome)
        if target is not None:
            row.seconds.observe(self.clock.now() - exchange.arrived_at)
            traffic.bytes_out += bytes_out
            self.flights.release(target)
        effects = self._admission.abandon(exchange)
        if effects:
            self._run(effects)
        if not self.active:
            waiters, self._all_idle_waiters = self._all_idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # -- time -------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Once a second: late answers, idle connections."""
        for exchange in tuple(self.active):
            exchange.check_late(now)
        for pool in self._pools.values():
            pool.sweep(now)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _post(self, event: CapacityChanged | ModelClosed | Tick) -> None:
        now = self.clock.now()
        effects = self._admission.handle(event, now)
        if self._recorder is not None:
            self._recorder.record(now, "admission", event, ())
        self._run(effects)
        self._arm()

    def _run(self, effects: Sequence[Effect]) -> None:
        # An effect may call back into the machine (a request that ends at once). Its state is
        # whole between calls, and an exchange that ended meanwhile ignores its effect.
        for effect in effects:
            exchange = effect.key
            assert isinstance(exchange, Exchange)
            if type(effect) is Granted:
                exchange.granted()
            else:
                assert not isinstance(effect, Granted)
                exchange.refused(effect.reason)

    def _arm(self) -> None:
        due = self._admission.due()
        if due is None:
            return
        delay = max(0.0, due - self.clock.now()) + 0.001
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay:
                return  # early is harmless: the machine is asked again then
            self._timer.cancel()
        self._timer = loop.call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._run(self._admission.handle(Tick(), self.clock.now()))
        self._arm()


def _capacity(model: ModelView) -> Capacity:
    if model.targets:
        return sum(t.slots for t in model.targets)
    return Refusal.FAILED if model.state is ModelState.FAILED else None
