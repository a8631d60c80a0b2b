"""The scripts that build engines, run as they are written; a Python of the test's own notes what it
is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.runtime.registry import Registry
from tests.runtime.fake_engine import program
from tests.runtime.fake_nvcc import make_nvcc
from tests.runtime.toy_source import toy_tree

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "scripts" / "build-linux.sh"
COMPILE_ONLY = ROOT / "scripts" / "gpu" / "compile-only.sh"

_PYTHON = """echo "python $*" >> "{log}"
case "$*" in
*"-m venv"*)
  for last; do :; done
  mkdir -p "$last/bin" && cp "$0" "$last/bin/python"
  printf '#!/bin/sh\\necho "meshd $*" >> "{log}"\\nexit 7\\n' > "$last/bin/meshd"
  chmod +x "$last/bin/meshd" ;;
esac
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def run(
    script: Path, tmp_path: Path, *words: str, limit_s: float = 30.0, **environ: str
) -> subprocess.CompletedProcess[str]:
    settings = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "XDG_CACHE_HOME": str(tmp_path / "a cache"),
        "HOME": str(tmp_path),
        "MESHD_DATA_DIR": "/nonexistent/meshd",
    }
    return subprocess.run(
        [script, *words],
        env={**settings, **environ},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


def test_the_environment_is_made_once_and_the_words_are_passed_on(
    tmp_path: Path, log: Path
) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "python3", _PYTHON.format(log=log))
    venv = tmp_path / "a cache" / "meshd" / "venv"
    words = ("--backend", "cuda", "--cuda-arch", "90;121")
    assert run(BUILD, tmp_path, *words).returncode == 7, "the exit status is the build's"
    said = log.read_text().splitlines()
    assert f"python -m venv --clear {venv}" in said
    assert said[-2].endswith(f"-m pip install --quiet --disable-pip-version-check --upgrade {ROOT}")
    assert said[-1] == "meshd runtime build --backend cuda --cuda-arch 90;121"
    log.unlink()
    run(BUILD, tmp_path, "--backend", "cpu")
    again = log.read_text().splitlines()
    assert not any("-m venv" in line for line in again)
    assert again[-1] == "meshd runtime build --backend cpu"


def test_another_place_for_the_environment(tmp_path: Path, log: Path) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "python3", _PYTHON.format(log=log))
    run(BUILD, tmp_path, "--backend", "cpu", VENV=str(tmp_path / "venv"))
    assert (tmp_path / "venv" / "bin" / "meshd").exists()
    assert not (tmp_path / "a cache").exists()


def test_no_python(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sh", "bash", "env", "dirname", "mkdir"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    done = run(BUILD, tmp_path, "--backend", "cpu", PATH=str(tmp_path / "bin"))
    assert done.returncode == 1
    assert "apt install python3 python3-venv" in done.stderr
    assert not (tmp_path / "a cache").exists()


def test_compiling_without_a_compiler_says_so(tmp_path: Path) -> None:
    done = run(COMPILE_ONLY, tmp_path, PYTHON="/nowhere/python", PATH="/usr/bin:/bin")
    assert done.returncode == 1
    assert "this needs " in done.stderr


def test_compiling_what_is_not_there(tmp_path: Path) -> None:
    make_nvcc(tmp_path / "bin")
    for name in ("cmake", "ninja"):
        program(tmp_path / "bin" / name, "exit 1\n")
    source = tmp_path / "nothing"
    python = sys.executable
    path = str(ROOT)
    done = run(COMPILE_ONLY, tmp_path, SOURCE=str(source), PYTHON=python, PYTHONPATH=path)
    assert done.returncode == 1
    assert f"--source {source}: no such file or directory" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_environment_builds_a_real_if_small_engine(tmp_path: Path) -> None:
    """With the index's packages; the source is a toy, so that the compiler has little to do."""
    tree = toy_tree(tmp_path / "tree")
    path = os.environ["PATH"]
    done = run(BUILD, tmp_path, "--backend", "cpu", "--source", str(tree), PATH=path, limit_s=540)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("engine cpu-unknown-")
    (record,) = Registry(tmp_path / "a cache").list()
    assert record.unchanged()
    assert not list(ROOT.glob("*.egg-info"))
    assert not (ROOT / "build").exists()
