"""One real llama-server under its supervisor: ready, killed, hung, starved, gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from meshd.runtime import prober
from meshd.runtime.child_events import ChildState
from meshd.runtime.supervisor import EngineReport, EngineSupervisor
from tests.conftest import wait_until
from tests.models import small_model, split_model
from tests.runtime.conftest import Stage, wait_for

pytestmark = pytest.mark.engine


@pytest.fixture
def binary(engine_dir: Path) -> Path:
    return engine_dir / "llama-server"


@pytest.fixture
def weights(short_dir: Path) -> Path:
    return small_model(short_dir / "m.gguf")


async def wait_state(engine: EngineSupervisor, *states: ChildState) -> EngineReport:
    await wait_for(lambda: engine.report.state in states, f"{states}; {engine.report}")
    return engine.report


async def stop(engine: EngineSupervisor, drain_s: float = 0.0) -> None:
    engine.stop(drain_s)
    async with asyncio.timeout(15.0):
        await engine.wait_stopped()


async def test_from_nothing_to_ready_to_nothing(stage: Stage, binary: Path, weights: Path) -> None:
    engine = stage.supervise(binary, weights)
    assert engine.report.state is ChildState.STOPPED
    began = time.monotonic()
    engine.start()
    report = await wait_state(engine, ChildState.READY)
    assert time.monotonic() - began < 5.0
    assert (report.slots, report.context_length, report.attempt) == (2, 512, 1)
    assert report.reason is None
    assert report.instance is not None
    assert report.socket_path is not None
    assert stage.files() == {Path(report.socket_path).name, f"{Path(report.socket_path).stem}.pid"}
    assert await prober.liveness(report.socket_path) is None
    assert any("model loaded" in line for line in engine.output.last(500))

    assert report.pid is not None
    process = psutil.Process(report.pid)
    assert process.ppid() == os.getpid()
    assert os.getpgid(report.pid) == report.pid
    assert process.cwd() == str(stage.run_dir.resolve())
    assert not [c for c in process.net_connections() if c.family.name.startswith("AF_INET")]

    await stop(engine)
    assert stage.states() == [
        ChildState.STARTING, ChildState.READY, ChildState.STOPPING, ChildState.STOPPED
    ]  # fmt: skip
    assert stage.files() == set()
    assert not psutil.pid_exists(report.pid)
    log = (stage.directory / "logs" / "m.log").read_text()
    assert "model loaded" in log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
async def test_a_killed_engine_comes_back_as_another_instance(
    stage: Stage, binary: Path, weights: Path, number: signal.Signals
) -> None:
    engine = stage.supervise(binary, weights)
    engine.start()
    first = await wait_state(engine, ChildState.READY)
    assert first.pid is not None
    os.kill(first.pid, number)
    backoff = await wait_state(engine, ChildState.BACKOFF)
    assert backoff.reason == f"the engine was ended by signal {number}; starting again in 0.5 s"
    assert backoff.retry_at is not None
    assert stage.files() == set()  # nor a core file
    second = await wait_state(engine, ChildState.READY)
    assert second.attempt == 2
    assert second.instance != first.instance
    assert second.socket_path != first.socket_path
    assert second.pid != first.pid
    assert len(psutil.Process().children()) == 1


async def test_a_start_ends_the_wait_for_the_next_try(
    stage: Stage, binary: Path, weights: Path
) -> None:
    engine = stage.supervise(binary, weights)
    engine.start()
    for _ in range(3):  # the next waits are 0.5, 1 and 2 s
        report = await wait_state(engine, ChildState.READY)
        assert report.pid is not None
        os.kill(report.pid, signal.SIGKILL)
        await wait_state(engine, ChildState.BACKOFF)
        engine.start()
    assert engine.report.state is ChildState.STARTING
    await wait_state(engine, ChildState.READY)


async def test_a_missing_shard_fails_at_once_and_is_named(
    stage: Stage, binary: Path, weights: Path, engine_dir: Path
) -> None:
    shards = split_model(weights, engine_dir)
    shards[2].unlink()
    engine = stage.supervise(binary, shards[0])
    began = time.monotonic()
    engine.start()
    report = await wait_state(engine, ChildState.FAILED)
    assert time.monotonic() - began < 2.0
    assert report.reason == f"{shards[2]}: No such file or directory"
    assert report.attempt == 1
    assert any(shards[2].name in line for line in report.evidence)
    assert stage.files() == set()


@dataclass(frozen=True)
class Damage:
    words: str
    content: bytes | None = None
    """In place of the weights."""
    kept: float = 1.0
    """Share of the weights that is left."""
    extra: tuple[str, ...] = ()

    def do(self, weights: Path) -> None:
        content = weights.read_bytes() if self.content is None else self.content
        weights.write_bytes(content[: int(len(content) * self.kept)])


DAMAGES = {
    "not GGUF": Damage("the file is not GGUF: '<htm'", b"<html>" + b" " * 4096),
    "empty": Damage("cannot", b""),
    "old": Damage("GGUFv1 is no longer supported", b"GGUF\x01\0\0\0" + b"\0" * 4096),
    "half": Damage("not within the file bounds", kept=0.5),
    "head": Damage("failed to read key-value pairs", kept=0.001),
    "argument": Damage("command line: --no-such-flag", extra=("--no-such-flag",)),
    "value": Damage("Unsupported cache type: q9", extra=("--cache-type-k", "q9")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_what_will_never_work_is_not_tried_again(
    stage: Stage, binary: Path, weights: Path, damage: Damage
) -> None:
    damage.do(weights)
    engine = stage.supervise(binary, weights, extra_args=damage.extra)
    engine.start()
    report = await wait_state(engine, ChildState.FAILED)
    assert report.reason is not None
    assert damage.words in report.reason
    assert report.attempt == 1
    assert report.evidence


async def test_a_binary_that_is_not_there(stage: Stage, short_dir: Path, weights: Path) -> None:
    engine = stage.supervise(short_dir / "llama-server", weights)
    engine.start()
    report = await wait_state(engine, ChildState.FAILED)
    missing = short_dir / "llama-server"
    assert report.reason == f"{missing} cannot be executed: No such file or directory"


@pytest.mark.slow
async def test_an_engine_without_memory_is_tried_smaller(
    stage: Stage, short_dir: Path, binary: Path, weights: Path
) -> None:
    script = short_dir / "tight"
    script.write_text(f'#!/bin/sh\nulimit -v 2000000\nexec "{binary}" "$@" -fit off -c 40000000\n')
    script.chmod(0o755)
    engine = stage.supervise(script, weights)
    engine.start()
    report = await wait_state(engine, ChildState.FAILED)
    assert report.degraded == "1 instead of 2 requests at a time"
    assert report.reason is not None
    assert "out of memory" in report.reason
    assert "nothing smaller is left to try" in report.reason
    assert report.attempt == 2


async def test_crashes_use_up_the_budget(stage: Stage, short_dir: Path, weights: Path) -> None:
    script = short_dir / "crashes"
    script.write_text("#!/bin/sh\necho last words\nkill -SEGV $$\n")
    script.chmod(0o755)
    engine = stage.supervise(script, weights, parallel=1, restart_budget=1)
    engine.start()
    report = await wait_state(engine, ChildState.FAILED)
    assert report.attempt == 2
    assert report.reason == (
        "the engine was ended by signal 11 (2 times within 600 s); nothing smaller is left to try"
    )
    assert report.evidence == ("last words", "last words")


@pytest.mark.slow
async def test_a_stopped_process_is_noticed_and_replaced(
    stage: Stage, binary: Path, weights: Path
) -> None:
    engine = stage.supervise(binary, weights, probe_interval_s=0.1, hang_after_s=2.0)
    engine.start()
    first = await wait_state(engine, ChildState.READY)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    await wait_state(engine, ChildState.BACKOFF)
    assert "answered nothing for" in str(engine.report.reason)
    assert not psutil.pid_exists(first.pid)
    second = await wait_state(engine, ChildState.READY)
    assert second.attempt == 2


async def test_a_start_that_hangs_is_ended(stage: Stage, short_dir: Path, weights: Path) -> None:
    script = short_dir / "hangs"
    script.write_text("#!/bin/sh\necho one line\nexec sleep 60\n")
    script.chmod(0o755)
    engine = stage.supervise(script, weights, start_silence_s=1.0)
    engine.start()
    report = await wait_state(engine, ChildState.BACKOFF)
    assert "made no progress in starting for 1 s" in str(report.reason)


@pytest.mark.slow
async def test_a_start_that_works_in_silence_is_waited_for(
    stage: Stage, short_dir: Path, binary: Path, weights: Path
) -> None:
    script = short_dir / "slow"
    script.write_text(
        f"#!{sys.executable} -IS\n"
        "import os, sys, time\n"
        "while time.process_time() < 3.0: pass\n"
        f"os.execv({str(binary)!r}, [{str(binary)!r}, *sys.argv[1:]])\n"
    )
    script.chmod(0o755)
    engine = stage.supervise(script, weights, start_silence_s=2.5)
    engine.start()
    report = await wait_state(engine, ChildState.READY, ChildState.BACKOFF)
    assert (report.state, report.attempt) == (ChildState.READY, 1)


async def test_an_idle_engine_is_asked_for_a_token(
    stage: Stage, binary: Path, weights: Path
) -> None:
    engine = stage.supervise(binary, weights, probe_interval_s=0.1, canary_interval_s=0.3)
    engine.start()
    await wait_state(engine, ChildState.READY)
    before = _completions(engine)
    await wait_for(lambda: _completions(engine) >= before + 2, "two canaries")
    assert engine.report.state is ChildState.READY


def _completions(engine: EngineSupervisor) -> int:
    return sum("stop processing" in line for line in engine.output.last(500))


async def test_a_stranger_on_the_socket_is_not_trusted(
    stage: Stage, short_dir: Path, binary: Path, weights: Path
) -> None:
    script = short_dir / "stranger"
    script.write_text(
        f"#!{sys.executable} -IS\n"
        "import os, sys\n"
        "argv = ['m,m~0' if '~' in a else a for a in sys.argv[1:]]\n"
        f"os.execv({str(binary)!r}, [{str(binary)!r}, *argv])\n"
    )
    script.chmod(0o755)
    engine = stage.supervise(script, weights)
    engine.start()
    report = await wait_state(engine, ChildState.BACKOFF, ChildState.READY)
    assert report.state is ChildState.BACKOFF
    assert "another process answers on the engine's socket" in str(report.reason)


async def test_an_embedding_engine_becomes_ready(stage: Stage, binary: Path, weights: Path) -> None:
    engine = stage.supervise(binary, weights, extra_args=("--embeddings",), probe_interval_s=0.1)
    engine.start()
    report = await wait_state(engine, ChildState.READY, ChildState.BACKOFF)
    assert report.state is ChildState.READY


async def test_a_stop_waits_for_the_requests_in_flight(
    stage: Stage, binary: Path, weights: Path
) -> None:
    engine = stage.supervise(binary, weights)
    engine.start()
    await wait_state(engine, ChildState.READY)
    stage.idle.clear()
    engine.stop(30.0)
    assert engine.report.state is ChildState.DRAINING
    assert engine.report.socket_path is not None
    assert await prober.liveness(engine.report.socket_path) is None  # it goes on serving
    stage.idle.set()
    await engine.wait_stopped()
    assert ChildState.DRAINING in stage.states()


async def test_a_second_stop_hurries(stage: Stage, binary: Path, weights: Path) -> None:
    engine = stage.supervise(binary, weights)
    engine.start()
    await wait_state(engine, ChildState.READY)
    stage.idle.clear()
    engine.stop(30.0)
    began = time.monotonic()
    await stop(engine, 0.0)
    assert time.monotonic() - began < 5.0


async def test_a_process_that_ignores_term_is_killed(
    stage: Stage, short_dir: Path, weights: Path
) -> None:
    script = short_dir / "deaf"
    script.write_text("#!/bin/sh\ntrap '' TERM\necho deaf\nwhile :; do sleep 1; done\n")
    script.chmod(0o755)
    engine = stage.supervise(script, weights, stop_grace_s=0.3)
    engine.start()
    await wait_for(lambda: engine.output.last(1) == ("deaf",), "the trap")
    pid = engine.report.pid
    assert pid is not None
    began = time.monotonic()
    await stop(engine)
    assert 0.3 <= time.monotonic() - began < 3.0
    assert not psutil.pid_exists(pid)
    assert stage.files() == set()


async def test_a_stop_before_there_is_a_process(stage: Stage, binary: Path, weights: Path) -> None:
    engine = stage.supervise(binary, weights)
    engine.start()
    await stop(engine)
    assert ChildState.READY not in stage.states()
    assert psutil.Process().children() == []


async def test_a_full_disk_costs_neither_engine_nor_daemon(
    stage: Stage, binary: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, pid: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("meshd.runtime.supervisor.write_pid_file", full)
    (stage.directory / "logs").mkdir()
    (stage.directory / "logs" / "m.log").symlink_to("/dev/full")
    engine = stage.supervise(binary, weights)
    engine.start()
    report = await wait_state(engine, ChildState.READY)
    assert report.attempt == 1
    await stop(engine)
    assert psutil.Process().children() == []


async def test_a_run_directory_that_vanished(stage: Stage, binary: Path, weights: Path) -> None:
    stage.run_dir.rmdir()
    engine = stage.supervise(binary, weights, parallel=1, restart_budget=0)
    engine.start()
    report = await wait_state(engine, ChildState.FAILED)
    assert str(report.reason).startswith("no process could be started: ")
    stage.run_dir.mkdir()
    engine.start()
    await wait_state(engine, ChildState.READY)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_done_to_it_one_engine_serves_in_the_end(
    stage: Stage, binary: Path, weights: Path, seed: int
) -> None:
    """Kills and stops processes in any phase of their lives, and asks for starts meanwhile."""
    rng = random.Random(seed)
    engine = stage.supervise(
        binary, weights, restart_budget=100, probe_interval_s=0.1, hang_after_s=1.0
    )
    engine.start()
    for number in range(15):
        await wait_for(lambda: engine.report.pid is not None, "a process")
        lines, pid = rng.randrange(12), engine.report.pid
        assert pid is not None
        seen = len(stage.reports)
        await wait_for(
            lambda: (
                len(stage.reports) > seen + lines or engine.report.state is ChildState.READY  # noqa: B023
            ),
            "some progress",
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGABRT]))
        await wait_for(lambda: engine.report.pid != pid, "the end of the process")  # noqa: B023
        if number > 1 or rng.random() < 0.5:
            engine.start()  # the waits grow
    await wait_state(engine, ChildState.READY)
    assert len(psutil.Process().children()) == 1
    assert len(stage.files()) == 2


@pytest.mark.slow
async def test_twenty_lives_leave_nothing(stage: Stage, binary: Path, weights: Path) -> None:
    me = psutil.Process()

    async def live() -> None:
        engine = stage.supervise(binary, weights)
        engine.start()
        await wait_state(engine, ChildState.READY)
        await stop(engine)

    await live()
    descriptors, tasks = me.num_fds(), len(asyncio.all_tasks())
    for _ in range(20):
        await live()
        assert me.children() == []
        assert stage.files() == set()
    await wait_for(lambda: me.num_fds() <= descriptors, f"{me.num_fds()} > {descriptors} files")
    await wait_for(lambda: len(asyncio.all_tasks()) <= tasks, f"{asyncio.all_tasks()}")


SUPERVISING = """
import asyncio, json, sys
from pathlib import Path
from tests.runtime.conftest import Stage

async def main() -> None:
    stage = Stage(Path(sys.argv[1]))
    engine = stage.supervise(Path(sys.argv[2]), Path(sys.argv[3]))
    engine.start()
    while engine.report.state != "ready":
        await asyncio.sleep(0.01)
    print(json.dumps(engine.report.pid), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_no_engine_outlives_its_supervisor(
    short_dir: Path, binary: Path, weights: Path, stopped: bool
) -> None:
    home = short_dir / "home"
    home.mkdir()
    daemon = subprocess.Popen(
        [sys.executable, "-c", SUPERVISING, str(home), str(binary), str(weights)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert daemon.stdout is not None
    with daemon.stdout:
        engine = psutil.Process(json.loads(daemon.stdout.readline()))
        if stopped:
            engine.suspend()
        daemon.kill()
        daemon.wait()
    killed_at = time.monotonic()
    wait_until(
        lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE,
        timeout_s=2.0,
        what="end of the engine",
    )
    assert time.monotonic() - killed_at < 2.0
