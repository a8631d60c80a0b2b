"""The shell around `Child`, where a real engine would not be slow, fast or odd enough on demand."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from meshd.ids import InstanceId
from meshd.runtime import prober
from meshd.runtime.child_events import ChildState, ProbeKind, ProbePassed, Progressed
from meshd.runtime.supervisor import EngineSupervisor
from tests.runtime.conftest import Stage, wait_for
from tests.runtime.scripted_process import ScriptedProcess

pytestmark = pytest.mark.usefixtures("scripted")


@pytest.fixture
def engine(stage: Stage, short_dir: Path) -> EngineSupervisor:
    return stage.supervise(short_dir / "llama-server", short_dir / "m.gguf")


async def ready(engine: EngineSupervisor) -> ScriptedProcess:
    await wait_for(lambda: engine.report.state is ChildState.READY, "ready")
    return ScriptedProcess.made[-1]


async def test_an_exit_faster_than_the_spawn_leaves_nothing(
    stage: Stage, engine: EngineSupervisor
) -> None:
    ScriptedProcess.exit_before_spawned.append(1)
    engine.start()
    await wait_for(lambda: engine.report.state is ChildState.BACKOFF, "the crash")
    assert stage.files() == set()
    assert engine.report.pid is None
    await ready(engine)
    assert engine.report.attempt == 2
    assert {Path(name).suffix for name in stage.files()} == {".pid"}


async def test_a_stop_before_the_spawn_is_done_reaches_the_process(
    stage: Stage, engine: EngineSupervisor
) -> None:
    engine.start()
    engine.stop(0.0)
    await engine.wait_stopped()
    assert [p.signals for p in ScriptedProcess.made] == [[signal.SIGTERM]]
    assert stage.files() == set()


async def test_every_life_has_a_name_and_a_socket_of_its_own(
    stage: Stage, engine: EngineSupervisor
) -> None:
    engine.start()
    (await ready(engine)).exit(1)
    engine.start()  # do not wait for the back-off
    await ready(engine)
    instances = {r.instance for r in stage.reports if r.state is ChildState.READY}
    sockets = {r.socket_path for r in stage.reports if r.state is ChildState.READY}
    assert len(instances) == len(sockets) == 2


async def test_what_is_printed_is_kept_and_counts_as_life_but_not_line_by_line(
    stage: Stage, engine: EngineSupervisor
) -> None:
    engine.start()
    process = await ready(engine)

    def told() -> int:
        return sum(isinstance(e.event, Progressed) for e in stage.recorder.entries())

    before = told()
    for number in range(200):
        process.say(f"line {number}")
    assert told() - before <= 2
    assert engine.output.last(1) == ("line 199",)


async def test_last_words_are_told_as_the_reason(
    engine: EngineSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "startup", _loading)
    engine.start()
    await wait_for(lambda: ScriptedProcess.made and engine.report.pid, "a process")
    process = ScriptedProcess.made[0]
    process.say("gguf_init_from_file: failed to open GGUF file '/w/x.gguf' (Permission denied)")
    process.say("srv  llama_server: exiting due to model loading error")
    process.exit(1)
    assert engine.report.state is ChildState.FAILED
    assert engine.report.reason == "/w/x.gguf: Permission denied"
    assert len(engine.report.evidence) == 2


@pytest.mark.parametrize("request_came", [True, False])
async def test_a_canary_behind_a_request_is_no_verdict(
    stage: Stage, engine: EngineSupervisor, monkeypatch: pytest.MonkeyPatch, request_came: bool
) -> None:
    engine.start()
    await ready(engine)

    async def no_token(*_: object) -> prober.Wrong:
        if request_came:
            stage.last_request_at = stage.clock.now()
        return prober.Wrong("no token within 60 s")

    monkeypatch.setattr(prober, "generate", no_token)
    stage.last_request_at = stage.clock.now() - 1000.0
    engine._child._canary_at = 0.0
    engine._driver.post(_idle_probe(engine))
    if request_came:
        await wait_for(lambda: not engine._child._canary_runs, "an answer")
        assert engine.report.state is ChildState.READY
    else:
        await wait_for(lambda: engine.report.state is ChildState.BACKOFF, "the end")
        assert "failed its canary: no token within 60 s" in str(engine.report.reason)


async def _loading(*_: object) -> prober.NotYet:
    return prober.NotYet()


def _idle_probe(engine: EngineSupervisor) -> ProbePassed:
    return ProbePassed(engine._child.generation, ProbeKind.LIVENESS, idle_s=1000.0)


async def test_a_drain_asks_for_this_instance(
    stage: Stage, engine: EngineSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[InstanceId] = []

    async def wait_idle(instance: InstanceId) -> None:
        asked.append(instance)

    engine._wait_idle = wait_idle
    engine.start()
    await ready(engine)
    engine.stop(10.0)
    await engine.wait_stopped()
    assert asked == [stage.reports[-1].instance]


async def test_reports_tell_how_far_a_start_is(
    stage: Stage, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "startup", _loading)
    (short_dir / "m.gguf").write_bytes(bytes(1000))  # less than this process has in memory
    engine = stage.supervise(short_dir / "llama-server", short_dir / "m.gguf")
    engine.start()
    await wait_for(lambda: stage.reports[-1].progress == 0.99, "progress")
    assert stage.reports[-1].state is ChildState.STARTING


async def test_after_the_end_nothing_is_reported(stage: Stage, engine: EngineSupervisor) -> None:
    engine.start()
    await ready(engine)
    engine.stop(0.0)
    await engine.wait_stopped()
    count = len(stage.reports)
    assert stage.reports[-1].state is ChildState.STOPPED
    engine.start()
    engine.stop(0.0)
    assert len(stage.reports) == count
