"""What is made of amdgpu's files, on trees of sysfs as kernels lay them out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshd.runtime.devices.amd import gfx_name, read_amd
from tests.runtime.devices.fake_nvml import GIB, MIB

MACHINE = (124 * GIB, 100 * GIB)


@dataclass(frozen=True)
class Card:
    vendor: str = "0x1002"
    device: str = "0x744c"
    vram: int = 24_560 * MIB
    vram_used: int = 48 * MIB
    gtt: int = 62 * GIB
    gtt_used: int = 2 * GIB
    unique_id: str | None = "4a1b2c3d5e6f7081"
    product_name: str | None = None
    metrics: bytes | None = b"\x78\x00\x01\x03"
    """First bytes of gpu_metrics: size, layout, revision."""
    gfx: int = 110_000
    cpu_cores: int = 0


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    """Node 0 of the topology is the CPU, as always."""
    write_node(tmp_path, 0, {"cpu_cores_count": 32, "simd_count": 0, "gfx_target_version": 0})
    return tmp_path


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    directory = tmp_path / "dev"
    directory.mkdir()
    (directory / "kfd").touch()
    return directory


def write_node(sys: Path, number: int, properties: dict[str, int]) -> None:
    node = sys / "class" / "kfd" / "kfd" / "topology" / "nodes" / str(number)
    node.mkdir(parents=True)
    (node / "properties").write_text("".join(f"{k} {v}\n" for k, v in properties.items()))


def plug(sys: Path, number: int, card: Card) -> None:
    device = sys / "class" / "drm" / f"card{number}" / "device"
    minor = 128 + number
    for name in (f"card{number}", f"renderD{minor}"):
        (device / "drm" / name).mkdir(parents=True)
    (sys / "class" / "drm" / f"card{number}-DP-1").mkdir()
    files = {
        "vendor": card.vendor,
        "device": card.device,
        "mem_info_vram_total": card.vram,
        "mem_info_vram_used": card.vram_used,
        "mem_info_gtt_total": card.gtt,
        "mem_info_gtt_used": card.gtt_used,
        "unique_id": card.unique_id,
        "product_name": card.product_name,
    }
    for name, value in files.items():
        if value is not None:
            (device / name).write_text(f"{value}\n")
    if card.metrics is not None:
        (device / "gpu_metrics").write_bytes(card.metrics + bytes(100))
    write_node(
        sys,
        number + 1,
        {
            "cpu_cores_count": card.cpu_cores,
            "simd_count": 192,
            "gfx_target_version": card.gfx,
            "drm_render_minor": minor,
        },
    )


def test_a_card(sys: Path, dev: Path) -> None:
    plug(sys, 0, Card(vendor="0x8086"))
    plug(sys, 1, Card())
    driver, (gpu,) = read_amd(sys, dev, MACHINE)
    assert (driver.vendor, driver.version, driver.problem) == ("AMD", None, None)
    assert (gpu.view.name, gpu.view.backend) == ("AMD GPU gfx1100", "rocm")
    assert gpu.view.uuid == "GPU-4a1b2c3d5e6f7081"
    assert gpu.view.memory_total_bytes == 24_560 * MIB
    assert gpu.view.memory_free_bytes == 24_512 * MIB
    assert (gpu.view.unified, gpu.view.compute_capability) == (False, "gfx1100")
    assert (gpu.processes, gpu.view.problem) == (None, None)


def test_a_card_with_a_name_and_a_driver_built_on_its_own(sys: Path, dev: Path) -> None:
    plug(sys, 0, Card(product_name="AMD Instinct MI300X OAM", gfx=90_402))
    (sys / "module" / "amdgpu").mkdir(parents=True)
    (sys / "module" / "amdgpu" / "version").write_text("6.12.12\n")
    driver, (gpu,) = read_amd(sys, dev, MACHINE)
    assert (driver.version, gpu.view.driver) == ("6.12.12", "6.12.12")
    assert (gpu.view.name, gpu.view.compute_capability) == ("AMD Instinct MI300X OAM", "gfx942")


def test_cards_come_by_number(sys: Path, dev: Path) -> None:
    for number in (10, 2, 1):
        plug(sys, number, Card(unique_id=str(number)))
    _, gpus = read_amd(sys, dev, MACHINE)
    assert [gpu.view.uuid for gpu in gpus] == ["GPU-1", "GPU-2", "GPU-10"]
    assert [gpu.index for gpu in gpus] == [0, 1, 2]


STRIX_HALO = Card(
    device="0x1586",
    vram=512 * MIB,
    vram_used=100 * MIB,
    gtt=110 * GIB,
    gtt_used=4 * GIB,
    unique_id=None,
    metrics=b"\x08\x01\x03\x00",
    gfx=110_501,
)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ((124 * GIB, 100 * GIB), (110 * GIB, 100 * GIB)),  # the kernel has less to give
        ((124 * GIB, 120 * GIB), (110 * GIB, 106 * GIB)),  # the pool has less left
        ((16 * GIB, 12 * GIB), (16 * GIB, 12 * GIB)),  # a cgroup allows less
    ],
)
def test_an_apu_uses_the_machines_memory(
    sys: Path, dev: Path, machine: tuple[int, int], expected: tuple[int, int]
) -> None:
    plug(sys, 0, STRIX_HALO)
    _, (gpu,) = read_amd(sys, dev, machine)
    assert (gpu.view.name, gpu.view.uuid) == ("AMD GPU gfx1151", None)
    assert gpu.view.unified
    assert (gpu.view.memory_total_bytes, gpu.view.memory_free_bytes) == expected


def test_an_apu_whose_firmware_set_memory_apart(sys: Path, dev: Path) -> None:
    card = Card(vram=96 * GIB, vram_used=GIB, gtt=16 * GIB, metrics=STRIX_HALO.metrics)
    plug(sys, 0, card)
    _, (gpu,) = read_amd(sys, dev, (31 * GIB, 20 * GIB))
    assert not gpu.view.unified
    assert (gpu.view.memory_total_bytes, gpu.view.memory_free_bytes) == (96 * GIB, 95 * GIB)


@pytest.mark.parametrize(("cores", "unified"), [(16, True), (0, False)])
def test_without_metrics_the_topology_tells_an_apu(
    sys: Path, dev: Path, cores: int, unified: bool
) -> None:
    plug(sys, 0, Card(metrics=None, cpu_cores=cores))
    _, (gpu,) = read_amd(sys, dev, MACHINE)
    assert gpu.view.unified is unified


def test_no_kfd(sys: Path, dev: Path) -> None:
    plug(sys, 0, Card())
    (dev / "kfd").unlink()
    driver, (gpu,) = read_amd(sys, dev, MACHINE)
    assert driver.problem is not None
    assert "is not there: ROCm engines will find no GPU" in driver.problem
    assert gpu.view.problem is None


def test_a_kfd_of_others(sys: Path, dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug(sys, 0, Card())
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may open everything
    driver, _ = read_amd(sys, dev, MACHINE)
    assert driver.problem is not None
    assert "usermod -aG render" in driver.problem


def test_a_card_without_kfd_and_memory(sys: Path, dev: Path) -> None:
    device = sys / "class" / "drm" / "card0" / "device"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1002\n")
    (device / "device").write_text("0x744c\n")
    _, (gpu,) = read_amd(sys, dev, MACHINE)
    assert gpu.view.name == "AMD GPU 0x744c"
    assert gpu.view.compute_capability is None
    assert gpu.view.problem is not None


def test_no_driver(tmp_path: Path) -> None:
    driver, gpus = read_amd(tmp_path, tmp_path, MACHINE)
    assert gpus == ()
    assert driver.problem is not None
    assert "not loaded" in driver.problem
    (tmp_path / "module" / "amdgpu").mkdir(parents=True)
    driver, _ = read_amd(tmp_path, tmp_path, MACHINE)
    assert driver.problem == "the amdgpu driver is loaded and lists no GPU"


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (0, None),
        (90_006, "gfx906"),
        (90_010, "gfx90a"),
        (90_402, "gfx942"),
        (100_302, "gfx1032"),
        (110_501, "gfx1151"),
        (120_001, "gfx1201"),
    ],
)
def test_names_of_targets(version: int, name: str | None) -> None:
    assert gfx_name(version) == name
