"""Which models a node runs: every rule of `meshd.runtime.hosting`, with literal times."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshd.ids import ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.runtime.hosting import Hosting
from meshd.runtime.hosting_events import (
    AbandonWeights,
    AcceptLoad,
    Effect,
    EngineFound,
    EngineNotFound,
    EngineReported,
    LoadAsked,
    LoadOptions,
    PrepareWeights,
    RefuseLoad,
    StartEngine,
    StopEngine,
    UnloadAsked,
    WeightFacts,
    WeightsAccepted,
    WeightsMoved,
    WeightsRejected,
)
from meshd.view import FetchView, ModelState, Part, Preparing, SplitPlan

M = ModelId("m")
REF = "/models/m.gguf"
FACTS = WeightFacts(REF, 5_000_000, 4096, ("completion",), None, 0)
FETCHING = Preparing(
    ModelState.FETCHING, "fetching 1 of 4 GB", 0.25, FetchView(10**9, 4 * 10**9, 1e8, 30.0)
)


@pytest.fixture
def hosting() -> Hosting:
    return Hosting(restart_drain_s=30.0)


def state(hosting: Hosting) -> ModelState:
    return hosting.entries[M].state


def serve(hosting: Hosting) -> None:
    """Bring `M` to READY at time 0."""
    hosting.handle(EngineFound(), 0.0)
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    hosting.handle(WeightsAccepted(M, 1, FACTS), 0.0)
    hosting.handle(EngineReported(M, ModelState.READY), 0.0)
    assert state(hosting) is ModelState.READY


def test_a_load_starts_with_the_weights(hosting: Hosting) -> None:
    hosting.handle(EngineFound(), 0.0)
    assert hosting.handle(LoadAsked(7, M, REF), 0.0) == [AcceptLoad(7), PrepareWeights(M, REF, 1)]
    assert state(hosting) is ModelState.VERIFYING
    assert hosting.handle(WeightsAccepted(M, 1, FACTS), 0.1) == [
        StartEngine(M, FACTS, LoadOptions())
    ]
    assert state(hosting) is ModelState.LOADING
    assert hosting.handle(EngineReported(M, ModelState.READY), 0.2) == []
    assert state(hosting) is ModelState.READY
    assert hosting.due() is None


def test_an_answer_of_an_earlier_preparation_is_of_the_past(hosting: Hosting) -> None:
    hosting.handle(EngineFound(), 0.0)
    hosting.handle(LoadAsked(1, M, "/old/m.gguf"), 0.0)
    assert hosting.handle(UnloadAsked(M, 0.0), 0.0) == [AbandonWeights(M, 1)]
    hosting.handle(LoadAsked(2, M, REF), 0.0)
    assert hosting.handle(WeightsAccepted(M, 1, FACTS), 0.1) == []
    assert hosting.handle(WeightsRejected(M, 1, "gone"), 0.1) == []
    assert hosting.handle(WeightsMoved(M, 1, FETCHING), 0.1) == []
    assert state(hosting) is ModelState.VERIFYING


def test_without_an_engine_a_model_has_failed_and_says_why(hosting: Hosting) -> None:
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    assert hosting.handle(WeightsAccepted(M, 1, FACTS), 0.0) == []
    assert state(hosting) is ModelState.FAILED
    assert hosting.entries[M].reason == "looking for an engine on this machine"
    assert hosting.handle(EngineNotFound("build one"), 1.0) == []
    assert hosting.handle(LoadAsked(2, M, REF), 2.0) == [AcceptLoad(2), PrepareWeights(M, REF, 2)]
    hosting.handle(WeightsAccepted(M, 2, FACTS), 2.0)
    assert (state(hosting), hosting.entries[M].reason) == (ModelState.FAILED, "build one")
    assert hosting.handle(EngineFound(), 3.0) == []
    assert hosting.handle(LoadAsked(3, M, REF), 4.0) == [AcceptLoad(3), PrepareWeights(M, REF, 3)]
    assert hosting.handle(WeightsAccepted(M, 3, FACTS), 4.0) == [
        StartEngine(M, FACTS, LoadOptions())
    ]


def test_refused_weights_fail_and_are_looked_at_again_by_a_load(hosting: Hosting) -> None:
    hosting.handle(EngineFound(), 0.0)
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    assert hosting.handle(WeightsRejected(M, 1, "shard 3 is missing", 30.0), 10.0) == []
    entry = hosting.entries[M]
    assert (entry.state, entry.reason) == (ModelState.FAILED, "shard 3 is missing")
    assert entry.retry_at == 40.0
    assert hosting.due() is None
    assert hosting.handle(Tick(), 40.0) == []
    assert hosting.handle(LoadAsked(2, M, REF), 41.0) == [AcceptLoad(2), PrepareWeights(M, REF, 2)]
    assert state(hosting) is ModelState.VERIFYING
    assert hosting.entries[M].retry_at is None
    hosting.handle(WeightsRejected(M, 2, "still missing"), 42.0)
    assert (hosting.entries[M].reason, hosting.entries[M].retry_at) == ("still missing", None)


def test_neither_engine_nor_its_lack_touches_refused_weights(hosting: Hosting) -> None:
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    hosting.handle(WeightsRejected(M, 1, "the hub is ill"), 0.0)
    assert hosting.handle(EngineNotFound("build one"), 1.0) == []
    assert hosting.entries[M].reason == "the hub is ill"
    assert hosting.handle(EngineFound(), 2.0) == []
    assert state(hosting) is ModelState.FAILED


def test_what_the_preparation_is_at_is_shown(hosting: Hosting) -> None:
    hosting.handle(EngineFound(), 0.0)
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    assert hosting.handle(WeightsMoved(M, 1, FETCHING), 1.0) == []
    entry = hosting.entries[M]
    assert (entry.state, entry.reason) == (ModelState.FETCHING, "fetching 1 of 4 GB")
    assert entry.now is FETCHING
    hosting.handle(WeightsAccepted(M, 1, FACTS), 2.0)
    assert hosting.entries[M].now is None


def test_an_unload_abandons_the_preparation(hosting: Hosting) -> None:
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    hosting.handle(WeightsMoved(M, 1, FETCHING), 1.0)
    assert hosting.handle(UnloadAsked(M, 9.0), 2.0) == [AbandonWeights(M, 1)]
    assert dict(hosting.entries) == {}


def test_a_load_retries_refused_weights_at_once(hosting: Hosting) -> None:
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    hosting.handle(WeightsRejected(M, 1, "missing"), 0.0)
    assert hosting.handle(LoadAsked(2, M, REF), 1.0) == [AcceptLoad(2), PrepareWeights(M, REF, 2)]
    assert state(hosting) is ModelState.VERIFYING


def test_a_load_of_a_ready_model_changes_nothing(hosting: Hosting) -> None:
    serve(hosting)
    assert hosting.handle(LoadAsked(2, M, REF), 1.0) == [AcceptLoad(2)]
    assert state(hosting) is ModelState.READY


def test_other_options_restart_the_engine(hosting: Hosting) -> None:
    serve(hosting)
    more = LoadOptions(context=8192)
    assert hosting.handle(LoadAsked(2, M, REF, more), 1.0) == [AcceptLoad(2), StopEngine(M, 30.0)]
    assert state(hosting) is ModelState.DRAINING
    assert hosting.handle(EngineReported(M, ModelState.DRAINING), 1.1) == []
    assert hosting.handle(EngineReported(M, ModelState.ABSENT), 2.0) == [PrepareWeights(M, REF, 2)]
    assert hosting.handle(WeightsAccepted(M, 2, FACTS), 2.1) == [StartEngine(M, FACTS, more)]


def test_another_plan_is_another_engine_and_another_epoch_is_not(hosting: Hosting) -> None:
    plan = SplitPlan((Part(NodeId("b"), "b", (("CPU", 9),), (4,), 0, True, 1.0),))
    hosting.handle(EngineFound(), 0.0)
    hosting.handle(LoadAsked(1, M, REF, LoadOptions(split=plan, epoch=3)), 0.0)
    (start,) = hosting.handle(WeightsAccepted(M, 1, FACTS), 0.0)
    assert isinstance(start, StartEngine)
    assert (start.options.split, start.options.epoch) == (plan, 3)
    hosting.handle(EngineReported(M, ModelState.READY), 0.0)
    again = LoadAsked(2, M, REF, LoadOptions(split=replace(plan), epoch=4))
    assert hosting.handle(again, 1.0) == [AcceptLoad(2)]
    other = LoadOptions(split=replace(plan, beside=1), epoch=4)
    assert hosting.handle(LoadAsked(3, M, REF, other), 2.0) == [AcceptLoad(3), StopEngine(M, 30.0)]


def test_a_name_has_one_set_of_weights(hosting: Hosting) -> None:
    serve(hosting)
    effects = hosting.handle(LoadAsked(2, M, "/elsewhere/m.gguf"), 1.0)
    assert [type(e) for e in effects] == [RefuseLoad]
    assert REF in effects[0].reason  # type: ignore[union-attr]
    assert state(hosting) is ModelState.READY


def test_an_engine_that_gave_up_is_ended_before_the_retry(hosting: Hosting) -> None:
    serve(hosting)
    hosting.handle(EngineReported(M, ModelState.FAILED, "5 crashes in 10 min"), 5.0)
    assert hosting.entries[M].reason == "5 crashes in 10 min"
    assert hosting.handle(LoadAsked(2, M, REF), 6.0) == [AcceptLoad(2), StopEngine(M, 0.0)]
    assert hosting.handle(EngineReported(M, ModelState.ABSENT), 6.1) == [PrepareWeights(M, REF, 2)]


def test_unload_stops_the_engine_and_forgets(hosting: Hosting) -> None:
    serve(hosting)
    assert hosting.handle(UnloadAsked(M, 9.0), 1.0) == [StopEngine(M, 9.0)]
    assert state(hosting) is ModelState.DRAINING
    assert hosting.handle(EngineReported(M, ModelState.ABSENT), 2.0) == []
    assert dict(hosting.entries) == {}


def test_unload_before_an_engine_forgets_at_once(hosting: Hosting) -> None:
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    hosting.handle(WeightsAccepted(M, 1, FACTS), 0.0)
    assert state(hosting) is ModelState.FAILED
    assert hosting.handle(UnloadAsked(M, 9.0), 0.0) == []
    assert dict(hosting.entries) == {}
    assert hosting.handle(UnloadAsked(M, 9.0), 0.0) == []


def test_an_engine_that_restarts_by_itself_is_ready_again(hosting: Hosting) -> None:
    serve(hosting)
    for reported in (ModelState.DRAINING, ModelState.LOADING, ModelState.READY):
        assert hosting.handle(EngineReported(M, reported, "hung"), 1.0) == []
        assert state(hosting) is reported


def test_an_engine_that_is_told_to_stop_is_not_ready_again(hosting: Hosting) -> None:
    serve(hosting)
    hosting.handle(UnloadAsked(M, 9.0), 1.0)
    hosting.handle(EngineReported(M, ModelState.READY), 1.0)
    assert state(hosting) is ModelState.DRAINING


def test_a_load_while_unloading_wins(hosting: Hosting) -> None:
    serve(hosting)
    hosting.handle(UnloadAsked(M, 9.0), 1.0)
    assert hosting.handle(LoadAsked(2, M, REF), 1.5) == [AcceptLoad(2), StopEngine(M, 30.0)]
    assert hosting.handle(EngineReported(M, ModelState.ABSENT), 2.0) == [PrepareWeights(M, REF, 2)]


def test_reports_about_engines_that_were_never_started_are_ignored(hosting: Hosting) -> None:
    assert hosting.handle(EngineReported(M, ModelState.READY), 0.0) == []
    hosting.handle(LoadAsked(1, M, REF), 0.0)
    assert hosting.handle(EngineReported(M, ModelState.READY), 0.0) == []
    assert state(hosting) is ModelState.VERIFYING


MODELS = [ModelId("a"), ModelId("b")]
REFS = ["/1/x.gguf", "/2/x.gguf"]


class HostingRules(RuleBasedStateMachine):
    """Any order of events keeps one engine a model and answers every load once."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Hosting(restart_drain_s=30.0)
        self.now = 0.0
        self.tickets = 0
        self.engines: set[ModelId] = set()
        self.preparations: list[PrepareWeights] = []

    def post(self, effects: list[Effect], ticket: int | None = None) -> None:
        answers = 0
        for effect in effects:
            match effect:
                case AcceptLoad() | RefuseLoad():
                    assert effect.ticket == ticket
                    answers += 1
                case StartEngine():
                    assert effect.model not in self.engines
                    self.engines.add(effect.model)
                case StopEngine():
                    assert effect.model in self.engines
                case PrepareWeights():
                    assert all(p.model != effect.model for p in self.preparations)
                    self.preparations.append(effect)
                case AbandonWeights():
                    (abandoned,) = [p for p in self.preparations if p.model == effect.model]
                    assert abandoned.preparation == effect.preparation
                    self.preparations.remove(abandoned)
        assert answers == (ticket is not None)

    @rule(
        model=st.sampled_from(MODELS),
        ref=st.sampled_from(REFS),
        options=st.sampled_from([LoadOptions(), LoadOptions(context=512)]),
    )
    def load(self, model: ModelId, ref: str, options: LoadOptions) -> None:
        self.tickets += 1
        event = LoadAsked(self.tickets, model, ref, options)
        self.post(self.machine.handle(event, self.now), self.tickets)

    @rule(model=st.sampled_from(MODELS))
    def unload(self, model: ModelId) -> None:
        self.post(self.machine.handle(UnloadAsked(model, 1.0), self.now))

    @rule(data=st.data(), end=st.sampled_from(["good", "bad", "not yet"]))
    def prepared(self, data: st.DataObject, end: str) -> None:
        if not self.preparations:
            return
        i = data.draw(st.sampled_from(self.preparations))
        if end == "not yet":
            self.post(self.machine.handle(WeightsMoved(i.model, i.preparation, FETCHING), self.now))
            return
        self.preparations.remove(i)
        if end == "good":
            facts = WeightFacts(i.ref, 1, None, (), None, 0)
            self.post(self.machine.handle(WeightsAccepted(i.model, i.preparation, facts), self.now))
        else:
            wait_s = data.draw(st.sampled_from([None, 30.0]))
            rejected = WeightsRejected(i.model, i.preparation, "no", wait_s)
            self.post(self.machine.handle(rejected, self.now))

    @rule(found=st.booleans())
    def engine(self, found: bool) -> None:
        event = EngineFound() if found else EngineNotFound("none")
        self.post(self.machine.handle(event, self.now))

    @rule(
        model=st.sampled_from(MODELS),
        state=st.sampled_from(
            [ModelState.LOADING, ModelState.READY, ModelState.DRAINING, ModelState.FAILED]
        ),
    )
    def report(self, model: ModelId, state: ModelState) -> None:
        if model in self.engines:
            self.post(self.machine.handle(EngineReported(model, state, "r"), self.now))

    @rule(model=st.sampled_from(MODELS))
    def stopped(self, model: ModelId) -> None:
        if model in self.engines:
            self.engines.remove(model)
            self.post(self.machine.handle(EngineReported(model, ModelState.ABSENT), self.now))

    @rule(seconds=st.floats(0.0, 60.0))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self.post(self.machine.handle(Tick(), self.now))
        due = self.machine.due()
        assert due is None or due > self.now

    @invariant()
    def engines_are_known(self) -> None:
        assert self.engines == {m for m, e in self.machine.entries.items() if e.engine}

    @invariant()
    def what_is_not_ready_says_why(self) -> None:
        for entry in self.machine.entries.values():
            assert entry.state is ModelState.READY or entry.reason


TestHostingRules = HostingRules.TestCase
