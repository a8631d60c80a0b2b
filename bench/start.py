"""How long meshd takes to listen and to serve, and what it costs idle: `python -m bench.start`.

Interleaved: meshd from `exec` to its first answer and to its first chat, then llama-server alone,
with the arguments meshd had given it, to its first chat. Prints a table and writes
bench/results/start.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from subprocess import Popen

from bench import machine
from bench.chats import Where, chat_status, get_status
from bench.figures import Goal, goals_table, show, table
from bench.measure import ATTEMPT_PAUSE_S, ATTEMPTS, PEACE
from bench.processes import (
    BenchError,
    Stable,
    accepts,
    argv_of,
    children_of,
    cpu_s,
    free_port,
    machine_cpu_s,
    own_cpu_s,
    rss_bytes,
)

RESULTS = Path(__file__).with_name("results")
MODEL = "builtin"
LISTEN_POLL_S = 0.0005
READY_POLL_S = 0.005
"""Of both alike: a client that asks again while a model loads."""
LIMIT_S = 60.0
SETTLE_S = 3.0
"""From ready to the start of the idle measurement."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds from the start of a process."""

    accepting_s: float
    """Connections are taken by the kernel; nobody is refused from here on."""
    listening_s: float
    """`/livez` has answered."""
    ready_s: float
    """A chat has answered."""
    engine_alone_s: float
    foreign: float
    """Cores taken meanwhile by what does not belong to the benchmark."""


