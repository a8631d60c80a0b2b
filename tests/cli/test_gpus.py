"""`meshd gpus`, as a person or a script calls it: a driver by script, an engine by script."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pynvml
import pytest

from meshd.cli.main import main
from meshd.runtime.devices import Reading, take_reading
from tests.runtime.devices import listings
from tests.runtime.devices.fake_nvml import GIB, FakeNvml, Part
from tests.runtime.fake_engine import make_engine

NO_DRIVER = FakeNvml(init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@dataclass(frozen=True)
class Result:
    exit_code: object
    stdout: str
    stderr: str


Gpus = Callable[..., Result]


@pytest.fixture
def gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Gpus:
    """`meshd gpus WORDS…` on a machine with that driver, and an engine that lists `listing`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MESHD_DATA_DIR", "/nonexistent/meshd")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tools = os.environ["PATH"].split(os.pathsep)
    without = [p for p in tools if not (Path(p) / "llama-server").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(without))

    def call(nvml: FakeNvml, *words: str, listing: str | None, cuda: bool = False) -> Result:
        def reading() -> Reading:
            return take_reading(nvml, sys=tmp_path / "sys", dev=tmp_path)

        monkeypatch.setattr("meshd.runtime.devices.take_reading", reading)
        if listing is not None:
            engine = tmp_path / "engine"
            if not engine.exists():
                make_engine(engine, devices=listing)
            if cuda:
                (engine / "libggml-cuda.so").write_bytes(b"a library")
            words = (*words, "--runtime-dir", str(engine))
        capsys.readouterr()
        with pytest.raises(SystemExit) as leave:
            main(["gpus", *words])
        said = capsys.readouterr()
        return Result(leave.value.code, said.out, said.err)

    return call


H200S = FakeNvml(Part(uuid="GPU-aaaa", computing=[(999_999_999, 5 * GIB)]), Part(uuid="GPU-bbbb"))


def test_a_table_of_what_all_agree_on(gpus: Gpus) -> None:
    result = gpus(H200S, listing=listings.CUDA_TWO)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        *("DEVICE", "BACKEND", "ENGINE", "FREE", "MEMORY", "COMPUTE", "DRIVER", "UUID")
    ]
    assert lines[1].split() == [
        *("NVIDIA", "H200", "cuda", "CUDA0", "139.8", "GiB", "140.4", "GiB", "9.0", "580.95.05"),
        "GPU-aaaa",
    ]
    assert "(the machine's)" in lines[3]
    assert "✗" not in result.stdout
    assert "NVIDIA H200 (CUDA0): pid 999999999 (not seen from here) uses 5.0 GiB" in result.stdout
    assert "built for cuda, lists CUDA0, CUDA1" in result.stdout


def test_json_has_everything(gpus: Gpus) -> None:
    result = gpus(H200S, "--json", listing=listings.CUDA_TWO)
    first, second, cpu = json.loads(result.stdout)
    assert (
        set(first)
        == set(cpu)
        == {
            *("name", "backend", "uuid", "memory_total_bytes", "memory_free_bytes", "unified"),
            *("compute_capability", "engine_name", "driver", "problem", "memory_bytes_per_s"),
            *("index", "parent", "processes"),
        }
    )
    assert (first["engine_name"], first["driver"], first["index"]) == ("CUDA0", "580.95.05", 0)
    assert first["processes"] == [{"pid": 999_999_999, "used_bytes": 5 * GIB, "name": None}]
    assert (second["processes"], cpu["processes"]) == ([], None)
    assert "lists CUDA0, CUDA1" in result.stderr


def test_the_engine_does_not_list_what_the_driver_does(gpus: Gpus) -> None:
    result = gpus(H200S, listing=listings.CPU)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].startswith("NVIDIA H200 ✗")
    assert (
        "✗ NVIDIA H200 (#1): the driver lists it, the engine does not: it was built for cpu"
        in result.stdout
    )
    assert "built for cpu, lists no GPU" in result.stdout


def test_an_adopted_engine_is_told_by_its_libraries(gpus: Gpus) -> None:
    result = gpus(H200S, listing=listings.CUDA_FAILED, cuda=True)
    assert "no CUDA-capable device is detected" in result.stdout
    assert "built for cuda, lists no GPU" in result.stdout


def test_no_driver_is_said_with_its_reason(gpus: Gpus) -> None:
    result = gpus(NO_DRIVER, listing=listings.CPU)
    assert result.exit_code == 0
    assert "NVIDIA: no NVIDIA driver is installed" in result.stdout
    assert "AMD: the amdgpu driver is not loaded" in result.stdout
    told = gpus(NO_DRIVER, "--json", listing=listings.CPU)
    assert [device["backend"] for device in json.loads(told.stdout)] == ["cpu"]
    assert "no NVIDIA driver is installed" in told.stderr


def test_without_an_engine_the_drivers_are_heard(gpus: Gpus) -> None:
    result = gpus(H200S, listing=None)
    assert result.exit_code == 0
    assert "✗" not in result.stdout
    assert "there is no llama.cpp engine for this machine" in result.stdout


def test_names_are_no_markup(gpus: Gpus) -> None:
    result = gpus(FakeNvml(Part(name="NVIDIA [red]X[/]")), listing=None)
    assert "NVIDIA [red]X[/]" in result.stdout


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["gpus", "--json"])
    assert leave.value.code == 0
    assert json.loads(capsys.readouterr().out)[-1]["backend"] == "cpu"
