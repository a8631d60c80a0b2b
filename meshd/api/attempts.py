"""The half of an exchange that faces engines: which one is asked, and which after it failed.

It ends with the first byte of an answer; exchange.py has the other half, and the numbered cases.
"""

from __future__ import annotations

from abc import abstractmethod
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from meshd.api import refusals
from meshd.api.breaker import Fault
from meshd.api.route import (
    NOTHING,
    Ambiguous,
    Broken,
    Failed,
    NotFound,
    NotReady,
    Route,
    on_its_way,
)
from meshd.api.upstream import Upstream
from meshd.errors import MeshdError, UpstreamFailed, UpstreamTimeout
from meshd.ids import ModelId
from meshd.view import Target

if TYPE_CHECKING:
    from meshd.api.relay import Relay
    from meshd.api.usage import Usage

MAX_RETRIES: Final = 2
HEALTHY_REFUSALS: Final = frozenset((429, 503))
"""Said by an engine or node that is sound: full, loading, draining."""


class State(IntEnum):
    NEW = 0
    WAITING = 1
    SENT = 2
    RELAYING = 3
    DONE = 4


def may_be_better_elsewhere(status: int) -> bool:
    """Whether another engine may well answer otherwise. 501 is what the software cannot do, not
    what the machine cannot."""
    return status == 429 or (status >= 500 and status != 501)


