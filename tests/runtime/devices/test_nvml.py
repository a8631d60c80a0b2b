"""What is made of NVML's answers, one machine a test."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from meshd.runtime.devices import GpuProcess
from meshd.runtime.devices.nvml import read_nvidia
from tests.runtime.devices.fake_nvml import GIB, MIB, FakeNvml, Part

MACHINE = (120 * GIB, 100 * GIB)


def test_a_gpu_with_memory_of_its_own(tmp_path: Path) -> None:
    nvml = FakeNvml(Part())
    driver, (gpu,) = read_nvidia(nvml, MACHINE, tmp_path)
    assert (driver.vendor, driver.version, driver.problem) == ("NVIDIA", "580.95.05", None)
    view = gpu.view
    assert (view.name, view.backend, view.driver) == ("NVIDIA H200", "cuda", "580.95.05")
    assert view.uuid == "GPU-6f0b5f3e-0d2c-4a77-9f1e-3f4bb4a1c001"
    assert (view.memory_total_bytes, view.memory_free_bytes) == (143_771 * MIB, 143_164 * MIB)
    assert (view.unified, view.compute_capability, view.problem) == (False, "9.0", None)
    assert view.memory_bytes_per_s == 4_900_000_000_000
    assert (gpu.index, gpu.parent, gpu.divided, gpu.processes) == (0, None, False, ())
    assert nvml.calls == ["init", "shutdown"]


def test_who_holds_memory_of_it(tmp_path: Path) -> None:
    (tmp_path / "4711").mkdir()
    (tmp_path / "4711" / "comm").write_text("llama-server\n")
    part = Part(computing=[(4711, 5 * GIB), (90, None)], drawing=[(4711, None), (12, 30 * MIB)])
    _, (gpu,) = read_nvidia(FakeNvml(part), MACHINE, tmp_path)
    assert gpu.processes == (
        GpuProcess(12, 30 * MIB, None),
        GpuProcess(90, None, None),
        GpuProcess(4711, 5 * GIB, "llama-server"),
    )


def test_nobody_may_be_asked_who_holds_memory_of_it(tmp_path: Path) -> None:
    refused = pynvml.NVML_ERROR_NO_PERMISSION
    _, (gpu,) = read_nvidia(FakeNvml(Part(computing=refused, drawing=refused)), MACHINE, tmp_path)
    assert gpu.processes is None
    assert gpu.view.problem is None


@pytest.mark.parametrize("memory", [pynvml.NVML_ERROR_NOT_SUPPORTED, (0, 0)])
def test_memory_the_driver_does_not_count_is_the_machines(
    tmp_path: Path, memory: tuple[int, int] | int
) -> None:
    part = Part(name="NVIDIA GB10", memory=memory, capability=(12, 1))
    _, (gpu,) = read_nvidia(FakeNvml(part), MACHINE, tmp_path)
    assert gpu.view.unified
    assert (gpu.view.memory_total_bytes, gpu.view.memory_free_bytes) == MACHINE
    assert gpu.view.compute_capability == "12.1"


@pytest.mark.parametrize(
    ("bus_bits", "memory_mhz", "bytes_per_s"),
    [
        (384, 10_501, 1_000_000_000_000),
        (64, 1_600, 26_000_000_000),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, 3201, None),
        (6144, pynvml.NVML_ERROR_NOT_SUPPORTED, None),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NO_PERMISSION, None),
    ],
)
def test_how_fast_its_memory_is_where_the_driver_tells(
    tmp_path: Path, bus_bits: int, memory_mhz: int, bytes_per_s: int | None
) -> None:
    part = Part(bus_bits=bus_bits, memory_mhz=memory_mhz)
    _, (gpu,) = read_nvidia(FakeNvml(part), MACHINE, tmp_path)
    assert (gpu.view.memory_bytes_per_s, gpu.view.problem) == (bytes_per_s, None)


def test_instances_of_mig_are_devices_and_their_gpu_is_not_usable(tmp_path: Path) -> None:
    name = "NVIDIA H100 80GB HBM3"
    part = Part(
        name=name,
        mig=True,
        instances={
            0: Part(f"{name} MIG 3g.40gb", "MIG-11111111-a", (40_448 * MIB, 40_407 * MIB)),
            4: Part(name, "MIG-22222222-b", (9_856 * MIB, 9_843 * MIB)),
        },
    )
    _, (gpu, first, second) = read_nvidia(FakeNvml(part), MACHINE, tmp_path)
    assert gpu.divided
    assert gpu.view.problem is not None
    assert "its instances" in gpu.view.problem
    assert (first.view.name, first.parent) == (f"{name} MIG 3g.40gb", part.uuid)
    assert (first.view.memory_total_bytes, first.view.problem) == (40_448 * MIB, None)
    assert (second.view.name, second.view.uuid) == (f"{name} MIG 1", "MIG-22222222-b")
    assert {first.view.compute_capability, second.view.compute_capability} == {"9.0"}
    assert {first.view.memory_bytes_per_s, second.view.memory_bytes_per_s} == {None}


def test_mig_without_an_instance(tmp_path: Path) -> None:
    _, (gpu,) = read_nvidia(FakeNvml(Part(mig=True)), MACHINE, tmp_path)
    assert gpu.divided
    assert gpu.view.problem is not None
    assert "there is no instance" in gpu.view.problem


def test_mig_that_is_off(tmp_path: Path) -> None:
    _, (gpu,) = read_nvidia(FakeNvml(Part(mig=False)), MACHINE, tmp_path)
    assert (gpu.divided, gpu.view.problem) == (False, None)


def test_a_lost_gpu_is_shown_and_does_not_hide_the_others(tmp_path: Path) -> None:
    lost = pynvml.NVML_ERROR_GPU_IS_LOST
    nvml = FakeNvml(Part(uuid="GPU-0"), Part(handle=lost), Part(uuid="GPU-2", memory=lost))
    driver, (good, nameless, named) = read_nvidia(nvml, MACHINE, tmp_path)
    assert driver.problem is None
    assert good.view.problem is None
    assert (nameless.view.name, nameless.view.uuid) == ("NVIDIA GPU 1", None)
    assert (named.view.name, named.view.uuid) == ("NVIDIA H200", "GPU-2")
    for gpu in (nameless, named):
        assert gpu.view.memory_total_bytes == 0
        assert gpu.view.problem is not None
        assert "fell off the bus" in gpu.view.problem
    assert nvml.calls == ["init", "shutdown"]


def test_a_divided_gpu_that_is_lost_while_it_is_read_is_listed_once(tmp_path: Path) -> None:
    lost = Part(uuid="MIG-1", memory=pynvml.NVML_ERROR_GPU_IS_LOST)
    nvml = FakeNvml(Part(uuid="GPU-0", mig=True, instances={0: Part(uuid="MIG-0"), 1: lost}))
    _, (gpu,) = read_nvidia(nvml, MACHINE, tmp_path)
    assert gpu.view.uuid == "GPU-0"
    assert gpu.view.problem is not None
    assert "fell off the bus" in gpu.view.problem


def test_a_gpu_with_another_error(tmp_path: Path) -> None:
    nvml = FakeNvml(Part(handle=pynvml.NVML_ERROR_IRQ_ISSUE))
    _, (gpu,) = read_nvidia(nvml, MACHINE, tmp_path)
    assert gpu.view.problem == "NVML cannot read the GPU: Interrupt Request Issue"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver is installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "sudo modprobe nvidia"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "driver/library version mismatch"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "may not use the NVIDIA driver"),
        (pynvml.NVML_ERROR_TIMEOUT, "the NVIDIA driver does not answer: Timeout"),
    ],
)
def test_why_there_is_no_driver(tmp_path: Path, error: int, words: str) -> None:
    for nvml in (FakeNvml(init=error), FakeNvml(Part(), count=error)):
        driver, gpus = read_nvidia(nvml, MACHINE, tmp_path)
        assert gpus == ()
        assert driver.problem is not None
        assert words in driver.problem
        assert not driver.blind


def test_a_mismatch_names_the_module_that_is_loaded(tmp_path: Path) -> None:
    loaded(tmp_path)
    nvml = FakeNvml(init=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    driver, _ = read_nvidia(nvml, MACHINE, tmp_path)
    assert driver.version == "570.133.20"


def test_a_container_that_was_not_given_the_driver(tmp_path: Path) -> None:
    loaded(tmp_path)
    driver, _ = read_nvidia(FakeNvml(init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), MACHINE, tmp_path)
    assert driver.problem is not None
    assert "--gpus all" in driver.problem


def test_a_jetson_whose_driver_has_no_nvml(tmp_path: Path) -> None:
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree" / "compatible").write_bytes(
        b"nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0"
    )
    driver, gpus = read_nvidia(
        FakeNvml(init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), MACHINE, tmp_path
    )
    assert driver.blind
    assert gpus == ()


def test_a_driver_without_gpus(tmp_path: Path) -> None:
    driver, gpus = read_nvidia(FakeNvml(), MACHINE, tmp_path)
    assert gpus == ()
    assert driver.problem == "the NVIDIA driver is loaded and lists no GPU"


def loaded(proc: Path) -> None:
    """As /proc/driver/nvidia/version of a loaded module."""
    (proc / "driver" / "nvidia").mkdir(parents=True)
    (proc / "driver" / "nvidia" / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Mar 30 04:02:31 UTC 2025\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
