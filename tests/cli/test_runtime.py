"""`meshd runtime …`, without a daemon, as a person or a script calls them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshd.cli.main import main
from meshd.runtime.registry import Registry
from tests.runtime.fake_engine import make_engine
from tests.runtime.toy_source import toy_files, toy_tree


@dataclass(frozen=True)
class Result:
    exit_code: object
    stdout: str
    stderr: str


Cli = Callable[..., Result]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cli(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Calls `meshd WORDS…` as the console script does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("MESHD_DATA_DIR", "/nonexistent/meshd")
    tools = os.environ["PATH"].split(os.pathsep)
    without = [p for p in tools if not (Path(p) / "llama-server").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(without))

    def call(*words: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leave:
            main(list(words))
        said = capsys.readouterr()
        return Result(leave.value.code, said.out, said.err)

    return call


@pytest.fixture
def built(cli: Cli, tmp_path: Path) -> str:
    """Id of a toy engine that was built through the command line."""
    tree = toy_tree(tmp_path / "tree")
    result = cli("runtime", "build", "--backend", "cpu", "--source", str(tree), "--json")
    assert result.exit_code == 0, result.stderr
    return str(json.loads(result.stdout)["id"])


def test_ls_of_nothing_says_what_to_do(cli: Cli) -> None:
    result = cli("runtime", "ls")
    assert result.exit_code == 0
    assert "meshd runtime build --backend cpu" in result.stdout
    assert json.loads(cli("runtime", "ls", "--json").stdout) == []


def test_build_tells_its_steps_in_lines_and_the_engine(cli: Cli, tmp_path: Path) -> None:
    tree = toy_tree(tmp_path / "tree")
    result = cli("runtime", "build", "--backend", "cpu", "--source", str(tree), "--jobs", "1")
    assert result.exit_code == 0, result.stderr
    said = result.stderr.splitlines()
    assert said[0] == "looking for the tools"
    assert "compiling 100%" in said
    assert len(said) == len(set(said)), "a log is no place for a bar"
    assert result.stdout.startswith("engine cpu-unknown-")


def test_ls_marks_the_one_that_runs(cli: Cli, built: str) -> None:
    assert cli("runtime", "ls").stdout.startswith(f"* {built}  0.1 (build 1, commit toy)")
    (record,) = json.loads(cli("runtime", "ls", "--json").stdout)
    assert (record["id"], record["current"], record["rpc_protocol"]) == (built, True, "7.1.2")


def test_ls_tells_architectures_and_what_is_not_finished(cli: Cli, built: str, cache: Path) -> None:
    runtimes = cache / "meshd" / "runtimes"
    path = runtimes / built / "record.json"
    record = json.loads(path.read_text())
    record["build"]["cmake_cache"]["CMAKE_CUDA_ARCHITECTURES"] = "90;121"
    path.write_text(json.dumps(record))
    work = runtimes / ".cuda-0c1e570-0a1b2c3d.build"
    work.mkdir()
    (work / "an.o").write_bytes(b"x" * 2_000_000)
    engine, begun = cli("runtime", "ls").stdout.splitlines()
    assert "commit toy)  sm_90 sm_121  /" in engine
    assert begun.startswith("- cuda-0c1e570-0a1b2c3d  not finished, 1.9 MiB; the same build")
    assert f"`rm -r {work}` gives it up" in begun


def test_ls_shows_the_one_on_path(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_engine(tmp_path / "opt")
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    result = cli("runtime", "ls")
    assert result.stdout.startswith("* adopted-")
    assert "(found on PATH)" in result.stdout
    (record,) = json.loads(cli("runtime", "ls", "--json").stdout)
    assert (record["directory"], record["current"]) == (str(directory), True)


def test_if_missing_builds_only_then(cli: Cli, built: str) -> None:
    words = ("runtime", "build", "--backend", "cpu", "--if-missing")
    result = cli(*words, "--source", "/nowhere")
    assert result.exit_code == 0
    assert (result.stdout, result.stderr) == (f"engine {built}: 0.1 (build 1, commit toy)\n", "")
    assert json.loads(cli(*words, "--json").stdout)["id"] == built


def test_if_missing_and_missing(cli: Cli) -> None:
    words = ("runtime", "build", "--backend", "cpu", "--if-missing", "--source", "/nowhere")
    result = cli(*words)
    assert result.exit_code == 1
    assert "error: --source /nowhere: no such file or directory" in result.stderr


def test_verify(cli: Cli, built: str, cache: Path) -> None:
    assert cli("runtime", "verify").stdout == f"{built}: ok\n"
    assert json.loads(cli("runtime", "verify", built, "--json").stdout) == {built: []}
    server = Path(Registry(cache).get(built).server_path)
    server.write_bytes(server.read_bytes() + b"x")
    result = cli("runtime", "verify")
    assert result.exit_code == 1
    assert "llama-server is not the file that was built" in result.stdout
    assert "CHANGED since it was built" in cli("runtime", "ls").stdout


def test_unknown_ids(cli: Cli, built: str) -> None:
    for command in ("verify", "use"):
        result = cli("runtime", command, "cpu-x")
        assert result.exit_code == 1
        assert f"no engine `cpu-x` was built here; there are: {built}" in result.stderr


def test_use(cli: Cli, built: str, cache: Path, tmp_path: Path) -> None:
    tree = toy_tree(tmp_path / "tree", toy_files(version="version: 0.2"))
    newer = cli("runtime", "build", "--backend", "cpu", "--source", str(tree), "--json")
    assert Registry(cache).find(None).id == json.loads(newer.stdout)["id"] != built
    result = cli("runtime", "use", built)
    assert result.exit_code == 0
    assert "from the next start" in result.stdout
    assert Registry(cache).find(None).id == built


@pytest.mark.parametrize(
    "words",
    [
        ("runtime", "build"),
        ("runtime", "build", "--backend", "abacus"),
        ("runtime", "build", "--backend", "cpu", "--cuda-arch", "90"),
        ("runtime", "build", "--backend", "cpu", "--jobs", "0"),
        ("runtime", "use"),
        ("runtime", "destroy"),
    ],
)
def test_usage(cli: Cli, words: tuple[str, ...]) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_no_compiler_is_said_with_its_package(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = cli("runtime", "build", "--backend", "cpu")
    assert result.exit_code == 1
    assert "apt install g++" in result.stderr
