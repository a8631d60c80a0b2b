"""Drivers and bus together: a GPU that is plugged in is never passed over in silence."""

from __future__ import annotations

from pathlib import Path

import pynvml

from meshd.runtime.devices import read_devices, take_reading
from meshd.runtime.devices.bus import BusGpu, gpus_on_bus
from tests.runtime.devices.fake_nvml import FakeNvml, Part

NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
MISMATCH = FakeNvml(init=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)


def slot(sys: Path, address: str, vendor: str, kind: str, driver: str | None = None) -> None:
    device = sys / "bus" / "pci" / "devices" / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    if driver is not None:
        target = sys / "bus" / "pci" / "drivers" / driver
        target.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(target)


def test_what_the_bus_knows(tmp_path: Path) -> None:
    slot(tmp_path, "0000:01:00.0", NVIDIA, "0x030200", "nvidia")
    slot(tmp_path, "0000:01:00.1", NVIDIA, "0x040300", "snd_hda_intel")
    slot(tmp_path, "0000:00:02.0", INTEL, "0x030000", "i915")
    slot(tmp_path, "0000:05:00.0", AMD, "0x120000")
    (tmp_path / "bus" / "pci" / "devices" / "0000:09:00.0").mkdir()
    assert gpus_on_bus(tmp_path) == (
        BusGpu("0000:01:00.0", "NVIDIA", "nvidia"),
        BusGpu("0000:05:00.0", "AMD", None),
    )


def test_no_bus(tmp_path: Path) -> None:
    assert gpus_on_bus(tmp_path) == ()


def test_a_gpu_whose_driver_does_not_answer_is_listed(tmp_path: Path) -> None:
    slot(tmp_path, "0000:01:00.0", NVIDIA, "0x030200", "nvidia")
    slot(tmp_path, "0000:05:00.0", AMD, "0x030000")
    reading = take_reading(MISMATCH, proc=tmp_path, sys=tmp_path, dev=tmp_path)
    nvidia, amd, cpu = reading.devices
    assert (nvidia.name, nvidia.backend) == ("NVIDIA GPU at 0000:01:00.0", "cuda")
    assert (nvidia.memory_total_bytes, nvidia.uuid) == (0, None)
    assert nvidia.problem is not None
    assert nvidia.problem.startswith("driver/library version mismatch")
    assert (amd.name, amd.backend) == ("AMD GPU at 0000:05:00.0", "rocm")
    assert amd.problem is not None
    assert "not loaded" in amd.problem
    assert cpu.problem is None


def test_another_driver_holds_it(tmp_path: Path) -> None:
    slot(tmp_path, "0000:01:00.0", NVIDIA, "0x030000", "nouveau")
    nvml = FakeNvml(init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    gpu, _ = read_devices(nvml, proc=tmp_path, sys=tmp_path)
    assert gpu.problem is not None
    assert gpu.problem.startswith("it is bound to `nouveau`; no NVIDIA driver is installed")


def test_a_driver_that_answers_knows_better_than_the_bus(tmp_path: Path) -> None:
    slot(tmp_path, "0000:01:00.0", NVIDIA, "0x030200", "nvidia")
    slot(tmp_path, "0000:02:00.0", NVIDIA, "0x030200", "vfio-pci")
    gpu, _ = read_devices(FakeNvml(Part()), proc=tmp_path, sys=tmp_path)
    assert (gpu.name, gpu.problem) == ("NVIDIA H200", None)


def test_a_cgroup_limits_unified_memory(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1024 kB\nMemAvailable: 512 kB\n")
    group = tmp_path / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("262144\n")
    (group / "memory.current").write_text("1024\n")
    (group / "memory.stat").write_text("anon 1024\n")
    nvml = FakeNvml(Part("NVIDIA GB10", memory=pynvml.NVML_ERROR_NOT_SUPPORTED))
    gpu, cpu = read_devices(nvml, proc=tmp_path, sys=tmp_path)
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (262_144, 261_120)
    assert cpu.memory_total_bytes == 262_144
