"""The life of one engine process: a pure machine.

Rules, numbered as in the code:

1. At most one process lives: a spawn is ordered only when the one before has exited.
2. A start has no total limit. It fails when nothing moved for `start_silence_s`, and at once on a
   deterministic fault when the process has exited.
3. READY needs a passed startup probe: health, identity, slots, one generated token.
4. A ready process is probed every `probe_interval_s`. It is hung when a probe fails
   `hang_after_s` after the last sign of life, and when an idle one fails its canary: only what was
   asked can be found silent, whatever kept us from asking. Progress without an answer (a long
   prompt, or a loop that will never end) counts for `BUSY_FACTOR` times `hang_after_s`.
5. A process that ended unasked is started again after a back-off, `restart_budget` times within
   `restart_window_s`; then, or at once when memory was short, one rung smaller with a fresh
   budget; and when there is no smaller rung the child has FAILED.
6. A deterministic fault is FAILED at once: trying again would only repeat it. But a process that
   was READY has shown that its launch works, and a fault that it survived did not end it.
7. A stop drains, then sends TERM, then KILL after `stop_grace_s`, and KILL again until it is gone.
   A second stop can only shorten the drain.
8. FAILED ends by StartAsked (a fresh budget, the spec as first asked for) or StopAsked. StartAsked
   also ends the wait of a BACKOFF; in any other state what it asks for is on its way, or is being
   ended.
9. An engine that uses RPC servers is started once: whatever ends it unasked is FAILED at once, for
   the servers have ended with it, and what asked for them has to be asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from meshd.kernel.machine import Tick
from meshd.runtime.child_events import (
    Announce,
    AwaitDrain,
    ChildState,
    Drained,
    Effect,
    EngineFacts,
    Event,
    Exited,
    FaultSeen,
    Force,
    Probe,
    ProbeFailed,
    ProbeKind,
    ProbeNotYet,
    ProbePassed,
    Progressed,
    SendSignal,
    Spawn,
    Spawned,
    SpawnFailed,
    StartAsked,
    StopAsked,
)
from meshd.runtime.degrade import given_up, next_rung
from meshd.runtime.faults import Fault, worse
from meshd.runtime.launch import LaunchSpec
from meshd.runtime.restart import RestartBudget

STARTUP_PROBE_S = 0.02
"""First wait between startup probes; grows by half to `SLOWEST_STARTUP_PROBE_S`."""
SLOWEST_STARTUP_PROBE_S = 0.5
SHORTEST_PROBE_S = 0.1
"""Between two probes of a ready process, whatever the configuration says."""
BUSY_FACTOR = 10
KILL_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Policy:
    """The times and limits of `[engine]`; seconds."""

    start_silence_s: float
    probe_interval_s: float
    hang_after_s: float
    canary_interval_s: float
    stop_grace_s: float
    restart_budget: int
    restart_window_s: float


class Child:
    """See the module's docstring. Public attributes are for reading."""

    def __init__(self, spec: LaunchSpec, policy: Policy) -> None:
        self.state = ChildState.STOPPED
        self.reason: str | None = None
        self.generation = 0
        self.pid: int | None = None
        self.facts: EngineFacts | None = None
        self.degraded: str | None = None
        """All that was given up of what was asked for, in words."""
        self.retry_at: float | None = None
        """When a BACKOFF ends."""
        self._asked = spec
        self._spec = spec
        self._policy = policy
        self._alive = False
        self._fault: Fault | None = None
        self._kill_reason: str | None = None
        """Set when the process is being ended because something is wrong with it."""
        self._cause = ""
        """Why the last process ended."""
        self._restarts = RestartBudget(policy.restart_budget, policy.restart_window_s)
        self._silent_at = 0.0
        """When silence is too long. STARTING: a timer; READY: judged when a probe fails."""
        self._answered_at = 0.0
        self._last_wrong = ""
        """What the last failed startup probe said."""
        self._probe_at: float | None = None
        self._probe_wait = STARTUP_PROBE_S
        self._canary_at = 0.0
        self._canary_runs = False
        self._served = False
        """It was READY."""
        self._stop_at: float | None = None
        """DRAINING: when TERM is due. STOPPING: when (the next) KILL is."""
        self._out: list[Effect] = []

    @property
    def fault(self) -> Fault | None:
        """What the last process said of its end, if it said anything."""
        return self._fault

    def due(self) -> float | None:
        match self.state:
            case ChildState.STARTING:
                return _earliest(self._probe_at, self._silent_at)
            case ChildState.READY:
                return self._probe_at
            case ChildState.DRAINING | ChildState.STOPPING:
                return self._stop_at
            case ChildState.BACKOFF:
                return self.retry_at
            case ChildState.STOPPED | ChildState.FAILED:
                return None

    def handle(self, event: Event, now: float) -> list[Effect]:
        self._out = []
        match event:
            case StartAsked():
                self._start(now)
            case StopAsked():
                self._stop(event, now)
            case Tick():
                self._tick(now)
            case _:
                if event.generation == self.generation and self._alive:
                    self._of_process(event, now)
        return self._out

    def _of_process(
        self,
        event: Spawned
        | SpawnFailed
        | Progressed
        | FaultSeen
        | ProbePassed
        | ProbeNotYet
        | ProbeFailed
        | Drained
        | Exited,
        now: float,
    ) -> None:
        match event:
            case Spawned():
                self.pid = event.pid
            case SpawnFailed():
                self._ended(event.reason, now)
            case Progressed():
                self._moved(now)
            case FaultSeen():
                self._fault = worse(self._fault, event.fault)
            case ProbePassed():
                self._passed(event, now)
            case ProbeNotYet():
                self._not_yet(event.kind, now)
            case ProbeFailed():
                self._probe_failed(event, now)
            case Drained():
                if self.state is ChildState.DRAINING:
                    self._end_process(now, None)
            case Exited():
                self._ended(f"the engine {_describe_exit(event.status)}", now)
            case _:
                assert_never(event)

    # -- start and stop ---------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        if self.state in (ChildState.STOPPED, ChildState.FAILED):  # 1, 8
            self._spec, self.degraded = self._asked, None
            self._restarts.refill()
            self._spawn(now, "starting the engine")
        elif self.state is ChildState.BACKOFF:
            self._spawn(now, f"starting again, as asked: {self._cause}")

    def _spawn(self, now: float, reason: str) -> None:
        self.generation += 1
        self._alive = True
        self.pid, self.facts, self.retry_at = None, None, None
        self._fault, self._kill_reason, self._last_wrong = None, None, ""
        self._silent_at = now + self._policy.start_silence_s
        self._probe_wait = STARTUP_PROBE_S
        self._probe_at = now + self._probe_wait
        self._canary_runs = self._served = False
        self._become(ChildState.STARTING, reason)
        self._out.append(Spawn(self.generation, self._spec))

    def _stop(self, event: StopAsked, now: float) -> None:  # 7
        drain_s = event.drain_s
        match self.state:
            case _ if event.kill and self._alive:
                self._kill(now, None)
            case ChildState.READY | ChildState.DRAINING if drain_s <= 0:
                self._end_process(now, None)
            case ChildState.READY:
                self._stop_at = now + drain_s
                self._become(ChildState.DRAINING, "finishing the requests in flight")
                self._out.append(AwaitDrain(self.generation))
            case ChildState.DRAINING:
                self._stop_at = min(self._stop_at or now, now + drain_s)
            case ChildState.STARTING:
                self._end_process(now, None)
            case ChildState.STOPPING:
                self._kill_reason = None  # whatever was wrong with it, it is not wanted any more
                self._become(ChildState.STOPPING, "stopping the engine")
            case ChildState.BACKOFF | ChildState.FAILED:
                self._become(ChildState.STOPPED, None)
            case ChildState.STOPPED:
                self._out.append(Announce(ChildState.STOPPED, None))

    def _end_process(self, now: float, kill_reason: str | None) -> None:
        """TERM now, KILL later. `kill_reason`: it is ended for a fault and counts as failed."""
        self._kill_reason = kill_reason
        self._stop_at = now + self._policy.stop_grace_s
        self._become(ChildState.STOPPING, kill_reason or "stopping the engine")
        self._out.append(SendSignal(self.generation, Force.TERM))

    def _kill(self, now: float, reason: str | None) -> None:
        """A process that does not answer will not follow a TERM either. `reason`: as above."""
        self._kill_reason = reason
        self._stop_at = now + KILL_AGAIN_S
        self._become(ChildState.STOPPING, reason or "stopping the engine")
        self._out.append(SendSignal(self.generation, Force.KILL))

    # -- what the process does --------------------------------------------------------------------

    def _moved(self, now: float) -> None:
        if self.state is ChildState.STARTING:
            self._silent_at = now + self._policy.start_silence_s
        elif self.state is ChildState.READY:
            busy_limit = self._answered_at + BUSY_FACTOR * self._policy.hang_after_s  # 4
            self._silent_at = max(self._silent_at, min(now + self._policy.hang_after_s, busy_limit))

    def _passed(self, event: ProbePassed, now: float) -> None:
        policy = self._policy
        if self.state is ChildState.STARTING and event.kind is ProbeKind.STARTUP:  # 3
            self.facts = event.facts
            self._served = True
            self._answered(now)
            self._probe_at = now + self._probe_interval()
            self._canary_at = now + policy.canary_interval_s
            self._become(ChildState.READY, None)
            return
        if self.state is not ChildState.READY:
            return
        self._answered(now)
        if event.kind is ProbeKind.CANARY:
            self._canary_runs = False
            self._canary_at = now + policy.canary_interval_s
            return
        self._probe_at = now + self._probe_interval()
        wanted = policy.canary_interval_s > 0 and not self._canary_runs
        if wanted and now >= self._canary_at and event.idle_s >= policy.canary_interval_s:  # 4
            self._canary_runs = True
            self._out.append(Probe(self.generation, ProbeKind.CANARY))

    def _answered(self, now: float) -> None:
        self._answered_at = now
        self._silent_at = now + self._policy.hang_after_s
        self._fault = None  # 6

    def _probe_interval(self) -> float:
        return max(self._policy.probe_interval_s, SHORTEST_PROBE_S)

    def _not_yet(self, kind: ProbeKind, now: float) -> None:
        if self.state is ChildState.STARTING:
            self._probe_wait = min(self._probe_wait * 1.5, SLOWEST_STARTUP_PROBE_S)
            self._probe_at = now + self._probe_wait
        elif self.state is ChildState.READY and kind is ProbeKind.CANARY:
            self._canary_runs = False
            self._canary_at = now + self._policy.canary_interval_s
        elif self.state is ChildState.READY:
            self._probe_at = now + self._probe_interval()

    def _probe_failed(self, event: ProbeFailed, now: float) -> None:
        if self.state is ChildState.STARTING:
            self._last_wrong = event.reason
            if event.final:
                self._end_process(now, event.reason)
            else:
                self._not_yet(event.kind, now)
        elif self.state is ChildState.READY:
            if event.kind is ProbeKind.CANARY:  # 4
                self._kill(now, f"the idle engine failed its canary: {event.reason}")
            elif now >= self._silent_at:  # 4
                silence = now - self._answered_at
                self._kill(now, f"the engine answered nothing for {silence:.0f} s")
            else:
                self._probe_at = min(now + self._probe_interval(), self._silent_at)

    def _ended(self, how: str, now: float) -> None:
        self._alive, self.pid = False, None
        self._probe_at = self._stop_at = None
        if self.state in (ChildState.STOPPING, ChildState.DRAINING) and self._kill_reason is None:
            self.facts = None
            self._become(ChildState.STOPPED, None)
            return
        self.facts = None
        fault = self._fault
        reason = fault.message if fault is not None else self._kill_reason or how
        hopeless = fault is not None and fault.deterministic and not self._served  # 6
        if hopeless or self._spec.rpc:  # 9
            self._become(ChildState.FAILED, reason)
        elif fault is not None and fault.out_of_memory:  # 5
            self._degrade(reason, now)
        else:
            self._restart(reason, now)

    def _restart(self, reason: str, now: float) -> None:  # 5
        wait = self._restarts.try_take(now)
        if wait is None:
            policy = self._policy
            often = f"{policy.restart_budget + 1} times within {policy.restart_window_s:.0f} s"
            self._degrade(f"{reason} ({often})", now)
            return
        self._cause = reason
        self.retry_at = now + wait
        self._become(ChildState.BACKOFF, f"{reason}; starting again in {wait:g} s")

    def _degrade(self, reason: str, now: float) -> None:
        rung = next_rung(self._spec)
        if rung is None:
            self._become(ChildState.FAILED, f"{reason}; nothing smaller is left to try")
            return
        self._spec = rung.spec
        self.degraded = given_up(self._asked, rung.spec)
        self._restarts.refill()
        self._spawn(now, f"{reason}; trying with {rung.words}")

    # -- time -------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        match self.state:
            case ChildState.STARTING | ChildState.READY:
                self._tick_process(now)
            case ChildState.DRAINING if self._stop_at is not None and self._stop_at <= now:
                self._end_process(now, None)
            case ChildState.STOPPING if self._stop_at is not None and self._stop_at <= now:
                self._stop_at = now + KILL_AGAIN_S
                self._out.append(SendSignal(self.generation, Force.KILL))
            case ChildState.BACKOFF if self.retry_at is not None and self.retry_at <= now:
                self._spawn(now, f"starting again: {self._cause}")
            case _:
                pass

    def _tick_process(self, now: float) -> None:
        starting = self.state is ChildState.STARTING
        if starting and self._silent_at <= now:  # 2
            said = f"; when asked: {self._last_wrong}" if self._last_wrong else ""
            limit = self._policy.start_silence_s
            self._kill(now, f"the engine made no progress in starting for {limit:g} s{said}")
        elif self._probe_at is not None and self._probe_at <= now:
            self._probe_at = None  # until it is answered
            kind = ProbeKind.STARTUP if starting else ProbeKind.LIVENESS
            self._out.append(Probe(self.generation, kind))

    def _become(self, state: ChildState, reason: str | None) -> None:
        changed = (state, reason) != (self.state, self.reason)
        self.state, self.reason = state, reason
        if changed:
            self._out.append(Announce(state, reason))


def _describe_exit(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"exited with status {status}"


def _earliest(*times: float | None) -> float | None:
    return min((t for t in times if t is not None), default=None)
