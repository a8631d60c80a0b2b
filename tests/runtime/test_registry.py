"""Which engine runs: the numbered decisions of `Registry.find`, and what is noticed before it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from meshd.errors import EngineMissing, EngineRejected, NotFound
from meshd.runtime.probe import probe
from meshd.runtime.record import BuildFacts, RuntimeRecord, cpu_features
from meshd.runtime.registry import RECORD, REMEMBERED_LIMIT, Registry
from tests.runtime.fake_engine import make_engine, questions
from tests.runtime.proof.conftest import cpu_program
from tests.runtime.proof.native import place_engine

__all__ = ["cpu_program"]

FACTS = BuildFacts(
    source="toy",
    source_sha256=None,
    commit="abcdef0",
    cmake_args=(),
    cmake_cache={},
    compiler="c++",
    built_at=0.0,
)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return Registry(tmp_path / "cache")


def built(
    registry: Registry,
    runtime_id: str,
    *,
    at: float,
    cpu: str = "",
    make: Callable[[Path], Path] = make_engine,
) -> RuntimeRecord:
    """An engine as `build` leaves one."""
    directory = make(registry.directory / runtime_id)
    facts = FACTS.model_copy(update={"cpu": cpu})
    record = probe(directory, runtime_id=runtime_id, build=facts, rpc_protocol="7.0.0")
    record = record.model_copy(update={"probed_at": at})
    (directory / RECORD).write_text(record.model_dump_json())
    (directory / "asked").unlink(missing_ok=True)
    return record


def test_3_an_engine_for_another_processor_is_passed_over(registry: Registry) -> None:
    built(registry, "cpu-here", at=1.0, cpu=cpu_features())
    built(registry, "cpu-elsewhere", at=2.0, cpu="0" * 8)
    assert registry.find(None).id == "cpu-here"


def test_only_engines_for_another_processor_are_named(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(registry, "cpu-elsewhere", at=2.0, cpu="0" * 8)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineMissing, match="cpu-elsewhere: built on another processor"):
        registry.find(None)


def test_nothing_there_says_how_to_get_one(registry: Registry) -> None:
    with pytest.raises(EngineMissing, match="meshd runtime build --backend cpu"):
        registry.find(None)
    assert registry.list() == ()
    assert registry.current() is None


def test_1_the_directory_given_or_nothing(registry: Registry, tmp_path: Path) -> None:
    built(registry, "cpu-a", at=1.0)
    mine = make_engine(tmp_path / "mine")
    assert registry.find(mine).directory == str(mine)
    with pytest.raises(EngineRejected, match="has no llama-server"):
        registry.find(tmp_path / "nowhere")


def test_1_a_build_directory_holds_its_programs_in_bin(registry: Registry, tmp_path: Path) -> None:
    make_engine(tmp_path / "build" / "bin")
    assert registry.find(tmp_path / "build").directory == str(tmp_path / "build" / "bin")


def test_2_the_one_chosen_before_a_newer_one(registry: Registry) -> None:
    built(registry, "cpu-old", at=1.0)
    built(registry, "cpu-new", at=2.0)
    assert registry.use("cpu-old").id == "cpu-old"
    assert registry.current() == "cpu-old"
    assert registry.find(None).id == "cpu-old"


def test_2_the_one_chosen_is_gone(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    built(registry, "cpu-old", at=1.0)
    chosen = built(registry, "cpu-new", at=2.0)
    registry.use("cpu-new")
    Path(chosen.server_path).unlink()
    with caplog.at_level(logging.WARNING):
        assert registry.find(None).id == "cpu-old"
    assert "cpu-new" in caplog.text


def test_3_the_newest_that_is_unchanged(registry: Registry) -> None:
    built(registry, "cpu-old", at=1.0)
    newest = built(registry, "cpu-new", at=2.0)
    assert registry.find(None).id == "cpu-new"
    assert questions(Path(newest.directory)) == [], "a start must not cost a probe"
    with Path(newest.server_path).open("a") as file:
        file.write("# one byte more\n")
    assert registry.find(None).id == "cpu-old"


def test_4_on_path_after_a_probe(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_engine(tmp_path / "opt")
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    assert registry.find(None).directory == str(directory)
    assert len(questions(directory)) == 3


def test_4_a_link_on_path_leads_to_where_the_libraries_are(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_engine(tmp_path / "opt")
    links = tmp_path / "links"
    links.mkdir()
    (links / "llama-server").symlink_to(directory / "llama-server")
    monkeypatch.setenv("PATH", str(links), prepend=os.pathsep)
    assert registry.find(None).directory == str(directory)


def test_4_what_is_wrong_with_the_one_on_path(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_engine(tmp_path / "opt", help_text="nothing")
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    with pytest.raises(EngineMissing, match=r"the one on PATH is not usable: .* too old"):
        registry.find(None)


def test_an_adopted_directory_is_probed_once(registry: Registry, tmp_path: Path) -> None:
    mine = make_engine(tmp_path / "mine")
    first = registry.find(mine)
    again = Registry(tmp_path / "cache").find(mine)
    assert again == first
    assert len(questions(mine)) == 3


@pytest.mark.parametrize("change", ["touch", "replace", "add library", "add rpc", "remove library"])
def test_an_adopted_directory_that_changed_is_probed_again(
    registry: Registry, tmp_path: Path, change: str
) -> None:
    mine = make_engine(tmp_path / "mine", rpc_name=None)
    first = registry.find(mine)
    server, library = mine / "llama-server", mine / "libggml-base.so.0"
    status = library.stat()
    match change:
        case "touch":
            os.utime(server, (1, 1))
        case "replace":  # same size, same time, other bytes
            (mine / "new").write_bytes(b"a lIbrary")
            os.utime(mine / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
            (mine / "new").replace(library)
        case "add library":
            (mine / "libggml-cuda.so").write_bytes(b"x")
        case "add rpc":
            make_engine(mine / "other")
            (mine / "other" / "ggml-rpc-server").rename(mine / "ggml-rpc-server")
        case "remove library":
            library.unlink()
    second = registry.find(mine)
    assert len(questions(mine)) == 6
    assert second != first


def test_what_is_remembered_has_a_limit(registry: Registry, tmp_path: Path) -> None:
    for n in range(REMEMBERED_LIMIT + 2):
        registry.find(make_engine(tmp_path / f"e{n}"))
    lines = (registry.directory / "adopted.json").read_text().splitlines()
    kept = [json.loads(line)["directory"] for line in lines]
    assert kept == [str(tmp_path / f"e{n}") for n in range(2, REMEMBERED_LIMIT + 2)]


def test_memory_that_cannot_be_read_or_written_costs_a_probe_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mine = make_engine(tmp_path / "mine")
    assert Registry(tmp_path / "file").find(mine).directory == str(mine)
    registry = Registry(tmp_path / "cache")
    registry.directory.mkdir(parents=True)
    (registry.directory / "adopted.json").write_bytes(b"{not json")
    assert registry.find(mine).directory == str(mine)


def test_broken_and_half_published_records_are_left_out(registry: Registry) -> None:
    whole = built(registry, "cpu-a", at=1.0)
    (registry.directory / "cpu-b").mkdir()
    (registry.directory / "cpu-b" / RECORD).write_text("{")
    (registry.directory / "cpu-a.partial").mkdir()
    (registry.directory / "cpu-a.partial" / RECORD).write_text(whole.model_dump_json())
    assert [r.id for r in registry.list()] == ["cpu-a"]


def test_a_cache_that_moved_is_still_good(registry: Registry, tmp_path: Path) -> None:
    built(registry, "cpu-a", at=1.0)
    registry.directory.parent.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "meshd")
    found = Registry(tmp_path / "elsewhere").find(None)
    assert found.server_path.startswith(str(tmp_path / "elsewhere"))


def test_verify_of_a_good_engine_finds_nothing(registry: Registry, cpu_program: Path) -> None:
    built(registry, "cpu-a", at=1.0, make=partial(place_engine, cpu_program))
    assert registry.verify("cpu-a") == ()


def test_verify_looks_at_what_is_really_run(registry: Registry) -> None:
    built(registry, "cpu-a", at=1.0)  # a script
    (finding,) = registry.verify("cpu-a")
    assert "none of the files of this engine" in finding


def test_verify_asks_for_what_it_was_built_for(registry: Registry, cpu_program: Path) -> None:
    record = built(registry, "cuda-a", at=1.0, make=partial(place_engine, cpu_program))
    changed = record.model_copy(update={"backend": "cuda"})
    (Path(record.directory) / RECORD).write_text(changed.model_dump_json())
    (finding,) = registry.verify("cuda-a")
    assert "it was not built for cuda" in finding


def test_verify_names_what_is_wrong(registry: Registry) -> None:
    record = built(registry, "cpu-a", at=1.0)
    directory = Path(record.directory)
    library = directory / "libggml-base.so.0"
    status = library.stat()
    library.write_bytes(b"a lIbrary")
    os.utime(library, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert record.unchanged(), "the cheap check cannot see this"
    (directory / "ggml-rpc-server").unlink()
    (directory / "libggml-evil.so").write_bytes(b"x")
    found = registry.verify("cpu-a")
    assert len(found) == 3
    assert any("libggml-base.so.0 is not the file that was built" in f for f in found)
    assert any("ggml-rpc-server is missing" in f for f in found)
    assert any("libggml-evil.so does not belong" in f for f in found)


def test_verify_runs_what_has_the_right_hash(registry: Registry) -> None:
    directory = Path(built(registry, "cpu-a", at=1.0).directory)
    (directory / "version.txt").write_text("version: 9\n")
    (finding,) = registry.verify("cpu-a")
    assert "it says 9" in finding
    (directory / "help.txt").unlink()
    assert "--help ended with status 1" in registry.verify("cpu-a")[0]


def test_use_refuses_what_cannot_run(registry: Registry) -> None:
    record = built(registry, "cpu-a", at=1.0)
    with pytest.raises(NotFound, match="no engine `cpu-x` was built here; there are: cpu-a"):
        registry.use("cpu-x")
    Path(record.server_path).unlink()
    with pytest.raises(EngineRejected, match="llama-server is missing; build it again"):
        registry.use("cpu-a")
    assert registry.current() is None
