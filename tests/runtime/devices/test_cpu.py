"""The CPU and the memory of the machine: files as /proc and cgroups have them."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from meshd.runtime.devices import read_devices, read_memory
from tests.runtime.devices.fake_nvml import GIB, FakeNvml

NO_DRIVER = FakeNvml(init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    directory = tmp_path / "proc"
    (directory / "self").mkdir(parents=True)
    (directory / "meminfo").write_text(
        f"MemTotal: {64 * 1024 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {48 * 1024 * 1024} kB\n"
        "HugePages_Total: 0\n"
    )
    (directory / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU: 4 GHz\n")
    (directory / "self" / "cgroup").write_text("0::/system.slice/meshd.service\n")
    return directory


def group(
    root: Path, name: str, limit: str, used: int = 0, *, cache: tuple[int, int] = (0, 0)
) -> None:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(
        f"anon {used - sum(cache)}\ninactive_file {cache[0]}\nactive_file {cache[1]}\n"
    )


def test_the_cpu_is_always_a_device(proc: Path, tmp_path: Path) -> None:
    (cpu,) = read_devices(NO_DRIVER, proc=proc, sys=tmp_path)
    assert (cpu.name, cpu.backend, cpu.unified) == ("A CPU: 4 GHz", "cpu", True)
    assert (cpu.memory_total_bytes, cpu.memory_free_bytes) == (64 * GIB, 48 * GIB)
    assert cpu.uuid is None
    assert cpu.compute_capability is None


def test_this_machine() -> None:
    devices = read_devices()
    assert devices[-1].backend == "cpu"
    assert 0 < devices[-1].memory_free_bytes <= devices[-1].memory_total_bytes


def test_no_proc_is_no_error(tmp_path: Path) -> None:
    (cpu,) = read_devices(NO_DRIVER, proc=tmp_path, sys=tmp_path)
    assert cpu.name
    assert cpu.memory_total_bytes == 0


@pytest.mark.parametrize(
    ("own", "slices", "expected"),
    [
        (("max", 5), ("max", 5), (64, 48)),
        ((str(8 * GIB), 2 * GIB), ("max", 0), (8, 6)),
        (("max", 0), (str(8 * GIB), 5 * GIB), (8, 3)),
        ((str(8 * GIB), 2 * GIB), (str(16 * GIB), 15 * GIB), (8, 1)),
        ((str(1000 * GIB), 2 * GIB), ("max", 0), (64, 48)),
        ((str(8 * GIB), 9 * GIB), ("max", 0), (8, 0)),
    ],
)
def test_limits_of_every_group_above(
    proc: Path,
    tmp_path: Path,
    own: tuple[str, int],
    slices: tuple[str, int],
    expected: tuple[int, int],
) -> None:
    root = tmp_path / "cgroup"
    group(root, "system.slice/meshd.service", *own)
    group(root, "system.slice", *slices)
    total, free = read_memory(proc, root)
    assert (total / GIB, free / GIB) == expected


def test_files_in_memory_make_room(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, "system.slice/meshd.service", str(8 * GIB), 7 * GIB, cache=(2 * GIB, 4 * GIB))
    assert read_memory(proc, root) == (8 * GIB, 7 * GIB)


def test_a_container_sees_its_own_group_as_the_root(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    root = tmp_path / "cgroup"
    group(root, ".", str(4 * GIB), GIB)
    assert read_memory(proc, root) == (4 * GIB, 3 * GIB)


def test_older_cgroups_are_ignored(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("4:memory:/x\n")
    assert read_memory(proc, tmp_path) == (64 * GIB, 48 * GIB)