class Attempts:
    """See the module's docstring."""

    __slots__ = (
        "_attempts",
        "_avoid",
        "_due_at",
        "_probe",
        "_retries",
        "_ticket",
        "_upstream",
        "from_peer",
        "http10",
        "model",
        "relay",
        "state",
        "target",
    )

    def __init__(self, relay: Relay, *, http10: bool, from_peer: bool) -> None:
        self.relay = relay
        self.http10 = http10
        self.from_peer = from_peer
        """Another node relays it; it goes no further than this one."""
        self.state = State.NEW
        self.model = ""
        self.target: Target | None = None
        self._due_at = 0.0
        """Monotonic: until when an answer must have begun, whoever gives it."""
        self._upstream: Upstream | None = None
        self._attempts = 0
        """As clients are told: those to replace a dead connection count too."""
        self._retries = 0
        self._avoid = NOTHING
        """Engines that failed under this request."""
        self._probe = 0
        """Number of the present attempt as its target's half-open probe; 0 if it is none."""
        self._ticket = 0
        """Of the connection being opened; a later one makes those before it nobody's."""

    # -- the other half ---------------------------------------------------------------------------

    @abstractmethod
    def fail(self, error: MeshdError) -> None: ...

    @abstractmethod
    def _refuse(self, error: MeshdError) -> None: ...

    @abstractmethod
    def _send(self, upstream: Upstream) -> None: ...

    @abstractmethod
    def _open_fresh(self) -> None:
        """Open a connection to the target, under a new `_ticket`."""

    # -- called by the view -----------------------------------------------------------------------

    def node_changed(self, what: str, *, gone: bool) -> None:
        """The target's node is `what`: `gone`, or in doubt, in which case only a request without
        an answer that has somewhere else to go leaves it."""
        if self.state is State.SENT and (gone or self._has_other_target()):
            assert self.target is not None
            self._drop_upstream()
            self._attempt_failed(f"node `{self.target.node}` is {what}", "node_lost")
        elif self.state is State.RELAYING and gone:
            self.fail(
                UpstreamFailed(
                    f"model `{self.model}`: its node is {what}; send the request again",
                    retry_after_s=refusals.QUEUE_RETRY_AFTER_S,
                )
            )

    # -- called by the pool -----------------------------------------------------------------------

    def connected(self, upstream: Upstream, ticket: int) -> None:
        if self.state is not State.SENT or ticket != self._ticket:
            upstream.set_aside()
        elif upstream.transport is None:
            self._attempt_broke("the connection was closed at once", "connection_lost")
        else:
            self._send(upstream)

    def connect_failed(self, reason: str, ticket: int) -> None:
        if self.state is State.SENT and ticket == self._ticket:
            assert self.target is not None
            self._attempts += 1
            self._judge(Fault.BROKE if self.target.local else Fault.UNREACHABLE, reason)
            self._attempt_failed(reason, "connect_failed")

    # -- for the other half -----------------------------------------------------------------------

    def _route(self) -> Route:
        return self.relay.route(self.model, self._avoid, own=self.from_peer)

    def _has_other_target(self) -> bool:
        """Whether another try is due and would go to an engine this request has not been at."""
        assert self.target is not None
        if self._retries >= MAX_RETRIES:
            return False
        seen = self._avoid | {self.target.instance}
        outcome = self.relay.route(self.model, seen, own=self.from_peer)
        return isinstance(outcome, Target) and outcome.instance not in seen

    def _unrouted(self, outcome: Ambiguous | NotFound | NotReady | Failed | Broken) -> MeshdError:
        if isinstance(outcome, (NotFound, NotReady)) and self.relay.drains_alone(
            self.model, own=self.from_peer
        ):
            return refusals.withdrawn()
        if self.from_peer and isinstance(outcome, NotFound):
            return refusals.not_here(self.model)
        return refusals.of_route(self.model, outcome)

    def _tell_asked(self, usage: Usage, outcome: Route) -> Route:
        """Tell that a client asked for the model. Where the request goes after that: a model that
        was missing may be on its way."""
        relay = self.relay
        if isinstance(outcome, NotFound) and usage.missing(self.model):
            self.model = relay.known_as(self.model, own=False)
            outcome = relay.route(self.model)
            if isinstance(outcome, NotFound):  # a request that begins while a view is delivered
                outcome = on_its_way(ModelId(self.model))
        relay.asked(self.model)
        return outcome

    def _attempt(self, target: Target) -> None:
        relay = self.relay
        self.target = target
        relay.flights.engage(target)
        if relay.breakers.troubled:
            self._probe = relay.breakers.begin(target.instance, relay.clock.now())
        if not self.http10:
            upstream = relay.pool(target).try_take()
            if upstream is not None:
                self._send(upstream)
                return
        self._open_fresh()

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.discard()

    def _judge(self, fault: Fault | None, reason: str = "") -> None:
        """Tell the target's circuit how the present attempt went."""
        breakers = self.relay.breakers
        assert self.target is not None
        instance = self.target.instance
        if fault is None:
            breakers.succeeded(instance)
        else:
            now = self.relay.clock.now()
            breakers.failed(instance, fault, reason, now, self._probe)
        self._probe = 0

    def _attempt_broke(self, reason: str, why: str) -> None:
        self._judge(Fault.BROKE, reason)
        self._attempt_failed(reason, why)

    def _attempt_failed(self, reason: str, why: str) -> None:
        """3. Before anything of an answer was sent to the client. `why`: for the metrics."""
        relay = self.relay
        left = self._leave_target()
        if relay.clock.now() >= self._due_at:
            self._refuse(self._timeout())
            return
        outcome = self._route()
        if isinstance(outcome, Target):
            seen = outcome.instance in self._avoid
            if self._retries < (1 if seen else MAX_RETRIES):
                self._retries += 1
                relay.traffic.retried(why)
                self._attempt(outcome)
                return
        elif isinstance(outcome, Broken) or (isinstance(outcome, NotFound) and not left.local):
            pass  # a model whose only node died was there all the same: not 404
        else:  # it stopped being ready while this request was on its way
            self._refuse(self._unrouted(outcome))
            return
        self._refuse(
            UpstreamFailed(
                f"model `{self.model}`: {reason}; `meshd logs` has more",
                retry_after_s=outcome.retry_after_s
                if isinstance(outcome, Broken)
                else refusals.QUEUE_RETRY_AFTER_S,
            )
        )

    def _leave_target(self) -> Target:
        target = self.target
        assert target is not None
        if self._probe:
            self._forgo_probe()
        self._upstream = None
        self._ticket += 1
        self._avoid |= {target.instance}
        self.target = None
        self.relay.flights.release(target)
        return target

    def _forgo_probe(self) -> None:
        """The probe ends without having told anything."""
        assert self.target is not None
        probe, self._probe = self._probe, 0
        self.relay.breakers.abandoned(self.target.instance, probe, self.relay.clock.now())

    def _timeout(self) -> UpstreamTimeout:
        limit_s = self.relay.settings.first_byte_timeout_s
        return UpstreamTimeout(
            f"the engine of model `{self.model}` gave no answer within {limit_s:.0f} s"
        )
