"""Programs of a build: how far, why they failed, and that they end with whoever ran them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.errors import BuildFailed, MeshdError, NoSpace
from meshd.runtime.steps import failure_of, fraction_of, run_step
from tests.conftest import wait_until
from tests.runtime.processes import ended

SHELL = "/bin/sh"


@pytest.mark.parametrize(
    ("line", "fraction"),
    [
        ("[1/4] Building CXX object a.o", 0.25),
        ("[224/224] Linking CXX executable bin/x", 1.0),
        ("[0/1] Re-running CMake...", 0.0),
        ("[0/0] nothing", 0.0),
        ("-- Configuring done", None),
        ("  [1/4] quoted in an error", None),
        ("", None),
    ],
)
def test_fraction(line: str, fraction: float | None) -> None:
    assert fraction_of(line) == fraction


@pytest.mark.parametrize(
    ("lines", "kind", "words"),
    [
        (
            ["FAILED: a.o", "/usr/bin/c++ -c a.cpp", "a.cpp:3:1: error: no such thing", "3 | x",
             "ninja: build stopped: subcommand failed."],
            BuildFailed, "status 1: a.cpp:3:1: error: no such thing",
        ),
        (
            ["CMake Error at CMakeLists.txt:4 (find_package):", "", "  Could NOT find CUDA",
             "-- Configuring incomplete, errors occurred!"],
            BuildFailed, "find_package): Could NOT find CUDA",
        ),
        (["c++: fatal error: Killed signal terminated program cc1plus"], BuildFailed, "--jobs 1"),
        (["fatal error: writing to x.o: No space left on device"], NoSpace, "ran out of disk"),
        (
            ["CMake Error at ggml/src/ggml-cuda/CMakeLists.txt:170 (target_link_libraries):",
             '  Target "ggml-cuda" links to:', "", "    CUDA::cublas", "",
             "  but the target was not found."],
            BuildFailed, "links to:; cuBLAS is missing: `apt install libcublas-dev-13-0`",
        ),
        (
            ["CMake Error at ggml/src/ggml-hip/CMakeLists.txt:47 (find_package):",
             "  Could not find a package configuration file provided by \"hipblas\" with any of"],
            BuildFailed, "hipBLAS is missing: `apt install hipblas-dev rocblas-dev`",
        ),
        (
            ["host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later …"],
            BuildFailed, "NVCC_CCBIN=",
        ),
        (["who", "knows"], BuildFailed, "status 1: knows"),
        ([], BuildFailed, "status 1: no output"),
    ],
)  # fmt: skip
def test_the_line_that_tells(lines: list[str], kind: type[MeshdError], words: str) -> None:
    failure = failure_of("ninja", 1, lines, Path("/the.log"))
    assert "(all of it is in /the.log)" in failure.message
    assert type(failure) is kind
    assert words in failure.message


def test_output_is_heard_and_kept(tmp_path: Path) -> None:
    heard: list[str] = []
    log = tmp_path / "log"
    script = 'echo "got $X"; printf "\\377\\n" >&2'
    run_step([SHELL, "-c", script], log, heard.append, {"X": "it"})
    assert heard == ["got it\n", "\ufffd\n"]
    assert log.read_text(encoding="utf-8") == f"$ {SHELL} -c {script}\n" + "".join(heard)


def test_only_what_failed_is_told(tmp_path: Path) -> None:
    script = "echo 'old error: fine'; echo 'FAILED: b.o'; echo 'b.cpp:1: error: bad'; exit 2"
    with pytest.raises(BuildFailed, match=r"sh failed with status 2: b\.cpp.*\(all of it is in "):
        run_step([SHELL, "-c", script], tmp_path / "log", lambda line: None)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"status 127: .*cannot be executed: No such file"):
        run_step([str(tmp_path / "x")], tmp_path / "log", lambda line: None)


@pytest.mark.parametrize("deaf", [False, True])
def test_an_interruption_ends_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    monkeypatch.setattr("meshd.runtime.steps._END_LIMIT_S", 0.3)
    pids: list[int] = []

    def hear(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    script = "sleep 600 & echo $!; wait"
    if deaf:
        script = f"trap '' TERM; {script}"
    with pytest.raises(KeyboardInterrupt):
        run_step([SHELL, "-c", script], tmp_path / "log", hear)
    wait_until(lambda: ended(pids[0]), what="the end of what it started")


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_builder_ends_the_program(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    code = (
        "from pathlib import Path; from meshd.runtime.steps import run_step\n"
        f"run_step(['/bin/sh', '-c', 'echo $$; exec sleep 600'], Path({str(log)!r}), "
        f"lambda line: Path({str(tmp_path / 'pid')!r}).write_text(line))"
    )
    builder = subprocess.Popen([sys.executable, "-c", code])
    pid_file = tmp_path / "pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), what="a start")
    pid = int(pid_file.read_text())
    os.kill(builder.pid, number)
    assert builder.wait(10) == -number
    wait_until(lambda: ended(pid), what="the program's end")