@dataclass(frozen=True, slots=True)
class Idle:
    seconds: float
    cpu_percent: float
    """Of one core."""
    rss_mb: float
    """The largest seen."""
    engine_cpu_percent: float


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="meshd-bench-"))
    try:
        with Stable(work) as stable:
            starts = Starts(stable, work, options.runtime_dir or _engine_dir())
            about = machine.describe()
            starts.warm_up()
            rounds = []
            for number in range(options.rounds):
                rounds.append(starts.round())
                _say(f"round {number + 1} of {options.rounds}: {rounds[-1]}")
            idle = starts.idle(options.idle_s)
            engine_version = starts.engine_version()
    except BenchError as error:
        print(f"bench.start: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    goals = goals_of(rounds, idle)
    print(_tables(rounds, idle, goals))
    document = {
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": about,
        "versions": machine.versions("meshd", "aiohttp", "uvloop") | {"engine": engine_version},
        "n": len(rounds),
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in goals],
        "idle": asdict(idle),
        "rounds": [asdict(r) for r in rounds],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    _say(f"written to {options.out}")
    return 0


def goals_of(rounds: Sequence[Round], idle: Idle) -> list[Goal]:
    listening = median(r.listening_s for r in rounds)
    later = median(r.ready_s - r.engine_alone_s for r in rounds)
    return [
        Goal("/livez answered after", 1e3 * listening, 300, unit=" ms"),
        Goal("ready later than llama-server alone", 1e3 * later, 500, unit=" ms"),
        Goal(f"memory, idle for {idle.seconds:.0f} s", idle.rss_mb, 70, unit=" MB"),
        Goal(f"CPU, idle for {idle.seconds:.0f} s", idle.cpu_percent, 0.5, unit=" %"),
    ]


class Starts:
    """Starts and ends meshd and its engine, again and again."""

    def __init__(self, stable: Stable, work: Path, engine_dir: Path) -> None:
        self._stable = stable
        self._work = work
        self._engine_dir = engine_dir
        self._engine_argv: tuple[str, ...] = ()

    def warm_up(self) -> None:
        """One start that is not counted: the built-in model is made, the engine looked at, files
        get into the page cache. Learns the engine's arguments."""
        meshd, *_ = self._meshd()
        self._engine_argv = argv_of(_engine_of(meshd))
        self._stable.end(meshd)

    def round(self) -> Round:
        """One that others did not disturb, or the least disturbed of some."""
        attempts: list[Round] = []
        while True:
            attempts.append(self._round())
            if attempts[-1].foreign <= PEACE or len(attempts) == ATTEMPTS:
                return min(attempts, key=lambda attempt: attempt.foreign)
            time.sleep(ATTEMPT_PAUSE_S)

    def _round(self) -> Round:
        began, ours, everything = time.monotonic(), own_cpu_s(), machine_cpu_s()
        meshd, accepting_s, listening_s, ready_s = self._meshd()
        self._stable.end(meshd)
        if meshd.returncode != 0:
            raise BenchError(f"meshd ended with {meshd.returncode}\n{self._stable.log_of('meshd')}")
        engine, alone_s = self._engine_alone()
        self._stable.end(engine)
        # All that was started is over and waited for, so it is in our own account.
        foreign_s = (machine_cpu_s() - everything) - (own_cpu_s() - ours)
        foreign = max(0.0, foreign_s) / (time.monotonic() - began)
        return Round(accepting_s, listening_s, ready_s, alone_s, round(foreign, 3))

    def idle(self, seconds: float) -> Idle:
        meshd, *_ = self._meshd()
        engine = _engine_of(meshd)
        time.sleep(SETTLE_S)
        _say(f"idle for {seconds:g} s")
        began, cpu_before, engine_before = time.monotonic(), cpu_s(meshd.pid), cpu_s(engine)
        largest = 0
        while (passed := time.monotonic() - began) < seconds:
            largest = max(largest, rss_bytes(meshd.pid))
            time.sleep(min(1.0, seconds - passed))
        passed = time.monotonic() - began
        spent, engine_spent = cpu_s(meshd.pid) - cpu_before, cpu_s(engine) - engine_before
        self._stable.end(meshd)
        return Idle(
            seconds=round(passed, 3),
            cpu_percent=100 * spent / passed,
            rss_mb=largest / 1e6,
            engine_cpu_percent=100 * engine_spent / passed,
        )

    def engine_version(self) -> str:
        return machine.first_line(str(self._engine_dir / "llama-server"), "--version")

    def _meshd(self) -> tuple[Popen[bytes], float, float, float]:
        """A running meshd with the model ready; the times of `Round`."""
        port = free_port()
        argv = [str(Path(sys.executable).with_name("meshd")), "run", "--model", MODEL]
        argv += ["--runtime-dir", str(self._engine_dir), "--listen", f"127.0.0.1:{port}"]
        argv += ["--peer-listen", "127.0.0.1:0"]
        argv += ["--data-dir", str(self._work / "data"), "--no-mdns", "--log-level", "warning"]
        began = time.monotonic()
        meshd = self._stable.start("meshd", argv, env={"XDG_CACHE_HOME": str(self._work / "cache")})
        self._until(meshd, "meshd", LISTEN_POLL_S, lambda: accepts(port))
        accepting_s = time.monotonic() - began
        self._until(meshd, "meshd", LISTEN_POLL_S, lambda: get_status(port, "/livez") == 200)
        listening_s = time.monotonic() - began
        self._until(meshd, "meshd", READY_POLL_S, lambda: _serves(port, MODEL))
        return meshd, accepting_s, listening_s, time.monotonic() - began

    def _engine_alone(self) -> tuple[Popen[bytes], float]:
        path = self._work / "alone.sock"
        path.unlink(missing_ok=True)
        argv = list(self._engine_argv)
        argv[argv.index("--host") + 1] = path.name
        began = time.monotonic()
        engine = self._stable.start("engine", argv, cwd=self._work)
        self._until(engine, "engine", READY_POLL_S, lambda: _serves(path, MODEL))
        return engine, time.monotonic() - began

    def _until(
        self, child: Popen[bytes], name: str, step_s: float, done: Callable[[], bool]
    ) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not done():
            if child.poll() is not None:
                code, log = child.returncode, self._stable.log_of(name)
                raise BenchError(f"{name} ended with {code}\n{log}")
            if time.monotonic() > deadline:
                raise BenchError(f"{name} did not answer within {LIMIT_S:g} s")
            time.sleep(step_s)


# -- steps ----------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    parser.add_argument("--rounds", type=int, help="interleaved starts (default 10)")
    parser.add_argument("--idle-s", type=float, help="length of the idle measurement (default 60)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 10 s idle")
    parser.add_argument(
        "--runtime-dir", type=Path, help="directory of llama-server (default: what meshd would run)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "start.json", help="where to write")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (3 if options.quick else 10)
    options.idle_s = options.idle_s or (10.0 if options.quick else 60.0)
    return options


def _engine_dir() -> Path:
    from meshd import config
    from meshd.errors import MeshdError
    from meshd.runtime.registry import Registry

    try:
        return Path(Registry(config.load().config.cache_dir).find(None).directory)
    except MeshdError as error:
        raise BenchError(error.message) from None


def _engine_of(meshd: Popen[bytes]) -> int:
    for pid in children_of(meshd.pid):
        if "--alias" in argv_of(pid):
            return pid
    raise BenchError("meshd serves a model but runs no engine")


def _serves(where: Where, model: str) -> bool:
    return chat_status(where, model) == 200


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tables(rounds: Sequence[Round], idle: Idle, goals: Sequence[Goal]) -> str:
    def row(name: str, of: Callable[[Round], float]) -> list[str]:
        values = sorted(1e3 * of(r) for r in rounds)
        return [name, show(median(values)), show(values[0]), show(values[-1])]

    times = table(
        ["ms from the start of the process", "median", "least", "most"],
        [
            row("meshd accepts connections", lambda r: r.accepting_s),
            row("meshd answers /livez", lambda r: r.listening_s),
            row("meshd answers a chat", lambda r: r.ready_s),
            row("llama-server alone answers a chat", lambda r: r.engine_alone_s),
            row("meshd later by", lambda r: r.ready_s - r.engine_alone_s),
        ],
    )
    rest = table(
        [f"idle for {idle.seconds:.0f} s, model loaded", "CPU % of a core", "MB"],
        [
            ["meshd", show(idle.cpu_percent, 2), show(idle.rss_mb)],
            ["its llama-server", show(idle.engine_cpu_percent, 2), "–"],
        ],
    )
    head = f"n = {len(rounds)}, interleaved."
    return "\n\n".join([head, times, rest, goals_table(goals)])


if __name__ == "__main__":
    sys.exit(main())
