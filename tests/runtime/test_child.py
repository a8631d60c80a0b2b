"""The life of one engine process, with literal times."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshd.ids import ModelId
from meshd.kernel.machine import Tick
from meshd.runtime.child import (
    BUSY_FACTOR,
    KILL_AGAIN_S,
    SHORTEST_PROBE_S,
    SLOWEST_STARTUP_PROBE_S,
    STARTUP_PROBE_S,
    Child,
    Policy,
)
from meshd.runtime.child_events import (
    TRANSITIONS,
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
    state_diagram,
)
from meshd.runtime.faults import Fault
from meshd.runtime.launch import LaunchSpec

SPEC = LaunchSpec(ModelId("m"), "/w/m.gguf", context=2048, parallel=1)
BIG = replace(SPEC, context=8192, parallel=2)
LEANING = replace(BIG, rpc=("127.0.0.1:1",), gpu_layers=3)
POLICY = Policy(
    start_silence_s=120.0,
    probe_interval_s=5.0,
    hang_after_s=60.0,
    canary_interval_s=60.0,
    stop_grace_s=10.0,
    restart_budget=2,
    restart_window_s=600.0,
)
FACTS = EngineFacts(slots=2, context_length=4096)
MISSING = Fault("file_missing", "/w/m-3.gguf: No such file", deterministic=True, rank=5)
NO_MEMORY = Fault("out_of_memory", "out of memory: 9 GB", deterministic=False, out_of_memory=True)
STARTUP, LIVENESS, CANARY = ProbeKind.STARTUP, ProbeKind.LIVENESS, ProbeKind.CANARY


@pytest.fixture
def child() -> Child:
    return Child(SPEC, POLICY)


def begin(child: Child, now: float = 0.0, pid: int = 7) -> None:
    """Start; the process runs."""
    child.handle(StartAsked(), now)
    child.handle(Spawned(child.generation, pid), now)


def serve(child: Child, now: float = 0.0) -> None:
    """Bring `child` to READY at `now`."""
    begin(child, now)
    child.handle(ProbePassed(child.generation, STARTUP, FACTS), now)
    assert child.state is ChildState.READY


def state(child: Child) -> ChildState:
    """Asked anew: mypy believes that nothing changes between two asserts."""
    return child.state


def tick(child: Child, now: float) -> list[Effect]:
    """A tick at `now`, which must be when the machine wants one."""
    assert child.due() == pytest.approx(now)
    return child.handle(Tick(), now)


def orders(effects: list[Effect]) -> list[Effect]:
    return [e for e in effects if not isinstance(e, Announce)]


# -- starting -------------------------------------------------------------------------------------


def test_a_start_spawns_and_asks_until_it_is_ready(child: Child) -> None:
    assert (child.state, child.due()) == (ChildState.STOPPED, None)
    effects = child.handle(StartAsked(), 0.0)
    assert effects == [Announce(ChildState.STARTING, "starting the engine"), Spawn(1, SPEC)]
    child.handle(Spawned(1, 7), 0.01)
    assert child.pid == 7
    assert tick(child, STARTUP_PROBE_S) == [Probe(1, STARTUP)]
    assert child.due() == 120.0  # nothing more until it answers
    assert child.handle(ProbeNotYet(1, STARTUP), 0.1) == []
    assert tick(child, 0.13) == [Probe(1, STARTUP)]
    assert child.handle(ProbePassed(1, STARTUP, FACTS), 0.2) == [Announce(ChildState.READY, None)]
    assert child.facts == FACTS
    assert child.due() == 5.2


def test_startup_probes_become_rare(child: Child) -> None:
    begin(child)
    now, gaps = 0.0, []
    for _ in range(15):
        due = child.due()
        assert due is not None
        gaps.append(due - now)
        now = due
        child.handle(Tick(), now)
        child.handle(ProbeNotYet(1, STARTUP), now)
        child.handle(Progressed(1), now)
    assert gaps == sorted(gaps)
    assert gaps[0] == pytest.approx(STARTUP_PROBE_S)
    assert gaps[-1] == pytest.approx(SLOWEST_STARTUP_PROBE_S)


def test_a_start_has_no_total_limit_but_one_of_silence(child: Child) -> None:
    begin(child)
    for now in (100.0, 200.0, 4000.0, 4100.0):
        child.handle(Progressed(1), now)
        assert child.handle(ProbeFailed(1, STARTUP, "/props answered 401"), now) == []
        assert child.state is ChildState.STARTING
    child.handle(Tick(), 4101.0)
    reason = "the engine made no progress in starting for 120 s; when asked: /props answered 401"
    assert tick(child, 4220.0) == [
        Announce(ChildState.STOPPING, reason),
        SendSignal(1, Force.KILL),
    ]
    assert tick(child, 4220.0 + KILL_AGAIN_S) == [SendSignal(1, Force.KILL)]
    child.handle(Exited(1, -9), 4223.0)
    assert child.state is ChildState.BACKOFF
    assert child.reason == f"{reason}; starting again in 0.5 s"
    child.handle(Tick(), 4224.0)
    assert child.reason == f"starting again: {reason}"


def test_silence_without_any_answer_is_said_plainly(child: Child) -> None:
    begin(child)
    child.handle(Tick(), STARTUP_PROBE_S)
    tick(child, 120.0)
    assert child.reason == "the engine made no progress in starting for 120 s"


def test_a_stranger_on_the_socket_ends_the_start(child: Child) -> None:
    begin(child)
    effects = child.handle(ProbeFailed(1, STARTUP, "another process answers", final=True), 1.0)
    assert orders(effects) == [SendSignal(1, Force.TERM)]
    assert state(child) is ChildState.STOPPING
    child.handle(Exited(1, 0), 1.1)
    assert state(child) is ChildState.BACKOFF
    assert child.reason == "another process answers; starting again in 0.5 s"


def test_no_process_at_all_counts_as_a_crash(child: Child) -> None:
    child.handle(StartAsked(), 0.0)
    child.handle(SpawnFailed(1, "no process could be started: Out of memory"), 0.0)
    assert child.state is ChildState.BACKOFF
    assert child.reason is not None
    assert child.reason.startswith("no process could be started: Out of memory; starting again")
    assert child.pid is None


# -- ends nobody asked for ------------------------------------------------------------------------


def test_a_deterministic_fault_is_not_tried_again(child: Child) -> None:
    begin(child)
    child.handle(FaultSeen(1, MISSING), 0.1)
    assert child.handle(Exited(1, 1), 0.1) == [Announce(ChildState.FAILED, MISSING.message)]
    assert child.due() is None


def test_the_fault_that_says_most_is_told(child: Child) -> None:
    begin(child)
    vague = Fault("load_failed", "could not load", deterministic=False, rank=1)
    for fault in (vague, MISSING, vague):
        child.handle(FaultSeen(1, fault), 0.1)
    child.handle(Exited(1, 1), 0.2)
    assert (child.state, child.reason) == (ChildState.FAILED, MISSING.message)


def test_a_crash_is_tried_again_with_growing_waits_then_smaller_then_given_up() -> None:
    child = Child(replace(SPEC, parallel=2), POLICY)
    begin(child)
    waits = []
    now = 0.0
    while child.state is not ChildState.FAILED:
        now += 1.0
        child.handle(Exited(child.generation, 1), now)
        if child.state is ChildState.BACKOFF:
            assert child.retry_at is not None
            waits.append(child.retry_at - now)
            now = child.retry_at
            assert [type(o) for o in orders(tick(child, now))] == [Spawn]
        if child.state is ChildState.STARTING and child.degraded:
            assert child.degraded == "1 instead of 2 requests at a time"
    assert waits == [0.5, 1.0, 0.5, 1.0]  # a budget for each rung
    assert child.generation == 6
    assert child.reason == (
        "the engine exited with status 1 (3 times within 600 s); nothing smaller is left to try"
    )


def test_waits_have_an_upper_limit_and_old_crashes_are_forgotten() -> None:
    child = Child(SPEC, replace(POLICY, restart_budget=100))
    begin(child)
    now = 0.0
    waits = []
    for _ in range(10):
        child.handle(Exited(child.generation, 1), now)
        assert child.retry_at is not None
        waits.append(child.retry_at - now)
        now = child.retry_at
        child.handle(Tick(), now)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
    child.handle(Exited(child.generation, 1), now + 601.0)
    assert child.retry_at == now + 601.5


def test_without_a_budget_the_first_crash_degrades() -> None:
    child = Child(BIG, replace(POLICY, restart_budget=0))
    begin(child)
    effects = child.handle(Exited(1, -11), 1.0)
    assert orders(effects) == [Spawn(2, replace(BIG, context=4096))]
    assert child.reason == (
        "the engine was ended by signal 11 (1 times within 600 s); "
        "trying with a context of 4096 tokens"
    )


def test_short_memory_gives_up_something_at_once() -> None:
    child = Child(BIG, POLICY)
    begin(child)
    specs = []
    while child.state is ChildState.STARTING:
        child.handle(FaultSeen(child.generation, NO_MEMORY), 0.0)
        effects = child.handle(Exited(child.generation, 1), 0.0)
        specs += [e.spec for e in effects if isinstance(e, Spawn)]
    assert specs == [
        replace(BIG, context=4096),
        replace(BIG, context=2048),
        replace(BIG, context=2048, parallel=1),
    ]
    assert child.state is ChildState.FAILED
    assert child.reason == "out of memory: 9 GB; nothing smaller is left to try"
    assert child.degraded == (
        "context of 2048 instead of 8192 tokens, 1 instead of 2 requests at a time"
    )


def test_a_launch_that_worked_cannot_be_wrong_for_good(child: Child) -> None:
    serve(child)
    child.handle(FaultSeen(1, MISSING), 1.0)
    child.handle(Exited(1, 1), 1.0)
    assert child.state is ChildState.BACKOFF
    assert child.reason == f"{MISSING.message}; starting again in 0.5 s"


def test_a_fault_it_survived_did_not_end_it() -> None:
    child = Child(BIG, POLICY)
    serve(child)
    child.handle(FaultSeen(1, NO_MEMORY), 1.0)
    child.handle(ProbePassed(1, LIVENESS), 5.0)
    child.handle(Exited(1, -9), 9.0)
    assert child.state is ChildState.BACKOFF
    assert child.reason == "the engine was ended by signal 9; starting again in 0.5 s"


def test_a_ready_engine_that_ran_out_of_memory_starts_smaller() -> None:
    child = Child(BIG, POLICY)
    serve(child)
    child.handle(FaultSeen(1, NO_MEMORY), 1.0)
    assert orders(child.handle(Exited(1, -6), 1.0)) == [Spawn(2, replace(BIG, context=4096))]
    assert (child.pid, child.facts) == (None, None)


# -- ready ----------------------------------------------------------------------------------------


def test_a_ready_engine_is_probed(child: Child) -> None:
    serve(child)
    assert tick(child, 5.0) == [Probe(1, LIVENESS)]
    assert child.due() is None  # it will answer, or its deadline will
    assert child.handle(ProbePassed(1, LIVENESS), 5.1) == []
    assert tick(child, 10.1) == [Probe(1, LIVENESS)]


def test_a_silent_engine_is_killed_and_started_again(child: Child) -> None:
    serve(child)
    tick(child, 5.0)
    assert child.handle(ProbeFailed(1, LIVENESS, "/health answered nothing"), 10.0) == []
    assert tick(child, 15.0) == [Probe(1, LIVENESS)]
    child.handle(ProbeFailed(1, LIVENESS, "nothing"), 57.0)
    assert tick(child, 60.0) == [Probe(1, LIVENESS)]  # no later than the limit
    effects = child.handle(ProbeFailed(1, LIVENESS, "nothing"), 65.0)
    assert orders(effects) == [SendSignal(1, Force.KILL)]
    assert child.reason == "the engine answered nothing for 65 s"
    child.handle(Exited(1, -9), 65.1)
    assert child.reason == "the engine answered nothing for 65 s; starting again in 0.5 s"


def test_an_engine_that_nobody_asked_is_not_hung(child: Child) -> None:
    serve(child)
    assert child.handle(Tick(), 5000.0) == [Probe(1, LIVENESS)]  # the daemon slept
    child.handle(ProbePassed(1, LIVENESS), 5000.1)
    assert child.state is ChildState.READY


def test_a_long_probe_interval_does_not_kill() -> None:
    child = Child(SPEC, replace(POLICY, probe_interval_s=600.0, hang_after_s=10.0))
    serve(child)
    assert tick(child, 600.0) == [Probe(1, LIVENESS)]
    child.handle(ProbePassed(1, LIVENESS), 600.1)
    assert child.state is ChildState.READY


def test_probes_have_a_pause_whatever_is_configured() -> None:
    child = Child(SPEC, replace(POLICY, probe_interval_s=0.0))
    serve(child)
    assert tick(child, SHORTEST_PROBE_S) == [Probe(1, LIVENESS)]
    child.handle(ProbeNotYet(1, LIVENESS), 1.0)
    assert child.due() == 1.0 + SHORTEST_PROBE_S


def test_progress_counts_as_life_but_not_for_ever(child: Child) -> None:
    serve(child)
    now = 0.0
    while child.state is ChildState.READY:
        now += 30.0
        assert now < 2000.0
        child.handle(Progressed(1), now)
        child.handle(ProbeFailed(1, LIVENESS, "busy"), now)
    assert now == 60.0 * BUSY_FACTOR
    assert child.reason == "the engine answered nothing for 600 s"


def test_progress_never_shortens_the_patience(child: Child) -> None:
    serve(child)
    child.handle(ProbePassed(1, LIVENESS), 50.0)
    child.handle(Progressed(1), 50.0)
    child.handle(ProbeFailed(1, LIVENESS, "busy"), 109.0)
    assert child.state is ChildState.READY


def test_an_idle_engine_generates_a_token_now_and_then(child: Child) -> None:
    serve(child)
    child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 59.0)
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 61.0) == [Probe(1, CANARY)]
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 66.0) == []  # one at a time
    assert child.handle(ProbePassed(1, CANARY), 67.0) == []
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 126.0) == []
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 127.0) == [Probe(1, CANARY)]


def test_a_busy_engine_needs_no_canary(child: Child) -> None:
    serve(child)
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=59.0), 100.0) == []


def test_a_canary_can_be_turned_off() -> None:
    child = Child(SPEC, replace(POLICY, canary_interval_s=0.0))
    serve(child)
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=float("inf")), 1000.0) == []


def test_a_failed_canary_ends_the_engine(child: Child) -> None:
    serve(child)
    child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 61.0)
    effects = child.handle(ProbeFailed(1, CANARY, "no token within 60 s"), 121.0)
    assert effects == [
        Announce(ChildState.STOPPING, "the idle engine failed its canary: no token within 60 s"),
        SendSignal(1, Force.KILL),
    ]


def test_a_canary_without_verdict_is_asked_again(child: Child) -> None:
    serve(child)
    child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 61.0)
    due = child.due()
    assert child.handle(ProbeNotYet(1, CANARY), 70.0) == []
    assert child.due() == due  # the liveness probes go their own way
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 129.0) == []
    assert child.handle(ProbePassed(1, LIVENESS, idle_s=1000.0), 130.0) == [Probe(1, CANARY)]


# -- stopping -------------------------------------------------------------------------------------


def test_a_stop_drains_then_terminates_then_kills(child: Child) -> None:
    serve(child)
    assert child.handle(StopAsked(30.0), 1.0) == [
        Announce(ChildState.DRAINING, "finishing the requests in flight"),
        AwaitDrain(1),
    ]
    assert tick(child, 31.0) == [
        Announce(ChildState.STOPPING, "stopping the engine"),
        SendSignal(1, Force.TERM),
    ]
    assert tick(child, 41.0) == [SendSignal(1, Force.KILL)]
    assert tick(child, 41.0 + KILL_AGAIN_S) == [SendSignal(1, Force.KILL)]
    assert child.handle(Exited(1, -9), 44.0) == [Announce(ChildState.STOPPED, None)]
    assert child.due() is None


def test_a_drained_engine_is_stopped_at_once(child: Child) -> None:
    serve(child)
    child.handle(StopAsked(30.0), 1.0)
    assert orders(child.handle(Drained(1), 2.0)) == [SendSignal(1, Force.TERM)]
    assert child.handle(Drained(1), 2.1) == []
    child.handle(Exited(1, 0), 2.5)
    assert child.state is ChildState.STOPPED


def test_a_second_stop_can_only_hurry(child: Child) -> None:
    serve(child)
    child.handle(StopAsked(30.0), 0.0)
    child.handle(StopAsked(100.0), 1.0)
    assert child.due() == 30.0
    child.handle(StopAsked(5.0), 1.0)
    assert child.due() == 6.0
    assert orders(child.handle(StopAsked(0.0), 2.0)) == [SendSignal(1, Force.TERM)]


def test_a_stop_without_drain_does_not_wait(child: Child) -> None:
    serve(child)
    assert child.handle(StopAsked(0.0), 1.0) == [
        Announce(ChildState.STOPPING, "stopping the engine"),
        SendSignal(1, Force.TERM),
    ]


def test_a_crash_while_draining_is_the_end_that_was_asked_for(child: Child) -> None:
    serve(child)
    child.handle(StopAsked(30.0), 0.0)
    child.handle(FaultSeen(1, NO_MEMORY), 1.0)
    assert child.handle(Exited(1, -6), 1.0) == [Announce(ChildState.STOPPED, None)]


def test_probes_and_progress_say_nothing_to_an_engine_that_ends(child: Child) -> None:
    serve(child)
    child.handle(StopAsked(30.0), 0.0)
    for event in (
        ProbePassed(1, LIVENESS, idle_s=1000.0),
        ProbeNotYet(1, LIVENESS),
        ProbeFailed(1, LIVENESS, "x"),
        ProbeFailed(1, CANARY, "x"),
        Progressed(1),
        Tick(),
    ):
        assert child.handle(event, 1.0) == []
    assert child.state is ChildState.DRAINING


@pytest.mark.parametrize("drains", [False, True])
def test_a_kill_does_not_ask_first(child: Child, drains: bool) -> None:
    serve(child)
    if drains:
        child.handle(StopAsked(30.0), 1.0)
    assert orders(child.handle(StopAsked(0.0, kill=True), 2.0)) == [SendSignal(1, Force.KILL)]
    assert child.state is ChildState.STOPPING
    assert orders(tick(child, 2.0 + KILL_AGAIN_S)) == [SendSignal(1, Force.KILL)]
    assert child.handle(Exited(1, -9), 3.0) == [Announce(ChildState.STOPPED, None)]


def test_a_kill_hurries_a_stop(child: Child) -> None:
    begin(child)
    child.handle(StopAsked(0.0), 1.0)
    assert orders(child.handle(StopAsked(0.0, kill=True), 1.5)) == [SendSignal(1, Force.KILL)]


def test_a_kill_without_a_process_is_a_stop(child: Child) -> None:
    begin(child)
    child.handle(FaultSeen(1, MISSING), 1.0)
    child.handle(Exited(1, 1), 1.0)
    assert child.handle(StopAsked(0.0, kill=True), 2.0) == [Announce(ChildState.STOPPED, None)]


def test_a_start_can_be_stopped_before_there_is_a_process(child: Child) -> None:
    child.handle(StartAsked(), 0.0)
    assert orders(child.handle(StopAsked(30.0), 0.0)) == [SendSignal(1, Force.TERM)]
    assert child.handle(SpawnFailed(1, "no"), 0.1) == [Announce(ChildState.STOPPED, None)]


def test_a_stop_of_a_hung_engine_does_not_bring_it_back(child: Child) -> None:
    serve(child)
    child.handle(ProbeFailed(1, LIVENESS, "nothing"), 60.0)
    assert state(child) is ChildState.STOPPING
    assert child.handle(StopAsked(5.0), 61.0) == [
        Announce(ChildState.STOPPING, "stopping the engine")
    ]
    assert child.due() == 60.0 + KILL_AGAIN_S
    child.handle(Exited(1, -9), 62.5)
    assert child.state is ChildState.STOPPED


@pytest.mark.parametrize("wanted", [ChildState.BACKOFF, ChildState.FAILED, ChildState.STOPPED])
def test_a_stop_without_a_process_is_done_at_once(child: Child, wanted: ChildState) -> None:
    if wanted is not ChildState.STOPPED:
        begin(child)
        if wanted is ChildState.FAILED:
            child.handle(FaultSeen(1, MISSING), 0.0)
        child.handle(Exited(1, 1), 0.0)
    assert child.state is wanted
    assert child.handle(StopAsked(30.0), 1.0) == [Announce(ChildState.STOPPED, None)]
    assert child.due() is None


# -- asked again ----------------------------------------------------------------------------------


def test_failed_ends_by_a_start_with_all_that_was_asked_for() -> None:
    child = Child(BIG, replace(POLICY, restart_budget=0))
    begin(child)
    for _ in range(4):
        child.handle(Exited(child.generation, 1), 0.0)
    assert child.state is ChildState.FAILED
    assert child.handle(StartAsked(), 5.0) == [
        Announce(ChildState.STARTING, "starting the engine"),
        Spawn(5, BIG),
    ]
    assert child.degraded is None


def test_a_start_ends_the_wait_of_a_backoff(child: Child) -> None:
    begin(child)
    child.handle(Exited(1, 1), 0.0)
    assert orders(child.handle(StartAsked(), 0.1)) == [Spawn(2, SPEC)]
    assert child.reason == "starting again, as asked: the engine exited with status 1"
    assert child.retry_at is None
    child.handle(Exited(2, 1), 0.2)
    assert child.retry_at == 1.2  # the budget is the same one


def test_a_start_of_a_running_engine_changes_nothing(child: Child) -> None:
    serve(child)
    assert child.handle(StartAsked(), 1.0) == []
    child.handle(StopAsked(9.0), 1.0)
    assert child.handle(StartAsked(), 1.0) == []
    assert child.state is ChildState.DRAINING


def test_events_of_an_earlier_process_are_of_the_past(child: Child) -> None:
    begin(child)
    child.handle(Exited(1, 1), 0.0)
    child.handle(Tick(), 0.5)
    assert child.generation == 2
    before = child.due()
    for event in (
        Spawned(1, 99),
        SpawnFailed(1, "x"),
        Progressed(1),
        FaultSeen(1, MISSING),
        ProbePassed(1, STARTUP, FACTS),
        ProbeFailed(1, STARTUP, "x", final=True),
        Drained(1),
        Exited(1, 0),
    ):
        assert child.handle(event, 50.0) == []
    assert (child.state, child.pid, child.due()) == (ChildState.STARTING, None, before)


def test_events_after_the_exit_are_of_the_past(child: Child) -> None:
    begin(child)
    child.handle(Exited(1, 1), 0.0)
    assert child.handle(Exited(1, 1), 0.1) == []
    assert child.handle(ProbePassed(1, STARTUP, FACTS), 0.1) == []
    assert child.state is ChildState.BACKOFF


def test_the_diagram_shows_every_transition() -> None:
    lines = state_diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> stopped"]
    assert len(lines) == 2 + sum(map(len, TRANSITIONS.values()))
    assert "    starting --> ready" in lines
    assert set(TRANSITIONS) == set(ChildState)


# -- any order ------------------------------------------------------------------------------------


@dataclass
class World:
    """What is outside the machine: at most one process, and questions that are open."""

    spawning: int | None = None
    alive: int | None = None
    probes: tuple[Probe, ...] = ()
    drains: tuple[int, ...] = ()


# 9


@pytest.mark.parametrize("fault", [NO_MEMORY, MISSING, None])
def test_an_engine_that_leans_on_workers_is_started_once(fault: Fault | None) -> None:
    child = Child(LEANING, POLICY)
    serve(child)
    if fault is not None:
        child.handle(FaultSeen(1, fault), 1.0)
    child.handle(Exited(1, -6), 1.0)
    reason = "the engine was ended by signal 6" if fault is None else fault.message
    assert (child.state, child.reason) == (ChildState.FAILED, reason)
    assert child.due() is None
    assert child.fault is fault


def test_a_hung_engine_that_leans_on_workers_has_failed() -> None:
    child = Child(LEANING, POLICY)
    serve(child)
    tick(child, 5.0)
    child.handle(ProbeFailed(1, LIVENESS, "/slots answered nothing"), 70.0)
    assert state(child) is ChildState.STOPPING
    child.handle(Exited(1, -9), 70.1)
    assert (child.state, child.reason) == (
        ChildState.FAILED,
        "the engine answered nothing for 70 s",
    )


class ChildRules(RuleBasedStateMachine):
    """Any order of spawn, health, exit, stop, tick: legal states, one process, one outcome."""

    @initialize(
        spec=st.sampled_from([SPEC, BIG, replace(BIG, gpu_layers=3, kv_type="q8_0"), LEANING]),
        budget=st.integers(0, 3),
        canary=st.sampled_from([0.0, 20.0]),
    )
    def make(self, spec: LaunchSpec, budget: int, canary: float) -> None:
        policy = replace(POLICY, restart_budget=budget, canary_interval_s=canary)
        self.spec = spec
        self.child = Child(spec, policy)
        self.world = World()
        self.now = 0.0
        self.stop_open = False
        """A stop was asked for and has not been answered."""
        self.ended_at: float | None = None

    def post(self, event: Event) -> None:
        before = self.child.state
        for effect in self.child.handle(event, self.now):
            match effect:
                case Spawn():
                    assert self.world.spawning is None
                    assert self.world.alive is None
                    assert not self.stop_open
                    assert effect.generation == self.child.generation
                    self.world = World(spawning=effect.generation)
                case SendSignal():
                    assert effect.generation in (self.world.alive, self.world.spawning)
                case Probe():
                    assert effect.generation in (self.world.alive, self.world.spawning)
                    assert all(p.kind != effect.kind for p in self.world.probes)
                    self.world.probes += (effect,)
                case AwaitDrain():
                    self.world.drains += (effect.generation,)
                case Announce():
                    self.announced(before, effect)
                    before = effect.state
        assert before is self.child.state  # every change was announced

    def announced(self, before: ChildState, effect: Announce) -> None:
        assert effect.state is before or effect.state in TRANSITIONS[before], (before, effect)
        assert effect.reason or effect.state in (ChildState.READY, ChildState.STOPPED)
        if effect.state is ChildState.STOPPED:
            self.stop_open = False

    @rule()
    def start(self) -> None:
        if not self.stop_open:
            self.post(StartAsked())

    @rule(drain_s=st.sampled_from([0.0, 5.0, 30.0]), kill=st.booleans())
    def stop(self, drain_s: float, kill: bool) -> None:
        self.stop_open = True
        self.post(StopAsked(drain_s, kill))

    @precondition(lambda self: self.world.spawning is not None)
    @rule(works=st.booleans())
    def spawned(self, works: bool) -> None:
        generation = self.world.spawning
        assert generation is not None
        if works:
            self.world.spawning, self.world.alive = None, generation
            self.post(Spawned(generation, 100 + generation))
        else:
            self.world = World()
            self.post(SpawnFailed(generation, "no process"))

    @precondition(lambda self: self.world.alive is not None)
    @rule(status=st.sampled_from([0, 1, -9]))
    def exit(self, status: int) -> None:
        generation = self.world.alive
        assert generation is not None
        self.world = World(probes=self.world.probes)
        self.post(Exited(generation, status))

    @precondition(lambda self: self.world.alive is not None)
    @rule(what=st.sampled_from([MISSING, NO_MEMORY, None]))
    def output(self, what: Fault | None) -> None:
        generation = self.world.alive
        assert generation is not None
        self.post(FaultSeen(generation, what) if what else Progressed(generation))

    @precondition(lambda self: self.world.probes)
    @rule(data=st.data(), how=st.sampled_from(["passed", "not yet", "failed", "final"]))
    def answer(self, data: st.DataObject, how: str) -> None:
        probe = data.draw(st.sampled_from(self.world.probes))
        self.world.probes = tuple(p for p in self.world.probes if p is not probe)
        generation, kind = probe.generation, probe.kind
        if how == "passed":
            facts = FACTS if kind is STARTUP else None
            self.post(ProbePassed(generation, kind, facts, idle_s=100.0))
        elif how == "not yet":
            self.post(ProbeNotYet(generation, kind))
        else:
            self.post(ProbeFailed(generation, kind, "wrong", final=how == "final"))

    @precondition(lambda self: self.world.drains)
    @rule()
    def drained(self) -> None:
        *rest, generation = self.world.drains
        self.world.drains = tuple(rest)
        self.post(Drained(generation))

    @rule(generation=st.integers(0, 3), kind=st.sampled_from(ProbeKind))
    def late(self, generation: int, kind: ProbeKind) -> None:
        """An answer of a process that is gone."""
        if generation < self.child.generation:
            state = self.child.state
            self.post(ProbePassed(generation, kind, FACTS))
            self.post(Exited(generation, 0))
            assert self.child.state is state

    @rule(seconds=st.floats(0.0, 100.0))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self.post(Tick())
        due = self.child.due()
        assert due is None or due > self.now

    @rule()
    def time_as_asked(self) -> None:
        due = self.child.due()
        if due is not None:
            self.now = max(self.now, due)
            self.post(Tick())
            again = self.child.due()
            assert again is None or again > self.now

    @invariant()
    def a_process_is_known_while_it_lives(self) -> None:
        if not hasattr(self, "child"):
            return
        resting = (ChildState.STOPPED, ChildState.BACKOFF, ChildState.FAILED)
        lives = self.world.alive is not None or self.world.spawning is not None
        assert lives == (self.child.state not in resting)
        assert (self.child.facts is not None) == (
            self.child.state in (ChildState.READY, ChildState.DRAINING)
        ) or self.child.state is ChildState.STOPPING

    @invariant()
    def what_leans_on_others_is_not_started_again(self) -> None:
        if hasattr(self, "child") and self.spec.rpc:
            assert self.child.state is not ChildState.BACKOFF
            assert self.child.degraded is None

    @invariant()
    def nothing_waits_without_a_timer_or_a_question(self) -> None:
        if not hasattr(self, "child"):
            return
        at_rest = self.child.state in (ChildState.STOPPED, ChildState.FAILED)
        asked = any(p.generation == self.world.alive for p in self.world.probes)
        asked |= self.world.spawning is not None
        assert at_rest or asked or self.child.due() is not None

    @invariant()
    def a_stop_that_is_open_comes_to_an_end(self) -> None:
        if hasattr(self, "child") and self.stop_open:
            assert self.child.state in (ChildState.DRAINING, ChildState.STOPPING)


TestChildRules = ChildRules.TestCase
